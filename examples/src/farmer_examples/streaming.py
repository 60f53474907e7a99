"""Training images read shard by shard, for sets too large to be opened at once: parquet files, tar shards, the hub.

Each worker of each process reads a stream of its own, whose course follows from the seed and a few whole numbers; so a
training is resumed at the very image.
"""

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from farmer_examples.batches import Batch, without_traceback
from farmer_examples.data import decode_image, renamed_classes, wrong_label
from farmer_examples.sources import DataError, class_names_in, find_columns, open_stream, reading

__all__ = ["Stream", "StreamLoader"]

READ = 64  # rows that datasets converts at a time
BARREN = 10  # epochs in a row without a row for a stream, after which there will be none

Example: TypeAlias = tuple[Tensor, int, int, int]
"""An image, its label, its draw and the number of images skipped before it."""


@dataclass
class _Position:
    """How far a stream has come: ``taken`` images of the block that starts at a row of a shard of an epoch's."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0
    images: int = 0
    """Yielded since the first epoch."""


@dataclass(frozen=True)
class _Row:
    """An image, not yet decoded; ``shard`` counts those that a stream reads in an epoch, ``row`` those of the shard."""

    shard: int
    row: int
    where: str
    image: Any
    label: int | str | None


class Stream(torch.utils.data.IterableDataset[Example]):
    """The training images of a source without end, or the share of one process in them.

    Every epoch, the shards (files) are put in a new order and dealt out to all workers of all processes; where there
    are fewer shards than workers, some share one, row by row. A worker shuffles what it reads in blocks, and goes on
    with the next epoch without waiting for any other.

    Yields:
        The image, uint8 `(channels, image_size, image_size)`; its label, -1 for "no class"; its draw, a number that no
        other use of an image in the training has, in any process and epoch; and how many images were skipped since the
        one before.

    Args:
        source: A path or glob of parquet files, or of tar shards in the WebDataset layout, with the label under cls or,
            in json, under "label"; a hub id "owner/name", or a folder laid out like a data set on the hub.
        image_size: Height and width of the images returned, in pixels; they are fitted as `load_images` does.
        channels: 1 for grey, 3 for colour.
        class_names: Names in the order of the labels, in place of the source's own; needed where it has none.
        on_corrupt: "raise" an error that names the row of an image that is not sound, or "skip" and count it.
        seed: Decides the order.
        block: How many images, encoded, a worker holds in memory and shuffles.

    Raises:
        DataError: If the source cannot be streamed or read, or its labels and the class names do not agree.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        channels: int,
        class_names: Sequence[str] | None = None,
        on_corrupt: Literal["raise", "skip"] = "raise",
        seed: int = 0,
        block: int = 4096,
    ) -> None:
        rows, self._files = open_stream(source)
        features = dict(rows.features or {})
        if isinstance(features.get("json"), dict):
            features |= {f"json.{name}": feature for name, feature in features["json"].items()}
        image, label = find_columns(features, source)
        names = () if label is None else class_names_in(features, label, source)
        if class_names is not None:
            names = renamed_classes(names, class_names)
        if names is None:
            raise DataError(f"{source}: expected class names, found labels in column {label!r}: set data.class_names")
        self.class_names = names
        self._label = label.split(".") if label == "json.label" else [label] if label else []
        self._rows = rows.select_columns([image, *self._label[:1]]).cast_column(image, datasets.Image(decode=False))
        self._image = image
        self._source = source
        self._image_size, self._channels = image_size, channels
        self._on_corrupt, self._seed, self._block = on_corrupt, seed, block
        self.skipped = 0  # nothing is known before it is read
        self.process, self.processes = 0, 1
        self._position = _Position()

    def share(self, process: int, processes: int) -> "Stream":
        """Return the part of one process of several, from its start."""
        part = copy.copy(self)
        part.process, part.processes, part._position = process, processes, _Position()
        return part

    def restart(self, images: int) -> None:
        """Let the next iteration begin an order that none before it had, after so many images of other shares."""
        self._position = _Position(epoch=images, images=images)

    def state_dict(self) -> dict[str, int]:
        """Return the position after the image that was yielded last."""
        return asdict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from a position."""
        self._position = _Position(**state)

    def preview(self, count: int) -> Tensor:
        """Return the first sound images of the source, uint8 `(count, channels, size, size)`, or all if they are fewer.

        They are the same on every process.
        """
        rows = (row for shard in range(self._rows.num_shards) for row in self._read(shard, 0))
        images = list(islice((image for row in rows if (image := self._decode(row)) is not None), count))
        if not images:
            raise DataError(f"{self._source}: expected images, found not one that is sound")
        return torch.stack(images)

    def __iter__(self) -> Iterator[Example]:
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        streams, stream = self.processes * workers, self.process * workers + number
        at = self._position
        fruitful = at.images > 0  # a position that was saved is behind an image of its epoch
        skipped = barren = 0
        while barren < BARREN:
            rows = self._rows_of(stream, streams, at)
            while block := list(islice(rows, self._block)):
                at.shard, at.row = block[0].shard, block[0].row
                generator = np.random.default_rng([self._seed, at.epoch, stream, at.shard, at.row])
                for i in generator.permutation(len(block))[at.taken :]:
                    at.taken += 1
                    label, image = self._number(block[i]), self._decode(block[i])
                    if image is None:
                        skipped += 1
                        continue
                    fruitful = True
                    at.images += 1
                    yield image, label, (at.images - 1) * streams + stream, skipped
                    skipped = 0
                at.taken = 0
                block.clear()  # before the next is read beside it
            if skipped and not fruitful:
                raise DataError(f"{self._source}: expected images, found {skipped} and not one of them sound")
            barren = 0 if fruitful else barren + 1
            fruitful = False
            at.epoch, at.shard, at.row = at.epoch + 1, 0, 0
        raise DataError(f"{self._source}: expected an image for each of {streams} workers, found fewer")

    def _rows_of(self, stream: int, streams: int, start: _Position) -> Iterator[_Row]:
        """Read one stream's part of an epoch, from a position on."""
        shards = self._rows.num_shards
        shuffled = np.random.default_rng([self._seed, start.epoch]).permutation(shards)
        sharing, turn = len(range(stream % shards, streams, shards)), stream // shards
        dealt = shuffled[stream % shards :: streams].tolist()
        first = (start.shard, start.row)
        for number, shard in islice(enumerate(dealt), start.shard, None):
            for row in self._read(shard, number):
                if row.row % sharing == turn and (number, row.row) >= first:
                    yield row

    def _read(self, shard: int, number: int) -> Iterator[_Row]:
        """Read a shard, which a stream counts by the number."""
        file = self._files[shard]
        # Unlike the iterator of datasets, iter() does not deal out shards to workers, which has been done.
        batches = self._rows.shard(self._rows.num_shards, shard).iter(READ)
        count = 0
        while True:
            with reading(file):
                batch = next(batches, None)
            if batch is None:
                return
            labels = batch[self._label[0]] if self._label else repeat(None)
            for image, label in zip(batch[self._image], labels, strict=False):
                for key in self._label[1:]:
                    label = label and label[key]
                yield _Row(number, count, f"{file}, row {count}", image, label)
                count += 1

    def _decode(self, row: _Row) -> Tensor | None:
        try:
            return decode_image(row.image, row.where, self._image_size, self._channels)
        except DataError:
            if self._on_corrupt == "raise":
                raise
            return None

    def _number(self, row: _Row) -> int:
        """Return the label of a row, checked against the classes."""
        label = -1 if row.label is None else row.label
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, str) or not -1 <= label < len(self.class_names):
            raise wrong_label(row.where, self.class_names, label)
        return int(label)


