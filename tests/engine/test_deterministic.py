"""`--deterministic`: a request's logits have the same bits alone and in any company, on every dense family."""

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import make_core, request
from support.models import (
    FAMILIES,
    MOE,
    MORE_FAMILIES,
    VOCAB,
    family_config,
    mixed_recipes,
    random_model,
    save_adapter,
    save_model,
    write_blob,
)
from torch.nn import functional as F

from loramux.server.engine.attention import ATTENTION_NAME, register_attention
from loramux.server.engine.core import EngineCore
from loramux.server.engine.invariant import CPU_TWINS, Twins, make_invariant
from loramux.server.engine.loading import UnsupportedModelError, load_model, prepare_model
from loramux.server.engine.protocol import EngineRequest

MIXED = [name for name, values in MORE_FAMILIES.items() if MOE.keys() <= values.keys()]
DENSE = [name for name in (*FAMILIES, *MORE_FAMILIES) if name not in MIXED]
NEW_TOKENS = 6
Rows = dict[tuple[str, int], list[torch.Tensor]]


class Recorder:
    """Keeps every logit row that an engine computes, by request and position; a position may be computed twice."""

    def __init__(self, core: EngineCore) -> None:
        self.rows: Rows = {}
        self._compute = core.runner.compute
        core.runner.compute = self  # type: ignore[method-assign, assignment]

    def __call__(self, inputs: Any, *rest: Any) -> Any:
        logits = self._compute(inputs, *rest)
        for row, chunk in zip(logits[: len(inputs.sampling)], inputs.sampling, strict=True):
            self.rows.setdefault((chunk.seq.request_id, chunk.end), []).append(row.clone())
        return logits


def serve(core: EngineCore, *batches: Iterable[EngineRequest]) -> tuple[Rows, dict[str, list[int]]]:
    """Logit rows and tokens of the requests; a batch comes two steps after the one before."""
    recorder = Recorder(core)
    found: dict[str, list[int]] = {}
    for batch in batches:
        for one in batch:
            core.add(one)
        for _ in range(2):
            for output in core.step().outputs:
                found.setdefault(output.request_id, []).extend(output.token_ids)
    while core.has_work():
        if core.is_waiting_only():
            time.sleep(0.001)  # for adapters on the move
        for output in core.step().outputs:
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return recorder.rows, found


def differing(rows: Rows, expected: Rows) -> list[tuple[str, int]]:
    """Where rows of the requests in `expected` have other bits than there; every position must be in both."""
    names = {name for name, _ in expected}
    assert {key for key in rows if key[0] in names} == expected.keys()
    return [key for key, (alone,) in expected.items() if not all(torch.equal(row, alone) for row in rows[key])]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (37, 1, 12, 140, 5, 70)]


class Family:
    """A saved model with adapters, and one request of it served alone."""

    def __init__(
        self, name: str, directory: Path, prompts: list[list[int]], dtype: str = "float32", **shape: int
    ) -> None:
        model = random_model(family_config(name, **shape))
        self.directory = save_model(model, directory / "model")
        self.blobs = directory / "blobs"
        adapters = directory / "adapters"
        self.digests = [
            write_blob(model, save_adapter(model, recipe, adapters), self.blobs) for recipe in mixed_recipes(model)[:5]
        ]
        self.dtype = dtype
        first, second, third = self.digests[:3]
        sets: list[list[tuple[str, float]]] = [
            [(second, 0.5), (first, 1.25)], [(first, 1.0)], [], [(third, 1.0)], [(first, 0.75)], [(second, 1.0)],
        ]  # fmt: skip
        self.requests = [
            request(f"r{i}", prompt, NEW_TOKENS, adapters, ignore_eos=True)
            for i, (prompt, adapters) in enumerate(zip(prompts, sets, strict=True))
        ]

    def core(self, **settings: Any) -> EngineCore:
        """An engine; deterministic unless `settings` say otherwise."""
        return make_core(
            self.directory,
            self.blobs,
            **{"deterministic": True, "dtype": self.dtype, "max_batched_tokens": 256, **settings},
        )

    def alone(self, **settings: Any) -> Rows:
        """The rows of every request, each served by an engine of its own."""
        rows: Rows = {}
        for one in self.requests:
            with closing(self.core(**settings)) as core:
                found, tokens = serve(core, [one])
            assert len(tokens[one.request_id]) == one.sampling.max_tokens
            rows.update(found)
        return rows


COMPANY: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "gathered pages": {"decode_workspace": False},
    "chunks": {"max_batched_tokens": 19, "block_size": 16},
    "overlap": {"overlap": True, "max_batched_tokens": 64},
}


def in_company(family: Family, **settings: Any) -> Rows:
    """The rows of all requests in one engine: the first decode while the others' prompts are computed."""
    with closing(family.core(**settings)) as core:
        return serve(core, family.requests[:3], family.requests[3:])[0]


