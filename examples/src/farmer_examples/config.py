"""The configuration of a run: its schema, the shipped files, and errors that say what to mend."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from farmer_ar import LatentPrior
from farmer_flow import AutoregressiveFlow
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from farmer_examples.data import DataError, ImageData, load_images
from farmer_examples.model import Farmer, TrainingNoise
from farmer_examples.streaming import Stream

__all__ = ["Config", "ConfigError", "load_config", "load_options", "nearest", "number", "shipped_configs"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the file."""


class Section(BaseModel):
    """A part of the configuration, in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images, and how they are brought to one size."""

    source: str
    """``digits``, a folder of IDX files or images, a glob of parquet files, or a hub id."""
    test_source: str | None = None
    """The held-out images, in place of a split of ``source``."""
    image_size: int = Field(ge=1)
    channels: Literal[1, 3] = 3
    grey_levels: int = Field(default=256, ge=2, le=256)
    class_names: list[str] | None = None
    flip: bool = False
    """Mirror half of the training images, chosen at random each time."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """The share of the images kept for evaluation where there is neither a split nor a ``test_source``."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    limit: int | None = Field(default=None, ge=1)
    """Use only so many images of each split."""
    streaming: bool = False
    """Read the training images shard by shard, without an index of them: for sets too large to hold on a disk."""
    shuffle_block: int = Field(default=4096, ge=1)
    """How many images in a row of a stream are shuffled at a time, beside the order of its shards."""

    def load(self, split: Literal["train", "test"]) -> ImageData:
        """Return the images of a split; see :func:`~farmer_examples.data.load_images`."""
        loading = self.model_dump(exclude={"grey_levels", "flip", "streaming", "shuffle_block"})
        if self.streaming:  # the source is not to be opened whole
            loading["source"] = self.test_source
        return load_images(split=split, **loading)

    def load_both(self) -> tuple[ImageData | Stream, ImageData]:
        """Return the images to train on, which may be a stream of them, and those held out."""
        if not self.streaming:
            return self.load("train"), self.load("test")
        common = self.model_dump(include={"source", "image_size", "channels", "class_names", "on_corrupt"})
        stream, held_out = Stream(**common, block=self.shuffle_block), self.load("test")
        if stream.class_names != held_out.class_names:
            raise DataError(
                f"{self.source} and {self.test_source} have other classes: name those of both in data.class_names"
            )
        return stream, held_out

    def check_size(self, model: Farmer) -> None:
        """Raise ConfigError unless these images are of the size and channels that a model was made for."""
        if (self.image_size, self.channels) != (model.image_size, model.channels):
            raise ConfigError(f"the model's images are not of the size or channels of {self.source} as configured")

    def check_classes(self, model: Farmer, class_names: Sequence[str]) -> None:
        """Raise ConfigError unless these classes, as loaded, are those that a model was made for."""
        if list(class_names) != model.class_names:
            raise ConfigError(f"the classes of {self.source} are not the model's: name its training's configuration")

    @model_validator(mode="after")
    def _stream_is_tested(self) -> Data:
        if self.streaming and self.test_source is None:
            raise ValueError("streaming=true needs data.test_source: no images are held out of a stream")
        if self.streaming and self.limit is not None:
            raise ValueError("limit is not for streaming=true, which has no index to draw from")
        return self

    @field_validator("class_names")
    @classmethod
    def _names_differ(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("every class must have a name of its own")
        return names


class Flow(Section):
    """The arguments of :class:`farmer_flow.AutoregressiveFlow`."""

    width: int = Field(ge=1)
    blocks: int = Field(ge=1)
    layers: int = Field(ge=1)
    head_dim: int = Field(default=64, ge=1)
    conditional: bool = False
    """Condition every block on the class as well as the prior."""


class Prior(Section):
    """The arguments of :class:`farmer_ar.LatentPrior`."""

    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    informative_dim: int | None = Field(default=None, ge=1)
    """How many of a token's channels are informative; all of them if left out."""
    components: int = Field(ge=1)
    redundant_components: int = Field(default=1, ge=1)
    condition_repeats: int = Field(default=1, ge=1)
    head_dim: int = Field(default=64, ge=1)


class Noise(Section):
    """See :class:`farmer_examples.model.TrainingNoise`."""

    kind: Literal["uniform", "gaussian"] = "uniform"
    start: float = Field(default=0.1, ge=0)
    end: float = Field(default=0.005, ge=0)


class Model(Section):
    """The model's shape."""

    patch_size: int = Field(ge=1)
    flow: Flow
    prior: Prior
    final_permute: bool = True
    whitening: bool = False
    """Let a linear map that whitens the patches, fitted before training, come before the flow."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class Schedule(Section):
    """The course of a training, whatever is trained."""

    steps: int = Field(ge=1)
    """Optimiser steps. The schedules end here, or at ``minutes`` if that comes first."""
    minutes: float | None = Field(default=None, gt=0)
    batch_size: int = Field(ge=1)
    """Images a step, over all processes and all the parts that they accumulate."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """The most images that a process computes at once; its share of the batch if left out."""
    lr: float = Field(default=1e-4, gt=0)
    final_lr: float = Field(default=1e-6, ge=0)
    warmup_steps: int = Field(default=5000, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.03, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_skipped: int = Field(default=10, ge=0)
    """Steps in all that are passed over because their gradient is not finite, before the training stops."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, of a block at a time: a third more work, far less memory."""
    compile: bool = False
    """Compile the blocks of the flow, and the layers and mixtures of the prior; the first step takes longer."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Of the average of the weights that is evaluated and kept; 0 for none, which saves its memory."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """The share of images that are learnt without their class."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products; ``auto`` is bf16 where the hardware computes in it, else fp32."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; needed only for data too large to hold in memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    evaluate_every: int = Field(default=1000, ge=1)
    """Steps between evaluations, each of which draws samples and writes a checkpoint."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that are not evaluated, beside those that are; none if left out."""
    samples: int = Field(default=64, ge=0)
    """Images in each sample grid."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints to keep, beside the best."""

    def parts(self, processes: int) -> int:
        """Return how many parts a process takes its share of a batch in: the fewest that are small enough and equal.

        Raises:
            ConfigError: if the processes cannot have equal shares.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest or not share:
            raise ConfigError(f"batch_size={self.batch_size} must be a multiple of the {processes} processes")
        least = -(-share // (self.micro_batch_size or share))
        return next(parts for parts in range(least, share + 1) if share % parts == 0)


class Training(Schedule):
    """The course of the maximum-likelihood training."""

    noise: Noise = Noise()
    evaluation_images: int | None = Field(default=None, ge=1)
    """How many held-out images to evaluate on; all of them if left out."""
    evaluation_draws: int = Field(default=1, ge=1)


class Distillation(Schedule):
    """The course of a distillation."""

    steps: int = Field(default=20000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    max_noise: float = Field(default=0.1, ge=0)
    """The largest standard deviation of the noise on the latents of images; the paper has 0.3."""
    pixel_weight: float = Field(default=150.0, ge=0)
    """Factor on the error of the student's image, in pixels, which is added to the mean error of the blocks' states."""
    prior_images: int = Field(default=4096, ge=1)
    """How many images of the model itself to learn from, drawn before the first step."""
    prior_share: float = Field(default=0.5, ge=0, le=1)
    """The share of each batch that they make up; the rest are real images."""
    evaluation_latents: int = Field(default=256, ge=1)
    """How many further latents of the prior the student is scored on."""
    drawn_at_once: int = Field(default=256, ge=1)
    """How many of either are drawn and inverted at once."""


class Config(Section):
    """Everything that defines a run."""

    data: Data
    model: Model
    training: Training
    distillation: Distillation = Distillation()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        dim = self.data.channels * self.model.patch_size**2
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"model.patch_size={self.model.patch_size} must divide data.image_size={self.data.image_size}"
            )
        if self.data.image_size == self.model.patch_size:
            raise ValueError("model.patch_size must be smaller than data.image_size: one token is no sequence")
        informative = self.model.prior.informative_dim
        if informative is not None and informative > dim:
            raise ValueError(f"model.prior.informative_dim={informative} exceeds a token's {dim} channels")
        for name in ("flow", "prior"):
            part = getattr(self.model, name)
            if part.width % part.head_dim:
                raise ValueError(f"model.{name}.width={part.width} must be a multiple of head_dim={part.head_dim}")
        return self

    @property
    def length(self) -> int:
        """The number of tokens of an image."""
        return (self.data.image_size // self.model.patch_size) ** 2

    def build(self, class_names: list[str]) -> Farmer:
        """Return a new model for these classes."""
        length = self.length
        dim = self.data.channels * self.model.patch_size**2
        flow, prior, noise = self.model.flow, self.model.prior, self.training.noise
        return Farmer(
            AutoregressiveFlow(
                dim,
                length,
                classes=len(class_names) if flow.conditional else 0,
                **flow.model_dump(exclude={"conditional"}),
            ),
            LatentPrior(
                dim,
                length,
                classes=len(class_names),
                informative_dim=prior.informative_dim or dim,
                **prior.model_dump(exclude={"informative_dim"}),
            ),
            image_size=self.data.image_size,
            channels=self.data.channels,
            patch_size=self.model.patch_size,
            grey_levels=self.data.grey_levels,
            class_names=class_names,
            noise=list(TrainingNoise(noise.kind, noise.start, noise.end)),
            final_permute=self.model.final_permute,
            whitening=self.model.whitening,
        )


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parents[1] / "configs"):  # installed; in a checkout
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise FileNotFoundError(f"no configurations beside {here}: the installation is incomplete")


def load_config(name: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a configuration.

    Args:
        name: of a shipped configuration, or the path of a YAML file.
        overrides: ``section.key=value`` each, the value in YAML.

    Raises:
        ConfigError: naming the key, what is wrong with it, the nearest valid key, and the file.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        shipped = shipped_configs()
        if str(name) not in shipped:
            raise ConfigError(f"no configuration {str(name)!r}{nearest(str(name), list(shipped))}")
        path = shipped[str(name)]
    content = _read(path, f"the sections {', '.join(Config.model_fields)}")
    where = str(path)
    for override in overrides or []:
        _apply(content, override)
        where = f"{path} and the command line"
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, where) for item in error.errors())) from None


def load_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Read a YAML file of a command's options.

    Raises:
        ConfigError: if it cannot be read or has a key that is none of the ``known``.
    """
    content = _read(path, f"some of the options {', '.join(known)}")
    for key in content:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {path}{nearest(str(key), known)}")
    return content


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold {expected}")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in the content of a file."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override is written section.key=value, got {override!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section, in the override {override!r}")
        content = inner
    try:
        content[last] = number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"the value of the override {override!r} is not valid YAML") from None


def number(value: Any) -> Any:
    """Read 1e-4 as a number, which YAML 1.1 takes for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _explain(error: Any, where: str) -> str:
    """Put one of pydantic's errors in a sentence."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {key!r} in {where}{nearest(str(error['loc'][-1]), list(section.model_fields))}"
    if error["type"] == "missing":
        return f"{key!r} is missing in {where}"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return f"{message}, in {where}"
    return f"{key} = {error['input']!r} in {where}: {message[0].lower()}{message[1:]}"


def nearest(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: the nearest that is known, and all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" Known: {', '.join(known)}"
