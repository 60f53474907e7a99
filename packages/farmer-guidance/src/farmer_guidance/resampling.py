"""Guidance by resampling (FARMER, arXiv 2510.23588, section 3.4, Algorithm 1 and A.2)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution
from torch.types import _size

from farmer_guidance.distributions import (
    check_pair,
    components,
    draw,
    expanded_right,
    gaussians,
    log_density,
    pick,
    temper,
)
from farmer_guidance.gaussian import guided_gaussian
from farmer_guidance.schedules import Temperature, placed, scale_at
from farmer_guidance.settings import GuidanceSettings

__all__ = ["PRESETS", "GuidedDraw", "ResamplingGuidance"]

PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "scale": scale,
        "conditional_candidates": 5,
        "unconditional_candidates": 5,
        "weighting": "per-proposal",
        "weight_temperature": 1.0,
        "scale_temperature": scale_temperature,
        "density_weight_temperature": density_weight_temperature,
        "density_scale_temperature": density_scale_temperature,
        "resampling_temperature": 1.1,
    }
    for name, scale, scale_temperature, density_weight_temperature, density_scale_temperature in [
        ("1.1b-p16", 2.5, 0.9, 0.2, 0.9),
        ("1.1b-p8", 2.0, 1.0, 0.2, 0.9),
        ("1.9b-p16", 3.5, 0.9, 0.2, 0.9),
        ("1.9b-p8", 1.5, 1.0, 0.1, 1.0),
    ]
}
"""The arguments of :class:`ResamplingGuidance` for the paper's models of ImageNet (Table 6), with its own weighting."""


class GuidedDraw(NamedTuple):
    """A guided draw and how it came about; all but the sample have the shape ``(*sample_shape, *batch)``."""

    sample: Tensor
    """``(*sample_shape, *batch, *event)``."""
    effective_sample_size: Tensor
    """``(sum of weights)^2 / sum of squared weights`` of the candidates, float32; inf where the draw is exact, and 0
    where it fell back."""
    from_conditional: Tensor
    """Whether the draw was proposed by the conditional. Draws in closed form come from neither."""
    from_unconditional: Tensor
    """Whether the draw was proposed by the unconditional."""
    fell_back: Tensor
    """Whether all candidates had weight zero, and a plain draw of the conditional took their place."""


