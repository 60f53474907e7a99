"""Everything appears whole or not at all."""

import json
import os

import pytest
from farmer_examples.storage import Checkpoint, checkpoints, find_model, prune, published


def save(run, step, held_out):
    checkpoint = Checkpoint.unpublished(run, step)
    checkpoint.begin()
    checkpoint.model.mkdir()
    (checkpoint.model / "config.json").write_text(str(step))
    checkpoint.publish({"held_out": held_out})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "figures.csv"
    with published(path) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), published(path) as partial:
        partial.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path):
    (tmp_path / "checkpoints" / ".partial-step-00000001" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / f".partial-{os.getpid()}-old-step-00000001" / "model").mkdir(parents=True)
    save(tmp_path, 1, 3.0)
    save(tmp_path, 1, 2.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_failed_checkpoint_is_none(tmp_path):
    save(tmp_path, 1, 3.0)
    unfinished = Checkpoint.unpublished(tmp_path, 2)
    unfinished.begin()
    unfinished.model.mkdir()
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1]
    unfinished.discard()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_can_be_written_again(tmp_path):
    save(tmp_path, 1, 3.0)
    save(tmp_path, 1, 2.0)
    assert [checkpoint.metrics for checkpoint in checkpoints(tmp_path)] == [{"held_out": 2.0}]


def test_the_best_and_the_newest_stay(tmp_path):
    for step, held_out in enumerate([5.0, 2.0, 4.0, 3.0, 6.0], start=1):
        save(tmp_path, step, held_out)
        prune(tmp_path, keep=2)
    (tmp_path / "checkpoints" / ".partial-1-step-00000009").mkdir()
    prune(tmp_path, keep=2)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [2, 4, 5]
    assert (tmp_path / "best" / "config.json").read_text() == "2"
    assert find_model(tmp_path) == tmp_path / "checkpoints" / "step-00000002" / "model"
    assert find_model(tmp_path / "best") == tmp_path / "best"
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    assert json.loads((tmp_path / "checkpoints" / "step-00000004" / "metrics.json").read_text()) == {"held_out": 3.0}


def test_a_removal_killed_midway_leaves_no_checkpoint_that_looks_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, 3.0 - step)

    def killed(path, *_):
        (path / "model" / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep=1)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [2]
    prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_missing_model_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither a run with a checkpoint that has a score nor a saved model"):
        find_model(tmp_path)
