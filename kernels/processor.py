"""What this machine's processor multiplies in hardware, as torch sees it."""

from collections.abc import Mapping
from typing import Any

import torch


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products run as such on the CPU: AVX512_BF16 or AMX_BF16 (x86), and torch may use them.

    Elsewhere torch widens bfloat16 to float32 within each product, which costs more than it saves. False where this
    torch cannot tell, and where ATEN_CPU_CAPABILITY keeps torch below AVX-512.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch
    older = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or older())
