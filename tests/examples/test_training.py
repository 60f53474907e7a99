"""Training, and going on with it: exact, and safe against being killed."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from farmer_examples import Farmer, loop, training
from farmer_examples.__main__ import RESTART, main
from farmer_examples.config import load_config
from farmer_examples.data import load_images
from farmer_examples.evaluation import evaluate
from farmer_examples.loop import TrainingError
from farmer_examples.resumption import State
from farmer_examples.storage import checkpoints, find_model
from farmer_examples.training import train
from farmer_flow import patchify
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SMALL = [
    "model.flow={width: 16, blocks: 2, layers: 1, head_dim: 8, conditional: true}",
    "model.prior={width: 16, layers: 1, head_dim: 8, informative_dim: 3, components: 2, redundant_components: 2}",
    "data.limit=64",
    "training.batch_size=16",
    "training.warmup_steps=2",
    "training.samples=0",
    "training.minutes=null",
    "training.evaluation_draws=1",
    "model.whitening=false",
]


def _reset_accelerate():
    """Forget the precision, of which Accelerate allows one a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    _reset_accelerate()
    yield
    _reset_accelerate()


def config(*overrides):
    return load_config("digits", [*SMALL, *overrides])


def weights(run, step=-1):
    """Return all that a checkpoint's state holds, and its model."""
    checkpoint = checkpoints(run)[step]
    whole = run / "state.pt"
    dcp_to_torch_save(checkpoint.state, whole)
    tensors = torch.load(whole, weights_only=False)
    tensors["course"] = json.loads((checkpoint.state / "course.json").read_text())
    tensors["own"] = torch.load(checkpoint.state / "process-0-of-1.pt")
    return tensors, Farmer.from_pretrained(checkpoint.model)


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for ours, theirs in zip(first, second, strict=True):
            assert_same(ours, theirs)
    else:
        assert first == second


def test_training_lowers_the_held_out_bits(tmp_path):
    course = train(config("training.steps=40", "training.evaluate_every=20", "training.lr=1e-2"), tmp_path)
    before, middle, after = (entry["held_out"] for entry in course.history)
    assert after < middle < before - 0.5
    assert (tmp_path / "curves.png").is_file()
    assert Farmer.from_pretrained(tmp_path / "best").class_names == [str(digit) for digit in range(10)]


def test_whitening_is_fitted_to_the_training_images_before_the_first_step(tmp_path):
    course = train(config("training.steps=1", "model.whitening=true"), tmp_path)
    plain = train(config("training.steps=1"), tmp_path / "plain")
    assert course.history[0]["held_out"] < plain.history[0]["held_out"] - 0.5
    model = Farmer.from_pretrained(tmp_path / "best")
    images, _ = load_images("digits", split="train", image_size=8, channels=1, limit=64).__getitems__(range(64))
    whitened, _ = model.whitening(patchify(model.noised(images, 1.0), model.patch_size))
    covariance = whitened.flatten(0, 1).T.cov()
    torch.testing.assert_close(covariance, torch.eye(4), atol=0.05, rtol=0)  # noise of another seed


def test_resuming_is_exact(tmp_path):
    """Ten steps at once and five and five end in the same numbers: weights, optimiser, average, history.

    Five batches make no whole epoch of four, so the data's position matters too.
    """
    settings = ["training.steps=10", "training.evaluate_every=5", "data.flip=true", "model.whitening=true"]
    train(config(*settings), tmp_path / "whole")
    train(config(*settings), tmp_path / "parts")
    last = checkpoints(tmp_path / "parts")[-1].path
    for file in sorted(last.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    last.rmdir()
    course = train(config(*settings), tmp_path / "parts", resume=True)
    assert course.step == 10
    (ours, model), (theirs, other) = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert_same(ours, theirs)
    assert_same(model.state_dict(), other.state_dict())
    logged = EventAccumulator(str(tmp_path / "parts" / "logs"))
    logged.Reload()
    assert [event.step for event in logged.Scalars("held out/held_out")] == [0, 5, 10], "what came later is dropped"


def test_a_training_at_its_end_stays_as_it_is(tmp_path, capsys):
    train(config("training.steps=2"), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(config("training.steps=2", "training.lr=1"), tmp_path, resume=True).step == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "is at its end, after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "course.json", "process-0-of-1.pt"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    train(config("training.steps=1"), tmp_path)
    path = checkpoints(tmp_path)[-1].state / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainingError, match=r"step-00000001 cannot be resumed: .*no sound checkpoint"):
        train(config("training.steps=2"), tmp_path, resume=True)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "course.json", "process-0-of-1.pt"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, file):
    settings = ["training.steps=3", "training.evaluate_every=1"]
    train(config(*settings), tmp_path)
    (before, model), newest = weights(tmp_path), checkpoints(tmp_path)[-1]
    path = newest.state / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert train(config(*settings), tmp_path, resume=True).step == 3
    printed = capsys.readouterr().out
    assert f"{newest.path} cannot be read" in printed
    assert "resuming from" in printed
    assert "step-00000002" in printed
    assert (newest.path.parent / "damaged-step-00000003").is_dir()
    (after, again) = weights(tmp_path)
    assert_same(after, before)
    assert_same(again.state_dict(), model.state_dict())


