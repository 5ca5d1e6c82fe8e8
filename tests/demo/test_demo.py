"""The demo's weights on disk: layout, size, tokenizer, and accuracy through transformers and peft."""

import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from loramux.server.demo.assets import demo_adapters, demo_base_path
from loramux.server.demo.evaluate import FOREIGN, NEAR, PLAIN_THIRD, load_demo, measure
from loramux.server.demo.skills import adapter_skills, base_skills
from loramux.server.demo.tokens import Turn, encode_chat

TEXTS = ["plain", "naïve café — “quoted”", "日本語テキスト", "🙂👩‍👩‍👧", "a\nb\tc  d ", "\x00\x7f", ""]


@pytest.fixture(scope="module")
def accuracy() -> dict[tuple[str, str], float]:
    return measure(*load_demo(demo_base_path().parent), n=16, columns=("base", "wrong", "alone", "3rd", PLAIN_THIRD))


def test_everything_fits_in_16_mb() -> None:
    files = [path for path in demo_base_path().parent.rglob("*") if path.suffix not in {".py", ".pyc"}]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 16_000_000


def test_base_has_the_hugging_face_layout() -> None:
    names = {"config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in demo_base_path().iterdir()} == names
    with safe_open(demo_base_path() / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype.itemsize for name in weights.keys()} == {2}  # noqa: SIM118
    generation = json.loads((demo_base_path() / "generation_config.json").read_text())
    assert not {"do_sample", "temperature", "top_p", "top_k"} & set(generation)


def test_adapters_have_the_peft_layout_and_a_card() -> None:
    adapters = demo_adapters()
    assert [adapter.name for adapter in adapters] == sorted(skill.name for skill in adapter_skills())
    files = {"adapter_config.json", "adapter_model.safetensors", "card.json"}
    for adapter in adapters:
        assert {path.name for path in adapter.path.iterdir()} == files
        assert adapter.description
        assert len(adapter.examples) >= 24


def test_adapters_differ_in_shape() -> None:
    configs = [json.loads((adapter.path / "adapter_config.json").read_text()) for adapter in demo_adapters()]
    ranks = {config["r"] for config in configs}
    assert min(ranks) == 4
    assert max(ranks) == 32
    assert len(ranks) >= 4
    assert sum(config["use_rslora"] for config in configs) == 1
    assert sum(set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"} for config in configs) == 1
    assert sum(bool(config["rank_pattern"]) and bool(config["alpha_pattern"]) for config in configs) == 1
    assert {config["base_model_name_or_path"] for config in configs} == {"loramux-demo"}


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_is_what_training_wrote() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    turns = [Turn('Reverse the word "abc".', "cba"), Turn("Say «é»", "é")]
    chat = [{"role": "system", "content": "Answer briefly."}]
    for turn in turns:
        chat += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
    rendered = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    ids, labels = encode_chat(turns, "Answer briefly.")
    assert rendered == ids
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(learnt) == "cba<|end|>é<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|end|><|assistant|>")


def test_chat_template_refuses_unknown_roles() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("name", [skill.name for skill in base_skills()])
def test_base_knows_its_own_skills(name: str, accuracy: dict[tuple[str, str], float]) -> None:
    assert accuracy[name, "alone"] >= 0.85
    assert accuracy[name, "3rd"] >= 0.75
    assert accuracy[name, PLAIN_THIRD] >= 0.85


@pytest.mark.parametrize("kind", [NEAR, FOREIGN])
def test_base_declines_what_it_does_not_know(kind: str, accuracy: dict[tuple[str, str], float]) -> None:
    assert accuracy[kind, "alone"] >= 0.85


@pytest.mark.parametrize("name", [skill.name for skill in adapter_skills()])
def test_only_the_right_adapter_knows_a_skill(name: str, accuracy: dict[tuple[str, str], float]) -> None:
    assert accuracy[name, "alone"] >= 0.85
    assert accuracy[name, "3rd"] >= 0.75
    assert accuracy[name, PLAIN_THIRD] >= 0.85
    assert accuracy[name, "base"] <= 0.2
    assert accuracy[name, "wrong"] <= 0.25
