"""The batches that a training takes of images that can be looked up: which, in which order, on which process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from farmer_examples.data import DataError, ImageData

__all__ = ["Batch", "Batches", "Feed", "without_traceback"]


class Batch(NamedTuple):
    """What a process computes at once."""

    images: Tensor
    """uint8 ``(batch, channels, size, size)``."""
    labels: Tensor
    """int64 ``(batch,)``, negative for no class."""
    draws: Tensor
    """int64 ``(batch,)``: the number of each image among all that the training takes, from which its noise follows."""
    skipped: int = 0
    """How many images were passed over on the way to these, because they are not sound."""


class Feed(Protocol):
    """Endless batches that remember how far they have been taken."""

    def __iter__(self) -> Iterator[Batch]:
        """Go on from where the last iteration or the loaded state ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process."""

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go to a position; False if it is none of this feed's, and nothing is done."""

    def seek(self, images: int) -> bool:
        """Go on as after so many images of all processes, when others had taken them; False if only nearly so."""


class Batches:
    """Endless batches, the images in a new order every epoch; an epoch is cut to whole batches.

    A batch holds the same images, and each the same number, on any number of processes and in any number of parts:
    the position is one number.

    Args:
        data: the images.
        batch_size: images of a step, over all processes and parts.
        parts: that each process takes its share in, one after another.
        process: the number of this one.
        processes: how many there are.
        seed: of the order.
        loading: further arguments of the DataLoader.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        parts: int = 1,
        process: int = 0,
        processes: int = 1,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        self.data, self.batch_size, self.parts, self.seed = data, batch_size, parts, seed
        self.process, self.processes = process, processes
        self.taken = 0
        self._loading = loading

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Numbered(self.data),
            batch_sampler=self._numbers(),
            collate_fn=_Numbered.collate,
            generator=Generator(),  # it would draw from torch's own, and a resumed training once more
            **self._loading,
        )
        try:
            for batch in loader:
                self.taken += len(batch.images) * self.processes
                yield batch
        except DataError as error:
            raise without_traceback(error) from None

    def state_dict(self) -> dict[str, Any]:
        """Return how many images all processes have taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on with the batch after so many images."""
        return "taken" in state and self.seek(state["taken"])

    def seek(self, images: int) -> bool:
        """Go on with the batch after so many images."""
        self.taken = images
        return True

    def _numbers(self) -> Iterator[list[int]]:
        """Yield this process's parts of all batches from here on, as numbers: ``epoch * images + image``."""
        total = len(self.data)
        share = self.batch_size // self.processes
        epoch, order = -1, torch.empty(0)
        for step in itertools.count(self.taken // self.batch_size):
            now, batch = divmod(step, total // self.batch_size)
            if now != epoch:
                epoch = now
                order = torch.randperm(total, generator=Generator().manual_seed(hash((self.seed, epoch)) % 2**63))
            start = batch * self.batch_size + self.process * share
            for part in order[start : start + share].chunk(self.parts):
                yield (epoch * total + part).tolist()


def without_traceback(error: DataError) -> DataError:
    """Return an error as it was raised, also that of a worker, whose message ends with it after a traceback."""
    return DataError(str(error).rsplit("DataError: ", 1)[-1].strip())


class _Numbered(Dataset[Batch]):
    """Images that are asked for by their numbers in a training."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitems__(self, numbers: list[int]) -> Batch:
        images, labels = self.data.__getitems__([number % len(self.data) for number in numbers])
        return Batch(images, labels, torch.tensor(numbers))

    @staticmethod
    def collate(batch: Batch) -> Batch:
        return batch
