"""Several processes that train together, over gloo on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from farmer_examples.distillation import STUDENT
from farmer_examples.storage import checkpoints

SMALL = [
    "model.flow={width: 16, blocks: 2, layers: 1, head_dim: 8, conditional: true}",
    "model.prior={width: 16, layers: 1, head_dim: 8, informative_dim: 3, components: 2, redundant_components: 2}",
    "data.limit=60",
    "training.batch_size=14",
    "training.steps=3",
    "training.samples=10",
    "training.minutes=null",
]
SHORT = ["distillation.steps=2", "distillation.batch_size=8", "distillation.minutes=null"]
SHORT += ["distillation.prior_images=20", "distillation.evaluation_latents=20", "distillation.samples=10"]


def farmer(processes, *arguments):
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else []), "farmer_examples", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        farmer(processes, "train", "--config", "digits", "--output", str(folder / str(processes)), *SMALL)
    return folder


def test_the_score_does_not_depend_on_the_number_of_processes(runs):
    """To the last bit, of the model before its first step; the last batch is short, and one process has one more."""
    one, two = (checkpoints(runs / processes)[-1].metrics for processes in ("1", "2"))
    assert one["step"] == two["step"] == 3
    histories = [_first_score(runs / processes) for processes in ("1", "2")]
    assert histories[0] == histories[1]
    assert one["held_out"] != two["held_out"], "they have not trained on the same images"


def _first_score(run):
    course = torch.load(checkpoints(run)[-1].state / "custom_checkpoint_0.pkl", weights_only=False)
    return course["history"][0]


def test_two_processes_distil_and_resume(runs):
    run = str(runs / "2")
    farmer(2, "distill", "--checkpoint", run, *SHORT)
    assert (checkpoints(runs / "2" / "distillation")[-1].model / STUDENT).is_file()
    printed = farmer(2, "distill", "--checkpoint", run, "--resume", *SHORT, "distillation.steps=3")
    assert printed.count("resuming from") == 1
    assert checkpoints(runs / "2" / "distillation")[-1].step == 3