@dataclass(frozen=True, eq=False)
class ResamplingGuidance(GuidanceSettings):
    r"""Draw from the guided density of two distributions, for which there is no closed form, by resampling.

    ``log p'(z) = log p_c(z) + w (log p_c(z) - log p_u(z)) + const`` (Eq. 15) in three steps (Algorithm 1): propose
    candidates from both, weigh them, pick one of them by weight. The draw converges to ``p'`` as candidates grow.

    Two weighings, with ``r = log p_c - log p_u``:

    - ``"balance"``: against the mixture of both proposals, ``w r - log(a + (1 - a) exp(-r))`` with ``a`` the
      conditional's share of the candidates. No weight exceeds ``exp(w r) / a``.
    - ``"per-proposal"``, the paper's: ``w r`` for a candidate of the conditional, ``(w + 1) r`` for one of the
      unconditional.

    Measured, the first is nearer to ``p'`` at the same number of candidates: it is the default.

    Temperatures (A.2) change what proposes, and separately the ratio ``r`` that guides. With ``q`` the tempered
    proposals and ``v`` the tempered densities the target is ``q_c (v_c / v_u)^w``, so that the guidance scale 0 always
    means plain draws of ``q_c``. Per-proposal weights keep to it where ``v`` is ``q``; otherwise the unconditional's
    candidates follow ``q_u (v_c / v_u)^(w + 1)``, and the draw is a mixture of both. The paper speaks of "the variance
    sigma_k" where it introduces T_sigma; sigma is the standard deviation elsewhere in it, and is taken as such here.

    Two diagonal Gaussians (``Normal``, ``Independent(Normal)``, mixtures of one component) have a guided Gaussian
    wherever its precision is positive in every channel; it is then sampled exactly, unless ``exact`` is False, the
    resampling temperature is not 1, or weights are per proposal and the temperatures of proposals and densities differ.

    Elements of a batch are drawn independently. With the same seed they are the same draws whatever the others are,
    but for Gaussians, where a neighbour without a closed form takes more random numbers.

    Args:
        scale: w, at least 0. A number; a tensor that broadcasts to the batch shape, so that each element has its own;
            or a function of the position in the sequence, 0 to 1, that gives either, as :class:`LinearSchedule`.
        conditional_candidates: s_c, how many candidates the conditional proposes.
        unconditional_candidates: s_u, likewise.
        weighting: ``"balance"`` or ``"per-proposal"``.
        weight_temperature: T_pi, a factor on the logits of the proposals' mixture weights. This and the other four
            are numbers above 0 or functions of the position.
        scale_temperature: T_sigma, a factor on the proposals' standard deviations.
        density_weight_temperature: T_pi,v, as the first, of the densities whose ratio guides.
        density_scale_temperature: T_sigma,v, as the second, likewise.
        resampling_temperature: T_s, a factor on the log-weights: above 1 is greedier.
        pooled: let all draws of a ``sample_shape`` share one set of candidates, as the paper does for its redundant
            tokens: cheaper by far, but draws repeat. Otherwise each draw has candidates of its own.
        exact: sample the guided Gaussian of two Gaussians in closed form.

    Log-densities are computed in the distributions' own dtype, and weighed in float32 or wider.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if it is neither number, tensor nor function.

    Example:
        >>> import torch
        >>> from torch.distributions import Gamma
        >>> from farmer_guidance import ResamplingGuidance
        >>> guide = ResamplingGuidance(2.0, conditional_candidates=32, unconditional_candidates=32)
        >>> gammas = Gamma(torch.tensor(5.0), 1.0), Gamma(torch.tensor(4.5), 1.0)
        >>> draws = guide(*gammas, (10000,), generator=torch.Generator().manual_seed(0))
        >>> bool((draws.mean() - 6).abs() < 0.1)        # p' is Gamma(5 + 2 (5 - 4.5), 1)
        True
    """

    _: KW_ONLY
    conditional_candidates: int = 5
    unconditional_candidates: int = 5
    weighting: Literal["balance", "per-proposal"] = "balance"
    density_weight_temperature: Temperature = 1.0
    density_scale_temperature: Temperature = 1.0
    resampling_temperature: Temperature = 1.0
    pooled: bool = False
    exact: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = self.conditional_candidates, self.unconditional_candidates
        if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) < 1:
            raise ValueError(f"candidates must be whole numbers, and 1 in all, got {counts[0]} and {counts[1]}")
        if self.weighting not in ("balance", "per-proposal"):
            raise ValueError(f'weighting must be "balance" or "per-proposal", got {self.weighting!r}')

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ResamplingGuidance:
        """Return the paper's setting for one of its models (Table 6).

        Args:
            name: one of :data:`PRESETS`.
            changes: arguments to set otherwise.

        Raises:
            ValueError: if there is no such setting.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def __call__(
        self,
        conditional: Distribution,
        unconditional: Distribution,
        sample_shape: _size = Size(),  # noqa: B008
        *,
        progress: float = 0.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Return guided draws.

        Args:
            conditional: any distribution.
            unconditional: another with its batch and event shapes. Where the scale is 0 throughout it is not looked at.
            sample_shape: how many draws of each element of the batch.
            progress: the position in the sequence, 0 to 1, for settings that are functions of it.
            generator: of random numbers, on the distributions' device.

        Returns:
            ``(*sample_shape, *batch, *event)``.

        Raises:
            ValueError: if the shapes differ, the scale does not broadcast to the batch, all log-densities are NaN, or a
                function gave a setting out of its range.
            TypeError: if a temperature is not 1 and a distribution cannot be tempered.
        """
        return self.draw(conditional, unconditional, sample_shape, progress=progress, generator=generator).sample

    @torch.no_grad()
    def draw(
        self,
        conditional: Distribution,
        unconditional: Distribution,
        sample_shape: _size = Size(),  # noqa: B008
        *,
        progress: float = 0.0,
        generator: Generator | None = None,
    ) -> GuidedDraw:
        """Return guided draws and how they came about; arguments and errors as when called."""
        check_pair(conditional, unconditional)
        shape = Size(sample_shape)
        scale = scale_at(self.scale, progress, conditional.batch_shape)
        now = self._temperatures_at(progress)
        proposal = {"weight": now["weight_temperature"], "scale": now["scale_temperature"]}
        density = {"weight": now["density_weight_temperature"], "scale": now["density_scale_temperature"]}
        proposals = [temper(conditional, **proposal)]
        if not isinstance(scale, Tensor) and scale == 0:
            sample = draw(proposals[0], shape, generator)
            return _without_candidates(sample, shape + conditional.batch_shape, conditional=True)
        proposals.append(temper(unconditional, **proposal))
        densities = proposals if density == proposal else [temper(p, **density) for p in (conditional, unconditional)]
        exact = None
        # per-proposal weights of different temperatures mean no density that has a closed form
        consistent = self.weighting == "balance" or density == proposal
        if self.exact and consistent and now["resampling_temperature"] == 1:
            exact = _exact(proposals, scale, density["scale"] / proposal["scale"], shape, generator)
        if exact is not None and exact.proper.all():
            return exact.draw
        resampled = self._resample(proposals, densities, scale, now["resampling_temperature"], shape, generator)
        return resampled if exact is None else exact.completed(resampled)

    def _resample(
        self,
        proposals: list[Distribution],
        densities: list[Distribution],
        scale: float | Tensor,
        temperature: float,
        shape: Size,
        generator: Generator | None,
    ) -> GuidedDraw:
        # candidates come first: (s_c + s_u, *sample, *batch, *event)
        counts = self.conditional_candidates, self.unconditional_candidates
        candidates_shape = Size() if self.pooled else shape
        spare = draw(proposals[0], shape, generator)  # used or not, so that elements do not move each other's draws
        proposed = [
            draw(p, Size((max(n, 1),)) + candidates_shape, generator) for p, n in zip(proposals, counts, strict=True)
        ]
        candidates = torch.cat([values[:n] for values, n in zip(proposed, counts, strict=True)])
        log_c, ratio = _log_ratio(densities, candidates, proposed)
        scale = placed(scale, ratio)
        # beside a candidate that the unconditional gives no mass no other counts, and among several of them log p_c
        # does: the limit of a floor under the unconditional that goes to 0
        infinite = ratio.isposinf()
        guiding = torch.where(infinite.any(0), log_c.where(infinite, -torch.inf), ratio)
        if self.weighting == "balance":
            if densities is not proposals:
                _, ratio = _log_ratio(proposals, candidates, proposed)
            log_weights = scale * guiding - _log_mixture(ratio, *counts)
        else:
            log_weights = torch.cat([scale * guiding[: counts[0]], (scale + 1) * guiding[counts[0] :]])
        largest = torch.finfo(log_weights.dtype).max
        log_weights = (temperature * log_weights).nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)

        unguided = torch.as_tensor(scale, device=ratio.device) == 0
        fell_back = log_weights.isneginf().all(0) & ~unguided
        plain = fell_back | unguided
        weights = log_weights.where(~plain, 0.0).softmax(0)
        size = weights.sum(0).square() / weights.square().sum(0)
        index = pick(weights, shape.numel() if self.pooled else 1, generator)  # (draws, *sample if own, *batch)
        chosen = candidates.take_along_dim(expanded_right(index, candidates.ndim - weights.ndim), 0)
        index = index.reshape(shape + index.shape[weights.ndim - len(proposals[0].batch_shape) :])
        chosen = chosen.reshape(index.shape + chosen.shape[weights.ndim :])
        chosen = spare.where(expanded_right(plain, chosen.ndim - index.ndim), chosen)
        conditional = plain | (index < counts[0])
        return GuidedDraw(
            chosen,
            size.where(~unguided, torch.inf).where(~fell_back, 0.0).float().expand(index.shape),
            conditional,
            ~conditional,
            fell_back.expand(index.shape),
        )


