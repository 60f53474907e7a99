"""Finding the inverse of a block by fixed-point iteration, and the fastest method for each block of a flow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from farmer_flow.flow import AutoregressiveBlock

__all__ = [
    "FEW",
    "METHODS",
    "BlockInversion",
    "Inversion",
    "Method",
    "fastest_methods",
    "fixed_point",
    "segment_length",
]

Method = Literal["sequential", "jacobi", "gauss-seidel-jacobi"]
METHODS: tuple[Method, ...] = get_args(Method)

PATIENCE = 8
"""A sample whose largest change has reached no new low in so many iterations is taken to diverge."""

FEW = 4
"""How many latents of a batch ``method="auto"`` measures."""

TIMED = 3
"""How often passes are timed; the fastest count."""

STEPS = 8
"""Passes over single tokens that are timed together."""


class BlockInversion(NamedTuple):
    """What the inverse of one block took."""

    method: Method
    iterations: Tensor
    """``(batch,)`` int64, at most ``length - 1``: passes over tokens in parallel until they had converged or were given
    up, in Gauss-Seidel-Jacobi summed over the segments; of the sequential method the passes over single tokens."""
    fell_back: Tensor
    """``(batch,)`` bool: the iteration diverged, and the sample was then inverted sequentially."""


class Inversion(NamedTuple):
    """The inverse of a flow, and what it took."""

    x: Tensor
    """``(batch, length, dim)``."""
    blocks: list[BlockInversion]
    """In the order of ``flow.blocks``."""

    @property
    def methods(self) -> list[Method]:
        """Return the method of each block, for the next inverse to use."""
        return [block.method for block in self.blocks]


def segment_length(method: Method, length: int) -> int:
    """Return how many tokens of a sequence a method solves for at a time.

    Where blocks contract, every segment takes about as many iterations as the whole sequence, so that more of them
    cost more passes and save no work; four leave room to those blocks for which a single one would diverge.
    """
    return {"sequential": 1, "jacobi": length, "gauss-seidel-jacobi": max(2, -(-length // 4))}[method]


def fixed_point(
    step: Callable[[Tensor, Tensor], Tensor], x: Tensor, live: Tensor, *, tolerance: float, drop_settled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate ``x <- step(x)``, where the token ``i`` of the result depends on the tokens before it alone.

    After ``k`` iterations the first ``k`` tokens are exact, so that there are ``tokens`` of them at most. A sample has
    converged when ``|new - old| <= tolerance (1 + |new|)`` everywhere, and by no more than in the iteration before.

    Args:
        step: maps ``(rows, tokens, dim)`` and the positions of these rows in the batch to the next iterate.
        x: ``(batch, tokens, dim)``, the first guess.
        live: ``(batch,)`` bool: the samples that matter.
        tolerance: see above.
        drop_settled: compute only the samples that go on; else all of them until the last has settled.

    Returns:
        The last iterate, shaped as ``x``; the iterations of each live sample, ``(batch,)`` int64; and which of them
        diverged, ``(batch,)`` bool: are not finite, or have reached no new smallest change in ``PATIENCE`` iterations.
    """
    x, live = x.clone(), live.clone()
    rows = torch.arange(len(x), device=x.device)
    iterations = torch.zeros_like(rows)
    diverged = torch.zeros_like(live)
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    stale, before = torch.zeros_like(rows), torch.zeros_like(smallest)
    for left in reversed(range(x.shape[1])):
        if drop_settled:
            rows = live.nonzero().squeeze(1)
        if not live.any():
            break
        old = x[rows]
        new = step(old, rows)
        x[rows] = new
        iterations += live
        change = torch.zeros_like(smallest)
        change[rows] = ((new - old).abs() / (1 + new.abs())).amax(dim=(1, 2))
        finite = torch.ones_like(live)
        finite[rows] = new.isfinite().all(dim=(1, 2))
        stale = torch.where(change < smallest, 0, stale + 1)
        smallest = change.minimum(smallest)
        converged = finite & (change <= tolerance) & (change <= before)
        before = change
        failed = live & ~converged & (~finite | ((stale >= PATIENCE) & (left > 0)))
        diverged |= failed
        live &= ~(converged | failed)
    return x, iterations, diverged


@torch.no_grad()
def fastest_methods(
    blocks: Sequence[AutoregressiveBlock], z: Tensor, labels: Tensor | None, *, tolerance: float, batch: int
) -> list[Method]:
    """Return for each block the method that inverts a batch in the least time, by an estimate.

    How many iterations a block needs is found on a few latents: the slowest of them counts for Gauss-Seidel-Jacobi, the
    average for Jacobi, which drops samples that have converged. What an iteration costs at the batch's size is timed
    on one block. A method that falls back on any of the latents is charged the sequential one as well.

    Args:
        blocks: of a flow, all of one shape.
        z: a few latents, ``(few, length, dim)``.
        labels: theirs, ``(few,)``, or None.
        tolerance: of :func:`fixed_point`.
        batch: how many latents are to be inverted at once.
    """
    seconds = {method: _seconds_a_pass(blocks[0], z, method, batch) for method in METHODS}
    sequential = (z.shape[1] - 1) * seconds["sequential"]
    fastest: list[Method] = []
    for block in reversed(blocks):
        cost: dict[Method, float] = {"sequential": sequential}
        for method in METHODS[1:]:
            x, report = block.inversion(z, labels, method, tolerance=tolerance)
            iterations = report.iterations.double()
            passes = iterations.mean() if method == "jacobi" else iterations.max()
            cost[method] = float(passes) * seconds[method] + (sequential if report.fell_back.any() else 0.0)
        fastest.insert(0, min(cost, key=lambda method: cost[method]))
        z = x
    return fastest


def _seconds_a_pass(block: AutoregressiveBlock, z: Tensor, method: Method, batch: int) -> float:
    """Time a pass over a segment in the middle of the sequence, with a cache of what comes before it."""
    length = z.shape[1] - 1
    segment = min(segment_length(method, length), length)
    tokens = z[:1, :segment].expand(batch, -1, -1).contiguous()
    condition = block.condition(None, tokens)
    cache = block.transformer.new_cache(batch, length) if segment < length else None
    passes = STEPS if segment == 1 else 1
    taken = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        for _ in range(passes):  # of single tokens several, as they follow each other without waiting for a value
            if cache is not None:
                cache.position = (length - segment) // 2
            found = block.undo(tokens, tokens, condition, cache)
        found.sum().item()
        taken.append((time.perf_counter() - start) / passes)
    return min(taken[1:])
