"""What is loaded is what lies in the source: each image with its label, once, or an error that names it."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from farmer_examples.data import DataError, ImageData, load_files, load_images, read_image
from farmer_examples.torchvision_operators import torchvision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

SIZE = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Write an RGB image of noise and return its pixels (channels, height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(seed, size, size, 3)
    PIL.Image.fromarray(pixels).save(path)
    return pixels.transpose(2, 0, 1)


def write_classes(folder: Path, counts: dict[str, int], first: int = 0) -> dict[str, np.ndarray]:
    """Write `counts[name]` images into a subfolder for each class, and return the pixels by path."""
    paths = [folder / name / f"{i:02}.png" for name, count in counts.items() for i in range(count)]
    return {str(path): write_image(path, seed) for seed, path in enumerate(paths, first)}


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def png(seed: int, folder: Path) -> bytes:
    path = folder / "one.png"
    write_image(path, seed)
    return path.read_bytes()


def load(source: object, split: str = "train", **options: object) -> ImageData:
    return load_images(str(source), **{"split": split, "image_size": SIZE, "channels": 3, **options})


def contents(data: ImageData) -> list[bytes]:
    return sorted(data[i][0].numpy().tobytes() for i in range(len(data)))


# The laws of every source.


@pytest.fixture(params=["digits", "idx", "idx.gz", "classes", "splits", "flat", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "source"
    folder.mkdir()
    match request.param:
        case "digits":
            return "digits"
        case "idx" | "idx.gz":
            write_idx(folder, "train", 20, zipped=request.param == "idx.gz")
            write_idx(folder, "t10k", 10, zipped=request.param == "idx.gz")
        case "classes":
            write_classes(folder, {"cat": 7, "dog": 8})
        case "splits":
            write_classes(folder / "train", {"cat": 7, "dog": 8})
            write_classes(folder / "test", {"cat": 2, "dog": 3}, first=15)
        case "flat":
            for i in range(12):
                write_image(folder / f"train_test_{i}.png", i)
        case "parquet":
            return str(write_parquet(folder / "some.parquet", 15))
    return str(folder)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_hold_what_the_items_hold(source: str, channels: int) -> None:
    data = load(source, channels=channels, limit=11)
    loader = DataLoader(data, batch_size=4, collate_fn=data.collate)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert images.shape == (11, channels, SIZE, SIZE)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for i, (image, label) in enumerate(data):
        assert torch.equal(image, images[i])
        assert isinstance(label, int)
        assert label == labels[i]
        assert label in range(len(data.class_names)) if data.class_names else label == -1


@pytest.mark.parametrize("image_size", [SIZE, 5])
@pytest.mark.parametrize("split", ["train", "test"])
def test_lazily_decoded_images_are_those_in_memory(source: str, split: str, image_size: int) -> None:
    in_memory, lazy, checked = (
        load(source, split, image_size=image_size, **options)
        for options in ({}, {"memory_limit": 0}, {"memory_limit": 0, "on_corrupt": "skip"})
    )
    assert isinstance(in_memory.pixels, torch.Tensor)
    assert not isinstance(lazy.pixels, torch.Tensor)
    everything = range(len(in_memory))
    for other in (lazy, checked):
        assert len(other) == len(in_memory)
        assert other.class_names == in_memory.class_names
        for one, same in zip(in_memory.__getitems__(everything), other.__getitems__(everything), strict=True):
            assert torch.equal(one, same)


def test_lazily_decoded_images_reach_the_workers_of_a_loader(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 3})
    data = load(tmp_path, memory_limit=0, held_out=0)
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=data.collate)
    assert torch.equal(torch.cat([images for images, _ in loader]), data.pixels[torch.arange(6)])


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("idx", (20, 10)),
        ("idx.gz", (20, 10)),
        ("classes", (13, 2)),
        ("splits", (15, 5)),
        ("flat", (11, 1)),
        ("parquet", (13, 2)),
    ],
    indirect=["source"],
)
def test_the_splits_of_a_source_share_no_image_and_lose_none(source: str, sizes: tuple[int, int]) -> None:
    train, test = contents(load(source, "train")), contents(load(source, "test"))
    assert (len(train), len(test)) == sizes
    assert len({*train, *test}) == sum(sizes)


def test_the_same_seed_takes_the_same_images_and_another_takes_others(tmp_path: Path) -> None:
    for i in range(40):
        write_image(tmp_path / f"{i}.png", i)
    for options in ({"split": "test", "held_out": 0.25}, {"limit": 10, "held_out": 0}):
        drawn = [contents(load(tmp_path, **options, seed=seed)) for seed in (3, 3, 4)]
        assert [len(images) for images in drawn] == [10, 10, 10]
        assert drawn[0] == drawn[1] != drawn[2]


def test_a_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 30, "dog": 30})
    assert set(load(tmp_path, limit=12).labels.tolist()) == {0, 1}


# Each source.


def test_digits_span_all_levels_and_split_as_scikit_learn_does() -> None:
    train, test = (load("digits", split, channels=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    expected = torch.tensor([round(level * 255 / 16) for level in range(17)])
    assert torch.equal(torch.unique(train.pixels), expected.to(torch.uint8))
    bunch = load_digits()
    assert np.abs(test.labels.bincount().numpy() - np.bincount(bunch.target) / 5).max() < 1
    levels = np.round(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(contents(train) + contents(test)) == sorted(image.tobytes() for image in levels)


def write_idx(folder: Path, prefix: str, count: int, *, zipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Write the images and labels of one split as IDX, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = noise(len(prefix), count, SIZE, SIZE)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_keep_pixels_and_labels(tmp_path: Path, zipped: bool) -> None:
    written = {prefix: write_idx(tmp_path, prefix, 20, zipped=zipped) for prefix in ("train", "t10k")}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = written[prefix]
        data = load(tmp_path, split, channels=1)
        assert torch.equal(data.pixels, torch.from_numpy(images)[:, None])
        assert torch.equal(data.labels, torch.from_numpy(labels).long())
        assert data.class_names == tuple("0123456789")


def test_clothes_are_told_by_their_folder_or_by_class_names(tmp_path: Path) -> None:
    fashion = tuple(torchvision.datasets.FashionMNIST.classes)
    for folder in ("my-Fashion-mnist", "FashionMNIST/raw", "other"):
        write_idx(tmp_path / folder, "train", 20)
    assert load(tmp_path / "my-Fashion-mnist").class_names == fashion
    assert load(tmp_path / "FashionMNIST" / "raw").class_names == fashion
    assert load(tmp_path / "other").class_names == tuple("0123456789")
    assert load(tmp_path / "other", class_names=list(fashion)).class_names == fashion


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_a_truncated_idx_file_is_named(tmp_path: Path, part: str, zipped: bool) -> None:
    write_idx(tmp_path, "train", 20, zipped=zipped)
    path = tmp_path / f"train-{part}-ubyte{'.gz' if zipped else ''}"
    truncate(path)
    with pytest.raises(DataError, match=path.name):
        load(tmp_path)


def test_other_faults_of_idx_files_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 20)
    labels = tmp_path / "train-labels-idx1-ubyte"
    sound = labels.read_bytes()
    labels.write_bytes(sound[:2] + b"\x0d" + sound[3:])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.*uint8"):
        load(tmp_path)
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + b"\0\1\2")
    with pytest.raises(DataError, match=r"20 images.*3 labels"):
        load(tmp_path)
    labels.unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.*expected this file"):
        load(tmp_path)


def test_folders_name_the_classes(tmp_path: Path) -> None:
    written = write_classes(tmp_path, {"dog": 3, "cat": 2, "ant": 1})
    data = load(tmp_path, held_out=0)
    assert data.class_names == ("ant", "cat", "dog")
    assert data.labels.tolist() == [0, 1, 1, 2, 2, 2]
    expected = np.stack([written[path] for path in sorted(written)])
    assert torch.equal(data.pixels, torch.from_numpy(expected))
    assert load(tmp_path, class_names=["a", "c", "d"]).class_names == ("a", "c", "d")


def test_a_single_class_is_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 3})
    assert load(tmp_path).class_names == ("dog",)


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for i in range(4):
        write_image(tmp_path / f"test_{i}.png", i)  # a name that says nothing about splits
    data = load(tmp_path, held_out=0)
    assert (len(data), data.class_names, data.labels.tolist()) == (4, (), [-1] * 4)


def test_a_metadata_file_labels_a_flat_folder(tmp_path: Path) -> None:
    folder = tmp_path / "an [odd] name"
    for i in range(3):
        write_image(folder / f"{i}.png", i)
    (folder / "metadata.csv").write_text("file_name,label\n2.png,dog\n0.png,cat\n1.png,dog\n")
    data = load(folder, held_out=0)
    assert data.class_names == ("cat", "dog")
    of_image = {image.numpy().tobytes(): label for image, label in (data[i] for i in range(3))}
    assert [of_image[read_image(folder / f"{i}.png", SIZE, 3).numpy().tobytes()] for i in range(3)] == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val"])
def test_the_splits_of_a_folder_are_kept(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path / "train", {"cat": 3, "dog": 2})
    test = write_classes(tmp_path / name, {"cat": 1, "dog": 2})
    assert len(load(tmp_path)) == 5
    assert contents(load(tmp_path, "test")) == sorted(pixels.tobytes() for pixels in test.values())


def test_validation_is_held_out_before_a_test_split(tmp_path: Path) -> None:
    """Test splits are published without labels, and the best checkpoint must not be chosen on them."""
    for count, name in enumerate(("train", "test", "validation"), start=2):
        write_classes(tmp_path / name, {"cat": count, "dog": count})
    assert (len(load(tmp_path)), len(load(tmp_path, "test"))) == (4, 8)


def write_parquet(path: Path, count: int, *, named: bool = True, first: int = 0) -> Path:
    """Write PNG bytes of noise, with (`named`) or without the features that datasets keeps in the schema."""
    rows = {
        "picture": [{"bytes": png(first + i, path.parent), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    (path.parent / "one.png").unlink()
    if not named:
        pq.write_table(pa.table(rows), path)
        return path
    label = datasets.ClassLabel(names=["ant", "bee", "cat"])
    features = datasets.Features({"picture": datasets.Image(), "label": label})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("named", [False, True])
def test_parquet_files_keep_pixels_and_labels(tmp_path: Path, named: bool) -> None:
    write_parquet(tmp_path / "train-0.parquet", 4, named=named)
    write_parquet(tmp_path / "train-1.parquet", 5, named=named, first=4)
    data = load(tmp_path / "train-*.parquet", held_out=0)
    expected = np.stack([noise(i, SIZE, SIZE, 3).transpose(2, 0, 1) for i in range(9)])
    assert torch.equal(data.pixels, torch.from_numpy(expected))
    assert data.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert data.class_names == (("ant", "bee", "cat") if named else ("0", "1", "2"))
    assert load(tmp_path / "train-0.parquet", class_names=["x", "y", "z"]).class_names == ("x", "y", "z")


def test_labels_may_be_strings_or_null(tmp_path: Path) -> None:
    images = [png(i, tmp_path) for i in range(4)]
    pq.write_table(pa.table({"img": images, "label": ["dog", None, "cat", "dog"]}), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", held_out=0)
    assert (data.class_names, data.labels.tolist()) == (("cat", "dog"), [1, -1, 0, 1])


def test_a_test_source_gives_the_test_split(tmp_path: Path) -> None:
    train, test = (write_parquet(tmp_path / f"{name}.parquet", 6, first=n) for name, n in (("a", 0), ("b", 9)))
    options = {"test_source": str(test)}
    assert contents(load(train, **options)) == contents(load(train, held_out=0))
    assert contents(load(train, "test", **options)) == contents(load(test, held_out=0))


# Any image becomes 8-bit grey or colour.


def save_and_read(image: PIL.Image.Image, path: Path, channels: int, **options: object) -> torch.Tensor:
    image.save(path, **options)
    return read_image(path, image.width, channels)


def test_modes_keep_their_colours(tmp_path: Path) -> None:
    colours = noise(0, SIZE, SIZE, 3)
    rgb = PIL.Image.fromarray(colours)
    grey = torch.from_numpy(np.asarray(rgb.convert("L")).copy())
    path = tmp_path / "image.png"
    assert torch.equal(save_and_read(rgb, path, 3), torch.from_numpy(colours.transpose(2, 0, 1).copy()))
    assert torch.equal(save_and_read(rgb, path, 1)[0], grey)
    assert torch.equal(save_and_read(rgb.convert("L"), path, 3), grey.expand(3, -1, -1))
    palette = rgb.quantize(16)
    expected = torch.from_numpy(np.asarray(palette.convert("RGB")).transpose(2, 0, 1).copy())
    assert torch.equal(save_and_read(palette, path, 3), expected)
    assert set(save_and_read(rgb.convert("1"), path, 1).unique().tolist()) == {0, 255}
    flat = PIL.Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    pixel = save_and_read(flat, tmp_path / "image.jpg", 3, quality=100)[:, 4, 4].tolist()
    assert np.allclose(pixel, [255, 0, 0], atol=3)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = PIL.Image.new("RGBA", (SIZE, SIZE), (200, 100, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, SIZE, SIZE // 2))
    for image in (rgba, rgba.quantize(4), rgba.convert("LA")):
        pixels = save_and_read(image, tmp_path / "image.png", 3)
        assert (pixels[:, : SIZE // 2] == 255).all()
        assert (pixels[:, SIZE // 2 :] < 255).any()


def test_sixteen_bit_levels_are_scaled(tmp_path: Path) -> None:
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(SIZE, SIZE)
    levels[-1, -1] = 65535
    for suffix in (".png", ".tif"):
        pixels = save_and_read(PIL.Image.fromarray(levels), tmp_path / f"image{suffix}", 1)[0]
        assert torch.equal(pixels, torch.from_numpy(np.round(levels * (255 / 65535)).astype(np.uint8)))
    with pytest.raises(DataError, match="floating-point"):
        save_and_read(PIL.Image.fromarray(levels.astype(np.float32)), tmp_path / "image.tif", 1)


def test_orientation_tags_are_applied(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(noise(0, SIZE, SIZE, 3))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 3
    turned = save_and_read(image, tmp_path / "turned.png", 3, exif=exif)
    assert torch.equal(turned, save_and_read(image, tmp_path / "plain.png", 3).flip(1, 2))


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 96), (5, 9)])
def test_the_centre_is_cropped_at_the_scale_of_the_shorter_side(tmp_path: Path, height: int, width: int) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, max(height, width)), (min(height, width), max(height, width)))
    image = PIL.Image.fromarray((ramp if width > height else ramp.T).astype(np.uint8))
    image.save(tmp_path / "ramp.png")
    pixels = read_image(tmp_path / "ramp.png", 16, 1).float()
    assert pixels.shape == (1, 16, 16)
    along = pixels.mean(1 if width > height else 2)[0]
    step = min(height, width) / 16 / (max(height, width) - 1)  # of the ramp's range, for each pixel of the result
    assert abs(along.mean() - 127.5) < 2
    assert abs((along[-1] - along[0]) / 255 - 15 * step) < 0.03


def test_shrinking_averages_what_it_leaves_out(tmp_path: Path) -> None:
    PIL.Image.fromarray(noise(0, 128, 128)).save(tmp_path / "noise.png")
    pixels = read_image(tmp_path / "noise.png", SIZE, 1).float()
    assert pixels.std() < 15  # 75 before; 4 with the mean over 16 x 16, 57 without it


# Nothing is dropped or replaced unsaid.


def corrupt_jpeg(path: Path) -> None:
    write_image(path, size=64)
    truncate(path)


def not_an_image(path: Path) -> None:
    path.write_text("this is no image")


def empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
@pytest.mark.parametrize("break_file", [corrupt_jpeg, not_an_image, empty])
def test_a_corrupt_file_is_named_or_counted(
    tmp_path: Path, break_file: Callable[[Path], None], memory_limit: int
) -> None:
    sound = write_classes(tmp_path, {"cat": 70, "dog": 2})  # more than are decoded at a time
    break_file(tmp_path / "cat" / "broken.jpg")
    options = {"memory_limit": memory_limit, "held_out": 0}
    with pytest.raises(DataError, match=r"cat/broken\.jpg"):
        contents(load(tmp_path, **options))
    data = load(tmp_path, **options, on_corrupt="skip")
    assert (len(data), data.skipped, data.labels.tolist()) == (72, 1, [0] * 70 + [1] * 2)
    assert contents(data) == sorted(pixels.tobytes() for pixels in sound.values())
    with pytest.raises(DataError, match=r"broken\.jpg"):
        read_image(tmp_path / "cat" / "broken.jpg", SIZE, 3)


def test_a_corrupt_row_is_numbered_or_counted(tmp_path: Path) -> None:
    images = [png(i, tmp_path) for i in range(4)]
    images[2] = images[2][:40]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [*images, None], "label": [0, 1, 2, 3, 4]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, row 2"):
        load(path, held_out=0)
    data = load(path, held_out=0, on_corrupt="skip")
    assert (data.skipped, data.labels.tolist()) == (2, [0, 1, 3])


def test_a_corrupt_parquet_file_is_named_among_others(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", 3)
    truncate(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet"):
        load(tmp_path / "*.parquet")


def test_other_files_are_named_or_counted_and_ordinary_ones_are_not(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 2})
    for name in (".DS_Store", "cat/Thumbs.db", "README.md", "metadata.csv", "cat/.hidden.png"):
        (tmp_path / name).touch()
    data = load(tmp_path, held_out=0)
    assert (len(data), data.skipped, data.class_names) == (5, 0, ("cat", "dog"))
    (tmp_path / "cat" / "notes.txt").write_text("seen from behind")
    with pytest.raises(DataError, match=r"cat/notes\.txt"):
        load(tmp_path)
    assert load(tmp_path, on_corrupt="skip").skipped == 1


def test_a_source_without_a_sound_image_is_an_error(tmp_path: Path) -> None:
    not_an_image(tmp_path / "one.png")
    with pytest.raises(DataError, match="not one of them sound"):
        load(tmp_path, held_out=0, on_corrupt="skip")


def test_folders_that_could_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "mixed", {"cat": 1})
    write_image(tmp_path / "mixed" / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png"):
        load(tmp_path / "mixed")
    write_classes(tmp_path / "split", {"train": 2, "test": 2, "plane": 2})
    with pytest.raises(DataError, match="plane"):
        load(tmp_path / "split")
    write_classes(tmp_path / "hollow", {"cat": 1})
    (tmp_path / "hollow" / "dog").mkdir()
    with pytest.raises(DataError, match="dog"):
        load(tmp_path / "hollow")
    with pytest.raises(DataError, match="expected images"):
        load(tmp_path / "hollow" / "dog")


def test_classes_that_differ_between_train_and_test_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    write_classes(tmp_path / "test", {"cat": 2, "cow": 2})
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"same classes.*dog.*cow"):
            load(tmp_path, split)
    write_image(tmp_path / "flat" / "one.png")
    with pytest.raises(DataError, match=r"same classes.*no classes"):
        load(tmp_path / "train", test_source=str(tmp_path / "flat"))


def test_labels_and_class_names_must_agree(tmp_path: Path) -> None:
    plain = write_parquet(tmp_path / "plain.parquet", 6, named=False)
    with pytest.raises(DataError, match=r"row 2.*0\.\.1.*got 2"):
        load(plain, class_names=["ant", "bee"])
    named = write_parquet(tmp_path / "named.parquet", 6)
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(DataError, match=r"class_names.*ant, bee, cat"):
            load(named, class_names=names)
    pq.write_table(pa.table({"image": [png(0, tmp_path)], "label": [-2]}), tmp_path / "wrong.parquet")
    with pytest.raises(DataError, match="got -2"):
        load(tmp_path / "wrong.parquet", held_out=0)
    pq.write_table(pa.table({"image": [png(0, tmp_path)], "label": [0.5]}), tmp_path / "float.parquet")
    with pytest.raises(DataError, match=r"label.*float"):
        load(tmp_path / "float.parquet", held_out=0)


def test_a_table_without_images_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a cat"], "label": [0]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="caption"):
        load(tmp_path / "text.parquet")


def test_a_misspelt_source_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'digits'.*\.parquet.*owner/name"):
        load("digit")
    write_image(tmp_path / "flowers" / "one.png")
    with pytest.raises(DataError, match=r"did you mean '.*/flowers'"):
        load(tmp_path / "flwoers")
    with pytest.raises(DataError, match="found none"):
        load(tmp_path / "*.parquet")


@pytest.mark.parametrize(
    "options", [{"channels": 2}, {"image_size": 0}, {"limit": 0}, {"held_out": 1.0}, {"held_out": 0.999}]
)
def test_impossible_requests_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    with pytest.raises(DataError):
        load(tmp_path, **options)


def test_without_held_out_images_there_is_no_test_split(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png")
    with pytest.raises(DataError, match="expected a test split"):
        load(tmp_path, "test", held_out=0)


def test_a_source_is_read_and_never_written(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    if source == "digits":
        pytest.skip("lies in no folder of ours")
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    load(source)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    assert capfd.readouterr() == ("", "")


def test_the_hub_is_asked_for_what_looks_like_an_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = {name: write_parquet(tmp_path / f"{name}.parquet", n) for name, n in (("train", 6), ("validation", 4))}
    local = datasets.load_dataset("parquet", data_files={name: str(path) for name, path in parts.items()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or local)
    assert (len(load("owner/some.name")), len(load("owner/some.name", "test"))) == (6, 4)
    assert asked == ["owner/some.name"] * 2

    def unreachable(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"owner/name.*no network.*no such path"):
        load("owner/name")


def test_files_are_found_by_suffix_and_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png"):
        write_image(tmp_path / name)
    given = tmp_path / "elsewhere" / "without_suffix"
    given.parent.mkdir()
    PIL.Image.new("L", (SIZE, SIZE)).save(given, format="png")
    only_some = [given, *(tmp_path / name for name in ("a.JPG", "b.png", "deep"))]
    found, data = load_files(list(map(str, only_some)), image_size=SIZE, channels=3)
    assert found == [given, *(tmp_path / name for name in ("a.JPG", "b.png", "deep/er/c.webp"))]
    images, labels = data.__getitems__(range(4))
    assert labels.tolist() == [-1] * 4
    for path, image in zip(found, images, strict=True):
        assert torch.equal(image, read_image(path, SIZE, 3))
    with pytest.raises(DataError, match="missing"):
        load_files([tmp_path / "missing"], image_size=SIZE, channels=3)
    with pytest.raises(DataError, match="found none"):
        load_files([given.parent], image_size=SIZE, channels=3)


def test_files_that_are_no_sound_images_are_named_or_counted(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        write_image(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: expected a sound image"):
        load_files([tmp_path], image_size=SIZE, channels=1)
    not_an_image(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"found 1 other file\(s\): .*notes\.txt"):
        load_files([tmp_path], image_size=SIZE, channels=1)
    found, data = load_files([tmp_path], image_size=SIZE, channels=1, on_corrupt="skip")
    assert [path.name for path in found] == ["a.png", "c.png"]
    assert (len(data), data.skipped) == (2, 2)
    assert torch.equal(data[1][0], read_image(tmp_path / "c.png", SIZE, 1))
