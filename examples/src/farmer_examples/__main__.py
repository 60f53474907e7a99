"""The command line: ``farmer train | plan | distill | sample | sweep | likelihood | demo``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from farmer_guidance import PRESETS

from farmer_examples.arguments import DTYPES, parser_of_commands
from farmer_examples.config import ConfigError, load_config, load_options
from farmer_examples.data import DataError, load_files
from farmer_examples.demo import demo
from farmer_examples.distillation import STUDENT, distill
from farmer_examples.guidance import Guides, Setting, read_options, settings_of
from farmer_examples.hardware import lacks_float64
from farmer_examples.inverse import ExactInverse, inverse_of
from farmer_examples.likelihood import save_likelihoods
from farmer_examples.loop import CONFIG, TrainingError, resumed_config
from farmer_examples.model import Farmer, UnknownClassError
from farmer_examples.plan import DEVICES, Device, plan
from farmer_examples.preemption import PreemptedError
from farmer_examples.sampling import SamplingError, save_samples
from farmer_examples.storage import find_model
from farmer_examples.sweep import stamp, sweep, table
from farmer_examples.training import train

__all__ = ["main"]

USER_ERRORS = (ConfigError, DataError, FloatingPointError, SamplingError, TrainingError, UnknownClassError, OSError)
RESTART = 75
"""Exit status of a training that was told to end and asks to be started again, EX_TEMPFAIL of sysexits.h."""

SWEPT = {"guidance", "guidance_method", "guidance_options", "inverse"}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in a message and exit status 2, preemption in 75."""
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of_commands()
    options = parser.parse_args(arguments)
    try:
        if options.command in ("sample", "sweep", "likelihood"):
            if options.config is not None:
                options = parser.parse_args(_with_options(arguments, options))
            if options.checkpoint is None:
                raise ConfigError("name a run or a model with --checkpoint")
        RUNS[options.command](options)
    except USER_ERRORS as error:
        print(f"farmer: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except PreemptedError as error:
        print(f"farmer: {error}", file=sys.stderr)
        raise SystemExit(RESTART) from None
    except KeyboardInterrupt:
        print("farmer: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _with_options(arguments: list[str], options: argparse.Namespace) -> list[str]:
    """Put the options in the file of ``--config`` before those of the command line, so that the latter win."""
    known = [name for name in vars(options) if name not in ("command", "config", "images")]
    written: list[str] = []
    several = {"sample": {"class", "guidance_options", "redundant_scale"}, "sweep": SWEPT}.get(options.command, ())
    for key, value in load_options(options.config, known).items():
        flag = key.replace("_", "-")
        values = value if isinstance(value, list) and key in several else [value]
        if isinstance(value, bool) and key == "files":
            written.append(f"--{flag}" if value else f"--no-{flag}")
        elif values and all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in values):
            written += [f"--{flag}", *map(str, values)]
        else:
            raise ConfigError(
                f"{key} = {value!r} in {options.config}: expected text or a number; quote yes, no and null"
            )
    return [arguments[0], *written, *arguments[1:]]


def _train(options: argparse.Namespace) -> None:
    if options.config is not None:
        config = load_config(options.config, options.overrides)
    elif options.resume and options.output is not None:
        config = resumed_config(options.output, options.overrides)
    else:
        raise ConfigError("name a configuration with --config, or a run to go on with by --output RUN --resume")
    run = options.output or Path("runs") / Path(options.config).stem
    train(config, run, resume=options.resume)
    _print(f"the best model is {find_model(run)}")


def _plan(options: argparse.Namespace) -> None:
    listed = DEVICES[options.device]
    found = plan(
        load_config(options.config, options.overrides),
        Device(options.memory or listed.memory, options.rate or listed.rate),
        gpus=options.gpus,
        sharded=options.sharded,
        utilisation=options.utilisation,
        dtype=DTYPES[options.precision],
        classes=options.classes,
    )
    print(found.table())


def _distill(options: argparse.Namespace) -> None:
    folder = find_model(options.checkpoint)
    if options.output is None and folder == options.checkpoint:
        raise ConfigError(f"{folder} is a model and not a run: name a folder for the distillation with --output")
    run = options.output or options.checkpoint / "distillation"
    for override in options.overrides:
        if not override.startswith(("distillation.", "data.")):
            raise ConfigError(f"{override}: a distillation takes keys of distillation and of data alone")
    if options.config is not None:
        config = load_config(options.config, options.overrides)
    elif options.resume and (run / CONFIG).is_file():
        config = resumed_config(run, options.overrides)
    elif (options.checkpoint / CONFIG).is_file():
        config = load_config(options.checkpoint / CONFIG, options.overrides)
    else:
        raise ConfigError(f"{options.checkpoint} is not a run: name its training's configuration with --config")
    distill(config, folder, run, resume=options.resume)
    _print(f"the student is {folder / STUDENT}: farmer sample --checkpoint {options.checkpoint} --inverse one-step")


def _print(text: str) -> None:
    """Print once, however many processes there are."""
    if PartialState().is_main_process:
        print(text)


def _load(checkpoint: Path) -> Farmer:
    return Farmer.load(find_model(checkpoint)).to(PartialState(cpu=lacks_float64()).device).eval()


def _guides(options: argparse.Namespace) -> Guides:
    scale, preset = options.guidance, options.guidance_preset
    if scale is None and preset is None:
        if options.guidance_method or options.guidance_options or options.guidance_schedule:
            raise ConfigError("settings of guidance need --guidance or --guidance-preset")
        return Guides()
    return Setting(
        PRESETS[preset]["scale"] if scale is None else scale,
        options.guidance_method or "resampling",
        preset,
        options.guidance_schedule or "constant",
        read_options(options.guidance_options),
    ).guides()


def _sample(options: argparse.Namespace) -> None:
    guides = _guides(options)
    model = _load(options.checkpoint)
    chosen = getattr(options, "class") or range(len(model.class_names)) or ["none"]
    classes = [model.label(name) for name in chosen]
    labels = torch.tensor(classes).repeat(-(-options.count // len(classes)))[: options.count]
    inverse = inverse_of(options.inverse, find_model(options.checkpoint), model, options.tolerance)
    save_samples(
        model,
        labels,
        options.output,
        seed=options.seed,
        batch_size=options.batch_size,
        columns=options.columns,
        files=options.files,
        guides=guides,
        redundant_scales=options.redundant_scale,
        inverse=inverse,
    )
    if isinstance(inverse, ExactInverse):
        print(inverse.report())
    print(f"{options.count} samples: {options.output / 'grid.png'} and {options.output / 'samples.csv'}")


def _sweep(options: argparse.Namespace) -> None:
    choices = {k: v if isinstance(v, list) else [v] for k, v in read_options(options.guidance_options).items()}
    settings = settings_of(
        options.guidance,
        options.guidance_method,
        preset=options.guidance_preset,
        schedule=options.guidance_schedule or "constant",
        options=choices,
        inverses=options.inverse,
    )
    folder, model = find_model(options.checkpoint), _load(options.checkpoint)
    if options.data is None and not (options.checkpoint / CONFIG).is_file():
        raise ConfigError(f"{options.checkpoint} is not a run: name its training's configuration with --data")
    data = load_config(options.data or options.checkpoint / CONFIG).data
    data.check_size(model)
    inverses = {name: inverse_of(name, folder, model, options.tolerance) for name in options.inverse}
    train, held_out = data.load("train"), data.load("test")
    data.check_classes(model, train.class_names)
    rows = sweep(
        model,
        settings,
        options.output,
        train=train,
        held_out=held_out,
        judge_file=options.judge or options.checkpoint / "judge.safetensors",
        count=options.count,
        seed=options.seed,
        batch_size=options.batch_size,
        origin=stamp(folder / "model.safetensors"),
        inverses=inverses,
        student=stamp(folder / STUDENT) if "one-step" in inverses else "",
    )
    print(table(rows))
    print(f"{options.output / 'sheet.png'} and {options.output / 'sweep.csv'}")


def _likelihood(options: argparse.Namespace) -> None:
    model = _load(options.checkpoint)

    def label(path: Path) -> int:
        name = getattr(options, "class")
        return model.label(path.parent.name if name == "folder" else name)

    paths, data = load_files(
        options.images,
        image_size=model.image_size,
        channels=model.channels,
        label=label,
        on_corrupt=options.on_corrupt,
    )
    bits = save_likelihoods(
        model,
        [str(path) for path in paths],
        data,
        options.output,
        draws=options.draws,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    skipped = f", {data.skipped} files skipped that are no sound images" if data.skipped else ""
    print(f"{len(bits)} images, {bits.mean():.4f} bits/dim on average{skipped}: {options.output}")


def _demo(options: argparse.Namespace) -> None:
    demo(options.output, options.config, options.overrides)


RUNS = {
    "train": _train,
    "plan": _plan,
    "distill": _distill,
    "sample": _sample,
    "sweep": _sweep,
    "likelihood": _likelihood,
    "demo": _demo,
}

if __name__ == "__main__":
    main()
