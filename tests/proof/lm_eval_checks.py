"""lm-eval's `local-completions` against a live server: the log-likelihoods of a task are transformers' and PEFT's own.

`make test-lm-eval`. The task's file and its rows are made here; nothing is asked of a hub.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from support.live import live_server
from support.models import byte_tokenizer, family_config, mixed_recipes, random_model, save_adapter, save_model

TOLERANCE = 1e-3
ROWS = [
    {"question": "The capital of France is", "choices": [" Paris", " Rome", " a city on the Seine"], "answer": 0},
    {"question": "Two and two make", "choices": [" four", " five"], "answer": 0},
    {"question": "Voilà — “quoted” text, and a 😀:", "choices": [" yes", " non, merci", " 否"], "answer": 1},
]
TASK = """\
task: loramux_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


class World:
    """A server, its model here, and the folder of the task."""

    def __init__(self, url: str, root: Path, model: Any, adapters: dict[str, Path]) -> None:
        self.url, self.root, self.model, self.adapters = url, root, model, adapters
        self.tokenizer = byte_tokenizer()

    def log_likelihood(self, name: str, context: str, continuation: str) -> float:
        """sum_i log p(token_i | what is before it) over the continuation's tokens."""
        model = self.model if name == "base" else peft.PeftModel.from_pretrained(self.model, self.adapters[name])
        whole, before = self.tokenizer(context + continuation)["input_ids"], self.tokenizer(context)["input_ids"]
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
        if name != "base":
            model.unload()
        return sum(float(scores[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("lm-eval")
    model = random_model(family_config("llama", vocab_size=262))
    save_model(model, root / "base", tokenizer=True)
    adapters = {r.name: save_adapter(model, r, root / "adapters") for r in mixed_recipes(model)[:2]}
    with live_server(root, "--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8") as server:
        for name, path in adapters.items():
            assert server.upload(name, path).status_code == 201
        yield World(server.url, root, model, adapters)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("tokenized", [True, False])
def test_log_likelihoods(world: World, monkeypatch: pytest.MonkeyPatch, number: int, tokenized: bool) -> None:
    assert HF_HUB_OFFLINE, "run it with HF_HUB_OFFLINE=1, as the make target does"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(world.root / "datasets"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = ["base", *world.adapters][number]
    rows = world.root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (world.root / "task.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    results = simple_evaluate(
        model="local-completions",
        model_args={
            "model": name, "base_url": f"{world.url}/v1/completions", "tokenizer": str(world.root / "base"),
            "tokenizer_backend": "huggingface", "tokenized_requests": tokenized, "num_concurrent": 4, "max_retries": 1,
            "max_length": 256,
        },
        tasks=["loramux_choices"],
        task_manager=TaskManager(include_path=str(world.root), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        cache_requests=False,
    )  # fmt: skip
    samples = results["samples"]["loramux_choices"]
    assert len(samples) == len(ROWS)
    for sample in samples:
        row = ROWS[sample["doc_id"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        expected = [world.log_likelihood(name, str(row["question"]), choice) for choice in row["choices"]]
        assert found == pytest.approx(expected, abs=TOLERANCE), row
        best = max(range(len(expected)), key=expected.__getitem__)
        assert sample["acc"] == (best == row["answer"])
