"""How latents become images: the inverses that the command line knows by name."""

from __future__ import annotations

from pathlib import Path

import torch
from farmer_flow import AutoregressiveFlow, BlockInversion
from farmer_flow.inversion import METHODS, Method
from torch import Tensor

from farmer_examples.distillation import load_student
from farmer_examples.model import Farmer, Inverse

__all__ = ["INVERSES", "ExactInverse", "inverse_of"]

INVERSES = [*METHODS, "auto", "one-step"]


class ExactInverse:
    """The inverse of a flow by one of its own methods, which remembers what it took.

    Args:
        flow: to be inverted.
        method: see :meth:`farmer_flow.AutoregressiveFlow.inverse`; ``"auto"`` is measured at the first batch, and kept.
        tolerance: see there.
    """

    def __init__(self, flow: AutoregressiveFlow, method: str, tolerance: float) -> None:
        self.flow, self.tolerance = flow, tolerance
        self.method: str | list[Method] = method
        self.reports: list[list[BlockInversion]] = []

    def __call__(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents to data, both ``(batch, length, dim)``."""
        found = self.flow.inversion(z, labels, method=self.method, tolerance=self.tolerance)
        self.method = found.methods
        self.reports.append(found.blocks)
        return found.x

    def report(self) -> str:
        """Return a line for each block: its method, the iterations of all samples so far, and how many fell back."""
        lines = []
        for index, blocks in enumerate(zip(*self.reports, strict=True)):
            iterations = torch.cat([block.iterations for block in blocks])
            fell_back = int(torch.cat([block.fell_back for block in blocks]).sum())
            lines.append(
                f"block {index}: {blocks[0].method}, {iterations.double().mean():.1f} iterations on average, "
                f"{iterations.max()} at most, over {self.flow.length} tokens"
                + (
                    f"; {fell_back} of {len(iterations)} samples diverged and were inverted sequentially"
                    * (fell_back > 0)
                )
            )
        return "\n".join(lines)


def inverse_of(name: str, folder: Path, model: Farmer, tolerance: float) -> Inverse:
    """Return the inverse that a name stands for.

    Args:
        name: one of :data:`INVERSES`.
        folder: of the model, where its student lies.
        model: whose flow is to be inverted.
        tolerance: of the exact parallel methods.
    """
    if name == "one-step":
        return load_student(folder, model.flow)
    return name if name == "sequential" else ExactInverse(model.flow, name, tolerance)
