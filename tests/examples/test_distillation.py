"""``farmer distill`` and the inverses that ``farmer sample`` may take."""

import csv
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from farmer_distill import OneStepInverse
from farmer_examples import Farmer, judge
from farmer_examples.__main__ import main
from farmer_examples.config import load_config
from farmer_examples.distillation import STUDENT, Distilling, decibels, load_student, save_student
from farmer_examples.storage import checkpoints, find_model
from PIL import Image
from safetensors.torch import load_file

TINY = [
    "model.flow={width: 32, blocks: 2, layers: 1, head_dim: 16}",
    "model.prior={width: 16, layers: 1, head_dim: 8, components: 2}",
    "training.samples=0",
    "training.minutes=null",
    "training.evaluation_draws=1",
    "training.evaluate_every=150",
]
SHORT = [
    "distillation.steps=120",
    "distillation.lr=3.0e-3",
    "distillation.warmup_steps=5",
    "distillation.ema_decay=0.95",
    "distillation.evaluate_every=60",
    "distillation.samples=20",
]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Forget the precision, of which Accelerate allows one a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    main(["train", "--config", "digits", "--output", str(folder), *TINY, "training.steps=150"])
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["distill", "--checkpoint", str(folder), *SHORT])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def history(folder):
    return [saved.metrics for saved in checkpoints(folder)]


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_student_comes_nearer_to_the_exact_inverse_and_lies_beside_the_model(run):
    model = Farmer.from_pretrained(find_model(run)).eval()
    student = load_student(find_model(run), model.flow)
    z = model.prior.sample(model.every_class(64))
    exact = model.decode(z, model.every_class(64))

    def error(inverse):
        with torch.no_grad():
            images = model.decode(z, model.every_class(64), inverse=inverse)
        return (images.clamp(-1, 1) - exact.clamp(-1, 1)).square().mean().item()

    assert error(student) < error(OneStepInverse.from_flow(model.flow)) / 2
    first, last = history(run / "distillation")
    assert last["psnr"] > first["psnr"]
    assert last["psnr"] == pytest.approx(decibels(last["held_out"]))
    assert len(last["blocks"]) == 2


def test_the_student_is_scored_on_other_latents_than_it_learns_from(run, tmp_path):
    settings = ["distillation.prior_images=50", "distillation.evaluation_latents=50"]
    distilling = Distilling(load_config(run / "config.yaml", settings), tmp_path, find_model(run), resume=False)
    scored, learnt = distilling.examined[0], distilling.pool[0]
    model = distilling.model
    latents = model.prior.sample(model.every_class(50), generator=torch.Generator().manual_seed(0))
    sampled = model.flow.inverse(model.permute(latents), model.every_class(50))
    for first, second in [(scored, learnt), (scored, sampled), (learnt, sampled)]:
        assert not torch.isclose(first, second).all(dim=2).all(dim=1).any()


def test_distilling_leaves_all_it_promises(run):
    folder = run / "distillation"
    for name in ("config.yaml", "best", "curves.png", "logs", f"best/{STUDENT}"):
        assert (folder / name).exists(), name
    names = [path.name for path in sorted((folder / "samples").iterdir())]
    assert names == ["step-00000000.png", "step-00000060.png", "step-00000120.png"]
    picture = Image.open(folder / "samples" / names[-1])
    assert min(picture.size) > 250, "two grids of two rows each"


def test_neither_the_model_nor_a_better_student_is_touched(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied, symlinks=True)
    before = {file.name: file.read_bytes() for file in find_model(copied).iterdir()}
    again = ["distill", "--checkpoint", str(copied), "--output", str(tmp_path / "again"), *SHORT]
    main([*again, "distillation.steps=2"])
    assert {file.name: file.read_bytes() for file in find_model(copied).iterdir()} == before
    assert "stays: its" in capsys.readouterr().out


def test_resuming_is_exact(run, tmp_path):
    """Oracle: the run that was not interrupted, of which the last checkpoint is taken away."""
    shutil.copytree(run / "distillation", tmp_path / "cut", symlinks=True)
    shutil.rmtree(checkpoints(tmp_path / "cut")[-1].path)
    main(["distill", "--checkpoint", str(run), "--output", str(tmp_path / "cut"), "--resume"])
    for ours, theirs in zip(checkpoints(tmp_path / "cut"), checkpoints(run / "distillation"), strict=True):
        expected = load_file(theirs.model / STUDENT)
        assert all(torch.equal(expected[name], tensor) for name, tensor in load_file(ours.model / STUDENT).items())
    assert [entry["blocks"] for entry in history(tmp_path / "cut")] == [
        entry["blocks"] for entry in history(run / "distillation")
    ]


def test_every_inverse_draws_the_same_images_but_the_students(run, tmp_path):
    tables = {}
    for name in ("sequential", "jacobi", "gauss-seidel-jacobi", "auto", "one-step"):
        arguments = ["sample", "--checkpoint", str(run), "--count", "20", "--inverse", name]
        main([*arguments, "--output", str(tmp_path / name)])
        with (tmp_path / name / "samples.csv").open(newline="") as file:
            tables[name] = [float(row["log_likelihood"]) for row in csv.DictReader(file)]
    for name in ("jacobi", "gauss-seidel-jacobi", "auto"):
        assert tables[name] == pytest.approx(tables["sequential"], abs=0.05)
    assert tables["one-step"] != pytest.approx(tables["sequential"], abs=0.05)


