"""Several processes that train together, over gloo on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from farmer_examples.__main__ import RESTART
from farmer_examples.config import shipped_configs
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


def launch(layout, *arguments):
    processes, sharding = LAYOUTS[layout]
    program = [str(Path(__file__).with_name("fsdp_on_cpu.py"))] if sharding == "fsdp" else ["-m", "farmer_examples"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *arguments],
        env={
            **os.environ,
            **(shipped_environment("fsdp") if sharding == "fsdp" else {}),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
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


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "one"),
        ("one", "fsdp-3"),
        pytest.param("fsdp", "ddp-4", marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_any_layout_resumes_from_any_other(runs, before, after, tmp_path):
    """And goes on with the images where the other stopped, so that it ends where one process does."""
    run = tmp_path / "run"
    shutil.copytree(runs / before, run, symlinks=True)
    shutil.rmtree(checkpoints(run)[-1].path)
    assert "step-00000004" in train(after, run, "--resume")
    assert checkpoints(run)[-1].step == 8
    assert history(run)[-1]["held_out"] == pytest.approx(history(runs / "one")[-1]["held_out"], abs=1e-4)
    assert history(run)[-1]["train"] == pytest.approx(history(runs / "one")[-1]["train"], abs=1e-4)


def test_activation_checkpointing_and_parts_change_nothing_under_sharding(runs, tmp_path):
    train("fsdp", tmp_path, "training.activation_checkpointing=true", "training.micro_batch_size=2")
    assert history(tmp_path)[-1]["held_out"] == pytest.approx(history(runs / "one")[-1]["held_out"], abs=1e-4)
    assert history(tmp_path)[-1]["train"] == pytest.approx(history(runs / "one")[-1]["train"], abs=1e-4)


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


def test_processes_that_cannot_share_a_batch_are_told_so(tmp_path):
    process = launch("ddp", "train", "--config", "digits", "--output", str(tmp_path), *SMALL, "training.batch_size=13")
    assert "batch_size=13 must be a multiple of the 2 processes" in process.communicate(timeout=200)[0]
    assert process.returncode


def test_two_processes_distil_and_resume(runs):
    run = str(runs / "ddp")
    farmer("ddp", "distill", "--checkpoint", run, *SHORT)
    assert (checkpoints(runs / "ddp" / "distillation")[-1].model / STUDENT).is_file()
    printed = farmer("ddp", "distill", "--checkpoint", run, "--resume", *SHORT, "distillation.steps=3")
    assert printed.count("resuming from") == 1
    assert checkpoints(runs / "ddp" / "distillation")[-1].step == 3


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    else:
        assert ours == theirs
