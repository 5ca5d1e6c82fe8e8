"""How much of a card's memory the KV cache may take: what is left when everything else is there, in measured bytes."""

import torch

from loramux.server.engine.loading import UnsupportedModelError
from loramux.server.engine.protocol import EngineRequest, SamplingParams
from loramux.server.engine.runner import Runner
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Chunk


def largest_prefill(max_batched_tokens: int, max_model_len: int, max_num_seqs: int, block_size: int) -> list[Chunk]:
    """Prompts that fill a step's token budget, with blocks of their own counted from 0; for measuring, not serving."""
    chunks: list[Chunk] = []
    left, block = max_batched_tokens, 0
    while left > 1 and len(chunks) < max_num_seqs:
        tokens = min(left, max_model_len - 1)
        request = EngineRequest(f"measure-{len(chunks)}", (0,) * tokens, SamplingParams(max_tokens=1, temperature=0.0))
        seq = Sequence.from_request(request)
        blocks = -(-tokens // block_size)
        seq.blocks.extend(range(block, block + blocks))
        chunks.append(Chunk(seq, 0, tokens))
        left, block = left - tokens, block + blocks
    return chunks


def measure_step(runner: Runner, chunks: list[Chunk]) -> int:
    """Device bytes that computing these chunks takes beyond what is allocated now, at its peak. CUDA only."""
    device = runner.model.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.launch(chunks).result()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(before)


def kv_bytes_left(*, total: int, used: int, step: int, utilization: float) -> int:
    """Bytes for the KV cache: utilization * total, without what is in use and what a step takes at its peak.

    Raises UnsupportedModelError, naming each part, when nothing is left.
    """
    left = int(total * utilization) - used - step
    if left <= 0:
        raise UnsupportedModelError(
            f"no memory is left for the KV cache: of {total} bytes {utilization:.0%} may be used, weights and adapter "
            f"memory take {used}, the largest step {step}; lower --max-batched-tokens or --device-adapter-bytes, raise "
            "--gpu-memory-utilization, or serve a smaller model"
        )
    return left


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """(total bytes of the card, bytes in use by anyone, without this process's cached but free memory)."""
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(total), int(total - free - idle)
