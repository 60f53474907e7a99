"""What the commands of the command line take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from farmer_guidance import PRESETS

from farmer_examples.config import shipped_configs
from farmer_examples.guidance import METHODS, SCHEDULES
from farmer_examples.inverse import INVERSES
from farmer_examples.plan import DEVICES

__all__ = ["DTYPES", "parser_of_commands"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKPOINT = "a run's folder (its best model), or a model's"
OVERRIDES = "change a value of the configuration, as in training.batch_size=64"


def parser_of_commands() -> argparse.ArgumentParser:
    """Return the parser of all commands, which enters the name of the one that is given as ``command``."""
    parser = argparse.ArgumentParser(
        prog="farmer", description="Train FARMER on images, draw guided samples and score exact likelihoods."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        add_arguments(command)
    return parser


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="NAME", help=f"a YAML file, or one of: {', '.join(shipped_configs())}")
    command.add_argument("--output", type=Path, metavar="RUN", help="folder of the run (runs/NAME)")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _plan(command: argparse.ArgumentParser) -> None:
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


def _distill(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=CHECKPOINT)
    command.add_argument("--config", metavar="NAME", help="the model's configuration (the run's own)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="of the distillation (RUN/distillation)")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change a value, as in distillation.minutes=20"
    )


def _sample(command: argparse.ArgumentParser) -> None:
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


def _sweep(command: argparse.ArgumentParser) -> None:
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


def _likelihood(command: argparse.ArgumentParser) -> None:
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


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="NAME", default="digits", help="a configuration of the digits (digits)")
    command.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (runs/demo)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


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


COMMANDS = {
    "train": (_train, "train a model, or go on with a training"),
    "plan": (_plan, "tell what a training takes: memory, the batch that fits, days"),
    "distill": (_distill, "teach a model's flow to a student that inverts it in one step"),
    "sample": (_sample, "draw images, with their densities in a CSV"),
    "sweep": (_sweep, "measure samples drawn in many ways, side by side"),
    "likelihood": (_likelihood, "score images, a CSV row each"),
    "demo": (_demo, "train on small digits and show the results, in minutes"),
}
