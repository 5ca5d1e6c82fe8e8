"""The LoRA term on a card with bits that do not depend on how many neighbours share a token's adapters.

`TritonLoraBackend` has two variants, for short segments and for long ones, with tiles of their own; they sum in the
same order, but through different matrix instructions. Here every segment is short.
"""

from collections.abc import Sequence

from loramux.kernels.lora.interface import Lane, Segment
from loramux.kernels.lora.launch import SHORT_TOKENS
from loramux.kernels.lora.triton_backend import TritonLoraBackend
from loramux.kernels.lora.triton_plan import TritonLoraPlan


class InvariantTritonLoraBackend(TritonLoraBackend):
    """`TritonLoraBackend` that cuts segments until all of them are of the decode variant."""

    def plan(
        self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens", *, padded: bool = False
    ) -> TritonLoraPlan | None:
        """The plan of the same tokens with the same adapters, in segments of at most `SHORT_TOKENS`."""
        short = [
            Segment(start, min(start + SHORT_TOKENS, segment.end), segment.adapters)
            for segment in segments
            for start in range(segment.start, segment.end, SHORT_TOKENS)
        ]
        return super().plan(short, num_tokens, lane, padded=padded)
