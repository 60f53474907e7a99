"""The moving average of the weights, which is what a training evaluates and keeps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Average"]


class Average:
    """An exponential moving average of a module's weights, sharded as they are.

    At first it follows closely: its decay is ``(1 + n) / (10 + n)`` at most after ``n`` updates.

    Args:
        module: the plain module, before it is wrapped or sharded for the training; it is copied without its weights.
        decay: of the average; 0 for none: the newest weights then stand for it, and take no memory of their own.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        # what deepcopy finds in its memo it takes as the copy
        memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
        self.module = copy.deepcopy(module, memo).eval()
        """The module as it was, without weights except within :meth:`whole`."""
        self._hollow = dict(self.module.named_parameters())
        self.weights: dict[str, Tensor] = {}
        """The averages, by the names that the plain module has for them."""

    def follow(self, module: nn.Module) -> None:
        """Start from the weights of the module in training, the same module but for its wrapping, and follow them.

        Its buffers are taken as they are.
        """
        self._buffers = dict(zip((name for name, _ in self.module.named_buffers()), module.buffers(), strict=True))
        self._followed = [parameter.detach() for parameter in module.parameters()]
        weights = [weight.clone() for weight in self._followed] if self.decay else self._followed
        self.weights = dict(zip(self._hollow, weights, strict=True))

    @property
    def kept(self) -> dict[str, Tensor]:
        """The averages that have to be saved beside the weights."""
        return self.weights if self.decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now."""
        if self.decay:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
            averages, newest = ([_local(w) for w in part] for part in (self.weights.values(), self._followed))
            torch._foreach_lerp_(averages, newest, 1 - decay)
        self.updates += 1

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Yield the plain module with the averages as its weights, all of them on every process while it lasts.

        All processes must enter it together.
        """
        # gathered from uneven shards, a weight is a view of more than itself, which safetensors would refuse
        weights = {name: w.full_tensor().clone() if isinstance(w, DTensor) else w for name, w in self.weights.items()}
        # not strict, because buffers need not be part of the state
        self.module.load_state_dict({**weights, **self._buffers}, strict=False, assign=True)
        try:
            yield self.module.to(next(iter(weights.values())).device)
        finally:
            self.module.load_state_dict(self._hollow, strict=False, assign=True)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
