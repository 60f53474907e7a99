"""Several processes that train together, over gloo on the CPU."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from farmer_examples.__main__ import RESTART
from farmer_examples.config import load_config, shipped_configs
from farmer_examples.distillation import STUDENT
from farmer_examples.storage import checkpoints
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SMALL = [
    "model.flow={width: 16, blocks: 2, layers: 2, head_dim: 8, conditional: true}",
    "model.prior={width: 16, layers: 2, head_dim: 8, informative_dim: 3, components: 2, redundant_components: 2}",
    "data.limit=60",
    "data.flip=true",
    "training.batch_size=24",
    "training.steps=8",
    "training.evaluate_every=4",
    "training.warmup_steps=2",
    "training.samples=10",
    "training.minutes=null",
    "training.keep=9",
]
SHORT = ["distillation.steps=2", "distillation.batch_size=8", "distillation.minutes=null"]
SHORT += ["distillation.prior_images=20", "distillation.evaluation_latents=20", "distillation.samples=10"]
LAYOUTS = {"one": (1, "no"), "ddp": (2, "no"), "fsdp": (2, "fsdp"), "fsdp-3": (3, "fsdp"), "ddp-4": (4, "no")}


def shipped_environment(name):
    """Return what `accelerate launch` tells its processes by a shipped configuration."""
    file = Path(next(iter(shipped_configs().values()))).parent / "accelerate" / f"{name}.yaml"
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "-m", "x"])
    )
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(("FSDP", "ACCELERATE"))}


def launch(layout, *arguments, **environment):
    processes, sharding = LAYOUTS[layout]
    program = str(Path(__file__).with_name("launched.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, program, *arguments],
        env={
            **os.environ,
            **(shipped_environment("fsdp") if sharding == "fsdp" else {}),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def farmer(layout, *arguments):
    process = launch(layout, *arguments)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output
    return output


def train(layout, run, *overrides):
    return farmer(layout, "train", "--config", "digits", "--output", str(run), *SMALL, *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the same training on one process and, on two, with DDP and with FSDP2."""
    folder = tmp_path_factory.mktemp("processes")
    for layout in ("one", "ddp", "fsdp"):
        train(layout, folder / layout)
    return folder


def history(run):
    return json.loads((checkpoints(run)[-1].state / "course.json").read_text())["history"]