def test_the_iterations_and_fall_backs_of_an_exact_inverse_are_reported(run, tmp_path, capsys):
    arguments = ["sample", "--checkpoint", str(run), "--count", "20", "--batch-size", "8", "--inverse", "jacobi"]
    counts = {}
    for tolerance in ("0.1", "1e-5"):
        main([*arguments, "--tolerance", tolerance, "--output", str(tmp_path / tolerance)])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block")]
        assert [line.partition(",")[0] for line in lines] == ["block 0: jacobi", "block 1: jacobi"]
        assert all("over 16 tokens" in line for line in lines)
        counts[tolerance] = float(lines[0].split()[3])
    assert 1 <= counts["0.1"] < counts["1e-5"] <= 15


def test_the_likelihood_of_a_students_image_is_the_flows(run):
    model = Farmer.from_pretrained(find_model(run)).eval()
    student = load_student(find_model(run), model.flow)
    labels = model.every_class(4)
    images = model.sample(labels, inverse=student, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, logdet = model.flow(model.tokenise(images)[0], labels)
        expected = model.prior.log_prob(model.permute(z), labels) + logdet
        torch.testing.assert_close(model.log_prob(images, labels), expected)


def test_a_sweep_measures_inverses_side_by_side_and_a_new_student_anew(run, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "MOST_EPOCHS", 1)
    copied = tmp_path / "run"
    shutil.copytree(run, copied, symlinks=True)
    command = ["sweep", "--checkpoint", str(copied), "--count", "20", "--guidance", "0"]
    command += ["--inverse", "sequential", "one-step", "--output", str(tmp_path / "sweep")]

    def measured():
        main(command)
        kept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
        return {row["name"]: row["frechet"] for row in kept}

    first = measured()
    assert list(first) == ["real images, held out", "no guidance", "no guidance, one-step"]
    assert first["no guidance"] != first["no guidance, one-step"]
    assert measured() == first
    main(
        ["sweep", "--checkpoint", str(copied), "--count", "20", "--guidance", "0", "--output", str(tmp_path / "sweep")]
    )
    assert measured() == first, "a sweep without the student leaves what was measured with it"
    model = Farmer.from_pretrained(find_model(copied))
    save_student(OneStepInverse.from_flow(model.flow), model.flow, find_model(copied))
    again = measured()
    assert again["no guidance"] == first["no guidance"]
    assert again["no guidance, one-step"] != first["no guidance, one-step"]


def test_mistakes_are_explained(run, tmp_path, capsys):
    model = find_model(run)
    assert "already holds a training" in refused(["distill", "--checkpoint", str(run), *SHORT], capsys)
    assert "there is no folder" in refused(["distill", "--checkpoint", str(tmp_path / "none")], capsys)
    assert "with --config" in refused(["distill", "--checkpoint", str(model), "--output", str(tmp_path)], capsys)
    assert "with --output" in refused(["distill", "--checkpoint", str(model)], capsys)
    assert "takes keys of" in refused(["distill", "--checkpoint", str(run), "training.minutes=1"], capsys)
    error = refused(["distill", "--checkpoint", str(run), "--output", str(run), "--resume"], capsys)
    assert "cannot be resumed" in error
    shutil.copytree(run / "distillation", tmp_path / "damaged", symlinks=True)
    for checkpoint in checkpoints(tmp_path / "damaged"):
        (checkpoint.model / STUDENT).unlink()
    resume = ["distill", "--checkpoint", str(run), "--output", str(tmp_path / "damaged"), "--resume"]
    assert "no sound checkpoint of a distillation" in refused(resume, capsys)
    for tolerance in ("0", "-1", "nan", "little"):
        assert "--tolerance" in refused(["sample", "--checkpoint", str(run), "--tolerance", tolerance], capsys)
    error = refused(["distill", "--checkpoint", str(run), "distillation.step=3", "--resume"], capsys)
    assert "did you mean 'steps'?" in error
    digits = ["distill", "--checkpoint", str(model), "--config", "fashion-mnist", "--output", str(tmp_path / "d")]
    assert "not of the size" in refused(digits, capsys)


def test_a_student_of_another_flow_is_refused(run, tmp_path, capsys):
    model = Farmer.from_pretrained(find_model(run))
    torch.nn.init.normal_(model.flow.blocks[0].out.weight)
    model.save_pretrained(tmp_path)
    sample = ["sample", "--checkpoint", str(tmp_path), "--inverse", "one-step", "--output", str(tmp_path / "out")]
    assert "make one with farmer distill" in refused(sample, capsys)
    (tmp_path / STUDENT).write_bytes((find_model(run) / STUDENT).read_bytes())
    assert "inverts another flow" in refused(sample, capsys)
    (tmp_path / STUDENT).write_bytes(b"damaged")
    assert "holds no student" in refused(sample, capsys)
    resume = ["distill", "--checkpoint", str(tmp_path), "--output", str(run / "distillation"), "--resume"]
    assert "distils another model than" in refused(resume, capsys)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    damaged = ["distill", "--checkpoint", str(tmp_path), "--config", "digits", "--output", str(tmp_path / "d")]
    assert "cannot be read" in refused(damaged, capsys)
    assert not (tmp_path / "out").exists()


def test_saving_and_loading_keeps_the_numbers(run, tmp_path):
    model = Farmer.from_pretrained(find_model(run))
    student = OneStepInverse.from_flow(model.flow)
    torch.nn.init.normal_(student.blocks[1].block.out.bias)
    save_student(student, model.flow, tmp_path)
    z = torch.randn(2, model.flow.length, model.flow.dim)
    assert torch.equal(load_student(tmp_path, model.flow)(z), student(z))
    assert [path.name for path in tmp_path.iterdir()] == [STUDENT]