class StreamLoader:
    """Batches of a stream, decoded in workers and endless; to be iterated once.

    Args:
        stream: The share of this process.
        batch_size: Images in every batch.
        workers: Processes that read and decode; none leaves it to this one.
        pin_memory: Whether the batches lie in memory from which a GPU copies fast.
        worker_init_fn: Called in each worker with its number.

    Raises:
        DataError: If the stream raises it, in a worker or not.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        workers: int,
        pin_memory: bool,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        self._stream = stream
        self._share = {"process": stream.process, "processes": stream.processes, "workers": workers}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # which torchdata still calls
            self._loader = StatefulDataLoader(
                stream,
                batch_size=batch_size,
                num_workers=workers,
                collate_fn=_collate,
                pin_memory=pin_memory,
                worker_init_fn=worker_init_fn,
                snapshot_every_n_steps=1,
                generator=torch.Generator(),  # it would draw from torch's own, and a resumed training once more
            )

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._loader
        except DataError as error:
            traceback.clear_frames(error.__traceback__)  # in a cycle with the workers, it would delay their end
            raise without_traceback(error) from None
        finally:
            self._loader.load_state_dict(self._loader.state_dict())  # which also lets the workers go

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last, whatever workers have read beyond it."""
        return {**self._share, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Let the iteration start from a position that the same share had, in as many workers; False for another's."""
        if self._share != {key: state.get(key) for key in self._share}:
            return False
        self._loader.load_state_dict(state["loader"])
        return True

    def seek(self, images: int) -> bool:
        """Begin an order of its own, since no position of another number of processes or workers fits: False."""
        self._stream.restart(images)
        return False


def _collate(examples: list[Example]) -> Batch:
    images, labels, draws, skipped = zip(*examples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(draws), sum(skipped))
