"""The command line: ``farmer train | sample | likelihood | demo``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from farmer_examples.config import ConfigError, load_config, shipped_configs
from farmer_examples.data import DataError, image_files, read_image
from farmer_examples.demo import demo
from farmer_examples.likelihood import save_likelihoods
from farmer_examples.model import Farmer, UnknownClassError
from farmer_examples.sampling import save_samples
from farmer_examples.storage import find_model
from farmer_examples.training import TrainingError, resumed_config, train

__all__ = ["main"]

USER_ERRORS = (ConfigError, DataError, TrainingError, UnknownClassError, FloatingPointError, OSError)
OVERRIDES = "change a value of the configuration, as in training.batch_size=64"


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in a message and exit status 2."""
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except USER_ERRORS as error:
        print(f"farmer: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("farmer: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="farmer", description="Train FARMER on images, draw samples and score exact likelihoods."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "train", _train, "train a model, or go on with a training")
    command.add_argument("--config", metavar="NAME", help=f"a YAML file, or one of: {', '.join(shipped_configs())}")
    command.add_argument("--output", type=Path, metavar="RUN", help="folder of the run (runs/NAME)")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)

    command = _command(commands, "sample", _sample, "draw images, with their densities in a CSV")
    _add_checkpoint(command)
    command.add_argument(
        "--class", dest="classes", nargs="+", metavar="CLASS", help="by name or number, or none (all classes)"
    )
    command.add_argument("--count", type=_positive, default=100, help="images in all (100)")
    command.add_argument("--seed", type=int, default=0, help="same seed, same images (0)")
    command.add_argument("--output", type=Path, default=Path("samples"), help="folder to write to (samples)")
    command.add_argument("--columns", type=_positive, default=10, help="of the grid (10)")
    command.add_argument("--files", action="store_true", help="also write each image to a file")
    command.add_argument("--batch-size", type=_positive, default=100, help="images drawn at once (100)")

    command = _command(commands, "likelihood", _likelihood, "score images, a CSV row each")
    _add_checkpoint(command)
    command.add_argument("images", nargs="+", type=Path, help="image files and folders of them")
    command.add_argument(
        "--class",
        dest="label",
        default="none",
        metavar="CLASS",
        help="of all images, by name or number; none; or folder: each image's folder names it (none)",
    )
    command.add_argument("--draws", type=_positive, default=8, help="of the dequantisation noise (8)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    command.add_argument("--output", type=Path, default=Path("likelihood.csv"), help="the CSV (likelihood.csv)")
    command.add_argument("--batch-size", type=_positive, default=64, help="images scored at once (64)")

    command = _command(commands, "demo", _demo, "train on small digits and show the results, in minutes")
    command.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (runs/demo)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    return parser


def _command(commands, name, run, summary):  # type: ignore[no-untyped-def]  # argparse's types are private
    command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(command=run)
    return command


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN",
        help="a run's folder (its best model), or a model's",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _train(options: argparse.Namespace) -> None:
    if options.config is not None:
        config = load_config(options.config, options.overrides)
    elif options.resume and options.output is not None:
        config = resumed_config(options.output, options.overrides)
    else:
        raise ConfigError("name a configuration with --config, or a run to go on with by --output RUN --resume")
    run = options.output or Path("runs") / Path(options.config).stem
    train(config, run, resume=options.resume)
    print(f"the best model is {find_model(run)}")


def _load(checkpoint: Path) -> Farmer:
    folder = find_model(checkpoint)
    try:
        model = Farmer.from_pretrained(folder)
    except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise OSError(f"the model in {folder} cannot be read: {error}") from error
    return model.to(PartialState().device).eval()


def _sample(options: argparse.Namespace) -> None:
    model = _load(options.checkpoint)
    classes = [model.label(name) for name in options.classes or range(len(model.class_names)) or ["none"]]
    labels = torch.tensor(classes).repeat(-(-options.count // len(classes)))[: options.count]
    save_samples(
        model,
        labels,
        options.output,
        seed=options.seed,
        batch_size=options.batch_size,
        columns=options.columns,
        files=options.files,
    )
    print(f"{options.count} samples: {options.output / 'grid.png'} and {options.output / 'samples.csv'}")


def _likelihood(options: argparse.Namespace) -> None:
    model = _load(options.checkpoint)
    paths = image_files(options.images)
    names = [path.parent.name if options.label == "folder" else options.label for path in paths]
    labels = torch.tensor([model.label(name) for name in names])
    images = _Files(paths, model)
    bits = save_likelihoods(
        model,
        [str(path) for path in paths],
        images,
        labels,
        options.output,
        draws=options.draws,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    print(f"{len(bits)} images, {bits.mean():.4f} bits/dim on average: {options.output}")


class _Files(torch.utils.data.Dataset[torch.Tensor]):
    """Image files, brought to a model's size when they are asked for."""

    def __init__(self, paths: list[Path], model: Farmer) -> None:
        self.paths, self.size, self.channels = paths, model.image_size, model.channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_image(self.paths[index], self.size, self.channels)


def _demo(options: argparse.Namespace) -> None:
    demo(options.output, options.overrides)


if __name__ == "__main__":
    main()
