"""Real images from one string: digits, IDX files, a folder of images, parquet files or a dataset on the hub.

Every source is first opened, undecoded, as its splits; the split that is asked for is then decoded and fitted
to `(channels, image_size, image_size)`, once into memory when it is small and image by image otherwise.
"""

import difflib
import glob
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from farmer_examples.torchvision_operators import torchvision

__all__ = ["DataError", "ImageData", "image_files", "load_images", "read_image"]

v2 = torchvision.transforms.v2

UNDERSTOOD = (
    '"digits"; a folder of IDX files (train-images-idx3-ubyte[.gz], ...); a folder of images; '
    'a path or glob of .parquet files; a hub id "owner/name"'
)
TEST_SPLITS = ("test", "validation", "valid", "val")  # the first that a source has is its test split
IMAGE_SUFFIXES = {*ImageFolder.EXTENSIONS, ".avif"}
HIDDEN = re.compile(r"\..*|__MACOSX")
ORDINARY = re.compile(r"Thumbs\.db|desktop\.ini|(README|LICENSE)(\.\w+)?|metadata\.(csv|jsonl|parquet)", re.I)
BLOCK = 64  # images that one thread decodes at a time


class DataError(ValueError):
    """Images that cannot be loaded: the message says what was expected, what came, and where."""


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
            (unlabelled) or with a subfolder for each class, and optionally train/ and test/ (or validation/,
            valid/, val/) above these; a path or glob of parquet files; or a hub id "owner/name".
        split: "train", or "test" for the images that training must not see.
        image_size: Height and width of the images returned, in pixels.
        channels: 1 for grey, 3 for colour.
        class_names: Names in the order of the labels, in place of the source's own.
        test_source: A second source for the test split: its own test split where it has one, else all of it.
        held_out: Where neither source has a test split, the fraction of the images that is kept for it.
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
    splits = _open(source)
    if test_source is not None:
        other = _open(test_source)
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


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the given files, and the images in the given folders.

    Args:
        paths: Files, which are returned whatever their suffix, and folders, which are searched recursively
            for files with the suffix of an image; other files in them, and hidden ones, are passed over.

    Returns:
        The paths in the order given, those within a folder sorted.

    Raises:
        DataError: If a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        images = _walk(path)[0] if path.is_dir() else [path]
        if not path.exists():
            raise DataError(f"{path}: expected an image or a folder of images, found nothing")
        if not images:
            raise DataError(f"{path}: expected images in the folder, found none")
        found.extend(images)
    return found


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
    return _decode_one({"path": str(path), "bytes": None}, str(path), image_size, channels)


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


