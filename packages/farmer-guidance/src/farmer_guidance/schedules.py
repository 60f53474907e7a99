"""Settings that change with a token's position in its sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from farmer_guidance.distributions import expanded_right

__all__ = [
    "CosineSchedule",
    "LinearSchedule",
    "Scale",
    "Temperature",
    "check",
    "is_zero",
    "placed",
    "scale_at",
    "temperature_at",
]

Scale = float | Tensor | Callable[[float], float | Tensor]
"""A guidance scale: a number, a tensor with one for each element of the batch, or a schedule of either:
a function of the position in the sequence, 0 to 1."""

Temperature = float | Callable[[float], float | Tensor]
"""A number, or a schedule of numbers."""


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """``start + (end - start) t`` at position ``t``, 0 for the first token of a sequence and 1 for the last.

    Args:
        start: value at the first token; a number, or a tensor with one for each element of the batch.
        end: value at the last token, likewise.

    Example:
        >>> from farmer_guidance import LinearSchedule
        >>> LinearSchedule(0.0, 3.0)(0.5)
        1.5
    """

    start: float | Tensor
    end: float | Tensor

    def __call__(self, progress: float) -> float | Tensor:
        """Return the value at a position, 0 to 1."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, eq=False)
class CosineSchedule(LinearSchedule):
    """``start + (end - start) (1 - cos(pi t)) / 2`` at position ``t``: flat at both ends.

    Args:
        start: value at the first token; a number, or a tensor with one for each element of the batch.
        end: value at the last token, likewise.
    """

    def __call__(self, progress: float) -> float | Tensor:
        """Return the value at a position, 0 to 1."""
        return super().__call__((1 - math.cos(math.pi * progress)) / 2)


def scale_at(setting: Scale, progress: float, batch: Size) -> float | Tensor:
    """Return the guidance scale at a position, 0 to 1, for a batch of this shape; the number 0 where all are 0.

    Raises:
        ValueError: if a schedule gave one out of its range, or it does not broadcast to the batch.
    """
    scale = _at("scale", setting, progress)
    if isinstance(scale, Tensor):
        try:
            fits = torch.broadcast_shapes(scale.shape, batch) == batch
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"a scale of shape {tuple(scale.shape)} does not broadcast to a batch of {tuple(batch)}")
        if not scale.any():
            return 0.0
    return scale


def placed(scale: float | Tensor, like: Tensor, event_dims: int = 0) -> float | Tensor:
    """Return a scale on the device of what it multiplies, no wider than it, with dimensions of size 1 for its event."""
    if not isinstance(scale, Tensor):
        return scale
    dtype = torch.promote_types(like.dtype, torch.float32)
    return expanded_right(scale.to(like.device, dtype), event_dims)


def temperature_at(name: str, setting: Temperature, progress: float) -> float:
    """Return a temperature at a position, 0 to 1.

    Raises:
        ValueError: if a schedule gave one out of its range.
    """
    return float(_at(name, setting, progress, positive=True))


def _at(name: str, setting: Scale, progress: float, *, positive: bool = False) -> float | Tensor:
    if not callable(setting):
        return setting
    value = setting(progress)
    check(name, value, positive=positive)
    return value


def check(name: str, setting: Scale, *, positive: bool = False) -> None:
    """Refuse a setting that is negative or not finite, or that has to be ``positive`` and is not one such number.

    Of functions other than schedules it cannot be known before they are called.
    """
    if isinstance(setting, LinearSchedule):
        check(f"{name}.start", setting.start, positive=positive)
        check(f"{name}.end", setting.end, positive=positive)
    elif not callable(setting):
        if not isinstance(setting, int | float | Tensor) or isinstance(setting, bool):
            raise TypeError(f"{name} must be a number, a tensor or a function of the position, got {setting!r}")
        values = torch.as_tensor(setting)
        if positive and values.numel() != 1:
            raise ValueError(f"{name} must be one number for the whole batch, got {values.numel()}")
        if not (values.isfinite() & (values > 0 if positive else values >= 0)).all():
            raise ValueError(f"{name} must be finite and {'above 0' if positive else 'at least 0'}, got {setting}")


def is_zero(setting: Scale) -> bool:
    """Whether a setting is 0 at all positions and for all elements of the batch, as far as it can be known."""
    if isinstance(setting, LinearSchedule):
        return is_zero(setting.start) and is_zero(setting.end)
    return not callable(setting) and not bool(torch.as_tensor(setting).any())