def whole_state(checkpoint, folder):
    dcp_to_torch_save(checkpoint.state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=False)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_processes_take_the_steps_of_one_process_on_the_same_images(runs, layout):
    """Noise, mirroring and label dropout are on: they belong to the images. Sums are rounded in another order."""
    for ours, theirs in zip(history(runs / layout), history(runs / "one"), strict=True):
        assert ours["held_out"] == pytest.approx(theirs["held_out"], abs=1e-4)
        assert ours["train"] == pytest.approx(theirs["train"], abs=1e-4)
    weights, expected = (load_file(runs / name / "best" / "model.safetensors") for name in (layout, "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=0)


def test_the_score_of_the_same_model_is_the_same_to_the_last_bit(runs):
    """The last batch is short, and one process has one batch more."""
    first = [history(runs / layout)[0] for layout in ("one", "ddp", "fsdp")]
    assert first[0] == first[1] == first[2]
    assert first[0]["images"] % 24


def test_sharded_state_is_sharded(runs):
    """Each of the processes writes about half of it, and none of them all."""
    sizes = [file.stat().st_size for file in sorted(checkpoints(runs / "fsdp")[-1].state.glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.65 * sum(sizes)


@pytest.mark.parametrize("layout", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_resuming_on_the_same_layout_is_exact(runs, layout, tmp_path):
    """Weights, optimiser, average, course, and each process's random numbers and place in the data, to the last bit."""
    run = tmp_path / "run"
    shutil.copytree(runs / layout, run, symlinks=True)
    shutil.rmtree(checkpoints(run)[-1].path)
    assert "step-00000004" in train(layout, run, "--resume")
    ours, theirs = checkpoints(run)[-1], checkpoints(runs / layout)[-1]
    assert ours.step == theirs.step == 8
    assert_equal(whole_state(ours, tmp_path), whole_state(theirs, tmp_path))
    for rank in range(2):
        own, expected = (torch.load(c.state / f"process-{rank}-of-2.pt") for c in (ours, theirs))
        assert own["feed"] == expected["feed"] == {"taken": 192}
        assert torch.equal(own["random"], expected["random"])
    for entry, expected in zip(history(run), history(runs / layout), strict=True):
        assert {**entry, "seconds": 0} == {**expected, "seconds": 0}
    assert (ours.model / "model.safetensors").read_bytes() == (theirs.model / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("fsdp", "one"), ("one", "fsdp-3"), ("fsdp", "ddp-4"), ("ddp", "fsdp")])
def test_any_layout_resumes_from_any_other(runs, before, after, tmp_path):
    """And goes on with the images where the other stopped, so that it ends where one process does."""
    run = tmp_path / "run"
    shutil.copytree(runs / before, run, symlinks=True)
    shutil.rmtree(checkpoints(run)[-1].path)
    assert "step-00000004" in train(after, run, "--resume")
    assert checkpoints(run)[-1].step == 8
    assert history(run)[-1]["held_out"] == pytest.approx(history(runs / "one")[-1]["held_out"], abs=1e-4)
    assert history(run)[-1]["train"] == pytest.approx(history(runs / "one")[-1]["train"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_activation_checkpointing_parts_and_compilation_change_nothing(layout, runs, tmp_path):
    ways = ["activation_checkpointing=true", "micro_batch_size=4", "compile=true"]
    train(layout, tmp_path, *(f"training.{way}" for way in ways))
    assert history(tmp_path)[-1]["held_out"] == pytest.approx(history(runs / "one")[-1]["held_out"], abs=1e-4)
    assert history(tmp_path)[-1]["train"] == pytest.approx(history(runs / "one")[-1]["train"], abs=1e-4)


@pytest.mark.slow
def test_bfloat16_rounds_the_same_under_sharding(tmp_path):
    """The log-determinants stay float32: rounded to bfloat16, a score of 5 bits would be off by 0.01."""
    for layout in ("one", "fsdp"):
        train(layout, tmp_path / layout, "training.precision=bf16")
    for ours, theirs in zip(history(tmp_path / "fsdp"), history(tmp_path / "one"), strict=True):
        assert ours["held_out"] == pytest.approx(theirs["held_out"], abs=2e-3)


@pytest.mark.slow
def test_sigterm_to_one_process_makes_all_of_them_save(tmp_path):
    process = launch("fsdp", "train", "--config", "digits", "--output", str(tmp_path), *SMALL, "training.steps=100000")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 200
    while not checkpoints(tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert "told to end, and saved at step" in output
    newest = checkpoints(tmp_path)[-1]
    assert f"exitcode  : {RESTART}" in output
    assert {file.name for file in newest.state.glob("process-*")} == {"process-0-of-2.pt", "process-1-of-2.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_what_goes_wrong_on_one_process_concerns_all(layout, tmp_path):
    """A batch that is bad on the second alone is passed over by both; a write that fails on it fails on both.

    And where its part of a checkpoint cannot be read, both fall back to the one before.
    """
    arguments = ["train", "--config", "digits", "--output", str(tmp_path), *SMALL, "training.evaluate_every=2"]
    process = launch(layout, *arguments, FAULTY="yes")
    output = process.communicate(timeout=250)[0]
    assert process.returncode
    assert "step 3: passed over, with a loss of nan" in output
    assert output.count("step 8 cannot be written: [Errno 28] No space left on device") == 2
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [2, 4, 6]
    own = checkpoints(tmp_path)[-1].state / "process-1-of-2.pt"
    own.write_bytes(own.read_bytes()[:100])
    output = farmer(layout, *arguments, "--resume")
    assert "step-00000006 cannot be read, and gets another name" in output
    assert output.count("resuming from") == 1
    assert checkpoints(tmp_path)[-1].step == 8
    course = json.loads((checkpoints(tmp_path)[-1].state / "course.json").read_text())
    assert course["skipped"] == 1
    steps = whole_state(checkpoints(tmp_path)[-1], tmp_path)["optimizer"]["state"]
    assert {int(state["step"]) for state in steps.values()} == {7}


@pytest.mark.slow
def test_each_process_has_a_place_of_its_own_in_a_stream(tmp_path):
    """Which checkpoints keep apart: a resumed run ends where the whole one does, though workers had read ahead."""
    for split, count in (("train", 90), ("test", 12)):
        write_digits(tmp_path / split, count)
    settings = [
        f"data={{source: '{tmp_path}/train-*.parquet', test_source: '{tmp_path}/test-*.parquet', streaming: true, "
        f"shuffle_block: 7, image_size: 8, channels: 1, class_names: {list('0123456789')}}}",
        "training.workers=1",
    ]
    run, whole = tmp_path / "run", tmp_path / "whole"
    train("ddp", whole, *settings)
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(checkpoints(run)[-1].path)
    train("ddp", run, *settings, "--resume")
    states = [torch.load(checkpoints(run)[-1].state / f"process-{rank}-of-2.pt") for rank in range(2)]
    expected = [torch.load(checkpoints(whole)[-1].state / f"process-{rank}-of-2.pt") for rank in range(2)]
    assert states[0]["feed"] != states[1]["feed"]
    assert [state["feed"] for state in states] == [state["feed"] for state in expected]
    assert_equal(whole_state(checkpoints(run)[-1], tmp_path), whole_state(checkpoints(whole)[-1], tmp_path))


def write_digits(path, count):
    """Write images in shards of a third of them."""
    data = load_config("digits").data.load("train")
    for shard in range(3):
        images = []
        for pixels in data.pixels[shard * count // 3 : (shard + 1) * count // 3]:
            file = io.BytesIO()
            PIL.Image.fromarray(pixels[0].numpy()).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": images, "label": data.labels[shard * count // 3 : (shard + 1) * count // 3].tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"{path}-{shard}.parquet")


@pytest.mark.slow
def test_two_processes_distil(runs):
    farmer("ddp", "distill", "--checkpoint", str(runs / "ddp"), *SHORT)
    assert (checkpoints(runs / "ddp" / "distillation")[-1].model / STUDENT).is_file()


@pytest.mark.slow
def test_a_sharded_student_resumes(runs):
    run = ["distill", "--checkpoint", str(runs / "fsdp")]
    settings = [*SHORT, "distillation.activation_checkpointing=true"]
    farmer("fsdp", *run, *settings)
    printed = farmer("fsdp", *run, "--resume", *settings, "distillation.steps=3")
    assert printed.count("resuming from") == 1
    assert checkpoints(runs / "fsdp" / "distillation")[-1].step == 3


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    else:
        assert ours == theirs
