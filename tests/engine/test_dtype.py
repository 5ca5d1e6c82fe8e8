"""Which dtype `auto` is, and that bfloat16 on a CPU stays as close to the exact numbers as PEFT's bfloat16 does."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.engines import drain, make_core, request
from support.models import VOCAB, family_config, mixed_recipes, random_model, save_adapter, save_model, write_blob
from torch import Tensor
from transformers import AutoModelForCausalLM

from loramux.kernels.lora.cases import relative_error
from loramux.kernels.lora.torch_backend import TorchLoraBackend
from loramux.kernels.processor import multiplies_bfloat16
from loramux.server.demo.assets import demo_base_path
from loramux.server.engine import loading
from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import load_model, pick_dtype
from loramux.server.engine.torch_attention import TorchLayer
from loramux.server.settings import load_settings

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


def processor(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr("loramux.kernels.lora.torch_backend.multiplies_bfloat16", lambda: bfloat16)


@pytest.mark.parametrize(
    ("setting", "own", "device", "has_products", "expected"),
    [
        ("auto", BF16, CPU, True, BF16),
        ("auto", BF16, CPU, False, F32),
        ("auto", F16, CPU, True, F32),
        ("auto", F32, CPU, True, F32),
        ("auto", None, CPU, True, F32),
        ("auto", "bfloat16", CPU, True, F32),
        ("auto", BF16, CARD, False, BF16),
        ("auto", F16, CARD, False, F16),
        ("auto", F32, CARD, False, F32),
        ("auto", None, CARD, False, BF16),
        ("float32", BF16, CPU, True, F32),
        ("bfloat16", F32, CPU, False, BF16),
        ("float16", F32, CPU, False, F16),
    ],
)
def test_which_dtype_is_picked(
    setting: str, own: Any, device: torch.device, has_products: bool, expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    processor(monkeypatch, bfloat16=has_products)
    assert pick_dtype(setting, SimpleNamespace(dtype=own), device)[0] is expected


@pytest.mark.parametrize(
    ("level", "capabilities", "expected"),
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"amx_bf16": True}, True),
        ("AVX512", {"avx512_f": True}, False),
        ("AVX2", {"avx512_bf16": True, "amx_bf16": True}, False),
        ("SVE256", {"sve_bf16": True}, False),
    ],
)
def test_what_the_processor_multiplies(
    level: str, capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: level)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False, raising=False)
    assert multiplies_bfloat16() is expected


@pytest.mark.parametrize("answer", [True, False, None])
def test_an_older_torch_tells_by_its_own_function(answer: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    if answer is None:
        monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    else:
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: answer, raising=False)
    assert multiplies_bfloat16() is bool(answer)


@pytest.mark.parametrize("has_products", [True, False])
def test_weights_cache_and_adapters_follow(
    has_products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor(monkeypatch, bfloat16=has_products)
    base = save_model(random_model(family_config("llama")).to(BF16), tmp_path / "base")
    with caplog.at_level(logging.INFO):
        core = make_core(base, tmp_path / "blobs", dtype="auto")
    expected = BF16 if has_products else F32
    (layer, *_), backend = core.runner.attention.layers, core.backend
    assert isinstance(layer, TorchLayer)
    assert isinstance(backend, TorchLoraBackend)
    assert {p.dtype for p in core.model.module.parameters()} == {expected}
    assert (layer.k.dtype, layer.v.dtype) == (expected, expected)
    assert (backend.dtype, backend.bank_dtype) == (expected, expected)
    assert core.info.dtype == str(expected).removeprefix("torch.")
    assert f"weights and cache in {core.info.dtype} on cpu" in caplog.text
    core.close()


@pytest.mark.parametrize(("own", "has_products", "banks"), [(BF16, True, BF16), (BF16, False, F32), (F16, True, F32)])
def test_banks_are_in_what_the_processor_multiplies(
    own: torch.dtype, has_products: bool, banks: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, bfloat16=has_products)
    base = save_model(random_model(family_config("llama")), tmp_path / "base")
    core = make_core(base, tmp_path / "blobs", dtype=str(own).removeprefix("torch."))
    assert isinstance(core.backend, TorchLoraBackend)
    assert (core.backend.dtype, core.backend.bank_dtype) == (own, banks)
    core.close()


def test_the_demo_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=True)
    assert loading.load_config(demo_base_path()).dtype is BF16  # or the rule below could go
    assert load_settings({}).to_engine_config("path", "blobs").dtype == "float32"
    assert load_settings({"dtype": "bfloat16"}).to_engine_config("path", "blobs").dtype == "bfloat16"
    assert load_settings({"model": "some/name"}).to_engine_config("path", "blobs").dtype == "auto"


def logits_of(core: EngineCore, prompts: dict[str, list[int]], adapters: dict[str, str | None]) -> dict[str, Tensor]:
    """The logits at each prompt's end, all prompts in the engine at once."""
    found: dict[str, Tensor] = {}
    compute = core.runner.compute

    def record(inputs: Any, *rest: Any) -> Any:
        logits = compute(inputs, *rest)
        for row, chunk in zip(logits[: len(inputs.sampling)], inputs.sampling, strict=True):
            found.setdefault(chunk.seq.request.request_id, row.double())
        return logits

    core.runner.compute = record  # type: ignore[method-assign]
    for name, prompt in prompts.items():
        digest = adapters[name]
        core.add(request(name, prompt, 3, [] if digest is None else [(digest, 1.0)], ignore_eos=True))
    drain(core)
    return found