class _Exact(NamedTuple):
    """Draws in closed form, of which only those count that are of a proper density, ``(*batch,)``."""

    draw: GuidedDraw
    proper: Tensor

    def completed(self, other: GuidedDraw) -> GuidedDraw:
        """Take the draws that do not count from another."""
        event = self.draw.sample.ndim - self.draw.fell_back.ndim
        sample = self.draw.sample.where(expanded_right(self.proper, event), other.sample)
        others = zip(self.draw[1:], other[1:], strict=True)
        return GuidedDraw(sample, *(mine.where(self.proper, theirs) for mine, theirs in others))


def _exact(
    pair: list[Distribution], scale: float | Tensor, widening: float, shape: Size, generator: Generator | None
) -> _Exact | None:
    """Draw from the guided Gaussian of two single ones; None for anything else."""
    if any(components(p) != 1 for p in pair):
        return None
    own, other = gaussians(pair[0]), gaussians(pair[1])
    if own is None or other is None:
        return None
    batch, event = pair[0].batch_shape, pair[0].event_shape
    loc, deviation, other_loc, other_deviation = (
        p.squeeze(len(batch)) for p in (own.loc, own.scale, other.loc, other.scale)
    )
    guided = guided_gaussian(loc, deviation, other_loc, other_deviation, placed(scale, loc, len(event)), widening)
    noise = torch.randn(shape + guided.loc.shape, dtype=guided.loc.dtype, device=loc.device, generator=generator)
    sample = (guided.loc + guided.scale * noise).to(loc.dtype)
    drawn = _without_candidates(sample, shape + batch, conditional=False)
    return _Exact(drawn, guided.proper.flatten(len(batch)).all(-1) if event else guided.proper)