def _decode_one(encoded: dict[str, Any], name: str, image_size: int, channels: int) -> torch.Tensor:
    """Decode `{"bytes": ..., "path": ...}` to uint8 `(channels, size, size)`; an error says `name`."""
    try:
        image = datasets.Image().decode_example(encoded)
        return _fit(_eight_bit(image, channels), image_size, channels)
    except Exception as error:  # Pillow's plugins raise almost anything on malformed files
        raise DataError(f"{name}: expected a sound image, got {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Split:
    """One split of a source, not yet decoded.

    `images` holds grey levels, uint8 `(total, height, width)`, or a single column of encoded images;
    `labels` is int64 `(total,)`; `rows` says which of them belong to the split. `class_names` is None where
    labels are only numbers, and empty where there are none. `strays` are the files beside the images that are
    no images.
    """

    images: torch.Tensor | datasets.Dataset
    labels: torch.Tensor
    class_names: tuple[str, ...] | None
    origin: str
    rows: torch.Tensor
    strays: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Undecoded:
    """A split that is indexed as if it were a tensor, and decodes what it is asked for."""

    split: _Split
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
            pixels.append(_decode_one(image, name, self.image_size, self.channels))
        return torch.stack(pixels)


def _decode(
    split: _Split,
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


def _hold_out(split: _Split, fraction: float, seed: int) -> dict[str, _Split]:
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


def _agreed_class_names(splits: Sequence[_Split], override: Sequence[str] | None) -> tuple[str, ...]:
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
        if (named and len(override) != len(names)) or not names:
            raise DataError(f"data.class_names: expected {_listed(names)}, got {_listed(tuple(override))}")
        names = tuple(override)
    for split in splits:
        wrong = ((split.labels < -1) | (split.labels >= len(names))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{split.origin}, row {row}: expected a label in 0..{len(names) - 1} for {_listed(names)}, "
                f"or -1 for none, got {int(split.labels[row])}"
            )
    return names


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
            "remove them, or let them be skipped and counted"
        )


# Sources.


def _open(source: str) -> dict[str, _Split]:
    """Open a source as its splits, "train" or "test" or both."""
    path = Path(source).expanduser()
    if source == "digits":
        return _open_digits()
    if path.is_dir():
        if any(path.glob("*-idx[13]-ubyte*")):
            return _open_idx(path)
        return _open_folder(path)
    if path.suffix == ".parquet":
        return {"train": _open_parquet(str(path))}
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.exists():
        return _open_hub(source, hint=_nearest(path))
    raise DataError(f"data.source {source!r} is not understood{_nearest(path)}; expected {UNDERSTOOD}")


def _nearest(path: Path) -> str:
    """Suggest what may have been meant by a path that does not exist."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    known = {"digits": "digits"} | {other.name: str(other) for other in beside}
    close = difflib.get_close_matches(path.name, known, n=1)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def _by_split(names: Collection[str]) -> dict[str, str]:
    """Find, among what a source calls its splits, those for train and test: the train split first."""
    test = [name for name in TEST_SPLITS if name in names]
    return ({"train": "train"} if "train" in names else {}) | ({"test": test[0]} if test else {})


def _all_rows(labels: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(labels))


def _open_digits() -> dict[str, _Split]:
    bunch = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    images = torch.as_tensor(np.round(bunch.images * 255 / 16).astype(np.uint8))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    names = tuple(str(name) for name in bunch.target_names)
    return {
        split: _Split(images, labels, names, "digits", torch.as_tensor(np.sort(chosen)))
        for split, chosen in zip(("train", "test"), rows, strict=True)
    }


def _open_idx(folder: Path) -> dict[str, _Split]:
    """Open the four IDX files, `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`, of MNIST and its kin."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        if not any(folder.glob(f"{prefix}-*-idx[13]-ubyte*")):
            continue
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", dimensions=1).to(torch.int64)
        if len(images) != len(labels) or images.numel() == 0:
            raise DataError(
                f"{folder}: expected as many {prefix} images as labels, and not none, "
                f"got {len(images)} images of {tuple(images.shape[1:])} and {len(labels)} labels"
            )
        fashion = any("fashion" in part.lower() for part in folder.resolve().parts[-2:])  # FashionMNIST/raw
        names = tuple(torchvision.datasets.FashionMNIST.classes) if fashion else None
        splits[split] = _Split(images, labels, names, f"{folder} ({prefix})", _all_rows(labels))
    return splits


def _read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read a uint8 IDX file, plain or gzipped: `0, 0, 8, dimensions`, big-endian sizes, and the values."""
    zipped = not path.exists()
    path = path.with_name(path.name + ".gz") if zipped else path
    if not path.exists():
        raise DataError(f"{path}: expected this file, gzipped or plain, found neither")
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a sound file, got {type(error).__name__}: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise DataError(f"{path}: expected an IDX file of {dimensions}-dimensional uint8, got {content[:start]!r}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: expected {math.prod(shape)} bytes for {shape}, got {len(content) - start}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def _open_folder(folder: Path) -> dict[str, _Split]:
    """Open a folder of images, with or without folders for splits above those for classes."""
    subfolders = _subfolders(folder)
    known = _by_split(subfolders)
    if not known:
        return {"train": _open_classes(folder)}
    images, strays = _walk(folder, recursive=False)
    beside = [
        *(name for name in subfolders if name not in ("train", *TEST_SPLITS)),
        *(path.name for path in images),
    ]
    if beside:
        raise DataError(
            f"{folder}: expected either splits ({', '.join(known.values())}) or classes, found beside them "
            f"{', '.join(beside[:5])}; put classes of these names into a folder train/"
        )
    splits = {split: _open_classes(folder / name) for split, name in known.items()}
    first = next(iter(splits))
    splits[first] = replace(splits[first], strays=(*strays, *splits[first].strays))
    return splits


def _open_classes(folder: Path) -> _Split:
    """Open images that lie in one folder, unlabelled, or under one subfolder for each class.

    datasets' imagefolder guesses: it forgets a single class, splits by the names of files, and passes over
    suffixes that it does not know. Here the folder is taken as it is, and left to imagefolder only where it
    is flat and labels may stand in its metadata file.
    """
    images, strays = _walk(folder)
    classes = _subfolders(folder)
    loose = [path for path in images if path.parent == folder]
    if not images:
        hint = f"; name its parquet files with a glob, {folder}/*.parquet" if any(folder.glob("*.parquet")) else ""
        raise DataError(f"{folder}: expected images, or a subfolder of images for each class, found none{hint}")
    if classes and loose:
        raise DataError(
            f"{folder}: expected all images in subfolders, one a class, or none, found {loose[0]} beside them"
        )
    of_image = [path.relative_to(folder).parts[0] for path in images]
    if empty := [] if loose else sorted(set(classes) - set(of_image)):
        raise DataError(f"{folder / empty[0]}: expected images in the folder of a class, found none")
    if loose and any(folder.glob("metadata.*")):
        rows = _load(str(folder), "imagefolder", data_files={"train": glob.escape(str(folder)) + "/**"}, split="train")
        if len(rows) != len(images):
            raise DataError(f"{folder}: expected metadata for {len(images)} images, found {len(rows)} rows")
        return replace(_split_of(rows, str(folder)), strays=tuple(strays))
    encoded = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in images]}, features=encoded)
    number = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([-1 if loose else number[name] for name in of_image])
    return _Split(rows, labels, tuple(classes), str(folder), _all_rows(labels), tuple(strays))


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not HIDDEN.fullmatch(path.name))


def _walk(folder: Path, recursive: bool = True) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder, and the files that are neither images nor hidden nor ordinary."""
    images, strays = [], []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if recursive and not HIDDEN.fullmatch(name)]
        for path in (Path(parent, name) for name in files if not HIDDEN.fullmatch(name)):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            elif not ORDINARY.fullmatch(path.name):
                strays.append(path)
    return sorted(images), sorted(strays)


