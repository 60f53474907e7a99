"""Real images, decoded and fitted to `(channels, image_size, image_size)`.

Once into memory when they are few and image by image otherwise. Where they come from is told in `sources.py`.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from farmer_examples.sources import DataError, Split, encoded_files, find_images, open_source
from farmer_examples.torchvision_operators import torchvision

__all__ = [
    "DataError",
    "ImageData",
    "decode_image",
    "load_files",
    "load_images",
    "read_image",
    "renamed_classes",
    "wrong_label",
]

v2 = torchvision.transforms.v2

BLOCK = 64  # images that one thread decodes at a time


class Pixels(Protocol):
    """Indexed by positions `(batch,)`, as a tensor is, and giving uint8 `(batch, channels, size, size)`."""

    def __getitem__(self, positions: torch.Tensor, /) -> torch.Tensor:
        """Return the images at the positions."""


class ImageData(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images of one size with their labels, batched without work in Python when they are in memory.

    Args:
        pixels: uint8 `(n, channels, size, size)`, or anything that is indexed like it.
        labels: int64 `(n,)`; -1 says "no class".
        class_names: The name of each class; empty when the images are unlabelled.
        skipped: How many files and rows of the source were left out, because they are no sound images.

    >>> data = ImageData(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("cat", "dog"))
    >>> images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=2, collate_fn=data.collate)))
    >>> images.shape, labels
    (torch.Size([2, 1, 8, 8]), tensor([0, 1]))
    """

    def __init__(self, pixels: Pixels, labels: torch.Tensor, class_names: Sequence[str] = (), skipped: int = 0) -> None:
        self.pixels = pixels
        self.labels = labels
        self.class_names = tuple(class_names)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images `(batch, channels, size, size)` and labels `(batch,)`: DataLoader calls this."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        labels = self.labels[positions]
        return self.pixels[positions], labels

    def spread(self, count: int) -> list[int]:
        """Return `count` positions evenly spread over the images; those of all where there are fewer."""
        count = min(len(self), count)
        return [i * len(self) // count for i in range(count)]

    def preview(self, count: int) -> torch.Tensor:
        """Return `count` images evenly spread over all, `(count, channels, size, size)`; all where there are fewer."""
        return self.__getitems__(self.spread(count))[0]

    @staticmethod
    def collate(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass on what `__getitems__` has already batched: the `collate_fn` for a DataLoader."""
        return batch


def load_images(
    source: str,
    *,
    split: Literal["train", "test"],
    image_size: int,
    channels: int,
    class_names: Sequence[str] | None = None,
    test_source: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    on_corrupt: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    memory_limit: int = 1 << 30,
) -> ImageData:
    """Load one split of a source of images.

    Every image has its shorter side resized (bicubic, antialiased) and its centre cropped; transparency is
    laid over white, orientation tags are applied and 16-bit grey levels are scaled to 0..255.

    Args:
        source: "digits" (scikit-learn's, 8x8, 1,437 + 360); a folder of IDX files; a folder of images, flat
            (unlabelled) or with a subfolder for each class, and optionally train/ and validation/ (or valid/,
            val/, test/) above these; a path or glob of parquet files or of tar shards in the WebDataset layout; or a
            hub id "owner/name".
        split: "train", or "test" for the images that training must not see.
        image_size: Height and width of the images returned, in pixels.
        channels: 1 for grey, 3 for colour.
        class_names: Names in the order of the labels, in place of the source's own.
        test_source: A second source for the test split, in place of the source's own: the second's test split where
            it has one, else all of it.
        held_out: Where there is neither, the fraction of the images that is kept for it.
        seed: Decides which images are held out, and which are taken under a `limit`.
        on_corrupt: "raise" an error that names a file that is no sound image, or "skip" and count it. To
            count exactly, "skip" decodes a set that exceeds `memory_limit` once through before it returns;
            "raise" finds a corrupt image of such a set only when it is asked for.
        limit: Take at most this many images, drawn with the seed, before those that are corrupt are skipped.
        memory_limit: A split of at most this many bytes, decoded, is decoded once into memory; another is
            decoded image by image as it is asked for, best in the workers of a DataLoader.

    Returns:
        The split, whose `skipped` counts what was left out of it. Other files in a folder from which images
        are held out count as the train split's.

    Raises:
        DataError: If the source is not understood, has no such split, holds a file that is no sound image, or
            if its labels and the class names do not agree.
    """
    if channels not in (1, 3) or image_size < 1 or (limit is not None and limit < 1) or not 0 <= held_out < 1:
        raise DataError(
            "expected channels 1 or 3, image_size and limit of at least 1 and held_out in [0, 1), "
            f"got channels={channels}, image_size={image_size}, limit={limit}, held_out={held_out}"
        )
    splits = open_source(source)
    if test_source is not None:
        other = open_source(test_source)
        splits["test"] = other["test"] if "test" in other else other["train"]
    if on_corrupt == "raise":
        _refuse_strays([stray for opened in splits.values() for stray in opened.strays])
    names = _agreed_class_names(list(splits.values()), class_names)
    if "test" not in splits and held_out > 0:
        splits = _hold_out(splits["train"], held_out, seed)
    if split not in splits:
        raise DataError(f"data.source {source!r}: expected a {split} split, found only {', '.join(splits)}")
    chosen = splits[split]
    if limit is not None and limit < len(chosen.rows):
        order = torch.randperm(len(chosen.rows), generator=torch.Generator().manual_seed(seed))
        chosen = replace(chosen, rows=chosen.rows[order[:limit].sort().values])
    return _decode(chosen, names, image_size, channels, on_corrupt, memory_limit)


def load_files(
    paths: Sequence[str | Path],
    *,
    image_size: int,
    channels: int,
    label: Callable[[Path], int] = lambda path: -1,
    on_corrupt: Literal["raise", "skip"] = "raise",
) -> tuple[list[Path], ImageData]:
    """Load files of images, after decoding each once to know that it is sound; they are not kept in memory.

    Args:
        paths: Files, whatever their suffix, and folders, which are searched recursively for files with the
            suffix of an image; hidden files in them are passed over.
        image_size: Height and width of the images returned, in pixels.
        channels: 1 for grey, 3 for colour.
        label: Gives the label of a file, and is asked for all of them before any is decoded; -1 says "no class".
        on_corrupt: "raise" an error that names a file that is no sound image, or "skip" and count it.

    Returns:
        The paths of the sound images, in the order given, those within a folder sorted; and the images.

    Raises:
        DataError: If a path does not exist, a folder holds no image, or a file is no sound image.
    """
    files: list[Path] = []
    strays: list[Path] = []
    for path in map(Path, paths):
        images, others = find_images(path) if path.is_dir() else ([path], [])
        if not path.exists():
            raise DataError(f"{path}: expected an image or a folder of images, found nothing")
        if not images:
            raise DataError(f"{path}: expected images in the folder, found none")
        files.extend(images)
        strays.extend(others)
    labels = torch.tensor([label(path) for path in files])
    if on_corrupt == "raise":
        _refuse_strays(strays)
    split = Split(encoded_files(files), labels, (), "the given files", torch.arange(len(files)))
    undecoded = _Undecoded(split, image_size, channels)
    sound = _decode_all(undecoded, None, on_corrupt)
    undecoded = replace(undecoded, split=replace(split, rows=sound))
    skipped = len(strays) + len(files) - len(sound)
    return [files[row] for row in sound.tolist()], ImageData(undecoded, labels[sound], (), skipped)


def read_image(path: str | Path, image_size: int, channels: int) -> torch.Tensor:
    """Read one image as `load_images` does.

    Args:
        path: A file in any format that Pillow reads.
        image_size: Height and width of the image returned, in pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        uint8 `(channels, image_size, image_size)`.

    Raises:
        DataError: If the file does not exist or is no sound image.
    """
    return decode_image({"path": str(path), "bytes": None}, str(path), image_size, channels)


# From encoded images to pixels.


def _fit(pixels: torch.Tensor, image_size: int, channels: int) -> torch.Tensor:
    """Resize, crop and repeat grey, from `(..., 1 or channels, h, w)` to `(..., channels, size, size)`."""
    bicubic = v2.InterpolationMode.BICUBIC
    pixels = v2.functional.resize(pixels, [image_size], interpolation=bicubic, antialias=True)
    pixels = v2.functional.center_crop(pixels, [image_size, image_size])
    return pixels.expand(*pixels.shape[:-3], channels, image_size, image_size).contiguous()


def _eight_bit(image: PIL.Image.Image, channels: int) -> torch.Tensor:
    """Convert an image of any mode to uint8 `(channels, height, width)`."""
    if image.mode == "F":
        raise ValueError("expected whole grey levels, got floating-point pixels, which have no known range")
    if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit levels clips them at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"expected grey levels 0..65535, got {levels.min()}..{levels.max()}")
        image = PIL.Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return v2.functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))


def decode_image(encoded: dict[str, Any], name: str, image_size: int, channels: int) -> torch.Tensor:
    """Decode `{"bytes": ..., "path": ...}` to uint8 `(channels, size, size)`; an error says `name`."""
    try:
        image = datasets.Image().decode_example(encoded)
        return _fit(_eight_bit(image, channels), image_size, channels)
    except Exception as error:  # Pillow's plugins raise almost anything on malformed files
        raise DataError(f"{name}: expected a sound image, got {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Undecoded:
    """A split that is indexed as if it were a tensor, and decodes what it is asked for."""

    split: Split
    image_size: int
    channels: int

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        rows = self.split.rows[positions]
        if isinstance(self.split.images, torch.Tensor):
            return _fit(self.split.images[rows][:, None], self.image_size, self.channels)
        (encoded,) = self.split.images[rows.tolist()].values()
        pixels = []
        for row, image in zip(rows.tolist(), encoded, strict=True):
            a_file = image is not None and image["bytes"] is None and image["path"] is not None
            name = image["path"] if a_file else f"{self.split.origin}, row {row}"
            pixels.append(decode_image(image, name, self.image_size, self.channels))
        return torch.stack(pixels)


def _decode(
    split: Split,
    class_names: tuple[str, ...],
    image_size: int,
    channels: int,
    on_corrupt: Literal["raise", "skip"],
    memory_limit: int,
) -> ImageData:
    """Decode a split into memory where it fits, and otherwise only as far as `on_corrupt` demands."""
    undecoded = _Undecoded(split, image_size, channels)
    shape = (len(split.rows), channels, image_size, image_size)
    in_memory = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= memory_limit else None
    sound = torch.arange(len(split.rows))
    if in_memory is not None or on_corrupt == "skip":
        sound = _decode_all(undecoded, in_memory, on_corrupt)
    skipped = len(split.strays) + len(split.rows) - len(sound)
    labels = split.labels[split.rows[sound]]
    if in_memory is None:
        undecoded = replace(undecoded, split=replace(split, rows=split.rows[sound]))
        return ImageData(undecoded, labels, class_names, skipped)
    return ImageData(in_memory[sound] if skipped else in_memory, labels, class_names, skipped)


def _decode_all(undecoded: _Undecoded, out: torch.Tensor | None, on_corrupt: Literal["raise", "skip"]) -> torch.Tensor:
    """Decode every image, into `out` where given, and return the positions `(sound,)` of the sound ones."""

    def decode(positions: torch.Tensor) -> torch.Tensor:
        try:
            pixels = undecoded[positions]
        except DataError:
            if on_corrupt == "raise":
                raise
            if len(positions) == 1:
                return positions[:0]
            return torch.cat([decode(position) for position in positions.split(1)])
        if out is not None:
            out[positions] = pixels
        return positions

    total, origin = len(undecoded.split.rows), undecoded.split.origin
    # Pillow and torch release the interpreter lock while they decode and resize.
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads,
        tqdm(total=total, desc=f"decoding {origin}", unit="image", delay=2, disable=None) as progress,
    ):
        blocks = torch.arange(total).split(BLOCK)
        sound = []
        for block, positions in zip(blocks, threads.map(decode, blocks), strict=True):
            sound.append(positions)
            progress.update(len(block))
    if not any(map(len, sound)):
        raise DataError(f"{origin}: expected images, found {total} and not one of them sound")
    return torch.cat(sound)


# Splits and classes.


def _hold_out(split: Split, fraction: float, seed: int) -> dict[str, Split]:
    """Keep a seeded fraction of the rows, at least one, for the test split."""
    total = len(split.rows)
    count = max(1, round(total * fraction))
    if count >= total:
        raise DataError(f"{split.origin}: expected enough images to hold out {fraction:.0%}, found {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return {
        "train": replace(split, rows=split.rows[order[count:].sort().values]),
        "test": replace(split, rows=split.rows[order[:count].sort().values], strays=()),
    }


def _agreed_class_names(splits: Sequence[Split], override: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names that all splits share, after checking every label against them."""
    named = {split.class_names: split for split in splits if split.class_names is not None}
    if len(named) > 1 or (() in named and len(splits) > 1 and any(s.class_names is None for s in splits)):
        found = "; ".join(f"{s.origin} has {_listed(s.class_names)}" for s in splits)
        raise DataError(f"expected the same classes in train and test: {found}")
    if named:
        (names,) = named
    else:
        names = tuple(str(label) for label in range(1 + max(int(split.labels.max()) for split in splits)))
    if override is not None:
        names = renamed_classes(names if named or not names else None, override)
    for split in splits:
        wrong = ((split.labels < -1) | (split.labels >= len(names))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise wrong_label(f"{split.origin}, row {row}", names, int(split.labels[row]))
    return names


def renamed_classes(names: tuple[str, ...] | None, override: Sequence[str]) -> tuple[str, ...]:
    """Return the names in place of a source's own; of those that are only numbers, None, there may be any number."""
    if names is not None and (len(override) != len(names) or not names):
        raise DataError(f"data.class_names: expected {_listed(names)}, got {_listed(tuple(override))}")
    return tuple(override)


def wrong_label(where: str, names: tuple[str, ...], label: int | str) -> DataError:
    """Return the error for a label that is none of the classes."""
    return DataError(
        f"{where}: expected a label in 0..{len(names) - 1} for {_listed(names)}, or -1 for none, got {label!r}"
    )


def _listed(names: Sequence[str] | None) -> str:
    """Say class names briefly."""
    if names is None:
        return "numbered classes"
    if not names:
        return "no classes"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{len(names)} classes ({shown})"


def _refuse_strays(strays: Sequence[Path]) -> None:
    if strays:
        shown = ", ".join(map(str, strays[:5])) + (", ..." if len(strays) > 5 else "")
        raise DataError(
            f"expected only images, found {len(strays)} other file(s): {shown}; "
            "remove them, or let them be skipped and counted: on_corrupt=skip"
        )
