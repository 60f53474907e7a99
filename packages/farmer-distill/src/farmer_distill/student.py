"""The student: an inverse of a flow in one parallel pass a block (paper, section 3.5)."""

from __future__ import annotations

import copy
from typing import cast

import torch
from farmer_flow import AutoregressiveBlock, AutoregressiveFlow, check_tokens
from torch import Tensor, nn

__all__ = ["InverseBlock", "OneStepInverse"]


class InverseBlock(nn.Module):
    """A block of the flow that maps latents to tokens: all at once, from the latents before each.

    Args:
        block: whose parameters it takes as its own.
    """

    def __init__(self, block: AutoregressiveBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map ``(batch, length, dim)`` latents to tokens of that shape; labels are ``(batch,)``, or None for none."""
        block = self.block
        z = block.in_order(z)
        x = block.undo(z[:, :-1], z[:, 1:], block.condition(labels, z))
        return block.in_order(torch.cat([z[:, :1], x], dim=1))


class OneStepInverse(nn.Module):
    r"""An approximate inverse of an autoregressive flow, in as many parallel passes as the flow has blocks.

    A block of the flow has the exact inverse ``x_i = z_i / sigma(x_<i) + mu(x_<i)``, one token after another (FARMER,
    arXiv 2510.23588, Eq. 9). The student's computes all tokens at once, with a Transformer of its own that reads the
    latents in place of the tokens:

        ``x_1 = z_1``,  ``x_i = z_i / sigma'(z_<i) + mu'(z_<i)``

    The exact inverse can be written in this form, since ``x_<i`` is a function of ``z_<i``; it remains to learn it,
    with :func:`~farmer_distill.distillation_loss`. The student starts from the flow's own weights, and so from one
    iteration of Jacobi's method a block. The paper's has bidirectional attention, which came out less accurate.

    A student's image has no likelihood of its own: densities come from the flow.

    Args:
        blocks: of a flow, to be trained.
        length: tokens of a sequence.
        dim: channels of a token.
        classes: number of classes; 0 for none.

    Example:
        >>> import torch
        >>> from farmer_distill import OneStepInverse
        >>> from farmer_flow import AutoregressiveFlow
        >>> flow = AutoregressiveFlow(dim=3, length=16, width=64, blocks=2, layers=1)
        >>> student = OneStepInverse.from_flow(flow)
        >>> z = torch.randn(4, 16, 3)
        >>> torch.equal(student(z), z)  # a fresh flow is the identity
        True
    """

    def __init__(self, blocks: nn.ModuleList, length: int, dim: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InverseBlock(cast(AutoregressiveBlock, block)) for block in blocks)
        self.length, self.dim, self.classes = length, dim, classes

    @classmethod
    def from_flow(cls, flow: AutoregressiveFlow) -> OneStepInverse:
        """Return a student that starts from a copy of a flow's blocks; the flow stays as it is."""
        blocks = copy.deepcopy(flow.blocks).requires_grad_(True)
        return cls(blocks, flow.length, flow.dim, flow.classes)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents to data, approximately.

        Args:
            z: ``(batch, length, dim)``.
            labels: ``(batch,)`` int64, negative for no class; None for no class at all.

        Returns:
            ``x``, shaped as ``z``, float32 whatever the autocast, or float64 for float64 latents.

        Raises:
            ValueError: if the latents or the labels have the wrong shape, or a label is out of range. Where gradients
                are enabled on a GPU, which would have to wait to find out, such a label fails a CUDA assertion instead.
        """
        return self.trajectory(z, labels)[0]

    def trajectory(self, z: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return ``[Z^0, ..., Z^n]``: the data, and what the blocks have made on the way from the latents ``Z^n``.

        Arguments and errors are those of :meth:`forward`.
        """
        states = [check_tokens(z, labels, self.length, self.dim, self.classes)]
        for block in reversed(self.blocks):
            states.append(block(states[-1], labels))
        return states[::-1]
