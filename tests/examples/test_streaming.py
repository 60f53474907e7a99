"""A stream gives every image once an epoch over all processes and workers, shuffled, and goes on where it was left."""

import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from farmer_examples.config import load_config
from farmer_examples.data import load_images
from farmer_examples.sources import DataError
from farmer_examples.storage import checkpoints
from farmer_examples.streaming import Stream, StreamLoader
from farmer_examples.training import train
from safetensors.torch import load_file

SIZE = 4
NAMES = ["ant", "bee", "cat"]
KINDS = ["parquet", "tar", "json", "hub"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(identity: int) -> bytes:
    """Encode an image whose every level is its identity."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((SIZE, SIZE, 3), identity, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: Sequence[bytes], labels: Sequence[int], *, named: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = datasets.ClassLabel(names=NAMES) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = [{"image": {"bytes": image, "path": None}, "label": n} for image, n in zip(images, labels, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path, row_group_size=3)


def write_tar(path: Path, images: Sequence[bytes], labels: Sequence[int], *, label_in: str = "cls") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            encoded = str(label) if label_in == "cls" else json.dumps({"caption": "an insect", "label": label})
            for suffix, content in (("png", image), (label_in, encoded.encode())):
                member = tarfile.TarInfo(f"{path.stem}-{i:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, counts: Sequence[int], kind: str = "parquet", corrupt: Sequence[int] = ()) -> str:
    """Write shards of so many images, numbered through and labelled by the number modulo 3; return the source."""
    numbers = iter(range(sum(counts)))
    for shard, count in enumerate(counts):
        identities = list(itertools.islice(numbers, count))
        images = [b"no image" if i in corrupt else png(i) for i in identities]
        labels = [i % 3 for i in identities]
        if kind in ("tar", "json"):
            write_tar(folder / f"{shard:02}.tar", images, labels, label_in="json" if kind == "json" else "cls")
        elif kind == "hub":
            write_parquet(folder / "data" / f"train-{shard:05}-of-{len(counts):05}.parquet", images, labels)
        else:
            write_parquet(folder / f"{shard:02}.parquet", images, labels)
    return {"hub": str(folder), "parquet": str(folder / "*.parquet")}.get(kind, str(folder / "*.tar"))


def make(source: object, **options: object) -> Stream:
    return Stream(str(source), **{"image_size": SIZE, "channels": 3, "class_names": NAMES, "block": 5, **options})


def epochs(stream: Stream, count: int) -> list[list[int]]:
    """Return the identities in each of the first epochs of a stream, after checking the images and labels."""
    found: list[list[int]] = [[] for _ in range(count)]
    for image, label, _, _ in stream:
        epoch = stream.state_dict()["epoch"]
        if epoch >= count:
            return found
        identity = int(image[0, 0, 0])
        assert torch.equal(image, torch.full((3, SIZE, SIZE), identity, dtype=torch.uint8))
        assert label == identity % 3
        found[epoch].append(identity)
    raise AssertionError("a stream has no end")


def be_worker(monkeypatch: pytest.MonkeyPatch, number: int, workers: int) -> None:
    worker = SimpleNamespace(id=number, num_workers=workers)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)


# The split.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("processes", "workers", "shards"), [(1, 1, 3), (2, 2, 8), (2, 2, 3), (2, 3, 7), (3, 1, 2), (4, 2, 1)]
)
def test_every_image_comes_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, processes: int, workers: int, shards: int
) -> None:
    counts = [4 + shard % 5 for shard in range(shards)] if shards > 1 else [20]
    stream = make(write_shards(tmp_path, counts, kind))
    found = []
    for process, worker in itertools.product(range(processes), range(workers)):
        be_worker(monkeypatch, worker, workers)
        found.append(epochs(stream.share(process, processes), 3))
    for parts in zip(*found, strict=True):
        assert Counter(itertools.chain(*parts)) == Counter(range(sum(counts)))


def test_no_two_uses_of_an_image_share_a_draw(tmp_path: Path) -> None:
    stream = make(write_shards(tmp_path, [5, 6, 7]))
    draws: list[int] = []
    for process in range(2):
        loader = StreamLoader(stream.share(process, 2), batch_size=4, workers=2, pin_memory=False)
        for _, _, drawn, _ in itertools.islice(loader, 12):
            draws.extend(drawn.tolist())
    assert len(set(draws)) == len(draws) == 2 * 12 * 4


def test_a_loader_gives_the_streams_of_its_workers_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make(write_shards(tmp_path, [5, 6, 7]))
    loader = StreamLoader(stream.share(1, 2), batch_size=4, workers=2, pin_memory=False)
    batches = list(itertools.islice(loader, 8))
    for images, labels, draws, skipped in batches:
        assert (images.shape, images.dtype) == ((4, 3, SIZE, SIZE), torch.uint8)
        assert (labels.shape, labels.dtype, draws.shape, draws.dtype) == ((4,), torch.int64) * 2
        assert skipped == 0
    for number in range(2):
        be_worker(monkeypatch, number, 2)
        examples = list(itertools.islice(stream.share(1, 2), 16))
        images, labels, draws = (torch.cat(parts) for parts in list(zip(*batches[number::2], strict=True))[:3])
        assert torch.equal(images, torch.stack([image for image, *_ in examples]))
        assert list(zip(labels.tolist(), draws.tolist(), strict=True)) == [example[1:3] for example in examples]


def test_fewer_images_than_workers_are_an_error(tmp_path: Path) -> None:
    source = write_shards(tmp_path, [2])
    with pytest.raises(DataError, match="each of 3 workers"):
        next(iter(make(source).share(2, 3)))


# The order.


def test_the_seed_and_the_epoch_decide_the_order(tmp_path: Path) -> None:
    source = write_shards(tmp_path, [9] * 6)
    one, same, other = (epochs(make(source, seed=seed), 3) for seed in (1, 1, 2))
    assert one == same
    assert len({tuple(order) for order in [*one, *other]}) == 6
    assert list(range(54)) not in [*one, *other]


def test_shards_are_shuffled_and_images_within_blocks(tmp_path: Path) -> None:
    source = write_shards(tmp_path, [9] * 6)
    in_order = epochs(make(source, block=1), 3)
    shards = [[i // 9 for i in order[::9]] for order in in_order]
    assert len({tuple(order) for order in [*shards, range(6)]}) == 4
    for order, dealt in zip(in_order, shards, strict=True):
        assert order == [9 * shard + row for shard in dealt for row in range(9)]
    permutations = []
    for order, shuffled in zip(in_order, epochs(make(source, block=12), 3), strict=True):
        for block in (slice(start, start + 12) for start in range(0, 54, 12)):
            assert sorted(order[block]) == sorted(shuffled[block])
            permutations.append(tuple(order[block].index(i) for i in shuffled[block]))
    assert len(set(permutations)) == 3 * 5


# The position.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_resumed_stream_goes_on_at_the_very_image(tmp_path: Path, kind: str, workers: int) -> None:
    stream = make(write_shards(tmp_path, [7, 4, 9, 6, 5], kind, corrupt=[3, 11, 12]), on_corrupt="skip")

    def load(process: int) -> StreamLoader:
        return StreamLoader(stream.share(process, 2), batch_size=3, workers=workers, pin_memory=False)

    for process in range(2):
        straight = load(process)
        states, batches = [straight.state_dict()], []
        for batch in itertools.islice(straight, 17):  # some three epochs
            batches.append(batch)
            states.append(straight.state_dict())
        assert sum(skipped for *_, skipped in batches) > 0
        for k in range(0, len(states), 1 if workers == 0 else 5):
            file = io.BytesIO()
            torch.save(states[k], file)
            file.seek(0)
            resumed = load(process)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            rest = list(itertools.islice(resumed, len(batches) - k))
            for one, same in zip(batches[k:], rest, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one[:3], same[:3], strict=True))
                assert one[3] == same[3]


def test_another_share_begins_an_order_of_its_own(tmp_path: Path) -> None:
    """The position of other processes or workers is refused, and the draws go on beyond any that there were."""
    stream = make(write_shards(tmp_path, [5, 5]))

    def load(part: Stream, workers: int = 0) -> StreamLoader:
        return StreamLoader(part, batch_size=5, workers=workers, pin_memory=False)

    former = load(stream.share(0, 2))
    before = list(itertools.islice(former, 4))
    for part, workers in ((stream.share(1, 2), 0), (stream, 0), (stream.share(0, 2), 1)):
        assert load(part, workers).load_state_dict(former.state_dict()) is False
    whole = load(stream.share(0, 1))
    assert whole.seek(40) is False
    after = list(itertools.islice(whole, 2))
    assert sorted(int(image[0, 0, 0]) for batch in after for image in batch.images) == list(range(10))
    assert min(int(batch.draws.min()) for batch in after) > max(int(batch.draws.max()) for batch in before)
    first = list(itertools.islice(load(stream.share(0, 1)), 2))
    assert any(not torch.equal(a.images, b.images) for a, b in zip(first, after, strict=True))


def test_a_training_from_a_stream_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And in a new order with other workers, which it says; what is no image is passed over and counted."""
    source = write_shards(tmp_path / "train", [9, 7, 11], corrupt=[4])
    settings = [
        f"data={{source: '{source}', test_source: '{write_shards(tmp_path / 'test', [6])}', streaming: true, "
        "shuffle_block: 5, image_size: 4, channels: 3, class_names: [ant, bee, cat], on_corrupt: skip, flip: true}",
        "model={patch_size: 2, whitening: true, flow: {width: 16, blocks: 2, layers: 1, head_dim: 8}, "
        "prior: {width: 16, layers: 1, head_dim: 8, components: 2}}",
        "training={steps: 10, evaluate_every: 5, batch_size: 6, samples: 0, warmup_steps: 2, precision: fp32}",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        train(load_config("digits", settings), run)
    shutil.rmtree(checkpoints(parts)[-1].path)
    assert train(load_config("digits", settings), parts, resume=True).step == 10
    ours, theirs = (load_file(checkpoints(run)[-1].model / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    output = capsys.readouterr()
    assert "in a new order" not in output.out
    assert "images of the stream, which are not sound, were passed over" in output.out + output.err
    course = train(load_config("digits", [*settings, "training.steps=12", "training.workers=1"]), parts, resume=True)
    assert course.step == 12
    assert "in a new order" in capsys.readouterr().out


# What is in the source.


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_is_the_first_images_on_every_process(tmp_path: Path, kind: str) -> None:
    stream = make(write_shards(tmp_path, [3, 4, 5], kind, corrupt=[1]), on_corrupt="skip")
    for part in (stream, stream.share(1, 2)):
        assert part.preview(5)[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 5]
        assert part.preview(50).shape == (11, 3, SIZE, SIZE)
    with pytest.raises(DataError, match="row 1: expected a sound image"):
        make(stream._source).preview(5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_corrupt_image_is_named_in_one_line_or_counted(
    tmp_path: Path, kind: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path, [6, 6], kind, corrupt=[8])
    loader = StreamLoader(make(source), batch_size=3, workers=workers, pin_memory=False)
    with pytest.raises(DataError, match=rf"^{tmp_path}/01\.{kind}, row 2: expected a sound image, got [^\n]*$"):
        list(itertools.islice(loader, 8))
    loader = StreamLoader(make(source, on_corrupt="skip"), batch_size=11, workers=0, pin_memory=False)
    batches = list(itertools.islice(loader, 3))
    assert sum(skipped for *_, skipped in batches) in (2, 3)  # the last may come after the last image
    assert all(8 not in images for images, *_ in batches)
    assert capfd.readouterr() == ("", "")


def test_a_source_without_a_sound_image_is_an_error(tmp_path: Path) -> None:
    stream = make(write_shards(tmp_path, [3, 3], corrupt=range(6)), on_corrupt="skip")
    with pytest.raises(DataError, match="found 6 and not one of them sound"):
        next(iter(stream))
    with pytest.raises(DataError, match="not one that is sound"):
        stream.preview(2)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_shard_is_named(tmp_path: Path, kind: str, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path, [6, 6, 6], kind)
    for number in (1, 0):
        broken = tmp_path / f"{number:02}.{kind}"
        content = broken.read_bytes()
        broken.write_bytes(content[:700])
        with pytest.raises(DataError, match=rf"^{broken} cannot be loaded: [^\n]*$"):
            list(StreamLoader(make(source), batch_size=3, workers=workers, pin_memory=False))
        broken.write_bytes(content)
    assert capfd.readouterr() == ("", "")


def test_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "one.tar", [png(0), png(1)], [2, 3])
    stream = make(tmp_path / "one.tar", on_corrupt="skip")
    with pytest.raises(DataError, match=r"one\.tar, row 1: expected a label in 0\.\.2 for 3 classes.*got 3"):
        list(stream)


def test_class_names_are_the_sources_or_the_configurations(tmp_path: Path) -> None:
    write_parquet(tmp_path / "named.parquet", [png(1)], [1])
    write_parquet(tmp_path / "numbered.parquet", [png(1)], [1], named=False)
    words = datasets.Dataset.from_dict({"image": [png(1), png(2)], "label": ["bee", None]})
    words.to_parquet(tmp_path / "words.parquet")
    words.remove_columns("label").to_parquet(tmp_path / "unlabelled.parquet")
    assert make(tmp_path / "named.parquet", class_names=None).class_names == tuple(NAMES)
    assert make(tmp_path / "named.parquet", class_names=["x", "y", "z"]).class_names == ("x", "y", "z")
    with pytest.raises(DataError, match=r"data\.class_names: expected 3 classes \(ant, bee, cat\), got 1 classes"):
        make(tmp_path / "named.parquet", class_names=["x"])
    for name in ("numbered", "words"):
        with pytest.raises(DataError, match=rf"{name}\.parquet: expected class names.*set data\.class_names"):
            make(tmp_path / f"{name}.parquet", class_names=None)
    assert {label for _, label, *_ in itertools.islice(make(tmp_path / "words.parquet"), 4)} == {1, -1}
    with pytest.raises(DataError, match=r"row 0: expected a label.*got 'bee'"):
        list(make(tmp_path / "words.parquet", class_names=["ant"]))
    unlabelled = make(tmp_path / "unlabelled.parquet", class_names=None)
    assert (unlabelled.class_names, next(iter(unlabelled))[1]) == ((), -1)


def test_tar_shards_can_also_be_opened_at_once(tmp_path: Path) -> None:
    for kind in ("tar", "json"):
        source = write_shards(tmp_path / kind, [4, 5], kind)
        data = load_images(source, split="train", image_size=SIZE, channels=3, held_out=0, class_names=NAMES)
        assert data.pixels[:, 0, 0, 0].tolist() == list(range(9))
        assert data.labels.tolist() == [i % 3 for i in range(9)]


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(png(1))
    pq.write_table(pa.table({"file_name": ["one.png"], "label": [0]}), tmp_path / "images" / "metadata.parquet")
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(b"")
    for source in ("digits", tmp_path / "images", tmp_path / "idx", tmp_path / "nothing"):
        with pytest.raises(DataError, match=rf"{source}.* cannot be streamed.*\.parquet.*\.tar.*owner/name"):
            make(source)
    for suffix in ("parquet", "tar"):
        with pytest.raises(DataError, match=f"expected {suffix} files, found none"):
            make(tmp_path / f"*.{suffix}")


def test_the_train_split_of_several_is_streamed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train.parquet", [png(1)], [1])
    write_parquet(tmp_path / "data" / "test.parquet", [png(2)], [2])
    assert epochs(make(tmp_path), 2) == [[1], [1]]
