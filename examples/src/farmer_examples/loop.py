"""The loop that every training here runs, with Accelerate: steps, averages, checkpoints, resumption, progress."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import textwrap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from farmer_examples.config import Config, ConfigError, load_config
from farmer_examples.model import lacks_float64
from farmer_examples.storage import Checkpoint, checkpoints, prune, published, set_aside

__all__ = ["Course", "Loop", "PreemptedError", "TrainingError", "computes_in_bf16", "resumed_config", "short_attention"]

CONFIG = "config.yaml"
SHORT_SEQUENCE = 128


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why, and what is left."""


class PreemptedError(RuntimeError):
    """A training that has saved its state because it was told to end, and is to be resumed."""


@dataclass
class Course:
    """How far a training has come. Saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that have been trained on."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps passed over because their gradient was not finite."""
    loss_sum: float = 0.0
    loss_count: int = 0
    """Of the batches since the last evaluation whose loss was finite."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return what Accelerate is to save."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what Accelerate has loaded."""
        self.__dict__.update(state)


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """Return the configuration that a run was started with, changed by ``overrides``."""
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} has no {CONFIG} to resume with; name one with --config")
    return load_config(run / CONFIG, overrides)


def computes_in_bf16() -> bool:
    """Whether the hardware has matrix products in bfloat16, and does not emulate them, a hundred times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _mixed_precision(precision: str) -> str:
    """Return Accelerate's name of a precision, after choosing one for ``auto``."""
    if precision == "auto":
        precision = "bf16" if computes_in_bf16() else "fp32"
    return "no" if precision == "fp32" else precision


