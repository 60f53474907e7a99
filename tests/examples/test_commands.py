"""The command line, as a user meets it."""

import csv
import json
import os

import pytest
from farmer_examples import judge, sampling, sweep
from farmer_examples.__main__ import main
from farmer_examples.sampling import SamplingError
from farmer_examples.storage import checkpoints
from PIL import Image

TINY = [
    "model.flow={width: 16, blocks: 2, layers: 1, head_dim: 8}",
    "model.prior={width: 16, layers: 1, head_dim: 8, informative_dim: 3, components: 2, redundant_components: 2}",
    "training.batch_size=32",
    "training.samples=20",
    "training.minutes=null",
    "training.evaluation_draws=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    main(["train", "--config", "digits", "--output", str(folder), *TINY, "training.steps=3"])
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_all_it_promises(run):
    for name in ("config.yaml", "best/model.safetensors", "best/config.json", "curves.png", "logs"):
        assert (run / name).exists(), name
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000000.png", "step-00000003.png"]


def test_a_run_resumes_from_its_own_configuration(run, capsys):
    main(["train", "--output", str(run), "--resume", "training.steps=4"])
    assert checkpoints(run)[-1].step == 4
    assert "resuming from" in capsys.readouterr().out


def test_samples(run, tmp_path):
    arguments = ["sample", "--checkpoint", str(run), "--class", "3", "none", "--count", "5", "--files", "--seed", "7"]
    main([*arguments, "--output", str(tmp_path / "a")])
    main([*arguments, "--output", str(tmp_path / "b")])
    table = rows(tmp_path / "a" / "samples.csv")
    assert [row["class"] for row in table] == ["3", "none", "3", "none", "3"]
    for row in table:
        total = float(row["log_prior"]) + float(row["logdet"])
        assert float(row["log_likelihood"]) == pytest.approx(total, abs=2e-3)
        assert float(row["nats_per_dim"]) == pytest.approx(-total / 64, abs=1e-3)
    assert len(list((tmp_path / "a").rglob("0*.png"))) == 5
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert Image.open(tmp_path / "a" / "grid.png").size == (5 * 66 + 2, 66 + 2)


def test_options_may_stand_in_a_file_and_the_command_line_wins(run, tmp_path, capsys):
    file = tmp_path / "sampling.yaml"
    file.write_text("class: [3, none]\ncount: 4\nfiles: true\nbatch_size: 2\nseed: 7\n")
    sample = ["sample", "--checkpoint", str(run), "--config", str(file)]
    main([*sample, "--output", str(tmp_path / "a"), "--count", "5"])
    assert [row["class"] for row in rows(tmp_path / "a" / "samples.csv")] == ["3", "none", "3", "none", "3"]
    assert len(list((tmp_path / "a").rglob("0*.png"))) == 5
    main([*sample, "--output", str(tmp_path / "c"), "--no-files"])
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"grid.png", "samples.csv"}
    for content, message in [
        ("cuont: 4", f"unknown key 'cuont' in {file}; did you mean 'count'?"),
        ("count: many", "--count: must be a whole number of at least 1, got 'many'"),
        ("class: no", f"class = False in {file}: expected text or a number"),
        ("output: null", f"output = None in {file}"),
        ("count: [1, 2]", f"count = [1, 2] in {file}"),
        ("guidance: strong", "--guidance: invalid float value: 'strong'"),
    ]:
        file.write_text(content)
        with pytest.raises(SystemExit) as stop:
            main([*sample, "--output", str(tmp_path / "b")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    file.write_text(f"draws: 2\non_corrupt: skip\nclass: 4\ncheckpoint: {run}")
    images = str(tmp_path / "a")
    output = tmp_path / "l.csv"
    main(["likelihood", images, "--config", str(file), "--output", str(output)])
    assert [row["class"] for row in rows(output)] == ["4"] * 6  # the grid is an image, too
    assert "6 images" in (printed := capsys.readouterr().out)
    assert "1 files skipped" in printed


def test_guided_samples(run, tmp_path):
    """Scale 0 is no guidance; presets, methods, schedules and options change what is drawn, from files as well."""
    sample = ["sample", "--checkpoint", str(run), "--count", "10", "--seed", "7"]
    drawn = {}
    for name, arguments in {
        "none": [],
        "zero": ["--guidance", "0"],
        "resampling": ["--guidance", "1.5"],
        "preset": ["--guidance-preset", "1.1b-p16"],
        "preset at 1.5": ["--guidance-preset", "1.1b-p16", "--guidance", "1.5"],
        "component": ["--guidance", "1.5", "--guidance-method", "component"],
        "cosine": ["--guidance", "1.5", "--guidance-schedule", "cosine"],
        "options": ["--guidance", "1.5", "--guidance-options", "scale_temperature=0.5", "conditional_candidates=20"],
    }.items():
        main([*sample, *arguments, "--output", str(tmp_path / name)])
        drawn[name] = (tmp_path / name / "grid.png").read_bytes()
    assert drawn.pop("zero") == drawn["none"]
    assert len(set(drawn.values())) == len(drawn)
    file = tmp_path / "guided.yaml"
    file.write_text("guidance: 1.5\nguidance_options: [scale_temperature=0.5, conditional_candidates=20]\n")
    main([*sample, "--config", str(file), "--output", str(tmp_path / "file")])
    assert (tmp_path / "file" / "grid.png").read_bytes() == drawn["options"]


def test_redundant_scales_make_a_sheet(run, tmp_path):
    """The same images with every factor: at 1 they are those of a plain draw."""
    sample = ["sample", "--checkpoint", str(run), "--count", "4"]
    main([*sample, "--redundant-scale", "0", "1", "4", "--files", "--output", str(tmp_path / "sheet")])
    main([*sample, "--redundant-scale", "0", "--guidance", "1", "--output", str(tmp_path / "guided")])
    main([*sample, "--output", str(tmp_path / "plain")])
    table, plain = rows(tmp_path / "sheet" / "samples.csv"), rows(tmp_path / "plain" / "samples.csv")
    assert [row["redundant_scale"] for row in table] == ["0"] * 4 + ["1"] * 4 + ["4"] * 4
    for mine, expected in zip(table[4:8], plain, strict=True):
        assert mine["log_likelihood"] == expected["log_likelihood"]
    assert table[0]["log_likelihood"] != table[4]["log_likelihood"]
    assert len(list((tmp_path / "sheet").rglob("0*.png"))) == 12
    assert Image.open(tmp_path / "sheet" / "grid.png").size[1] > 3 * 66


def test_a_sweep_goes_on_where_it_was_interrupted(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge, "MOST_EPOCHS", 1)
    output = tmp_path / "sweep"
    command = ["sweep", "--checkpoint", str(run), "--count", "30", "--output", str(output)]
    main([*command, "--guidance", "0", "1", "--guidance-method", "resampling", "component"])
    first = rows(output / "sweep.csv")
    assert [row["name"] for row in first] == [
        "real images, held out",
        "no guidance",
        "w = 1, resampling",
        "w = 1, component",
    ]
    assert [(row["scale"], row["method"]) for row in first[2:]] == [("1.0", "resampling"), ("1.0", "component")]
    assert 1 < float(first[2]["effective_candidates"]) <= 10
    assert 0 < float(first[2]["from_conditional"]) < 1
    assert float(first[2]["fell_back"]) == 0
    assert "training the judge" in capsys.readouterr().err
    file = output / "sweep.json"
    kept = json.loads(file.read_text())
    kept["rows"][1]["recall"] = 0.25  # what is kept is not drawn again
    file.write_text(json.dumps(kept))
    main([*command, "--guidance", "0", "2", "--guidance-options", "scale_temperature=[0.8, 1.0]"])
    printed = capsys.readouterr()
    assert "training the judge" not in printed.err
    names = [row["name"] for row in rows(output / "sweep.csv")]
    assert names[:4] == [row["name"] for row in first]
    assert names[4:] == [
        "no guidance, scale_temperature 0.8",
        "w = 2, resampling, scale_temperature 0.8",
        "w = 2, resampling, scale_temperature 1.0",
    ]
    assert rows(output / "sweep.csv")[1]["recall"] == "0.25"
    assert len(list((output / "settings").iterdir())) == 7
    assert (output / "sheet.png").is_file()

    def refused(*arguments, command=command):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--guidance", "0", *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "name another" in refused("--seed", "1")
    assert "not of the size or channels" in refused("--data", "fashion-mnist")
    assert "holds no judge" in refused("--judge", str(run / "config.yaml"))
    os.utime(run / "judge.safetensors")  # another judge in its place
    assert "name another" in refused()
    for content in ("[]", "{", '{"of": {}, "rows": []}', '{"of": {}, "rows": [{}]}'):
        file.write_text(content)
        assert str(output) in refused()


def test_a_setting_that_fails_does_not_stop_a_sweep(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge, "MOST_EPOCHS", 1)

    def draw(*arguments, guides, **options):
        if guides.guide.uses_unconditional:
            raise SamplingError("not finite")
        return sampling.draw(*arguments, guides=guides, **options)

    monkeypatch.setattr(sweep, "draw", draw)
    command = ["sweep", "--checkpoint", str(run), "--count", "20", "--output", str(tmp_path / "sweep")]
    main([*command, "--guidance", "1", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("w = 1")).endswith("not finite")
    assert [row["name"] for row in rows(tmp_path / "sweep" / "sweep.csv")] == ["real images, held out", "no guidance"]


def test_likelihoods_of_folders_by_class(run, tmp_path):
    samples = tmp_path / "samples"
    main(["sample", "--checkpoint", str(run), "--class", "3", "8", "--count", "6", "--files", "--output", str(samples)])
    folders = [str(samples / name) for name in ("3", "8")]
    score = ["likelihood", "--checkpoint", str(run), *folders, "--class", "folder"]
    main([*score, "--output", str(tmp_path / "one.csv"), "--draws", "300", "--batch-size", "1"])
    main([*score, "--output", str(tmp_path / "all.csv"), "--draws", "300"])
    one, together = rows(tmp_path / "one.csv"), rows(tmp_path / "all.csv")
    assert [row["class"] for row in one] == ["3", "3", "3", "8", "8", "8"]
    for first, second in zip(one, together, strict=True):
        error = float(first["bits_per_dim_error"]) + float(second["bits_per_dim_error"])
        assert float(first["bits_per_dim"]) == pytest.approx(float(second["bits_per_dim"]), abs=5 * error)
        density = float(first["log_prior"]) + float(first["logdet"])
        assert float(first["nats_per_dim"]) == pytest.approx(-density / 64, abs=1e-4)


def test_the_demo_judges_its_samples(tmp_path, capsys):
    main(["demo", "--output", str(tmp_path), *TINY, "training.steps=2"])
    printed = capsys.readouterr().out
    assert "bits/dim" in printed
    assert "unguided samples are seen as the requested digit" in printed
    assert "of 500 guided ones" in printed
    for name in ("samples.png", "curves.png", "likelihood.csv"):
        assert (tmp_path / name).is_file(), name
    assert len(rows(tmp_path / "likelihood.csv")) == 360
    before = checkpoints(tmp_path)[-1].step
    main(["demo", "--output", str(tmp_path), *TINY, "training.steps=2"])  # a second time, it shows what there is
    assert "is at its end, after 2 steps" in (again := capsys.readouterr().out)
    assert again.split("class consistency")[1] == printed.split("class consistency")[1]
    assert checkpoints(tmp_path)[-1].step == before


@pytest.mark.parametrize("command", [[], ["train"], ["distill"], ["sample"], ["sweep"], ["likelihood"], ["demo"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_mistakes_end_in_a_message(run, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "config.json").write_bytes((run / "best" / "config.json").read_bytes())
    (truncated / "model.safetensors").write_bytes((run / "best" / "model.safetensors").read_bytes()[:1000])
    model = ["--checkpoint", str(run)]
    output = ["--output", str(tmp_path / "out" / "l.csv")]
    for arguments, message in [
        (["train", "--config", "digit"], "did you mean 'digits'?"),
        (["train"], "--config"),
        (["train", "--config", "digits", "training.stpes=1"], "did you mean 'steps'?"),
        (["train", "--config", "digits", "--output", str(run)], "--resume"),
        (["train", "--output", str(tmp_path / "none"), "--resume"], "has no config.yaml"),
        (["sample", "--checkpoint", str(tmp_path / "none")], "there is no folder"),
        (["sample", "--checkpoint", str(tmp_path / "empty")], "neither a run"),
        (["sample", "--checkpoint", str(broken)], str(broken)),
        (["sample", "--checkpoint", str(truncated)], str(truncated)),
        (["sample", *model, "--class", "eleven"], "no class 'eleven'"),
        (["sample", *model, "--output", str(run)], "is not empty"),
        (["sample", *model, "--guidance", "-1"], "scale must be finite and at least 0, got -1.0"),
        (["sample", *model, "--guidance-options", "weighting=balance"], "need --guidance or --guidance-preset"),
        (["sample", *model, "--guidance-method", "component"], "need --guidance or --guidance-preset"),
        (["sample", *model, "--guidance", "1", "--guidance-options", "scale_temperature=high"], "cannot be 'high'"),
        (["sample", *model, "--guidance", "1", "--class", "none"], "guidance contrasts classes with none"),
        (["sample", *model, "--guidance", "1", "--guidance-options", "wieghting=balance"], "mean 'weighting'?"),
        (["sample", *model, "--guidance", "1", "--guidance-options", "weighting"], "expected KEY=VALUE"),
        (["sample", *model, "--guidance", "1", "--guidance-options", "weighting=most"], "weighting must be"),
        (["sample", *model, "--guidance", "1", "--guidance-options", "conditional_candidates=2.5"], "cannot be 2.5"),
        (["sample", *model, "--guidance-preset", "1.1b-p8", "--guidance-method", "component"], "leave out the preset"),
        (["sweep", *model, "--output", str(run)], "is not empty"),
        (["sweep", *model, "--output", str(tmp_path / "sweep"), "--count", "9"], "at least 10 images of each kind"),
        (["sweep", *model, "--guidance-options", "scale_temperature=[]"], "values of scale_temperature is empty"),
        (["sweep", *model, "--guidance-options", "scale_temprature=1"], "did you mean 'scale_temperature'?"),
        (["sweep", "--checkpoint", str(run / "best")], "--data"),
        (["train", "--output", str(run), "--resume", "training.steps=9", "model.flow.width=32"], "cannot be resumed"),
        (["train", "--output", str(run), "--resume", "training.steps=9", "model.whitening=true"], "cannot be resumed"),
        (["sample"], "--checkpoint"),
        (["demo", "--config", "cifar10"], "needs data.source=digits"),
        (["likelihood", *model, str(tmp_path / "broken.png"), "--class", "eleven"], "no class 'eleven'"),
        (["likelihood", *model, str(tmp_path / "broken.png"), "--class", "folder"], "no class"),
        (["likelihood", *model, str(tmp_path / "none.png"), *output], "none.png"),
        (["likelihood", *model, str(tmp_path / "empty"), *output], "empty"),
        (["likelihood", *model, str(tmp_path / "broken.png"), *output], "broken.png"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2, arguments
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("farmer: error:"), error
        assert message in error
        assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*"))
