"""The guided density of two Gaussians in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GuidedGaussian", "guided_gaussian"]


class GuidedGaussian(NamedTuple):
    """``p'`` channel by channel, where it is a density at all."""

    loc: Tensor
    scale: Tensor
    """Standard deviations."""
    proper: Tensor
    """Whether the precision is positive; where it is not, the other two mean nothing."""


def guided_gaussian(
    loc: Tensor, scale: Tensor, other_loc: Tensor, other_scale: Tensor, guidance: float | Tensor, widening: float = 1.0
) -> GuidedGaussian:
    r"""Return the Gaussian ``p_c (v_c / v_u)^w`` is proportional to, all channels apart.

    ``p_c`` has mean ``m_c`` and standard deviation ``s_c``; ``v_c`` and ``v_u``, whose ratio guides, have means
    ``m_c, m_u`` and standard deviations ``b s_c, b s_u``. At ``b = 1`` this is Eq. 15. The exponents add up to

        ``1 / s^2 = 1 / s_c^2 + w (1 / (b s_c)^2 - 1 / (b s_u)^2)``  and
        ``m = m_c + w s^2 (m_c - m_u) / (b s_u)^2``,

    a density only where the first is positive. Computed and returned in float32 or wider.

    Args:
        loc: ``m_c``, of any shape; the other tensors broadcast with it.
        scale: ``s_c``.
        other_loc: ``m_u``.
        other_scale: ``s_u``.
        guidance: ``w``.
        widening: ``b``.
    """
    loc, scale, other_loc, other_scale = (
        p.to(torch.promote_types(p.dtype, torch.float32)) for p in (loc, scale, other_loc, other_scale)
    )
    own, other = (widening * scale).pow(-2), (widening * other_scale).pow(-2)
    precision = scale.pow(-2) + guidance * (own - other)
    proper = (precision > 0) & precision.isfinite()
    variance = precision.where(proper, 1.0).reciprocal()
    return GuidedGaussian(loc + guidance * variance * (loc - other_loc) * other, variance.sqrt(), proper)
