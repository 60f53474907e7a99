"""Mixtures of diagonal Gaussians over vectors (paper, Eq. 11 and 12)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, constraints
from torch.types import _size

__all__ = ["DiagonalMixture"]


class DiagonalMixture(Distribution):
    r"""A mixture of K Gaussians over R^dim with diagonal covariances.

    ``p(z) = sum_k pi_k prod_j N(z_j; mu_kj, sigma_kj^2)`` with ``pi = softmax(logits)``: the density of
    ``MixtureSameFamily(Categorical(logits), Independent(Normal(loc, scale), 1))``, and its attributes, but values
    that share a mixture are scored by matrix products. Nothing of size (values, K, dim) is then ever made: for
    256 values, 200 components and 640 channels that would be 131 MB in float32. A dimension is shared if it is
    missing from the parameters, has size 1 in them, or was made by :meth:`expand`.

    Args:
        logits: ``(*batch, K)`` unnormalised log-weights.
        loc: ``(*batch, K, dim)`` means.
        scale: ``(*batch, K, dim)`` standard deviations.
        validate_args: as in every torch distribution.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import torch
        >>> from farmer_ar import DiagonalMixture
        >>> mixture = DiagonalMixture(torch.zeros(5, 3), torch.randn(5, 3, 2), torch.ones(5, 3, 2))
        >>> mixture.batch_shape, mixture.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> mixture.log_prob(mixture.sample((7,))).shape
        torch.Size([7, 5])
    """

    arg_constraints = {  # noqa: RUF012  # torch declares it so
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.nonnegative, 2),
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if logits.ndim < 1 or loc.ndim < 2 or loc.shape[-2:] != scale.shape[-2:] or loc.shape[-2] != logits.shape[-1]:
            raise ValueError(
                "logits must be (*batch, K), loc and scale (*batch, K, dim), got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        batch = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2], scale.shape[:-2])
        self.logits = logits.expand(*batch, -1)
        self.loc, self.scale = loc.expand(*batch, -1, -1), scale.expand(*batch, -1, -1)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    @property
    def mixture_distribution(self) -> Categorical:
        """The distribution of the component, batch ``(*batch,)``."""
        return Categorical(logits=self.logits, validate_args=False)

    @property
    def component_distribution(self) -> Independent[Normal]:
        """The components, batch ``(*batch, K)`` and event ``(dim,)``."""
        return Independent(Normal(self.loc, self.scale, validate_args=False), 1, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(*batch, dim)``."""
        return torch.einsum("...k,...kd->...d", self.logits.softmax(-1), self.loc)

    @property
    def variance(self) -> Tensor:
        """``(*batch, dim)``: the mean of the variances plus the variance of the means."""
        spread = (self.loc - self.mean.unsqueeze(-2)).square() + self.scale.square()
        return torch.einsum("...k,...kd->...d", self.logits.softmax(-1), spread)

    def expand(self, batch_shape: _size, _instance: Any = None) -> DiagonalMixture:
        """Return the mixture repeated to ``batch_shape``, without copying its parameters."""
        batch = Size(batch_shape)
        return DiagonalMixture(
            self.logits.expand(*batch, -1),
            self.loc.expand(*batch, -1, -1),
            self.scale.expand(*batch, -1, -1),
            validate_args=False,
        )

    def temper(self, *, weight: float = 1.0, scale: float = 1.0) -> DiagonalMixture:
        """Return the mixture with its logits times ``weight`` and its standard deviations times ``scale``.

        These are the temperatures T_pi and T_sigma of the paper's section A.2. The paper speaks of "the variance
        sigma_k"; sigma is the standard deviation elsewhere in it, and is taken as such here.
        """
        return DiagonalMixture(self.logits * weight, self.loc, self.scale * scale, validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: _size = Size(), *, generator: Generator | None = None) -> Tensor:  # noqa: B008
        """Draw ``(*sample_shape, *batch, dim)``; ``generator`` must live on the parameters' device."""
        logits, loc, scale = self._distinct()
        shape = Size(sample_shape) + self.batch_shape
        lead = len(shape) - len(self.batch_shape)
        own = [lead + i for i, size in enumerate(logits.shape[:-1]) if size > 1]
        shared = [i for i in range(len(shape)) if i not in own]
        owners, sharers = math.prod(shape[i] for i in own), math.prod(shape[i] for i in shared)
        if not owners * sharers:
            return loc.new_empty((*shape, loc.shape[-1]))
        weights = logits.reshape(owners, -1).float().softmax(-1)
        component = weights.multinomial(sharers, replacement=True, generator=generator)
        owner = torch.arange(owners, device=component.device).unsqueeze(-1)
        mu, sigma = (p.reshape(owners, *p.shape[-2:])[owner, component] for p in (loc, scale))
        noise = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
        drawn = (mu + sigma * noise).reshape(*(shape[i] for i in own), *(shape[i] for i in shared), -1)
        return drawn.permute(*_inverse_permutation([*own, *shared]), len(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``(*sample, *batch, dim)`` values, ``(*sample, *batch)``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        logits, loc, scale = self._distinct()
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        padding = (1,) * (len(shape) - len(self.batch_shape))
        logits, loc, scale = (p.reshape(padding + p.shape) for p in (logits, loc, scale))
        own = [i for i, size in enumerate(logits.shape[:-1]) if size > 1]
        shared = [i for i in range(len(shape)) if i not in own]
        if math.prod([shape[i] for i in shared]) == 1:  # a list, because torch.compile traces no generator there
            joint = logits.log_softmax(-1) + _log_normal(value.unsqueeze(-2), loc, scale)
            return joint.logsumexp(-1)
        order = [*own, *shared]
        owners = math.prod([shape[i] for i in own])
        values = value.expand(*shape, -1).permute(*order, len(shape)).reshape(owners, -1, value.shape[-1])
        joint = logits.reshape(owners, 1, -1).log_softmax(-1) + _log_normal_of_shared(
            values, loc.reshape(owners, *loc.shape[-2:]), scale.reshape(owners, *scale.shape[-2:])
        )
        scored = joint.logsumexp(-1).reshape([shape[i] for i in order])
        return scored.permute(_inverse_permutation(order))

    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters with size 1 in every batch dimension along which they merely repeat."""
        logits, loc, scale = self.logits, self.loc, self.scale
        for i in range(len(self.batch_shape)):
            if self.batch_shape[i] > 1 and logits.stride(i) == loc.stride(i) == scale.stride(i) == 0:
                logits, loc, scale = (p.narrow(i, 0, 1) for p in (logits, loc, scale))
        return logits, loc, scale


def _log_normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Sum the log-densities of independent normals over the last dimension."""
    squares = ((value - loc) / scale).square().sum(-1)
    return -0.5 * squares - scale.log().sum(-1) - 0.5 * math.log(2 * math.pi) * loc.shape[-1]


def _log_normal_of_shared(values: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Score every value under every component: (b, n, d) under (b, k, d) gives (b, n, k).

    ``((x - mu) / sigma)^2 = x^2 / sigma^2 - 2 x mu / sigma^2 + mu^2 / sigma^2`` summed over channels is two matrix
    products. The three terms cancel where means are large and scales small, so they are centred on the mean of the
    means and taken in float64, which also keeps autocast and TF32 away from them: a component at distance D of
    the centre with scale s costs about (D / s)^2 * 1e-16 of log-density, 1e-10 for means of 1 and scales of 1e-3.
    """
    centre = loc.double().mean(-2, keepdim=True)
    x, mu = values.double() - centre, loc.double() - centre
    precision = scale.double().pow(-2)
    squares = x.square() @ precision.mT - 2 * x @ (precision * mu).mT + (precision * mu.square()).sum(-1).unsqueeze(-2)
    log_scale = scale.double().log().sum(-1).unsqueeze(-2)
    joint = -0.5 * squares - log_scale - 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    return joint.to(torch.promote_types(values.dtype, loc.dtype))


def _inverse_permutation(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
