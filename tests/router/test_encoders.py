"""Encoders: rows against the formulas, identity by content, options that are honoured or refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.encoders import save_encoder
from transformers import BertModel

from loramux.router.encoders.concat import ConcatEncoder
from loramux.router.encoders.huggingface import EncoderError, HuggingFaceEncoder
from loramux.router.encoders.ngram import NgramEncoder

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w2 w3 w4", "", "w9 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def by_hand(folder: Path, words: list[int], pooling: str) -> np.ndarray:
    model = BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states = model(torch.tensor([[2, *words, 3]])).last_hidden_state[0]
    pooled = states[0] if pooling == "cls" else states.mean(0)
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_rows_are_the_pooled_states_of_each_text_alone(folder: Path, pooling: str) -> None:
    encoder = HuggingFaceEncoder(folder, pooling=pooling, batch_size=2)  # type: ignore[arg-type]
    rows = encoder.encode(TEXTS)
    assert rows.shape == (5, encoder.dim)
    assert rows.dtype == np.float32
    assert rows[0] == pytest.approx(by_hand(folder, [5, 6, 7], pooling), abs=1e-5)
    assert rows[1] == pytest.approx(by_hand(folder, [8], pooling), abs=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_long_texts_are_cut_on_the_side_asked_for(folder: Path) -> None:
    text = " ".join(f"w{i}" for i in range(10))
    right = HuggingFaceEncoder(folder, max_tokens=6).encode([text])
    left = HuggingFaceEncoder(folder, max_tokens=6, truncation="left").encode([text])
    assert right[0] == pytest.approx(by_hand(folder, [4, 5, 6, 7], "mean"), abs=1e-5)
    assert left[0] == pytest.approx(by_hand(folder, [10, 11, 12, 13], "mean"), abs=1e-5)


def test_normalise_and_prefix(folder: Path) -> None:
    plain = HuggingFaceEncoder(folder, normalise=False).encode(TEXTS[:1])
    assert np.linalg.norm(plain) != pytest.approx(1, abs=1e-2)
    assert plain[0] / np.linalg.norm(plain) == pytest.approx(HuggingFaceEncoder(folder).encode(TEXTS[:1])[0], abs=1e-6)
    prefixed = HuggingFaceEncoder(folder, prefix="w1 w2 ").encode(["w3"])
    assert prefixed[0] == pytest.approx(HuggingFaceEncoder(folder).encode(["w1 w2 w3"])[0], abs=1e-6)


def test_the_name_is_content_and_options(folder: Path, tmp_path: Path) -> None:
    name = HuggingFaceEncoder(folder).name
    shutil.copytree(folder, tmp_path / "copy")
    copied = HuggingFaceEncoder(tmp_path / "copy")
    copied.encode(TEXTS)  # the tokenizer remembers its latest call
    copied.refresh_name()
    assert copied.name == name
    others = [
        HuggingFaceEncoder(save_encoder(tmp_path / "other", seed=1)),
        HuggingFaceEncoder(folder, pooling="cls"),
        HuggingFaceEncoder(folder, max_tokens=8),
        HuggingFaceEncoder(folder, truncation="left"),
        HuggingFaceEncoder(folder, normalise=False),
        HuggingFaceEncoder(folder, prefix="w1 "),
    ]
    assert len({name, *(other.name for other in others)}) == 7


def test_a_saved_encoder_is_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    encoder = HuggingFaceEncoder(folder, pooling="mean", max_tokens=16)
    encoder.save(tmp_path / "saved")
    again = HuggingFaceEncoder(tmp_path / "saved", pooling="mean", max_tokens=16)
    assert again.name == encoder.name
    assert (again.encode(TEXTS) == encoder.encode(TEXTS)).all()


def test_sentence_transformers_files_are_followed_or_refused(tmp_path: Path) -> None:
    cls = HuggingFaceEncoder(save_encoder(tmp_path / "cls", pooling="cls_token", modules=("Normalize",)))
    assert (cls.pooling, cls.max_tokens) == ("cls", 12)
    assert HuggingFaceEncoder(save_encoder(tmp_path / "mean", pooling="mean_tokens")).pooling == "mean"
    with pytest.raises(EncoderError, match=r"pooling_mode_max_tokens.*pass pooling"):
        HuggingFaceEncoder(save_encoder(tmp_path / "max", pooling="max_tokens"))
    dense = save_encoder(tmp_path / "dense", pooling="mean_tokens", modules=("Dense",))
    with pytest.raises(EncoderError, match=r"Dense.*pass pooling"):
        HuggingFaceEncoder(dense)
    assert HuggingFaceEncoder(dense, pooling="mean").pooling == "mean"


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="max_tokens is 33; this encoder takes 3 to 32"):
        HuggingFaceEncoder(folder, max_tokens=33)
    with pytest.raises(EncoderError, match="max_tokens is 2"):
        HuggingFaceEncoder(folder, max_tokens=2)
    with pytest.raises(EncoderError, match="batch_size"):
        HuggingFaceEncoder(folder, batch_size=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match="cannot be loaded"):
        HuggingFaceEncoder(tmp_path / "empty")


def test_ngram_rows_tell_texts_apart_and_stay_the_same() -> None:
    encoder = NgramEncoder(dim=512)
    rows = encoder.encode(
        ["Translate this into French", "translate this into french!", "SELECT * FROM t", "", "变压器"]
    )
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 0, 1], abs=1e-6)
    assert rows[0] @ rows[1] > 0.8 > 0.3 > rows[0] @ rows[2]
    assert (NgramEncoder(dim=512).encode(["变压器"])[0] == rows[4]).all()
    # rows are stored by name: if this fails, the version in the name has to be raised
    assert encoder.name == "ngram-v1-1-4-512"
    assert np.flatnonzero(NgramEncoder(64, 1, 2).encode(["ab"])[0]).tolist() == [9, 10, 13, 26, 31, 50]


@pytest.mark.parametrize(("dim", "shortest", "longest"), [(1, 1, 2), (8, 0, 2), (8, 3, 2), (8, 1, 17)])
def test_ngram_sizes_are_checked(dim: int, shortest: int, longest: int) -> None:
    with pytest.raises(ValueError, match="must"):
        NgramEncoder(dim, shortest, longest)


def test_ngram_takes_any_text() -> None:
    rows = NgramEncoder(dim=32).encode(["a", "\ud800 lone surrogate", "x" * 100_000, "\0"])
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(4), abs=1e-5)


def test_concatenation_weighs_cosines() -> None:
    a, b = NgramEncoder(64, 1, 1), NgramEncoder(128, 2, 3)
    both = ConcatEncoder([a, b], [1.0, 2.0])
    x, y = ["a text of words", "another text"], ["a text with words", "nothing alike"]
    cosine = np.einsum("nd,nd->n", both.encode(x), both.encode(y))
    parts = [np.einsum("nd,nd->n", e.encode(x), e.encode(y)) for e in (a, b)]
    assert cosine == pytest.approx((parts[0] + 4 * parts[1]) / 5, abs=1e-6)
    assert both.dim == 192
    assert len({both.name, ConcatEncoder([a, b], [1.0, 1.0]).name, ConcatEncoder([b, a], [1.0, 2.0]).name}) == 3
    for parts_, weights in (([], []), ([a], [1.0, 1.0]), ([a], [0.0])):
        with pytest.raises(ValueError, match="one weight above 0"):
            ConcatEncoder(parts_, weights)