def _open_parquet(pattern: str) -> _Split:
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise DataError(f"data.source {pattern!r}: expected parquet files, found none{_nearest(Path(pattern))}")
    for file in files:  # datasets would not say which of them is broken
        try:
            pyarrow.parquet.read_schema(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: expected a parquet file, got {error}") from error
    data_files = {"train": [glob.escape(file) for file in files]}
    return _split_of(_load(pattern, "parquet", data_files=data_files, split="train"), pattern)


def _open_hub(source: str, hint: str) -> dict[str, _Split]:
    try:
        found = _load(source, source)
    except DataError as error:
        raise DataError(f"{error}; there is no such path either{hint}; expected {UNDERSTOOD}") from error
    names = _by_split(found) or ({"train": next(iter(found))} if len(found) == 1 else {})
    splits = {split: _split_of(found[name], f"{source} ({name})") for split, name in names.items()}
    if not splits:
        raise DataError(f"{source}: expected a split train or test, found {', '.join(found)}")
    return splits


def _load(source: str, *args: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset` quietly, and say which source it failed on."""
    with _quiet_datasets():
        try:
            return datasets.load_dataset(*args, **options)
        except Exception as error:  # datasets, the hub and Arrow raise errors of their own without a common base
            cause = error.__cause__ or error
            raise DataError(f"data.source {source!r} cannot be loaded: {type(cause).__name__}: {cause}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error is raised as one
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _split_of(rows: datasets.Dataset, origin: str) -> _Split:
    """Find the columns of images and labels by their features."""

    def encodes_images(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if encodes_images(feature)]
    image = _only(images, ("image", "img"), origin)
    if image is None or len(rows) == 0:
        raise DataError(f"{origin}: expected rows with a column of images, got {len(rows)} rows of {features}")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    common = ("label", "labels", "class", "target", "fine_label")
    label = _only(labels or [name for name in common if name in features], common, origin)
    numbers, names = _labels_in(rows, label, origin)
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return _Split(rows, numbers, names, origin, _all_rows(numbers))


def _only(found: Sequence[str], preferred: Sequence[str], origin: str) -> str | None:
    """Choose the one column found, or the first preferred among several."""
    if len(found) < 2:
        return next(iter(found), None)
    for name in preferred:
        if name in found:
            return name
    raise DataError(f"{origin}: expected one column, or one named {' or '.join(preferred)}, got {', '.join(found)}")


def _labels_in(rows: datasets.Dataset, column: str | None, origin: str) -> tuple[torch.Tensor, tuple[str, ...] | None]:
    """Return labels int64 `(n,)`, -1 for a null, and class names: None where labels are only numbers."""
    if column is None:
        return torch.full((len(rows),), -1), ()
    feature = rows.features[column]
    values = rows.data.column(column).to_pylist()
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        names = tuple(sorted({value for value in values if value is not None}))
        number: Callable[[Any], int] = {name: label for label, name in enumerate(names)}.__getitem__
        return torch.tensor([-1 if value is None else number(value) for value in values]), names
    if not isinstance(feature, datasets.ClassLabel) and not re.match("bool|u?int", getattr(feature, "dtype", "")):
        raise DataError(f"{origin}: expected class labels, integers or strings in column {column!r}, got {feature}")
    numbers = torch.tensor([-1 if value is None else int(value) for value in values])
    return numbers, tuple(feature.names) if getattr(feature, "names", None) else None