def test_sigterm_saves_and_asks_for_a_restart(tmp_path, monkeypatch, capsys):
    """And the resumed run ends in the numbers of one that was left alone, though no evaluation was due."""
    settings = ["training.steps=6", "training.evaluate_every=6", "data.flip=true"]
    train(config(*settings), tmp_path / "whole")
    original, calls = Farmer.noised, []

    def warned(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Farmer, "noised", warned)
    run = tmp_path / "parts"
    _reset_accelerate()
    missed = []
    before = signal.signal(signal.SIGTERM, lambda *_: missed.append(1))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", "digits", "--output", str(run), *SMALL, *settings])
        os.kill(os.getpid(), signal.SIGTERM)
        assert missed == [1], "the handler of before is back"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == RESTART
    assert "saved at step 3: go on with --resume" in capsys.readouterr().err
    assert [checkpoint.step for checkpoint in checkpoints(run)] == [3]
    _reset_accelerate()
    train(config(*settings), run, resume=True)
    (ours, model), (theirs, other) = weights(run), weights(tmp_path / "whole")
    assert_same(ours, theirs)
    assert_same(model.state_dict(), other.state_dict())


def test_checkpoints_between_evaluations_have_no_score_and_are_never_the_best(tmp_path):
    settings = ["training.evaluate_every=4", "training.save_every=2", "training.keep=5", "training.steps=7"]
    train(config(*settings), tmp_path)
    kept = {checkpoint.step: "held_out" in checkpoint.metrics for checkpoint in checkpoints(tmp_path)}
    assert kept == {2: False, 4: True, 6: False, 7: True}
    assert (tmp_path / "best").resolve().parent.name in ("step-00000004", "step-00000007")
    assert find_model(tmp_path).parent.name in ("step-00000004", "step-00000007")


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    train(config("training.steps=1"), tmp_path)
    original = State.write

    def into_a_full_disk(self, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # writes beyond fail, as on a full disk
        try:
            return original(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(State, "write", into_a_full_disk)
    with pytest.raises(TrainingError, match=r"step 2 cannot be written: .*last good checkpoint is .*00000001"):
        train(config("training.steps=2"), tmp_path, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(State, "write", original)
    assert train(config("training.steps=2"), tmp_path, resume=True).step == 2


@pytest.mark.parametrize(("most", "parts"), [(8, 2), (7, 4), (1, 16)])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(tmp_path, most, parts):
    """With noise, mirroring and label dropout, which belong to the images. Seven do not divide sixteen, four do."""
    settings = ["training.steps=3", "data.limit=40", "training.max_grad_norm=1e9", "data.flip=true"]
    train(config(*settings), tmp_path / "whole")
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        original = Farmer.noised
        patch.setattr(Farmer, "noised", lambda *a, **k: taken.append(len(a[1])) or original(*a, **k))
        train(config(*settings, f"training.micro_batch_size={most}"), tmp_path / "parts")
    assert taken == [16 // parts] * parts * 3
    (ours, _), (theirs, _) = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, expected in ours["optimizer"]["state"].items():
        torch.testing.assert_close(
            theirs["optimizer"]["state"][name]["exp_avg"], expected["exp_avg"], rtol=1e-3, atol=1e-5
        )


def _poison_batches(monkeypatch, *poisoned, value=math.nan):
    original, calls = Farmer.noised, []

    def noised(self, images, progress, **options):
        calls.append(1)
        return original(self, images, progress, **options) * (value if len(calls) in poisoned else 1)

    monkeypatch.setattr(Farmer, "noised", noised)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_is_passed_over_and_counted(tmp_path, monkeypatch, value):
    """Whichever of a step's two parts is bad. Oracle: the steps that the optimiser has counted."""
    _poison_batches(monkeypatch, 3, 8, value=value)
    course = train(config("training.steps=6", "training.micro_batch_size=8"), tmp_path)
    assert (course.step, course.skipped) == (6, 2)
    tensors, model = weights(tmp_path)
    assert all(state["step"] == 4 for state in tensors["optimizer"]["state"].values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert math.isfinite(course.history[-1]["train"])


def test_too_many_bad_batches_stop_and_keep_what_there_is(tmp_path, monkeypatch):
    _poison_batches(monkeypatch, 2, 8)
    with pytest.raises(TrainingError, match=r"gradient became nan at step 8; the last good checkpoint is .*00000005"):
        train(config("training.steps=20", "training.evaluate_every=5", "training.max_skipped=1"), tmp_path)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [5]
    _, model = weights(tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_take_it(tmp_path, monkeypatch):
    original = loop.Accelerator.clip_grad_norm_
    calls = []

    def poisoned(self, *arguments):
        calls.append(1)
        return original(self, *arguments) * (math.inf if len(calls) == 3 else 1)

    monkeypatch.setattr(loop.Accelerator, "clip_grad_norm_", poisoned)
    with pytest.raises(TrainingError, match="the gradient became inf at step 3; there is no checkpoint yet"):
        train(config("training.steps=20", "training.max_skipped=0"), tmp_path)


def test_a_held_out_score_that_is_not_finite_stops_before_it_is_saved(tmp_path, monkeypatch):
    scores = iter([4.0, math.nan])

    def poisoned(*arguments, **options):
        return {**evaluate(*arguments, **options), "held_out": next(scores)}

    monkeypatch.setattr(training, "evaluate", poisoned)
    with pytest.raises(TrainingError, match=r"the held-out score became nan at step 2; there is no checkpoint yet"):
        train(config("training.steps=2"), tmp_path)
    assert not checkpoints(tmp_path)


def test_bfloat16_trains_almost_as_float32(tmp_path):
    settings = ["training.steps=20", "training.lr=1e-2"]
    exact = train(config(*settings), tmp_path / "fp32").history
    _reset_accelerate()
    rounded = train(config(*settings, "training.precision=bf16"), tmp_path / "bf16").history
    assert rounded[-1]["held_out"] < rounded[0]["held_out"] - 0.3
    assert rounded[-1]["held_out"] == pytest.approx(exact[-1]["held_out"], abs=0.05)
    assert rounded[-1]["held_out"] != exact[-1]["held_out"]


@pytest.mark.parametrize("samples", [0, 3, 25])
def test_any_number_of_samples_is_drawn(tmp_path, monkeypatch, samples):
    drawn = []
    original = Farmer.sample
    monkeypatch.setattr(Farmer, "sample", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1])
    train(config("training.steps=1", f"training.samples={samples}"), tmp_path)
    assert [len(images) for images in drawn] == ([samples] * 2 if samples else [])
    assert (tmp_path / "samples").exists() == (samples > 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_a_precision_that_the_hardware_lacks_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"training\.precision=fp16 needs a GPU"):
        train(config("training.precision=fp16"), tmp_path)


def test_a_run_is_not_written_over(tmp_path):
    train(config("training.steps=1"), tmp_path)
    with pytest.raises(TrainingError, match="--resume"):
        train(config("training.steps=1"), tmp_path)


def test_time_ends_a_training(tmp_path):
    course = train(config("training.steps=1000000", "training.minutes=0.02"), tmp_path)
    assert 0 < course.step < 1000000
    assert checkpoints(tmp_path)[-1].step == course.step


def test_more_images_a_step_than_there_are_is_explained(tmp_path):
    with pytest.raises(ValueError, match="batch_size=128 images a step, but there are 64"):
        train(config("training.batch_size=128"), tmp_path)


@pytest.mark.parametrize("kills", [2, pytest.param(16, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_killed_training_goes_on_from_its_newest_checkpoint(tmp_path, kills):
    """SIGKILL at random moments, writing checkpoints almost all the time: no unreadable one, no lost one.

    Each life resumes at the newest checkpoint that the one before had published, so it loses at most the work since.
    """
    moments = random.Random(0)
    command = [sys.executable, "-m", "farmer_examples", "train", "--config", "digits", "--output", str(tmp_path)]
    command += ["--resume", *SMALL, "training.steps=100000", "training.evaluate_every=1", "training.keep=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    newest = 0
    for _ in range(kills):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not [c for c in checkpoints(tmp_path) if c.step > newest] and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        if newest:
            resumed = int(output.split("resuming from")[1].split("step-")[1][:8])
            assert resumed == newest
        for checkpoint in checkpoints(tmp_path):
            assert math.isfinite(checkpoint.metrics["held_out"])
        for step in range(-len(checkpoints(tmp_path)), 0):
            weights(tmp_path, step)
        assert checkpoints(tmp_path)[-1].step > newest
        newest = checkpoints(tmp_path)[-1].step
    course = train(config(f"training.steps={newest + 2}", "training.evaluate_every=1"), tmp_path, resume=True)
    assert course.step == newest + 2
    assert [entry["step"] for entry in course.history] == list(range(newest + 3))


def test_an_unforeseen_error_ends_the_process_also_beside_workers(tmp_path):
    """Which ignore the SIGTERM by which Python would end them."""
    script = (
        "from farmer_examples import Farmer\nfrom farmer_examples.__main__ import main\nFarmer.noised = None\nmain()"
    )
    arguments = ["train", "--config", "digits", "--output", str(tmp_path), *SMALL, "training.workers=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "TypeError: 'NoneType' object is not callable" in done.stderr
