"""The command line: ``farmer train | plan | distill | sample | sweep | likelihood | demo``."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from farmer_guidance import PRESETS

from farmer_examples.config import ConfigError, load_config, load_options, shipped_configs
from farmer_examples.data import DataError, load_files
from farmer_examples.demo import demo
from farmer_examples.distillation import STUDENT, distill
from farmer_examples.guidance import METHODS, SCHEDULES, Guides, Setting, read_options, settings_of
from farmer_examples.hardware import lacks_float64
from farmer_examples.inverse import INVERSES, ExactInverse, inverse_of
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
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKPOINT = "a run's folder (its best model), or a model's"
OVERRIDES = "change a value of the configuration, as in training.batch_size=64"


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in a message and exit status 2, preemption in 75."""
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command in (_sample, _sweep, _likelihood):
            if options.config is not None:
                options = parser.parse_args(_with_options(arguments, options))
            if options.checkpoint is None:
                raise ConfigError("name a run or a model with --checkpoint")
        options.command(options)
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
    several = {_sample: {"class", "guidance_options", "redundant_scale"}, _sweep: SWEPT}.get(options.command, ())
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="farmer", description="Train FARMER on images, draw guided samples and score exact likelihoods."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "train", _train, "train a model, or go on with a training")
    command.add_argument("--config", metavar="NAME", help=f"a YAML file, or one of: {', '.join(shipped_configs())}")
    command.add_argument("--output", type=Path, metavar="RUN", help="folder of the run (runs/NAME)")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)

    command = _command(commands, "plan", _plan, "tell what a training takes: memory, the batch that fits, days")
    command.add_argument("--config", metavar="NAME", required=True, help="as of farmer train")
    command.add_argument("--gpus", type=_positive, default=1, help="how many there are (1)")
    command.add_argument("--device", choices=list(DEVICES), default="h100", help="each of them (h100)")
    command.add_argument("--memory", type=_above_0, metavar="GIB", help="of each, for one that is not listed")
    command.add_argument(
        "--rate", type=_above_0, metavar="TFLOPS", help="of its dense matrix products in bf16, likewise"
    )
    command.add_argument(
        "--sharded",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="FSDP: divide weights, gradients, optimiser and average among them; else each has a copy",
    )
    command.add_argument(
        "--utilisation", type=_share, default=0.4, metavar="SHARE", help="of the rate that is reached (0.4)"
    )
    command.add_argument(
        "--precision", choices=list(DTYPES), default="bf16", help="of matrix products, as to memory (bf16)"
    )
    command.add_argument(
        "--classes", type=_positive, default=1000, help="how many, if the configuration does not name them (1000)"
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)

    command = _command(commands, "distill", _distill, "teach a model's flow to a student that inverts it in one step")
    command.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=CHECKPOINT)
    command.add_argument("--config", metavar="NAME", help="the model's configuration (the run's own)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="of the distillation (RUN/distillation)")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change a value, as in distillation.minutes=20"
    )

    command = _command(commands, "sample", _sample, "draw images, with their densities in a CSV")
    _add_checkpoint(command)
    command.add_argument("--class", nargs="+", metavar="CLASS", help="by name or number, or none (all classes)")
    command.add_argument("--count", type=_positive, default=100, help="images in all (100)")
    command.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale w; 0 is no guidance (none)")
    command.add_argument("--guidance-method", choices=list(METHODS), help="component is the naive one (resampling)")
    _add_guidance(command)
    command.add_argument(
        "--redundant-scale",
        type=_factor,
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="on the variance of the redundant channels; several make a sheet of the same images with each (1)",
    )
    command.add_argument(
        "--inverse",
        choices=INVERSES,
        default="sequential",
        help="one-step is the student of farmer distill; auto measures which exact method is the fastest (sequential)",
    )
    _add_tolerance(command)
    command.add_argument("--seed", type=int, default=0, help="same seed, same images (0)")
    command.add_argument("--output", type=Path, default=Path("samples"), help="new folder to write to (samples)")
    command.add_argument("--columns", type=_positive, default=10, help="of the grid (10)")
    command.add_argument(
        "--files", action=argparse.BooleanOptionalAction, default=False, help="also write each image to a file"
    )
    command.add_argument("--batch-size", type=_positive, default=100, help="images drawn at once (100)")

    command = _command(commands, "sweep", _sweep, "measure samples drawn in many ways, side by side")
    _add_checkpoint(command)
    scales = [0.0, 0.25, 0.5, 1.0, 2.0, 3.0]
    command.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=scales,
        metavar="SCALE",
        help=f"guidance scales ({' '.join(f'{scale:g}' for scale in scales)})",
    )
    command.add_argument(
        "--guidance-method", nargs="+", choices=list(METHODS), default=["resampling"], help="one or both (resampling)"
    )
    command.add_argument(
        "--inverse", nargs="+", choices=INVERSES, default=["sequential"], help="one or several (sequential)"
    )
    _add_tolerance(command)
    _add_guidance(command, "; a list in brackets is swept over, as in scale_temperature=[0.8,0.9,1]")
    command.add_argument("--count", type=_positive, default=1000, help="images at each setting (1000)")
    command.add_argument("--seed", type=int, default=0, help="of the images (0)")
    command.add_argument("--data", metavar="NAME", help="configuration whose images to measure by (the run's own)")
    command.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="the classifier to measure by; trained on the data if there is none yet (judge.safetensors in the run)",
    )
    command.add_argument(
        "--output", type=Path, default=Path("sweep"), help="folder; an unfinished sweep goes on (sweep)"
    )
    command.add_argument("--batch-size", type=_positive, default=250, help="images drawn at once (250)")

    command = _command(commands, "likelihood", _likelihood, "score images, a CSV row each")
    _add_checkpoint(command)
    command.add_argument("images", nargs="+", type=Path, help="image files and folders of them")
    command.add_argument(
        "--class",
        default="none",
        metavar="CLASS",
        help="of all images, by name or number; none; or folder: each image's folder names it (none)",
    )
    command.add_argument(
        "--on-corrupt",
        choices=["raise", "skip"],
        default="raise",
        help="files that are no sound images: stop, or count",
    )
    command.add_argument("--draws", type=_positive, default=8, help="of the dequantisation noise (8)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    command.add_argument("--output", type=Path, default=Path("likelihood.csv"), help="the CSV (likelihood.csv)")
    command.add_argument("--batch-size", type=_positive, default=64, help="images scored at once (64)")

    command = _command(commands, "demo", _demo, "train on small digits and show the results, in minutes")
    command.add_argument("--config", metavar="NAME", default="digits", help="a configuration of the digits (digits)")
    command.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (runs/demo)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    return parser


def _command(commands, name, run, summary):  # type: ignore[no-untyped-def]  # argparse's types are private
    command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(command=run)
    return command


def _add_guidance(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument("--guidance-preset", choices=list(PRESETS), help="one of the paper's settings (none)")
    command.add_argument(
        "--guidance-schedule",
        choices=["constant", *SCHEDULES],
        help="let the scale grow from 0 at the first token to its value at the last (constant)",
    )
    command.add_argument(
        "--guidance-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"arguments of the method, as in scale_temperature=0.9 conditional_candidates=32{more}",
    )


def _add_tolerance(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tolerance",
        type=_above_0,
        default=1e-5,
        help="change at which the exact inverses that iterate, all but sequential, stop (1e-5)",
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help=CHECKPOINT,
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options, as in count: 40")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return factor


def _above_0(text: str) -> float:
    number = _factor(text)
    if not number:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _share(text: str) -> float:
    share = _above_0(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"must be a share, at most 1, got {text!r}")
    return share


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


if __name__ == "__main__":
    main()