@contextlib.contextmanager
def short_attention(device: torch.device, length: int) -> Iterator[None]:
    """Choose plain matrix products over the fused attention for short sequences on a CPU, where they are faster."""
    if device.type != "cpu" or length > SHORT_SEQUENCE:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name also for the CPU
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class Loop(ABC):
    """One training: a module, its average, the optimiser, the images and the course so far.

    A subclass builds the module and says what its loss is, and how it is scored and saved.

    Args:
        config: see :class:`~farmer_examples.config.Config`; its section :attr:`section` is the course to take.
        run: gets ``config.yaml``, ``checkpoints/``, ``best``, ``samples/``, ``curves.png`` and TensorBoard's ``logs/``.
        resume: go on from the newest readable checkpoint in ``run``, if there is one.

    Raises:
        TrainingError: if ``run`` holds another training, or no checkpoint of it fits the configuration.
        DataError: if the images cannot be read.
    """

    section: ClassVar[str]
    """The section of the configuration with the loop's settings."""

    def __init__(self, config: Config, run: Path, *, resume: bool) -> None:
        settings = self.settings = getattr(config, self.section)
        if not resume and checkpoints(run):
            raise TrainingError(f"{run} already holds a training: go on with --resume, or choose another --output")
        self.config, self.run = config, run
        try:
            self.accelerator = Accelerator(
                mixed_precision=_mixed_precision(settings.precision),
                # every step takes all its parts, also across the end of an epoch
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=settings.accumulation, sync_with_dataloader=False
                ),
                cpu=lacks_float64(),
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
                log_with="tensorboard",
                project_dir=run,
            )
        except ValueError as error:  # a precision that the hardware lacks
            raise ConfigError(f"{self.section}.precision={settings.precision}: {error}") from error
        if settings.precision == "fp16" and self.accelerator.device.type == "cpu":  # Accelerate would take fp32
            raise ConfigError(f"{self.section}.precision=fp16 needs a GPU: take bf16, fp32 or auto")
        set_seed(settings.seed)
        with self.accelerator.main_process_first():
            self.data, self.held_out = config.data.load("train"), config.data.load("test")
        for name, part in [("training", self.data), ("held-out", self.held_out)]:
            if part.skipped:
                self.accelerator.print(
                    f"skipped {part.skipped} files or rows of the {name} set that are no sound images"
                )
        self._check_batch()
        module = self.build()
        self.course = Course()
        self.ema = AveragedModel(
            module, device=self.accelerator.device, multi_avg_fn=_warmed_up_average(settings.ema_decay)
        )
        loader = DataLoader(
            self.data,
            batch_size=settings.batch_size // settings.accumulation,
            shuffle=True,
            drop_last=True,
            collate_fn=self.data.collate,
            num_workers=settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_ignore_sigterm,
        )
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.module, self.optimizer, self.loader = self.accelerator.prepare(module, optimizer, loader)
        self.accelerator.register_for_checkpointing(self.course, self.ema)
        self.generator = Generator(self.accelerator.device)
        self.spoilt: float | None = None
        self._resume(resume)

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the module to train."""

    def prepare(self) -> None:  # noqa: B027  a training has nothing to do here unless it says so
        """Do what steps need and the clock is not to count."""

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of uint8 images after a share of the course, and further figures for the logs.

        Some of the labels are dropped already. Random numbers come from ``self.generator``, which is reseeded at every
        batch.
        """

    @abstractmethod
    def evaluate(self, train: float | None) -> dict[str, Any]:
        """Score the averaged module, with pictures; ``train`` is the mean loss since the last time.

        All processes call it, and get the same.

        Returns:
            Figures that JSON can hold, of which ``held_out`` is the score, the lower the better.
        """

    @abstractmethod
    def save(self, folder: Path, held_out: float | None) -> None:
        """Write the averaged module to a new folder; ``held_out`` is its score, if it has been scored."""

    @abstractmethod
    def shown(self, loss: float, figures: dict[str, float]) -> dict[str, str]:
        """Return what the progress bar tells beside the speed."""

    def train(self) -> Course:
        """Run to the end of the schedule.

        Raises:
            TrainingError: if the gradient was not finite too often, or a held-out score is not.
            PreemptedError: on SIGTERM, after the step or evaluation at hand and a checkpoint.
        """
        with _triggered_by_sigterm(self.accelerator):
            return self._train()

    def _train(self) -> Course:
        settings, course, accelerator = self.settings, self.course, self.accelerator
        if course.step and self._progress(course.seconds) >= 1:
            accelerator.print(f"the training in {self.run} is at its end, after {course.step} steps")
            return course
        if accelerator.is_main_process:
            with published(self.run / CONFIG) as partial:
                partial.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        accelerator.init_trackers("logs")
        self.bar = tqdm(
            total=settings.steps,
            initial=course.step,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        if course.step == 0:
            self._evaluate(train=None)
        self.prepare()
        started = time.perf_counter() - course.seconds
        for epoch in itertools.count(course.epoch):
            course.epoch = epoch
            self.loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(self.loader, course.batch) if course.batch else self.loader
            for images, labels in batches:
                progress = self._progress(time.perf_counter() - started)
                loss, figures = self._step(images, labels, progress)
                course.batch += 1
                if math.isfinite(loss):
                    course.loss_sum, course.loss_count = course.loss_sum + loss, course.loss_count + 1
                if not accelerator.sync_gradients:
                    continue
                course.step += 1
                course.seconds = time.perf_counter() - started
                self._show(loss, figures, progress)
                done = course.step >= settings.steps or self._progress(course.seconds) >= 1
                if accelerator.check_trigger() and not done:
                    self._save({"step": course.step})  # at once, as there may be seconds left
                    self.bar.close()
                    accelerator.end_training()
                    raise PreemptedError(f"told to end, and saved at step {course.step}: go on with --resume")
                if done or course.step % settings.evaluate_every == 0:
                    pause = time.perf_counter()
                    self._evaluate(self._mean_loss())
                    self._save(course.history[-1])
                    started += time.perf_counter() - pause  # the schedule counts the training alone
                if done:
                    self.bar.close()
                    accelerator.end_training()
                    return course
            course.batch = 0
        raise AssertionError("unreachable")

    def _step(self, images: Tensor, labels: Tensor, progress: float) -> tuple[float, dict[str, float]]:
        settings, accelerator, course = self.settings, self.accelerator, self.course
        # reseeded at every batch, so that a resumed training sees the same noise
        generator = self.generator.manual_seed(
            hash((settings.seed, course.epoch, course.batch, accelerator.process_index)) % 2**63
        )
        if self.config.data.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        dropped = torch.rand(len(labels), device=labels.device, generator=generator) < settings.label_dropout
        labels = labels.masked_fill(dropped, -1)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(progress)
        with accelerator.accumulate(self.module), short_attention(accelerator.device, self.config.length):
            loss, figures = self.loss(images, labels, progress)
            value = loss.item()
            if not math.isfinite(value):
                self.spoilt = value
                loss = loss * math.nan  # and so is the gradient: thus all processes learn of it
            accelerator.backward(loss)
            figures = {"loss": value, **figures}
            sound, scaled = True, settings.precision == "fp16"
            if accelerator.sync_gradients:
                norm = float(accelerator.clip_grad_norm_(self.module.parameters(), settings.max_grad_norm))
                figures["grad_norm"] = norm
                sound = math.isfinite(norm)
                if not sound:
                    spoilt = [part for part in gather_object([self.spoilt]) if part is not None]
                    if spoilt or not scaled:  # a gradient beyond fp16 is its scaler's to pass over
                        self._skip(spoilt[0] if spoilt else value, norm)
                self.spoilt = None
            if sound or scaled:
                self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients and sound and not accelerator.optimizer_step_was_skipped:
                self.ema.update_parameters(accelerator.unwrap_model(self.module))
        return value, figures

    def _mean_loss(self) -> float | None:
        """Return the mean loss since the last time, over all processes; None if none was finite."""
        course = self.course
        parts = gather_object([(course.loss_sum, course.loss_count)])
        course.loss_sum, course.loss_count = 0.0, 0
        total, count = (sum(column) for column in zip(*parts, strict=True))
        return total / count if count else None

    def _skip(self, loss: float, norm: float) -> None:
        """Count a step that is passed over, the same on every process.

        Raises:
            TrainingError: if there have been too many.
        """
        settings, course = self.settings, self.course
        course.skipped += 1
        if course.skipped > settings.max_skipped:
            raise TrainingError(self._diverged("gradient", norm, course.step + 1))
        if self.accelerator.is_main_process:
            self.bar.write(
                f"step {course.step + 1}: passed over, with a loss of {loss} and a gradient of {norm} "
                f"({course.skipped} of {settings.max_skipped} that may be)"
            )

    def _progress(self, seconds: float) -> float:
        """Return the share of the schedule that is done, the same on every process."""
        settings = self.settings
        progress = self.course.step / settings.steps
        if settings.minutes is not None:
            progress = max(progress, seconds / (60 * settings.minutes))
            if self.accelerator.num_processes > 1:
                progress = broadcast_object_list([progress])[0]
        return min(1.0, progress)

    def _lr(self, progress: float) -> float:
        """Linear warm-up, then a cosine from ``lr`` to ``final_lr``."""
        settings = self.settings
        warmup = min(1.0, (self.course.step + 1) / max(1, settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (settings.final_lr + (settings.lr - settings.final_lr) * cosine)

    def _evaluate(self, train: float | None) -> None:
        """Score the averaged module, and enter the score in the course."""
        course = self.course
        self.ema.module.eval()
        scores = self.evaluate(train)
        if not math.isfinite(scores["held_out"]):
            raise TrainingError(self._diverged("held-out score", scores["held_out"], course.step))
        course.history.append({"step": course.step, "seconds": course.seconds, **scores})

    def _save(self, metrics: dict[str, Any]) -> None:
        accelerator, course = self.accelerator, self.course
        problem = ""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            try:
                with Checkpoint.publish(self.run, course.step, metrics) as checkpoint:
                    accelerator.save_state(str(checkpoint.state))
                    self.save(checkpoint.model, metrics.get("held_out"))
            except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
                problem = _shortened(error)
            else:
                prune(self.run, self.settings.keep)
        problem = broadcast_object_list([problem])[0]
        if problem:
            raise TrainingError(
                f"the checkpoint of step {course.step} cannot be written: {problem}; {self._last_good()}. "
                f"If the disk is full, make room; then go on with --resume"
            )

    def _resume(self, resume: bool) -> None:
        """Take up the newest checkpoint that can be read; those that cannot are renamed, and named."""
        failed: list[tuple[Checkpoint, str]] = []
        found = broadcast_object_list([checkpoints(self.run) if resume else []])[0]
        for saved in reversed(found):
            problem = ""
            try:
                self.accelerator.load_state(str(saved.state))
            except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError, SafetensorError) as error:
                problem = _shortened(error)
            problem = next(filter(None, gather_object([problem])), "")  # if one process cannot read it, none takes it
            if problem:
                failed.append((saved, problem))
                continue
            for damaged, reason in failed:
                self.accelerator.print(f"{damaged.path} cannot be read, and gets another name: {reason}")
                if self.accelerator.is_main_process:
                    set_aside(damaged)
            if failed and self.accelerator.is_main_process:
                prune(self.run, self.settings.keep)
            self.accelerator.print(f"resuming from {saved.path}")
            return
        if failed:
            raise TrainingError(
                f"{failed[0][0].path} cannot be resumed: {failed[0][1]}. Either the configuration describes another "
                f"model than {self.run / CONFIG}, or the run has no sound checkpoint: then start it anew elsewhere"
            )

    def _show(self, loss: float, figures: dict[str, float], progress: float) -> None:
        settings, course = self.settings, self.course
        if not self.accelerator.is_main_process:
            return
        images = settings.batch_size * self.accelerator.num_processes
        if settings.minutes is not None and course.step % 20 == 0:
            self.bar.total = min(settings.steps, round(course.step * settings.minutes * 60 / course.seconds))
        speed = {"images/s": f"{images * course.step / course.seconds:.0f}"}
        self.bar.set_postfix({**self.shown(loss, figures), **speed}, refresh=False)
        self.bar.update()
        if course.step % 20 == 0:
            shown = {f"train/{name}": value for name, value in figures.items()}
            self.accelerator.log({**shown, "train/lr": self._lr(progress)}, step=course.step)

    def _diverged(self, what: str, value: float, step: int) -> str:
        return (
            f"the {what} became {value} at step {step}; {self._last_good()}. Nothing was written over. "
            f"A lower {self.section}.lr or {self.section}.max_grad_norm, or fp32, may help"
        )

    def _last_good(self) -> str:
        saved = checkpoints(self.run)
        return f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"

    def _check_batch(self) -> None:
        settings = self.settings
        needed = settings.batch_size * self.accelerator.num_processes
        if len(self.data) < needed:
            raise ConfigError(
                f"{self.section}.batch_size={settings.batch_size} on {self.accelerator.num_processes} processes takes "
                f"{needed} images a step, but there are {len(self.data)}"
            )


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def _ignore_sigterm(worker: int) -> None:
    """Leave SIGTERM, which batch systems send to every process of a job, to the process that saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _triggered_by_sigterm(accelerator: Accelerator) -> Iterator[None]:
    """Let SIGTERM, the warning of batch systems, set the trigger that all processes check after a step."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    accelerator.check_trigger()  # which makes it
    before = signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warmed_up_average(decay: float) -> Any:
    """Return an exponential moving average that at first follows closely: decay ``(1 + n) / (10 + n)`` at most."""

    @torch.no_grad()
    def update(averages: list[Tensor], parameters: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(parameters), weight)

    return update
