"""The student: an inverse of a flow in one parallel pass a block (paper, section 3.5)."""

from __future__ import annotations

import copy
from typing import cast

import torch
from farmer_flow import AutoregressiveFlow
from farmer_flow.flow import AutoregressiveBlock, checked
from torch import Tensor, nn

__all__ = ["OneStepInverse"]


class OneStepInverse(nn.Module):
    r"""An approximate inverse of an autoregressive flow in as many parallel passes as the flow has blocks."""

    def __init__(self, blocks: nn.ModuleList, length: int, dim: int, classes: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.length, self.dim, self.classes = length, dim, classes

    @classmethod
    def from_flow(cls, flow: AutoregressiveFlow) -> OneStepInverse:
        """Return a student that starts from a copy of a flow's blocks; the flow stays as it is."""
        blocks = copy.deepcopy(flow.blocks)
        blocks.requires_grad_(True)
        return cls(blocks, flow.length, flow.dim, flow.classes)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents to data, approximately."""
        return self.trajectory(z, labels)[0]

    def trajectory(self, z: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return ``[Z^0, ..., Z^n]``: the data, and what each of the blocks has made on the way from the latents."""
        states = [checked(z, labels, self.length, self.dim, self.classes)]
        for block in reversed(self.blocks):
            states.append(_undone(cast(AutoregressiveBlock, block), states[-1], labels))
        return states[::-1]


def _undone(block: AutoregressiveBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    z = block.in_order(z)
    x = block.undo(z[:, :-1], z[:, 1:], block.condition(labels, z))
    return block.in_order(torch.cat([z[:, :1], x], dim=1))
