"""A flow as a ``torch.distributions`` transform."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["FlowTransform"]


class Flow(Protocol):
    """Any invertible map of tokens with a log-determinant."""

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor: ...


class FlowTransform(Transform):
    """The map from latents to data, so that a base distribution over latents becomes one over data.

    Calling it is the flow's ``inverse``; its ``inv`` is the flow's ``forward``. Hence
    ``TransformedDistribution(base, FlowTransform(flow))`` has the density ``base(flow(x)) |det dz/dx|`` (Eq. 6).

    Args:
        flow: an :class:`~farmer_flow.AutoregressiveFlow`, or anything with its ``forward`` and ``inverse``.
        labels: ``(batch,)`` classes of the sequences, or None.
        cache_size: 1 keeps the last pair and its log-determinant, so that ``log_prob`` runs the flow once and not
            twice; as in every torch transform, right only while the flow's parameters do not change.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from farmer_flow import AutoregressiveFlow, FlowTransform
        >>> flow = AutoregressiveFlow(dim=3, length=16, width=64, blocks=2, layers=1)
        >>> base = Independent(Normal(torch.zeros(16, 3), torch.ones(16, 3)), 2)
        >>> density = TransformedDistribution(base, FlowTransform(flow))
        >>> x = density.sample((4,))
        >>> density.log_prob(x).shape
        torch.Size([4])
    """

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, flow: Flow, labels: Tensor | None = None, *, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.flow, self.labels = flow, labels
        self._last: tuple[Tensor, Tensor] | None = None  # data and the log-determinant of its forward pass

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the same transform with another cache size."""
        return FlowTransform(self.flow, self.labels, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and other.flow is self.flow and other.labels is self.labels

    __hash__ = None  # type: ignore[assignment]  # as every torch transform that defines equality

    def _call(self, z: Tensor) -> Tensor:
        return self.flow.inverse(z, self.labels)

    def _inverse(self, x: Tensor) -> Tensor:
        z, logdet = self.flow(x, self.labels)
        if self._cache_size:
            self._last = (x, logdet)
        return z

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|det dy/dx|``, ``(batch,)``, for latents ``x`` and their data ``y``, ``(batch, length, dim)``."""
        if self._last is not None and self._last[0] is y:
            return -self._last[1]
        return -self.flow(y, self.labels)[1]