@pytest.mark.parametrize("name", DENSE)
def test_bits_do_not_depend_on_the_company(name: str, tmp_path: Path, prompts: list[list[int]]) -> None:
    family = Family(name, tmp_path, prompts)
    alone = family.alone()
    assert len(alone) == NEW_TOKENS * len(family.requests)
    for case, settings in COMPANY.items():
        assert differing(in_company(family, **settings), alone) == [], case


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path, prompts: list[list[int]]) -> None:
    family = Family("qwen2", tmp_path, prompts, dtype=dtype)
    alone = family.alone()
    for case, settings in COMPANY.items():
        assert differing(in_company(family, **settings), alone) == [], case


@pytest.mark.parametrize(("name", "threads"), [("llama", 2), ("gpt_neox", 3)])
def test_sizes_that_fill_no_vector_and_several_threads(
    name: str, threads: int, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """Odd widths, so that rows end within vectors, and enough elements for torch to share them out over threads."""
    shape = {"hidden_size": 132, "intermediate_size": 331, "num_attention_heads": 6, "num_key_value_heads": 3}
    family = Family(name, tmp_path, prompts, head_dim=22, **shape)
    before = torch.get_num_threads()
    try:
        alone = family.alone(threads=threads)
        assert differing(in_company(family, threads=threads), alone) == []
    finally:
        torch.set_num_threads(before)


def test_plain_mode_differs(tmp_path: Path, prompts: list[list[int]]) -> None:
    """The tests above can fail."""
    family = Family("llama", tmp_path, prompts)
    plain = {"deterministic": False}
    alone = family.alone(**plain)
    for case, settings in COMPANY.items():
        assert differing(in_company(family, **plain, **settings), alone) != [], case


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi", "cohere2"])
def test_logits_are_those_of_plain_mode(name: str, tmp_path: Path, prompts: list[list[int]]) -> None:
    family = Family(name, tmp_path, prompts)
    plain, rows = family.alone(deterministic=False), family.alone()
    for key, (row,) in rows.items():
        torch.testing.assert_close(row, plain[key][0], rtol=0, atol=2e-4)


def test_prefix_cache_hits_change_no_bit(tmp_path: Path, prompts: list[list[int]]) -> None:
    family = Family("mistral", tmp_path, prompts)
    alone = family.alone()
    with closing(family.core(max_batched_tokens=50)) as core:
        serve(core, [replace(one, request_id=f"before-{one.request_id}") for one in family.requests])
        rows, _ = serve(core, family.requests)
        assert core.stats().prefix_hit_tokens >= 140 // 4 * 4 - 4
    assert differing(rows, alone) == []


def test_preempted_requests_get_the_same_bits(tmp_path: Path, prompts: list[list[int]]) -> None:
    family = Family("llama", tmp_path, prompts)
    family.requests = [
        replace(one, sampling=replace(one.sampling, max_tokens=40))
        for one in family.requests
        if len(one.prompt_token_ids) < 80
    ]
    alone = family.alone()
    per_block = 4 * load_model(family.directory, dtype=family.dtype).kv_bytes_per_token
    scarce = {"kv_cache_bytes": 40 * per_block, "block_size": 4, "max_model_len": 140, "enable_prefix_caching": False}
    with closing(family.core(**scarce)) as core:
        rows, _ = serve(core, family.requests)
        assert core.stats().preemptions > 0
    assert differing(rows, alone) == []


@pytest.mark.parametrize("name", MIXED)
def test_models_that_route_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = random_model(family_config(name))
    directory = save_model(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__} .*--deterministic.*experts.*dense model"):
        make_core(directory, tmp_path, deterministic=True)


@pytest.mark.parametrize("flag", ["lora_implementation", "attention_implementation"])
def test_kernels_of_a_card_are_refused_without_one(flag: str, tmp_path: Path) -> None:
    directory = save_model(random_model(family_config("llama")), tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"--deterministic needs --{flag.replace('_', '-')} torch"):
        make_core(directory, tmp_path, deterministic=True, **{flag: "triton"})


class _Softplus(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An activation that nobody has looked at."""
        return torch.nn.functional.softplus(x)


def test_unknown_operations_are_refused_by_name() -> None:
    register_attention()
    model = random_model(family_config("llama"), attention=ATTENTION_NAME)
    model.model.layers[1].mlp.act_fn = _Softplus()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*aten\.softplus in _Softplus"):
        make_invariant(prepare_model(model, model.config, ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "operation",
    [F.silu, torch.sigmoid, F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: torch.rsqrt(x.abs() + 1)],
    ids=["silu", "sigmoid", "gelu", "gelu-tanh", "rsqrt"],
)
def test_twins_compute_what_torch_does_at_every_position_alike(operation: Any, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 1001).to(dtype)
    twins = Twins(CPU_TWINS)
    with twins:
        found = operation(x)
    torch.testing.assert_close(found, operation(x), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    with twins:
        for count in (1, 3, 32, 77):
            assert torch.equal(operation(x.repeat(count)), found.repeat(count))
            assert torch.equal(operation(x[count:].clone()), found[count:])
