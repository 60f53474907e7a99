"""The naive guidance of mixtures, component by component (JetFormer, arXiv 2411.19722; GIVT, arXiv 2312.02116)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution
from torch.types import _size

from farmer_guidance.distributions import check_pair, draw, expanded_right, gaussians, pick, temper
from farmer_guidance.gaussian import guided_gaussian
from farmer_guidance.schedules import placed, scale_at
from farmer_guidance.settings import GuidanceSettings

__all__ = ["ComponentGuidance"]


@dataclass(frozen=True, eq=False)
class ComponentGuidance(GuidanceSettings):
    r"""Guide two mixtures of diagonal Gaussians as if their components were pairs: the baseline of resampling.

    Component k is drawn by the conditional's weights, and the guided density of the two Gaussians numbered k,
    ``N(m_c, s_c^2)^(1+w) N(m_u, s_u^2)^(-w)`` (Eq. 15), is sampled channel by channel. That is not the guided density
    of the mixtures, unless both have one component: nothing pairs the components of two mixtures. A channel whose
    guided precision is not positive is drawn from the conditional's component; one whose precision is barely positive
    is drawn far away, and nothing holds it back.

    Args:
        scale: w, at least 0; a number, a tensor that broadcasts to the batch shape, or a function of the position in
            the sequence, 0 to 1, that gives either.
        weight_temperature: a factor on the logits of the mixture weights, above 0, or a function of the position.
        scale_temperature: a factor on all standard deviations, likewise.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from farmer_guidance import ComponentGuidance
        >>> ComponentGuidance(2.0)(Normal(torch.zeros(3), 1.0), Normal(torch.ones(3), 1.0)).shape
        torch.Size([3])
    """

    @torch.no_grad()
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
            conditional: a diagonal Gaussian, or a mixture of them: what has the attributes
                ``mixture_distribution`` and ``component_distribution`` of torch's ``MixtureSameFamily``.
            unconditional: another with the same shapes and number of components. Where the scale is 0 throughout
                it is not looked at.
            sample_shape: how many draws of each element of the batch.
            progress: the position in the sequence, 0 to 1, for settings that are functions of it.
            generator: of random numbers, on the distributions' device.

        Returns:
            ``(*sample_shape, *batch, *event)``.

        Raises:
            ValueError: if the shapes or the numbers of components differ, or the scale does not broadcast.
            TypeError: if a distribution is neither Gaussian nor a mixture of Gaussians.
        """
        check_pair(conditional, unconditional)
        scale = scale_at(self.scale, progress, conditional.batch_shape)
        now = self._temperatures_at(progress)
        temperatures = {"weight": now["weight_temperature"], "scale": now["scale_temperature"]}
        conditional = temper(conditional, **temperatures)
        if not isinstance(scale, Tensor) and scale == 0:
            return draw(conditional, Size(sample_shape), generator)
        own, other = gaussians(conditional), gaussians(temper(unconditional, **temperatures))
        if own is None or other is None:
            names = " and ".join(type(p).__name__ for p in (conditional, unconditional))
            raise TypeError(f"component guidance needs diagonal Gaussians or mixtures of them, got {names}")
        if own.logits.shape != other.logits.shape:
            raise ValueError(
                "component guidance pairs components, and needs as many in both, "
                f"got {own.logits.shape[-1]} and {other.logits.shape[-1]}"
            )
        shape, batch, event = Size(sample_shape), conditional.batch_shape, conditional.event_shape
        component = pick(own.logits.softmax(-1).movedim(-1, 0), shape.numel(), generator)  # (draws, *batch)
        loc, scale_c, other_loc, other_scale = (
            p.movedim(len(batch), 0).take_along_dim(expanded_right(component, len(event)), 0)
            for p in (own.loc, own.scale, other.loc, other.scale)
        )
        guided = guided_gaussian(loc, scale_c, other_loc, other_scale, placed(scale, loc, len(event)))
        noise = torch.randn(loc.shape, dtype=guided.loc.dtype, device=loc.device, generator=generator)
        drawn = guided.loc.where(guided.proper, loc) + guided.scale.where(guided.proper, scale_c) * noise
        return drawn.to(loc.dtype).reshape(shape + batch + event)
