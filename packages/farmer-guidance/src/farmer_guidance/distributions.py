"""What guidance asks of a torch distribution: a draw, a density, tempering, and whether it is Gaussian."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

__all__ = [
    "Gaussians",
    "check_pair",
    "components",
    "draw",
    "expanded_right",
    "gaussians",
    "log_density",
    "pick",
    "temper",
]


class Gaussians(NamedTuple):
    """The K components of a mixture of Gaussians with diagonal covariances; K is 1 for a single Gaussian."""

    logits: Tensor
    """``(*batch, K)``."""
    loc: Tensor
    """``(*batch, K, *event)``."""
    scale: Tensor
    """``(*batch, K, *event)``, standard deviations."""


def check_pair(conditional: Distribution, unconditional: Distribution) -> None:
    """Refuse two distributions that are not over the same space.

    Raises:
        ValueError: if their batch or event shapes differ.
    """
    for name in ("batch_shape", "event_shape"):
        first, second = (tuple(getattr(p, name)) for p in (conditional, unconditional))
        if first != second:
            raise ValueError(
                f"conditional and unconditional must have the same {name.replace('_', ' ')}, got {first} and {second}"
            )


def expanded_right(tensor: Tensor, dims: int) -> Tensor:
    """Return a view with so many dimensions of size 1 more, at the end."""
    return tensor.reshape(tensor.shape + (1,) * dims)


def draw(distribution: Distribution, shape: Size, generator: Generator | None) -> Tensor:
    """Draw ``(*shape, *batch, *event)``, from ``generator`` also where the distribution takes none."""
    if generator is None:
        return distribution.sample(shape)
    if "generator" in inspect.signature(distribution.sample).parameters:
        return distribution.sample(shape, generator=generator)  # type: ignore[call-arg]  # not torch's own
    with _as_default(generator):
        return distribution.sample(shape)


@contextmanager
def _as_default(generator: Generator) -> Iterator[None]:
    """Let ``generator`` stand in for its device's default one, which torch's own distributions draw from."""
    device = generator.device
    cpu = device.type == "cpu"
    module, where = (torch, ()) if cpu else (torch.get_device_module(device), (device,))
    before = module.get_rng_state(*where)
    module.set_rng_state(generator.get_state(), *where)
    try:
        yield
    finally:
        generator.set_state(module.get_rng_state(*where))
        module.set_rng_state(before, *where)


def pick(weights: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Draw indices by weight, with replacement: ``(options, *rest)`` gives ``(count, *rest)``."""
    rows = weights.movedim(0, -1).reshape(-1, weights.shape[0])
    if not len(rows) or not count:
        return torch.zeros((count, *weights.shape[1:]), dtype=torch.int64, device=weights.device)
    return rows.multinomial(count, replacement=True, generator=generator).T.reshape(count, *weights.shape[1:])


def log_density(distribution: Distribution, value: Tensor, within: Tensor) -> Tensor:
    """Return the log-density of ``(*sample, *batch, *event)`` values, in float32 or wider; -inf outside the support.

    torch's distributions refuse values outside their support, but a value drawn from another may well be there, and
    rounding puts some of their own on its edge. One of ``within``, ``(draws, *rest)`` of the distribution's own that
    broadcast to the values, is scored in its place, and not used.
    """
    if value.is_floating_point():
        value = value.to(torch.promote_types(value.dtype, torch.float32))
    if not value.numel():  # which torch's Independent cannot score
        return torch.zeros(value.shape[: value.ndim - len(distribution.event_shape)], device=value.device)
    inside = _inside_support(distribution, value)
    if inside is None or inside.all():
        log_prob = distribution.log_prob(value)
    else:
        event = len(distribution.event_shape)
        sound = _inside_support(distribution, within)
        if sound is not None:
            first = sound.int().argmax(0, keepdim=True)
            within = within.take_along_dim(expanded_right(first, event), 0)
        value = value.where(expanded_right(inside, event), within.to(value.dtype))
        log_prob = distribution.log_prob(value).where(inside, -torch.inf)
    return log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))


def _inside_support(distribution: Distribution, value: Tensor) -> Tensor | None:
    """Return ``(*sample, *batch)``, or None where all is inside or nobody knows."""
    try:
        support = distribution.support
    except NotImplementedError:
        return None
    return None if support is None else support.check(value)


def temper(distribution: Distribution, *, weight: float = 1.0, scale: float = 1.0) -> Distribution:
    """Multiply the logits of a mixture's weights by ``weight``, and standard deviations by ``scale`` (paper, A.2).

    Args:
        distribution: with a method ``temper(weight=, scale=)``; or torch's ``Normal``, ``Independent`` of it, or
            ``MixtureSameFamily`` of either. Any, if both factors are 1.
        weight: T_pi.
        scale: T_sigma.

    Raises:
        TypeError: if the distribution is none of these.
    """
    if weight == 1 and scale == 1:
        return distribution
    if hasattr(distribution, "temper"):
        tempered: Distribution = distribution.temper(weight=weight, scale=scale)
        return tempered
    if type(distribution) is Normal:  # whose subclasses may be anything
        return Normal(distribution.loc, distribution.scale * scale, validate_args=False)
    if type(distribution) is Independent and type(distribution.base_dist) is Normal:
        base = temper(distribution.base_dist, scale=scale)
        return Independent(base, distribution.reinterpreted_batch_ndims, validate_args=False)
    if type(distribution) is MixtureSameFamily and (mixture := gaussians(distribution)) is not None:
        weights = Categorical(logits=mixture.logits * weight, validate_args=False)
        tempered = temper(distribution.component_distribution, scale=scale)
        return MixtureSameFamily(weights, tempered, validate_args=False)
    raise TypeError(
        f"a {type(distribution).__name__} cannot be tempered: set its temperatures to 1, or give it a method "
        "temper(weight=, scale=); Normal, Independent(Normal) and MixtureSameFamily of these are known"
    )


def components(distribution: Distribution) -> int:
    """Return of how many components a mixture is; 1 for anything else."""
    return distribution.component_distribution.batch_shape[-1] if hasattr(distribution, "component_distribution") else 1


def gaussians(distribution: Distribution) -> Gaussians | None:
    """Return the components of a diagonal Gaussian or a mixture of them, None for anything else.

    A mixture is what has ``mixture_distribution`` and ``component_distribution``, as torch's ``MixtureSameFamily``.
    """
    if hasattr(distribution, "mixture_distribution") and hasattr(distribution, "component_distribution"):
        normal = _normal(distribution.component_distribution)
        if normal is None:
            return None
        return Gaussians(_logits(distribution.mixture_distribution), normal.loc, normal.scale)
    normal = _normal(distribution)
    if normal is None:
        return None
    one = len(distribution.batch_shape)  # where the dimension of the single component goes
    logits = normal.loc.new_zeros(*distribution.batch_shape, 1)
    return Gaussians(logits, normal.loc.unsqueeze(one), normal.scale.unsqueeze(one))


def _normal(distribution: Distribution) -> Normal | None:
    base = distribution.base_dist if type(distribution) is Independent else distribution
    return base if type(base) is Normal else None


def _logits(categorical: Categorical) -> Tensor:
    """Return the logits, -inf for a probability of 0, in whose place torch puts the logarithm of a small number."""
    logits: Tensor = categorical.logits
    floor = math.log(torch.finfo(logits.dtype).eps) - 1  # far above the logits whose probability rounds to 0
    return logits.masked_fill((categorical.probs == 0) & (logits > floor), -torch.inf)