@pytest.mark.parametrize("has_products", [True, False], ids=["bfloat16-banks", "float32-banks"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bfloat16_is_as_close_to_exact_as_peft(
    family: str, has_products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, bfloat16=has_products)
    model = random_model(family_config(family), std=0.08)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BF16))
    base = save_model(model, tmp_path / "base")
    recipes = mixed_recipes(model)[:5]
    paths = {recipe.name: save_adapter(model, recipe, tmp_path / "adapters") for recipe in recipes}
    digests = {name: write_blob(model, path, tmp_path / "blobs") for name, path in paths.items()}
    generator = torch.Generator().manual_seed(5)
    jobs: dict[str, str | None] = {"base": None, **{name: name for name in paths}, "again": recipes[0].name}
    prompts = {
        job: torch.randint(3, VOCAB, (4 + 5 * i,), generator=generator).tolist() for i, job in enumerate(jobs)
    }  # fmt: skip
    core = make_core(base, tmp_path / "blobs", dtype="bfloat16", max_batched_tokens=256)
    ours = logits_of(core, prompts, {job: digests[name] if name else None for job, name in jobs.items()})
    core.close()

    references = {dtype: AutoModelForCausalLM.from_pretrained(base, dtype=dtype) for dtype in (torch.float64, BF16)}
    ours_off = theirs_off = 0.0
    for job, name in jobs.items():
        found = {}
        for dtype, reference in references.items():
            wrapped = reference
            if name is not None:  # adapters in the model's dtype, as ours are
                wrapped = peft.PeftModel.from_pretrained(reference, paths[name], autocast_adapter_dtype=False)
                for parameter in wrapped.parameters():
                    parameter.data = parameter.data.to(dtype)
            with torch.inference_mode():
                found[dtype] = wrapped.eval()(torch.tensor([prompts[job]])).logits[0, -1].double()
            if name is not None:
                wrapped.unload()
        exact, theirs = found.values()
        assert relative_error(ours[job], exact) <= 0.03, job
        ours_off += relative_error(ours[job], exact) ** 2
        theirs_off += relative_error(theirs, exact) ** 2
    assert 0 < ours_off <= 1.5 * theirs_off


def test_an_explicit_dtype_wins_over_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=True)
    base = save_model(random_model(family_config("llama")).to(BF16), tmp_path)
    assert load_model(base, device="cpu").dtype is BF16
    assert load_model(base, device="cpu", dtype="float32").dtype is F32
