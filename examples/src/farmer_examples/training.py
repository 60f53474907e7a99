"""Training by exact maximum likelihood (paper, Eq. 13 and 14), with Accelerate."""

from __future__ import annotations

import contextlib
import itertools
import math
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    broadcast_object_list,
    set_seed,
)
from safetensors import SafetensorError
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from farmer_examples.config import Config, ConfigError, load_config
from farmer_examples.evaluation import evaluate
from farmer_examples.model import Farmer, lacks_float64
from farmer_examples.pictures import grid, save_curves, save_image
from farmer_examples.storage import Checkpoint, checkpoints, prune, published

__all__ = ["TrainingError", "train"]

CONFIG = "config.yaml"
SHORT_SEQUENCE = 128
WHITENED_TOKENS = 2**16


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why, and what is left."""


@dataclass
class Course:
    """How far a training has come. Saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that have been trained on."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return what Accelerate is to save."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what Accelerate has loaded."""
        self.__dict__.update(state)


def train(config: Config, run: Path, *, resume: bool = False) -> Course:
    """Train a model and keep it in the folder ``run``.

    Args:
        config: see :class:`~farmer_examples.config.Config`.
        run: gets ``config.yaml``, ``checkpoints/``, ``best``, ``samples/``, ``curves.png`` and TensorBoard's ``logs/``.
        resume: go on from the newest checkpoint in ``run``, if there is one; a training that is at its end stays as
            it is.

    Raises:
        TrainingError: if the loss, the gradient or the held-out score is not finite, ``run`` holds another training, or
            its newest checkpoint does not fit the configuration.
        DataError: if the images cannot be read.
    """
    return Trainer(config, run, resume=resume).train()


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
def short_attention(model: Farmer) -> Iterator[None]:
    """Choose plain matrix products over the fused attention for short sequences on a CPU, where they are faster."""
    if model.device.type != "cpu" or (model.image_size // model.patch_size) ** 2 > SHORT_SEQUENCE:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name also for the CPU
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class Trainer:
    """One training: the model, its average, the optimiser, the images and the course so far."""

    def __init__(self, config: Config, run: Path, *, resume: bool) -> None:
        settings = config.training
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
            raise ConfigError(f"training.precision={settings.precision}: {error}") from error
        if settings.precision == "fp16" and self.accelerator.device.type == "cpu":  # Accelerate would take fp32
            raise ConfigError("training.precision=fp16 needs a GPU: take bf16, fp32 or auto")
        set_seed(settings.seed)
        with self.accelerator.main_process_first():
            self.data, self.held_out = config.data.load("train"), config.data.load("test")
        for name, part in [("training", self.data), ("held-out", self.held_out)]:
            if part.skipped:
                self.accelerator.print(
                    f"skipped {part.skipped} files or rows of the {name} set that are no sound images"
                )
        self._check_batch()
        model = config.build(list(self.data.class_names))
        if config.model.whitening:
            self._fit_whitening(model)
        self.course = Course()
        self.ema = AveragedModel(
            model, device=self.accelerator.device, multi_avg_fn=_warmed_up_average(settings.ema_decay)
        )
        loader = DataLoader(
            self.data,
            batch_size=settings.batch_size // settings.accumulation,
            shuffle=True,
            drop_last=True,
            collate_fn=self.data.collate,
            num_workers=settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.accelerator.register_for_checkpointing(self.course, self.ema)
        self.generator = Generator(self.accelerator.device)
        self._resume(resume)

    def _fit_whitening(self, model: Farmer) -> None:
        """Fit the whitening to images spread over the training set, the same on every process."""
        images, _ = self.data.__getitems__(self.data.spread(-(-WHITENED_TOKENS // model.flow.length)))
        generator = Generator().manual_seed(self.config.training.seed)
        model.fit_whitening(model.noised(images, progress=0.0, generator=generator))

    def train(self) -> Course:
        """Run to the end of the schedule."""
        settings, course, accelerator = self.config.training, self.course, self.accelerator
        if course.step and self._progress(course.seconds) >= 1:
            accelerator.print(f"the training in {self.run} is at its end, after {course.step} steps")
            return course
        if accelerator.is_main_process:
            with published(self.run / CONFIG) as partial:
                partial.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        accelerator.init_trackers("logs")
        bar = tqdm(
            total=settings.steps,
            initial=course.step,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        if course.step == 0:
            self._evaluate(bar, train=None)
        started = time.perf_counter() - course.seconds
        losses: list[float] = []
        for epoch in itertools.count(course.epoch):
            course.epoch = epoch
            self.loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(self.loader, course.batch) if course.batch else self.loader
            for images, labels in batches:
                progress = self._progress(time.perf_counter() - started)
                loss, figures = self._step(images, labels, progress)
                course.batch += 1
                losses.append(loss)
                if not accelerator.sync_gradients:
                    continue
                course.step += 1
                course.seconds = time.perf_counter() - started
                self._show(bar, loss, figures, progress)
                done = course.step >= settings.steps or self._progress(course.seconds) >= 1
                if done or course.step % settings.evaluate_every == 0:
                    pause = time.perf_counter()
                    self._evaluate(bar, train=sum(losses) / len(losses))
                    self._save()
                    losses.clear()
                    started += time.perf_counter() - pause  # the schedule counts the training alone
                if done:
                    bar.close()
                    accelerator.end_training()
                    return course
            course.batch = 0
        raise AssertionError("unreachable")

    def _step(self, images: Tensor, labels: Tensor, progress: float) -> tuple[float, dict[str, float]]:
        settings, accelerator, course = self.config.training, self.accelerator, self.course
        model: Farmer = accelerator.unwrap_model(self.model)
        # reseeded at every batch, so that a resumed training sees the same noise
        generator = self.generator.manual_seed(
            hash((settings.seed, course.epoch, course.batch, accelerator.process_index)) % 2**63
        )
        if self.config.data.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        dropped = torch.rand(len(labels), device=labels.device, generator=generator) < settings.label_dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(progress)
        with accelerator.accumulate(self.model), short_attention(model):
            density = self.model(model.noised(images, progress, generator=generator), labels.masked_fill(dropped, -1))
            loss = -density.log_prob.mean() / model.dimensions
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(self._diverged("loss", value, course.step + 1))
            accelerator.backward(loss)
            figures = {"loss": value, "logdet": density.logdet.mean().item() / model.dimensions}
            if accelerator.sync_gradients:
                norm = float(accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
                if not math.isfinite(norm) and settings.precision != "fp16":  # whose scaler passes over such steps
                    raise TrainingError(self._diverged("gradient", norm, course.step + 1))
                figures["grad_norm"] = norm
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.ema.update_parameters(model)
        return value, figures

    def _progress(self, seconds: float) -> float:
        """Return the share of the schedule that is done, the same on every process."""
        settings = self.config.training
        progress = self.course.step / settings.steps
        if settings.minutes is not None:
            progress = max(progress, seconds / (60 * settings.minutes))
            if self.accelerator.num_processes > 1:
                progress = broadcast_object_list([progress])[0]
        return min(1.0, progress)

    def _lr(self, progress: float) -> float:
        """Linear warm-up, then a cosine from ``lr`` to ``final_lr``."""
        settings = self.config.training
        warmup = min(1.0, (self.course.step + 1) / max(1, settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (settings.final_lr + (settings.lr - settings.final_lr) * cosine)

    def _evaluate(self, bar: tqdm[Any], train: float | None) -> None:
        """Score the held-out images, draw samples, and enter both in the course and the logs."""
        if not self.accelerator.is_main_process:
            return
        settings, course = self.config.training, self.course
        model: Farmer = self.ema.module
        model.eval()
        with self.accelerator.autocast():
            scores = evaluate(
                model,
                self.held_out,
                batch_size=settings.batch_size,
                limit=settings.evaluation_images,
                draws=settings.evaluation_draws,
                seed=settings.seed,
            )
        if not math.isfinite(scores["held_out"]):
            raise TrainingError(self._diverged("held-out score", scores["held_out"], course.step))
        unit = "bits/dim" if model.noise.kind == "uniform" else "nats/dim at the training noise"
        if train is not None and unit == "bits/dim":
            train = self._bits(train)
        entry = {"step": course.step, "train": train, "train_unit": unit, "seconds": course.seconds, **scores}
        course.history.append(entry)
        bar.write(
            f"step {course.step}: held out {scores['held_out']:.4f} bits/dim "
            f"(± {scores['held_out_error']:.4f} over {scores['images']} images)"
        )
        self.accelerator.log({"held out/bits per dim": scores["held_out"]}, step=course.step)
        save_curves(course.history, self.run / "curves.png")
        if settings.samples:
            self._draw(bar)

    def _draw(self, bar: tqdm[Any]) -> None:
        settings, step = self.config.training, self.course.step
        model: Farmer = self.ema.module
        classes = max(1, len(model.class_names))
        columns = min(classes, 10) if classes > 1 else 8
        labels = torch.arange(settings.samples) % classes - (0 if model.class_names else 1)
        generator = Generator(model.device).manual_seed(settings.seed)
        images = model.sample(labels.to(model.device), generator=generator)
        if not images.isfinite().all():
            bar.write(f"step {step}: the samples are not finite, and no picture is drawn")
            return
        picture = grid(model.to_uint8(images).cpu(), columns)
        save_image(picture, self.run / "samples" / f"step-{step:08d}.png")
        self.accelerator.get_tracker("tensorboard").log_images(
            {"samples": picture[None].numpy()}, step=step, dataformats="NCHW"
        )

    def _save(self) -> None:
        accelerator, course = self.accelerator, self.course
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with Checkpoint.publish(self.run, course.step, course.history[-1]) as checkpoint:
                accelerator.save_state(str(checkpoint.state))
                self.ema.module.save_pretrained(checkpoint.model)
            prune(self.run, self.config.training.keep)
        accelerator.wait_for_everyone()

    def _resume(self, resume: bool) -> None:
        saved = checkpoints(self.run) if resume else []
        if saved:
            try:
                self.accelerator.load_state(str(saved[-1].state))
            except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError, SafetensorError) as error:
                reason = textwrap.shorten(str(error), 200, placeholder=" ...")
                raise TrainingError(
                    f"{saved[-1].path} cannot be resumed: {reason}. Either the configuration describes another model "
                    f"than {self.run / CONFIG}, or the checkpoint is damaged: remove it to resume the one before"
                ) from error
            self.accelerator.print(f"resuming from {saved[-1].path}")

    def _show(self, bar: tqdm[Any], loss: float, figures: dict[str, float], progress: float) -> None:
        settings, course = self.config.training, self.course
        images = settings.batch_size * self.accelerator.num_processes
        if settings.minutes is not None and course.step % 20 == 0:
            bar.total = min(settings.steps, round(course.step * settings.minutes * 60 / course.seconds))
        model: Farmer = self.ema.module
        uniform = model.noise.kind == "uniform"
        bar.set_postfix(
            {
                "bits/dim" if uniform else "nats/dim": f"{self._bits(loss) if uniform else loss:.3f}",
                "log-det/dim": f"{figures['logdet']:.2f}",
                "images/s": f"{images * course.step / course.seconds:.0f}",
            },
            refresh=False,
        )
        bar.update()
        if course.step % 20 == 0:
            shown = {f"train/{name}": value for name, value in figures.items()}
            self.accelerator.log({**shown, "train/lr": self._lr(progress)}, step=course.step)

    def _bits(self, nats: float) -> float:
        """Turn the loss under uniform dequantisation, in nats a dimension, into bits a dimension."""
        return (nats - math.log(2 / self.config.data.grey_levels)) / math.log(2)

    def _diverged(self, what: str, value: float, step: int) -> str:
        saved = checkpoints(self.run)
        left = f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"
        return (
            f"the {what} became {value} at step {step}; {left}. "
            "Nothing was written over. A lower training.lr or training.max_grad_norm, or fp32, may help"
        )

    def _check_batch(self) -> None:
        settings = self.config.training
        needed = settings.batch_size * self.accelerator.num_processes
        if len(self.data) < needed:
            raise ConfigError(
                f"training.batch_size={settings.batch_size} on {self.accelerator.num_processes} processes takes "
                f"{needed} images a step, but there are {len(self.data)}"
            )


def _warmed_up_average(decay: float) -> Any:
    """Return an exponential moving average that at first follows closely: decay ``(1 + n) / (10 + n)`` at most."""

    @torch.no_grad()
    def update(averages: list[Tensor], parameters: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(parameters), weight)

    return update
