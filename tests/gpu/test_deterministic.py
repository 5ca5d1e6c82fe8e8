"""On a card: dense products, means, attention and a whole model have the same bits in any batch."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loramux.kernels.attention import AttentionLimits, AttentionShape
from loramux.kernels.attention import make_backend as make_attention
from loramux.kernels.dense import product_reference, row_mean_reference
from loramux.kernels.dense.cases import LARGE_PRODUCTS, SMALL_PRODUCTS, ProductCase, error, make_product
from loramux.kernels.dense.lora import make_invariant_backend
from loramux.kernels.dense.triton_product import triton_product, triton_row_mean
from loramux.kernels.lora import ModuleWeights
from loramux.server.engine.attention import ATTENTION_NAME, register_attention
from loramux.server.engine.invariant import make_invariant
from loramux.server.engine.kernel_attention import KernelAttention
from loramux.server.engine.loading import prepare_model
from loramux.server.engine.protocol import AdapterRef, EngineRequest, SamplingParams
from loramux.server.engine.runner import Runner
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Chunk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
BLOCK = 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL_PRODUCTS, *LARGE_PRODUCTS], ids=str)
def test_products_match_the_reference_and_do_not_depend_on_the_rows(case: ProductCase, dtype: torch.dtype) -> None:
    x, weight, bias = make_product(case, dtype, "cuda")
    found = triton_product(x, weight, bias)
    expected = product_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(triton_product(x, weight, bias, partials=case.rows > 64), found)
    for row in {0, case.rows // 2, case.rows - 1}:
        assert torch.equal(triton_product(x[row : row + 1], weight, bias)[0], found[row])
    more = torch.cat([x.flip(0), x, x])
    assert torch.equal(triton_product(more, weight, bias)[case.rows : 2 * case.rows], found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 896, 2049, 8192])
def test_means_do_not_depend_on_the_rows(features: int, dtype: torch.dtype) -> None:
    x = torch.randn(1000, features, device="cuda").to(dtype)
    found = triton_row_mean(x)
    assert error(found, row_mean_reference(x.double())) <= TOLERANCE[dtype] * 4
    assert torch.equal(triton_row_mean(x[999:]), found[999:])


class Model:
    """A random model of two layers with real widths, its adapters, and one sequence computed in any way."""

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](
            vocab_size=4096, hidden_size=896, intermediate_size=2432, num_hidden_layers=2, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=1024, head_dim=64, eos_token_id=2, bos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
        register_attention()
        module = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
        self.model = prepare_model(module.to("cuda").eval().requires_grad_(False), config, (2,))
        make_invariant(self.model)
        sites = [p.site for p in self.model.projections if p.site is not None]
        self.lora = make_invariant_backend(
            sites, dtype=dtype, device=self.model.device, budget_bytes=1 << 28, max_slots=4, max_tokens=512
        )
        self.slots: dict[str, int] = {}
        for number, rank in enumerate((8, 33)):
            modules = {
                part.module: ModuleWeights(
                    torch.randn(rank, site.in_features) / 30, torch.randn(part.out_features, rank) / 30, 1.0
                )
                for site in sites
                for part in site.slices
                if not part.module.endswith("lm_head")
            }
            slot = self.lora.reserve(dict.fromkeys(modules, rank))
            self.lora.fill(slot, modules)
            torch.cuda.synchronize()
            assert self.lora.filled(slot)
            self.lora.publish(slot)
            self.slots[f"a{number}"] = slot
        shapes = [AttentionShape(a.heads, a.kv_heads, a.k_dim, a.v_dim) for a in self.model.attention]
        self.kernels = make_attention(
            shapes, dtype=dtype, device="cuda", block_size=BLOCK, limits=AttentionLimits(512, 16, 2048), tiles_only=True
        )

    def sequence(self, name: str, length: int, adapters: list[tuple[str, float]], first_block: int) -> Sequence:
        tokens = torch.randint(3, 4096, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        refs = tuple(AdapterRef(digest, weight) for digest, weight in adapters)
        seq = Sequence.from_request(EngineRequest(name, tuple(tokens), SamplingParams(max_tokens=1), refs))
        seq.slots = self.slots
        seq.blocks.extend(range(first_block, first_block + -(-length // BLOCK)))
        return seq

    def rows(self, cuts: list[int], company: list[tuple[int, int]]) -> list[Any]:
        """Logits at each cut of a sequence of 200 tokens; `company` are (tokens, tokens cached) of others."""
        path = KernelAttention(
            self.model.attention, self.kernels, num_blocks=256, dtype=self.model.dtype, device=self.model.device
        )
        runner = Runner(self.model, self.lora, path, block_size=BLOCK)
        mine = self.sequence("mine", 200, [("a1", 0.5), ("a0", 1.0)], 0)
        others = [
            self.sequence(str(i), length, [[], [("a0", 1.0)], [("a1", 2.0)]][i % 3], 16 + i * 16)
            for i, (length, _) in enumerate(company)
        ]
        found, start = [], 0
        for end in cuts:
            mine.tokens = mine.tokens[:200]
            visible = Sequence.from_request(mine.request)
            visible.slots, visible.blocks = mine.slots, mine.blocks
            visible.tokens = mine.tokens[:end]
            chunks = [Chunk(visible, start, end)]
            chunks += [Chunk(seq, cached, len(seq.tokens)) for seq, (_, cached) in zip(others, company, strict=True)]
            chunks.sort(key=lambda c: c.end - c.start > 1)
            logits, sampled = runner.forward(chunks)
            found.append(logits[[c.seq is visible for c in sampled].index(True)].clone())
            start = end
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "starcoder2", "cohere2", "gpt_neox"])
def test_logits_have_the_same_bits_in_any_batch(family: str, dtype: torch.dtype) -> None:
    model = Model(family, dtype)
    (whole,) = model.rows([200], [])
    company = [(130, 129), (1, 0), (77, 0), (100, 40)]
    for cuts in ([200], [64, 199, 200], [3, 20, 150, 200]):
        assert torch.equal(model.rows(cuts, [])[-1], whole)
        assert torch.equal(model.rows(cuts, company)[-1], whole)
