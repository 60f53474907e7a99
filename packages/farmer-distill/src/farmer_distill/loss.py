"""What the student learns from: the states of the teacher's forward pass (paper, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from farmer_flow import AutoregressiveFlow
from torch import Generator, Tensor

from farmer_distill.student import OneStepInverse

__all__ = ["block_errors", "distillation_loss"]


def distillation_loss(
    student: OneStepInverse,
    teacher: AutoregressiveFlow,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    max_noise: float = 0.3,
    data_weight: float = 0.0,
    decode: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Return the mean over blocks of the squared error of the student's states against the teacher's (Algorithm 2).

    The teacher runs forward, once, without gradient and in the precision in force; its inverse is never needed. The
    student starts from the teacher's latents with noise of standard deviation ``s``, one draw of
    ``s ~ U[0, max_noise]`` a sequence, since it will meet latents that no data has, and goes on from its own states.

    Beyond the paper, whose loss the defaults are, a last term may be added: the error of the data in units of its own,
    such as pixels.

    Args:
        student: whose parameters get gradients.
        teacher: the flow to be inverted; it stays as it is.
        x: ``(batch, length, dim)``: data, or what the teacher's inverse makes of latents from a prior.
        labels: ``(batch,)`` int64, negative for no class; None for no class at all.
        max_noise: the largest standard deviation of the noise on the latents.
        data_weight: factor on the mean squared error of the data after ``decode``.
        decode: a differentiable map of ``(batch, length, dim)``; None for the data as it is.
        generator: of the noise, on the device of ``x``.

    Returns:
        A scalar, float32 whatever the autocast, or float64 for float64 tokens.

    Raises:
        ValueError: if tokens or labels have the wrong shape, a label is out of range, ``max_noise`` or ``data_weight``
            is negative, or student and teacher have other numbers of blocks.
    """
    if not data_weight >= 0:
        raise ValueError(f"data_weight must be at least 0, got {data_weight}")
    reached, states = _trajectories(student, teacher, x, labels, max_noise, generator)
    loss = _errors(reached, states).mean()
    if data_weight:
        ours, theirs = (reached[0], states[0]) if decode is None else (decode(reached[0]), decode(states[0]))
        loss = loss + data_weight * (ours - theirs).square().mean()
    return loss


def block_errors(
    student: OneStepInverse,
    teacher: AutoregressiveFlow,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    max_noise: float = 0.3,
    generator: Generator | None = None,
) -> Tensor:
    """Return the terms of the paper's loss, ``(blocks,)``: the mean squared error of each block's output.

    Term ``t`` is that of ``Z^t``, so that the first is the error of the data itself. Arguments and errors are as in
    :func:`distillation_loss`, which takes the mean of these terms.
    """
    return _errors(*_trajectories(student, teacher, x, labels, max_noise, generator))


def _trajectories(
    student: OneStepInverse,
    teacher: AutoregressiveFlow,
    x: Tensor,
    labels: Tensor | None,
    max_noise: float,
    generator: Generator | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the student's states and the teacher's, ``[Z^0, ..., Z^n]`` each."""
    if not max_noise >= 0:
        raise ValueError(f"max_noise must be at least 0, got {max_noise}")
    if len(student.blocks) != len(teacher.blocks):
        raise ValueError(f"the student has {len(student.blocks)} blocks, and the teacher {len(teacher.blocks)}")
    with torch.no_grad():
        states = teacher.trajectory(x, labels)
        z = states[-1]
        deviation = max_noise * torch.rand(len(z), 1, 1, dtype=z.dtype, device=z.device, generator=generator)
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    return student.trajectory(z + deviation * noise, labels), states


def _errors(reached: list[Tensor], states: list[Tensor]) -> Tensor:
    pairs = zip(reached[:-1], states[:-1], strict=True)
    return torch.stack([(ours - theirs).square().mean() for ours, theirs in pairs])