def _without_candidates(sample: Tensor, shape: Size, *, conditional: bool) -> GuidedDraw:
    no = torch.zeros(shape, dtype=torch.bool, device=sample.device)
    return GuidedDraw(sample, torch.full_like(no, torch.inf, dtype=torch.float32), no | conditional, no, no)


def _log_ratio(pair: list[Distribution], value: Tensor, proposed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``log p_c`` and ``log p_c - log p_u``, which is -inf wherever the conditional has no mass.

    It is -inf also for a candidate that a distribution cannot score, such as one that rounding has put on an edge.

    Raises:
        ValueError: if for an element of the batch no candidate of any draw can be scored.
    """
    log_c, log_u = (log_density(p, value, own) for p, own in zip(pair, proposed, strict=True))
    unknown = log_c.isnan() | log_u.isnan()
    draws = unknown.ndim - len(pair[0].batch_shape)
    if unknown.flatten(0, draws - 1).all(0).any():
        names = " or the ".join(type(p).__name__ for p in pair)
        raise ValueError(f"all log-densities are NaN: the parameters of the {names} are not finite")
    return log_c, (log_c - log_u).where(~log_c.isneginf() & ~unknown, -torch.inf)


def _log_mixture(ratio: Tensor, conditional: int, unconditional: int) -> Tensor:
    """Return ``log(a p_c + (1 - a) p_u) - log p_c`` for candidates of the log-ratio ``log p_c - log p_u``."""
    total = conditional + unconditional
    log_share, log_rest = (math.log(n / total) if n else -math.inf for n in (conditional, unconditional))
    return torch.logaddexp(ratio.new_tensor(log_share), log_rest - ratio)
