"""What a source of images is: digits, IDX files, a folder of images, parquet files, tar shards or a hub's data set.

Each is opened, undecoded, as its splits.
"""

import difflib
import glob
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from farmer_examples.torchvision_operators import torchvision

__all__ = [
    "DataError",
    "Split",
    "class_names_in",
    "encoded_files",
    "find_columns",
    "find_images",
    "open_source",
    "open_stream",
    "reading",
]

UNDERSTOOD = (
    '"digits"; a folder of IDX files (train-images-idx3-ubyte[.gz], ...); a folder of images; '
    'a path or glob of .parquet files or of .tar shards in the WebDataset layout; a hub id "owner/name"'
)
STREAMED = (
    "a path or glob of .parquet files or of .tar shards in the WebDataset layout; "
    'a hub id "owner/name", or a folder of such files laid out like a data set on the hub'
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # as datasets calls those that read the files
# The first of these that a source has is held out. The validation split comes first: the best checkpoint is chosen on
# it, and large data sets publish their test split without labels.
TEST_SPLITS = ("validation", "valid", "val", "test")
IMAGE_SUFFIXES = {*ImageFolder.EXTENSIONS, ".avif"}
HIDDEN = re.compile(r"\..*|__MACOSX")
ORDINARY = re.compile(r"Thumbs\.db|desktop\.ini|(README|LICENSE)(\.\w+)?|metadata\.(csv|jsonl|parquet)", re.I)


class DataError(ValueError):
    """Images that cannot be loaded: the message says what was expected, what came, and where."""


@dataclass(frozen=True)
class Split:
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


def open_source(source: str) -> dict[str, Split]:
    """Open a source as its splits, "train" or "test" or both."""
    path = Path(source).expanduser()
    if source == "digits":
        return _open_digits()
    if path.is_dir():
        if any(path.glob("*-idx[13]-ubyte*")):
            return _open_idx(path)
        return _open_folder(path)
    if path.suffix in BUILDERS:
        return {"train": _open_shards(str(path))}
    if HUB_ID.fullmatch(source) and not path.exists():
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


def _open_digits() -> dict[str, Split]:
    bunch = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    images = torch.as_tensor(np.round(bunch.images * 255 / 16).astype(np.uint8))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    names = tuple(str(name) for name in bunch.target_names)
    return {
        split: Split(images, labels, names, "digits", torch.as_tensor(np.sort(chosen)))
        for split, chosen in zip(("train", "test"), rows, strict=True)
    }


def _open_idx(folder: Path) -> dict[str, Split]:
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
        splits[split] = Split(images, labels, names, f"{folder} ({prefix})", _all_rows(labels))
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


def _open_folder(folder: Path) -> dict[str, Split]:
    """Open a folder of images, with or without folders for splits above those for classes."""
    subfolders = _subfolders(folder)
    known = _by_split(subfolders)
    if not known:
        return {"train": _open_classes(folder)}
    images, strays = find_images(folder, recursive=False)
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


def _open_classes(folder: Path) -> Split:
    """Open images that lie in one folder, unlabelled, or under one subfolder for each class.

    datasets' imagefolder guesses: it forgets a single class, splits by the names of files, and passes over
    suffixes that it does not know. Here the folder is taken as it is, and left to imagefolder only where it
    is flat and labels may stand in its metadata file.
    """
    images, strays = find_images(folder)
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
    number = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([-1 if loose else number[name] for name in of_image])
    return Split(encoded_files(images), labels, tuple(classes), str(folder), _all_rows(labels), tuple(strays))


def encoded_files(paths: Sequence[Path]) -> datasets.Dataset:
    """Return image files as rows, unread."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": [str(path) for path in paths]}, features=features)


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not HIDDEN.fullmatch(path.name))


def find_images(folder: Path, recursive: bool = True) -> tuple[list[Path], list[Path]]:
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


def _find_shards(pattern: str) -> list[str]:
    """Return the parquet files or tar shards that a path or glob names."""
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        kind, hint = Path(pattern).suffix[1:], _nearest(Path(pattern))
        raise DataError(f"data.source {pattern!r}: expected {kind} files, found none{hint}")
    return files


def _open_shards(pattern: str) -> Split:
    builder, files = BUILDERS[Path(pattern).suffix], _find_shards(pattern)
    for file in files if builder == "parquet" else ():  # datasets would not say which of them is broken
        try:
            pyarrow.parquet.read_schema(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: expected a parquet file, got {error}") from error
    data_files = {"train": [glob.escape(file) for file in files]}
    rows = _load(pattern, builder, data_files=data_files, split="train")
    return _split_of(rows.flatten() if isinstance(rows.features.get("json"), dict) else rows, pattern)


def _open_hub(source: str, hint: str) -> dict[str, Split]:
    try:
        found = _load(source, source)
    except DataError as error:
        raise DataError(f"{error}; there is no such path either{hint}; expected {UNDERSTOOD}") from error
    names = _by_split(found) or ({"train": next(iter(found))} if len(found) == 1 else {})
    splits = {split: _split_of(found[name], f"{source} ({name})") for split, name in names.items()}
    if not splits:
        raise DataError(f"{source}: expected a split train or test, found {', '.join(found)}")
    return splits


def open_stream(source: str) -> tuple[datasets.IterableDataset, list[str]]:
    """Open the train split of a source to be read shard by shard, and list its files, of which each is a shard."""
    path = Path(source).expanduser()
    if path.suffix in BUILDERS and not path.is_dir():
        files = _find_shards(str(path))
        with reading(files[0]):  # the only one that is looked into
            data_files = {"train": [glob.escape(file) for file in files]}
            builder = datasets.load_dataset_builder(BUILDERS[path.suffix], data_files=data_files)
            return builder.as_streaming_dataset("train"), files
    refusal = DataError(f"data.source {source!r} cannot be streamed{_nearest(path)}; expected {STREAMED}")
    laid_out = path.is_dir() and any(file.suffix in BUILDERS for file in path.rglob("*"))
    if not laid_out and (path.exists() or not HUB_ID.fullmatch(source)):
        raise refusal
    with reading(f"data.source {source!r}"):
        builder = datasets.load_dataset_builder(str(path) if laid_out else source)
        found = builder.as_streaming_dataset()
    if builder.name not in BUILDERS.values():
        raise refusal
    if "train" not in found and len(found) > 1:
        raise DataError(f"{source}: expected a split train, found {', '.join(found)}")
    split = "train" if "train" in found else next(iter(found))
    return found[split], list(builder.config.data_files[split])


def _load(source: str, *args: Any, **options: Any) -> Any:
    with reading(f"data.source {source!r}"):
        return datasets.load_dataset(*args, **options)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Keep datasets quiet, and say what it failed to read."""
    with _quiet_datasets():
        try:
            yield
        except Exception as error:  # datasets, the hub and Arrow raise errors of their own without a common base
            cause = error.__cause__ or error
            raise DataError(f"{what} cannot be loaded: {type(cause).__name__}: {cause}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error is raised as one
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell the hub of every local file
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _split_of(rows: datasets.Dataset, origin: str) -> Split:
    image, label = find_columns(rows.features, origin)
    if len(rows) == 0:
        raise DataError(f"{origin}: expected rows with a column of images, got none of {rows.features}")
    numbers, names = _labels_in(rows, label, origin)
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Split(rows, numbers, names, origin, _all_rows(numbers))


def find_columns(features: Mapping[str, Any], origin: str) -> tuple[str, str | None]:
    """Find the columns of images and of labels, if there are any, by their features."""

    def encodes_images(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if encodes_images(feature)]
    image = _only(images, ("image", "img", "jpg", "jpeg", "png", "webp"), origin)
    if image is None:
        raise DataError(f"{origin}: expected a column of images, got {dict(features)}")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    common = ("label", "labels", "class", "target", "fine_label", "cls", "json.label")
    return image, _only(labels or [name for name in common if name in features], common, origin)


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
    names = class_names_in(rows.features, column, origin)
    values = rows.data.column(column).to_pylist()
    if rows.features[column].dtype in ("string", "large_string"):
        names = tuple(sorted({value for value in values if value is not None}))
        number: Callable[[Any], int] = {name: label for label, name in enumerate(names)}.__getitem__
        return torch.tensor([-1 if value is None else number(value) for value in values]), names
    return torch.tensor([-1 if value is None else int(value) for value in values]), names


def class_names_in(features: Mapping[str, Any], column: str, origin: str) -> tuple[str, ...] | None:
    """Return the class names that the feature of a column of labels has: None for numbers and words."""
    feature = features[column]
    if not isinstance(feature, datasets.ClassLabel) and not re.match(
        "bool|u?int|(large_)?string", getattr(feature, "dtype", "")
    ):
        raise DataError(f"{origin}: expected class labels, integers or strings in column {column!r}, got {feature}")
    return tuple(feature.names) if getattr(feature, "names", None) else None
