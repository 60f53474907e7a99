"""The loop that every training here runs, with Accelerate: steps, averages, checkpoints, resumption, progress."""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from farmer_examples.average import Average
from farmer_examples.batches import Batch, Batches, Feed
from farmer_examples.config import Config, ConfigError, load_config
from farmer_examples.hardware import lacks_float64, mixed_precision, short_attention
from farmer_examples.parallel import checkpoint_activations, compile_parts, sharding
from farmer_examples.preemption import PreemptedError, ignore_sigterm, triggered_by_sigterm
from farmer_examples.resumption import State, together
from farmer_examples.storage import Checkpoint, checkpoints, clear, prune, published, set_aside
from farmer_examples.streaming import Stream, StreamLoader

__all__ = ["Course", "Loop", "TrainingError", "resumed_config"]

CONFIG = "config.yaml"

NOTABLE_WAIT = 0.1
"""Share of the time spent waiting for data from which the progress bar tells of it."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why, and what is left."""


@dataclass
class Course:
    """How far a training has come. Saved with every checkpoint."""

    step: int = 0
    images: int = 0
    """Taken so far, by all processes."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps passed over because their gradient was not finite."""
    loss_sum: float = 0.0
    loss_count: int = 0
    """Of the batches since the last evaluation whose loss was finite."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was saved."""
        self.__dict__.update(state)


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """Return the configuration that a run was started with, changed by ``overrides``."""
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} has no {CONFIG} to resume with; name one with --config")
    return load_config(run / CONFIG, overrides)


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
        self.accelerator = self._accelerator()
        set_seed(settings.seed)
        self.parts = settings.parts(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.parts
        with self.accelerator.main_process_first():
            self.data, self.held_out = config.data.load_both()
        for name, part in [("training", self.data), ("held-out", self.held_out)]:
            if part.skipped:
                self.accelerator.print(
                    f"skipped {part.skipped} files or rows of the {name} set that are no sound images"
                )
        self.feed = self._feed()
        module = self.build()
        self.course = Course()
        self.average = Average(module, settings.ema_decay)
        if settings.activation_checkpointing:
            checkpoint_activations(module)
        if settings.compile:
            compile_parts(module, whole_blocks=not self.accelerator.is_fsdp2)
        self.module, self.optimizer = self.accelerator.prepare(module, self._optimizer(module))
        self.average.follow(self.accelerator.unwrap_model(self.module))
        self.state = State(
            self.accelerator, self.module, self.optimizer.optimizer, self.average, self.course, self.feed
        )
        self.generator = Generator(self.accelerator.device)
        self.unsound = 0
        self._resume(resume)

    def _accelerator(self) -> Accelerator:
        precision = self.settings.precision
        try:
            accelerator = Accelerator(
                mixed_precision=mixed_precision(precision),
                # the feed has no end to synchronise with
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
                cpu=lacks_float64(),
                fsdp_plugin=sharding(),
                # others wait while the main process fetches a data set or draws samples
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
                log_with="tensorboard",
                project_dir=self.run,
            )
        except ValueError as error:  # a precision that the hardware lacks
            raise ConfigError(f"{self.section}.precision={precision}: {error}") from error
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigError("DeepSpeed is not supported: shard with FSDP2, as configs/accelerate/fsdp.yaml does")
        if precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would take fp32
            raise ConfigError(f"{self.section}.precision=fp16 needs a GPU: take bf16, fp32 or auto")
        return accelerator

    def _feed(self) -> Feed:
        settings, accelerator = self.settings, self.accelerator
        share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        loading = {"pin_memory": accelerator.device.type == "cuda", "worker_init_fn": ignore_sigterm}
        if isinstance(self.data, Stream):
            size = settings.batch_size // (accelerator.num_processes * self.parts)
            return StreamLoader(self.data.share(**share), batch_size=size, workers=settings.workers, **loading)
        if len(self.data) < settings.batch_size:
            raise ConfigError(
                f"{self.section}.batch_size={settings.batch_size} images a step, but there are {len(self.data)}"
            )
        sizes = {"batch_size": settings.batch_size, "parts": self.parts}
        return Batches(self.data, **sizes, **share, seed=settings.seed, num_workers=settings.workers, **loading)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        return torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the module to train."""

    def prepare(self) -> None:  # noqa: B027  a training has nothing to do here unless it says so
        """Do what steps need and the clock is not to count."""

    @abstractmethod
    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch after a share of the course, and further figures for the logs, all on the device.

        Some of the images are mirrored and some of the labels dropped already. Random numbers of an image come from
        :meth:`generators`, which depend on its number alone.
        """

    @abstractmethod
    def evaluate(self, module: nn.Module, train: float | None) -> dict[str, Any]:
        """Score the averaged module, with pictures; ``train`` is the mean loss since the last time.

        All processes call it, and get the same.

        Returns:
            Figures that JSON can hold, of which ``held_out`` is the score, the lower the better.
        """

    @abstractmethod
    def save(self, module: nn.Module, folder: Path, held_out: float | None) -> None:
        """Write the averaged module to a new folder; ``held_out`` is its score, if it has been scored.

        The main process alone calls it.
        """

    @abstractmethod
    def shown(self, figures: dict[str, float]) -> dict[str, str]:
        """Return what the progress bar tells of a step beside the speed."""

    def train(self) -> Course:
        """Run to the end of the schedule.

        Raises:
            TrainingError: if the gradient was not finite too often, or a held-out score is not.
            PreemptedError: on SIGTERM, after the step or evaluation at hand and a checkpoint.
        """
        with triggered_by_sigterm(self.accelerator):
            return self._train()

    def _train(self) -> Course:
        settings, course, accelerator = self.settings, self.course, self.accelerator
        if course.step and self._progress(course.seconds) >= 1:
            accelerator.print(f"the training in {self.run} is at its end, after {course.step} steps")
            return course
        if accelerator.is_main_process:
            with published(self.run / CONFIG) as partial:
                partial.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        # what a run that was killed has logged beyond its checkpoint is dropped
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": course.step + 1}})
        self.bar = tqdm(
            total=settings.steps,
            initial=course.step,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        if course.step == 0:
            with self.average.whole() as module:
                self._evaluate(module, train=None)
        self.prepare()
        self.started = time.perf_counter() - course.seconds
        self.waits: deque[float] = deque(maxlen=20)
        # workers that are left alone keep a process that fails from ending
        with contextlib.closing(iter(self.feed)) as batches:
            while True:
                self._show(self._step(batches))
                done = course.step >= settings.steps or self._progress(course.seconds) >= 1
                told = accelerator.check_trigger() and not done
                self._keep(done, told)
                if done or told:
                    self.bar.close()
                    # gloo's threads need the interpreter to let go of the last tensors, which the end would deny them
                    accelerator.wait_for_everyone()
                    accelerator.end_training()
                if told:
                    raise PreemptedError(f"told to end, and saved at step {course.step}: go on with --resume")
                if done:
                    return course

    def _keep(self, done: bool, told: bool) -> None:
        """Evaluate and save where it is time to; the schedule counts the training alone."""
        settings, course = self.settings, self.course
        pause = time.perf_counter()
        due = done or course.step % settings.evaluate_every == 0
        scored = due and not told  # there may be seconds left to save in
        if scored or told or (settings.save_every and course.step % settings.save_every == 0):
            with self.average.whole() as module:
                if scored:
                    self._evaluate(module, self._mean_loss())
                self._save(module, course.history[-1] if scored else {"step": course.step})
        self.started += time.perf_counter() - pause

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Take one step of the optimiser, over all parts of its batch, and return its figures."""
        settings, accelerator, course = self.settings, self.accelerator, self.course
        progress = self._progress(time.perf_counter() - self.started)
        lr = self._lr(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        values, figures = [], []
        waited = 0.0
        for _ in range(self.parts):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.unsound += batch.skipped
            # the backward pass, too, may compute attention
            with accelerator.accumulate(self.module), short_attention(accelerator.device, self.config.length):
                with accelerator.autocast():
                    loss, shown = self.loss(self._augmented(batch), progress)
                values.append(loss.detach())
                figures.append(shown)
                # NaN where the loss is not finite, and so is the gradient: thus all processes learn of it, and none has
                # to wait here until its GPU knows the loss
                accelerator.backward(loss * (1 + 0 * loss.detach()))
        norm = _norm(accelerator.clip_grad_norm_(self.module.parameters(), settings.max_grad_norm))
        losses, spoilt = _parted(torch.stack(values).tolist())
        told = _joined([{name: value.item() for name, value in part.items()} for part in figures])
        course.step += 1
        course.images += settings.batch_size
        seconds, course.seconds = course.seconds, time.perf_counter() - self.started
        self.waits.append(waited / (course.seconds - seconds))
        course.loss_sum, course.loss_count = course.loss_sum + sum(losses), course.loss_count + len(losses)
        finite, scaled = math.isfinite(norm), settings.precision == "fp16"
        if not finite:
            spoilt = gather_object(spoilt)
            # a gradient beyond fp16 is its scaler's to pass over, as long as that has room to scale it down
            if spoilt or not scaled or accelerator.scaler.get_scale() < 1:
                self._skip(spoilt[0] if spoilt else losses[-1], norm)
        if finite or scaled:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite and not accelerator.optimizer_step_was_skipped:
            self.average.update()
        mean = sum(losses) / len(losses) if losses else math.nan
        return {"loss": mean, **told, "grad_norm": norm, "lr": lr}

    def _augmented(self, batch: Batch) -> Batch:
        """Move a batch to the device, mirror some of its images and drop some of its labels."""
        images, labels, draws, skipped = batch
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        chances = torch.stack([torch.rand(2, device=device, generator=g) for g in self.generators(draws, purpose=0)])
        if self.config.data.flip:
            images = torch.where(chances[:, 0, None, None, None] < 0.5, images.flip(-1), images)
        labels = labels.masked_fill(chances[:, 1] < self.settings.label_dropout, -1)
        return Batch(images, labels, draws, skipped)

    def generators(self, draws: Tensor, purpose: int = 1) -> Iterator[Generator]:
        """Yield a generator of random numbers for each of the images with these numbers: the same one, seeded anew."""
        for draw in draws.tolist():
            yield self.generator.manual_seed(hash((self.settings.seed, draw, purpose)) % 2**63)

    def _mean_loss(self) -> float | None:
        """Return the mean loss since the last time, over all processes; None if none was finite."""
        total, count = self._pool_losses()
        self.course.loss_sum, self.course.loss_count = 0.0, 0
        return total / count if count else None

    def _pool_losses(self) -> tuple[float, int]:
        """Leave the losses of all processes to the main one, whose course is what is saved."""
        course = self.course
        parts = gather_object([(course.loss_sum, course.loss_count)])
        total, count = (sum(column) for column in zip(*parts, strict=True))
        main = self.accelerator.is_main_process
        course.loss_sum, course.loss_count = (total, count) if main else (0.0, 0)
        return total, count

    def _skip(self, loss: float, norm: float) -> None:
        """Count a step that is passed over, the same on every process.

        Raises:
            TrainingError: if there have been too many.
        """
        settings, course = self.settings, self.course
        course.skipped += 1
        if course.skipped > settings.max_skipped:
            raise TrainingError(self._diverged("gradient", norm, course.step))
        if self.accelerator.is_main_process:
            self.bar.write(
                f"step {course.step}: passed over, with a loss of {loss} and a gradient of {norm} "
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

    def _evaluate(self, module: nn.Module, train: float | None) -> None:
        """Score the averaged module, and enter the score in the course."""
        course = self.course
        scores = self.evaluate(module, train)
        unsound = sum(gather_object([self.unsound]))
        if unsound and self.accelerator.is_main_process:
            self.bar.write(f"step {course.step}: {unsound} images of the stream, which are not sound, were passed over")
        if not math.isfinite(scores["held_out"]):
            raise TrainingError(self._diverged("held-out score", scores["held_out"], course.step))
        course.history.append({"step": course.step, "seconds": course.seconds, **scores})

    def _save(self, module: nn.Module, metrics: dict[str, Any]) -> None:
        """Write a checkpoint with all processes; it joins the run when all of them have written theirs."""
        main, checkpoint = self.accelerator.is_main_process, Checkpoint.unpublished(self.run, self.course.step)

        def publish() -> None:
            checkpoint.publish(metrics)
            prune(self.run, self.settings.keep)

        self._pool_losses()
        problem = together(lambda: main and checkpoint.begin())
        problem = problem or together(lambda: self.state.write(checkpoint.state))
        problem = problem or together(lambda: main and self.save(module, checkpoint.model, metrics.get("held_out")))
        problem = problem or together(lambda: main and publish())
        if problem:
            if main:
                checkpoint.discard()
            raise TrainingError(
                f"the checkpoint of step {self.course.step} cannot be written: {_shortened(problem)}; "
                f"{self._last_good()}. If the disk is full, make room; then go on with --resume"
            )

    def _resume(self, resume: bool) -> None:
        """Take up the newest checkpoint that can be read; those that cannot are renamed, and named."""
        failed: list[tuple[Checkpoint, str]] = []
        if self.accelerator.is_main_process:
            clear(self.run)
        found = broadcast_object_list([checkpoints(self.run) if resume else []])[0]
        for saved in reversed(found):
            problem = together(lambda state=saved.state: self.state.read(state))
            if problem:  # if one process cannot read it, none takes it
                failed.append((saved, _shortened(problem)))
                continue
            for damaged, reason in failed:
                self.accelerator.print(f"{damaged.path} cannot be read, and gets another name: {reason}")
                if self.accelerator.is_main_process:
                    set_aside(damaged)
            if failed and self.accelerator.is_main_process:
                prune(self.run, self.settings.keep)
            if not self.accelerator.is_main_process:  # which has the losses of all
                self.course.loss_sum, self.course.loss_count = 0.0, 0
            self.accelerator.print(f"resuming from {saved.path}")
            return
        if failed:
            raise TrainingError(
                f"{failed[0][0].path} cannot be resumed: {failed[0][1]}. Either the configuration describes another "
                f"model than {self.run / CONFIG}, or the run has no sound checkpoint: then start it anew elsewhere"
            )

    def _show(self, figures: dict[str, float]) -> None:
        settings, course = self.settings, self.course
        if course.step % 20 == 0:
            figures = _joined(gather_object([figures]))
        if not self.accelerator.is_main_process:
            return
        if settings.minutes is not None and course.step % 20 == 0:
            self.bar.total = min(settings.steps, round(course.step * settings.minutes * 60 / course.seconds))
        told = {**self.shown(figures), "images/s": f"{course.images / course.seconds:.0f}"}
        waiting = statistics.mean(self.waits)
        if waiting > NOTABLE_WAIT:
            told["waiting for data"] = f"{waiting:.0%}"
        self.bar.set_postfix(told, refresh=False)
        self.bar.update()
        if course.step % 20 == 0:
            shown = {f"train/{name}": value for name, value in figures.items()}
            self.accelerator.log({**shown, "train/waiting for data": waiting}, step=course.step)

    def _diverged(self, what: str, value: float, step: int) -> str:
        return (
            f"the {what} became {value} at step {step}; {self._last_good()}. Nothing was written over. "
            f"A lower {self.section}.lr or {self.section}.max_grad_norm, or fp32, may help"
        )

    def _last_good(self) -> str:
        saved = checkpoints(self.run)
        return f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"


def _shortened(problem: str) -> str:
    return textwrap.shorten(problem, 200, placeholder=" ...")


def _joined(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of several parts of a batch as one: those that end in ``_max`` by their maximum."""
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: max(c) if name.endswith("_max") else statistics.fmean(c) for name, c in columns.items()}


def _parted(losses: list[float]) -> tuple[list[float], list[float]]:
    """Part those that are finite from those that are not."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return finite, [loss for loss in losses if not math.isfinite(loss)]


def _norm(norm: Tensor) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
