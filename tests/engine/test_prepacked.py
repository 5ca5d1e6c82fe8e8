"""Blocked weights on the CPU: the same products, where they are worth it and memory is there for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import VOCAB, saved_llama
from torch import Tensor
from torch.nn import functional as F

from loramux.server.engine import prepacked
from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import UnsupportedModelError
from loramux.server.engine.prepacked import PrepackedProduct

ON: dict[str, Any] = {"prepacked_weights": True}


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 17, 64, 129])
@pytest.mark.parametrize(("outs", "ins"), [(96, 48), (7, 33), (513, 255)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_plain_weights(rows: int, outs: int, ins: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(n, ins, generator=generator) for n in (outs, rows))
    bias = torch.randn(outs, generator=generator) if with_bias else None
    product = PrepackedProduct(weight)
    with torch.inference_mode():
        for given in (x, x.unsqueeze(0), x.t().contiguous().t()):
            got = product(given, weight, bias)
            assert got.shape == (*given.shape[:-1], outs)
            assert got.is_contiguous()
            torch.testing.assert_close(got.double(), exact(given, weight, bias), atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    return saved_llama(tmp_path_factory.mktemp("prepacked"), 2)


def blocked(core: EngineCore) -> int:
    return sum(isinstance(p.product, PrepackedProduct) for p in core.model.projections)


def answers(core: EngineCore, digests: list[str]) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    for i in range(9):
        prompt = torch.randint(3, VOCAB, (5 + 3 * i,), generator=generator).tolist()
        adapters = [(digests[i % 3 - 1], 1.0)] if i % 3 else []
        core.add(request(str(i), prompt, 12, adapters, ignore_eos=True))
    return {key: tokens_of(outputs) for key, outputs in drain(core).items()}


def test_the_output_is_unchanged(places: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    base, blobs, digests = places
    monkeypatch.setattr(prepacked, "MIN_WEIGHTS", 1)
    found = []
    for wanted in (False, True):
        core = make_core(base, blobs, prepacked_weights=wanted)
        assert blocked(core) == (len(core.model.projections) if wanted else 0)
        found.append(answers(core, digests))
        core.close()
    assert found[0] == found[1]


def test_it_is_left_alone_where_it_does_not_pay(
    places: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, blobs, _ = places

    def count(**settings: Any) -> int:
        core = make_core(base, blobs, **settings)
        core.close()
        return blocked(core)

    assert count(**ON) == 0  # every matrix of this model is small
    monkeypatch.setattr(prepacked, "MIN_WEIGHTS", 1)
    assert count() > 0
    assert count(deterministic=True) == 0
    assert count(dtype="bfloat16") == 0
    monkeypatch.setattr(prepacked, "host_bytes_left", lambda: 1 << 10)
    assert count() == 0
    assert count(**ON) > 0
    monkeypatch.setattr(prepacked, "_has_kernels", lambda: False)
    assert count() == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"dtype": "bfloat16"}, "--dtype float32"), ({"deterministic": True}, "--deterministic"),
     ({"compile_layers": True}, "--compile-layers")],
)  # fmt: skip
def test_where_it_cannot_be_it_is_refused(
    places: tuple[Path, Path, list[str]], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        make_core(places[0], places[1], **ON, **settings)
