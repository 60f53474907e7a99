"""Finding the inverse of a block by fixed-point iteration, and the fastest method for each block of a flow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from farmer_flow.flow import AutoregressiveBlock

__all__ = ["BlockInversion", "Inversion", "Method", "fastest_methods", "fixed_point", "segment_length"]

Method = Literal["sequential", "jacobi", "gauss-seidel-jacobi"]
METHODS: tuple[Method, ...] = get_args(Method)

PATIENCE = 8
"""A sample whose largest change has reached no new low in so many iterations is taken to diverge."""

TIMED = 3
"""How often a pass is timed; the fastest counts."""


class BlockInversion(NamedTuple):
    """What the inverse of one block took."""

    method: Method
    iterations: Tensor
    """``(batch,)`` int64, at most ``length - 1``: passes over tokens in parallel until they had converged or were given
    up; of the sequential method the passes over single tokens."""
    fell_back: Tensor
    """``(batch,)`` bool: the iteration diverged, and the sample was then inverted sequentially."""


class Inversion(NamedTuple):
    """The inverse of a flow, and what it took."""

    x: Tensor
    """``(batch, length, dim)``."""
    blocks: list[BlockInversion]
    """In the order of ``flow.blocks``."""


def segment_length(method: Method, length: int) -> int:
    """Return how many tokens of a sequence a method solves for at a time."""
    return {"sequential": 1, "jacobi": length, "gauss-seidel-jacobi": max(2, -(-length // 8))}[method]


def fixed_point(
    step: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, tolerance: float, part: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate ``x <- step(x)``, where the token ``i`` of the result depends on the tokens before it alone.

    After ``k`` iterations the first ``k`` tokens are exact, so that there are ``tokens`` of them at most.

    Args:
        step: maps ``(rows, tokens, dim)`` and the positions of these rows in the batch to the next iterate.
        x: ``(batch, tokens, dim)``, the first guess.
        tolerance: a sample has converged when ``|new - old| <= tolerance (1 + |new|)`` everywhere.
        part: compute only the samples that go on; else all of them go on until the last has converged.

    Returns:
        The last iterate, shaped as ``x``; the iterations of each sample, ``(batch,)`` int64; and which of them
        diverged, ``(batch,)`` bool: are not finite, or have reached no new smallest change in ``PATIENCE`` iterations.
    """
    x = x.clone()
    rows = torch.arange(len(x), device=x.device)
    iterations = torch.zeros_like(rows)
    diverged = torch.zeros_like(rows, dtype=torch.bool)
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    stale = torch.zeros_like(rows)
    for left in reversed(range(x.shape[1])):
        old = x[rows]
        new = step(old, rows)
        x[rows] = new
        iterations[rows] += 1
        change = ((new - old).abs() / (1 + new.abs())).amax(dim=(1, 2))
        finite = new.isfinite().all(dim=(1, 2))
        stale = torch.where(change < smallest, 0, stale + 1)
        smallest = change.minimum(smallest)
        exact = finite if left == 0 else finite & (change <= tolerance)
        diverged[rows] |= ~finite | (~exact & (stale >= PATIENCE))
        going = ~exact & ~diverged[rows]
        if not going.any():
            break
        if part:
            rows, smallest, stale = rows[going], smallest[going], stale[going]
    return x, iterations, diverged


@torch.no_grad()
def fastest_methods(
    blocks: Sequence[AutoregressiveBlock], z: Tensor, labels: Tensor | None, *, tolerance: float, batch: int
) -> list[Method]:
    """Return for each block the method that inverts a batch in the least time.

    The number of iterations that a block needs hardly depends on the batch, and is found on a few latents; what an
    iteration costs depends on the batch alone, and is timed on one block.

    Args:
        blocks: of a flow, all of one shape.
        z: a few latents, ``(few, length, dim)``.
        labels: theirs, ``(few,)``, or None.
        tolerance: of :func:`fixed_point`.
        batch: how many latents are to be inverted at once.
    """
    seconds = {method: _seconds_a_pass(blocks[0], z, method, batch) for method in METHODS}
    fastest: list[Method] = []
    for block in reversed(blocks):
        cost = {METHODS[0]: (z.shape[1] - 1) * seconds[METHODS[0]]}
        found = {method: block.inversion(z, labels, method, tolerance=tolerance) for method in METHODS[1:]}
        for method, (_, report) in found.items():
            cost[method] = int(report.iterations.max()) * seconds[method]
            if report.fell_back.any():
                cost[method] += cost[METHODS[0]]
        fastest.insert(0, min(cost, key=lambda method: cost[method]))
        z = found[METHODS[-1]][0]
    return fastest


def _seconds_a_pass(block: AutoregressiveBlock, z: Tensor, method: Method, batch: int) -> float:
    """Time one pass over a segment in the middle of the sequence, with a cache of what comes before it."""
    length = z.shape[1] - 1
    segment = min(segment_length(method, length), length)
    tokens = z[:1, :segment].expand(batch, -1, -1).contiguous()
    condition = block.condition(None, tokens)
    cache = block.transformer.new_cache(batch, length)
    taken = []
    for _ in range(TIMED + 1):
        cache.position = (length - segment) // 2
        start = time.perf_counter()
        block.undo(tokens, tokens, condition, cache).sum().item()  # whose value has to be waited for
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
