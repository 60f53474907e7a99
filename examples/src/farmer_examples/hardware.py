"""What the hardware at hand can do, and does best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["computes_in_bf16", "lacks_float64", "mixed_precision", "short_attention"]

SHORT_SEQUENCE = 128


def lacks_float64() -> bool:
    """Whether the accelerator at hand cannot compute in float64, as Apple's: the CPU has to be used instead."""
    return torch.backends.mps.is_available()


def computes_in_bf16() -> bool:
    """Whether the hardware has matrix products in bfloat16, and does not emulate them, a hundred times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def mixed_precision(precision: str) -> str:
    """Return Accelerate's name of a precision, after choosing one for ``auto``."""
    if precision == "auto":
        precision = "bf16" if computes_in_bf16() else "fp32"
    return "no" if precision == "fp32" else precision


@contextlib.contextmanager
def short_attention(device: torch.device, length: int) -> Iterator[None]:
    """Choose plain matrix products over the fused attention for short sequences on a CPU, where they are faster."""
    if device.type != "cpu" or length > SHORT_SEQUENCE:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name also for the CPU
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
