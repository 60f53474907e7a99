"""Training by exact maximum likelihood (paper, Eq. 13 and 14)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from farmer_examples.batches import Batch
from farmer_examples.config import Config
from farmer_examples.evaluation import evaluate, mixture_figures
from farmer_examples.loop import Course, Loop, TrainingError
from farmer_examples.model import Farmer
from farmer_examples.pictures import columns, grid, save_curves, save_image
from farmer_examples.resumption import together

__all__ = ["Training", "train"]

WHITENED_TOKENS = 2**16

COLLAPSED = 1.5
"""A mixture with fewer components than these in use has collapsed."""


def train(config: Config, run: Path, *, resume: bool = False) -> Course:
    """Train a model and keep it in the folder ``run``.

    Arguments and errors are those of :class:`~farmer_examples.loop.Loop`; a training that is at its end stays as it is.
    """
    return Training(config, run, resume=resume).train()


class Training(Loop):
    """The maximum-likelihood training of a :class:`~farmer_examples.model.Farmer`."""

    section = "training"

    def build(self) -> Farmer:
        """Return a new model, its whitening fitted to images spread over the training set, or to a stream's first."""
        model = self.config.build(list(self.data.class_names))
        if self.config.model.whitening:
            images = self.data.preview(-(-WHITENED_TOKENS // model.flow.length))
            generator = Generator().manual_seed(self.settings.seed)  # the same on every process
            model.fit_whitening(model.noised(images, progress=0.0, generator=generator))
        return model

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative log-density of noised images in nats per dimension (Eq. 14)."""
        model: Farmer = self.accelerator.unwrap_model(self.module)
        noised = model.noised(batch.images, progress, generator=self.generators(batch.draws))
        density = self.module(noised, batch.labels)
        loss = -density.log_prob.mean() / model.dimensions
        logdet = density.logdet.detach() / model.dimensions
        return loss, {"logdet": logdet.mean(), "logdet_max": logdet.max()}

    def evaluate(self, model: nn.Module, train: float | None) -> dict[str, Any]:
        """Score held-out images in bits per dimension, draw the curves and samples."""
        settings = self.settings
        with self.accelerator.autocast():
            scores = evaluate(
                model,
                self.held_out,
                batch_size=min(settings.batch_size, settings.micro_batch_size or settings.batch_size),
                limit=settings.evaluation_images,
                draws=settings.evaluation_draws,
                seed=settings.seed,
            )
        if not math.isfinite(scores["held_out"]):
            return scores
        unit = "bits/dim" if model.noise.kind == "uniform" else "nats/dim at the training noise"
        if train is not None and unit == "bits/dim":
            train = self._bits(train)
        scores = {
            "train": train,
            "train_unit": unit,
            **scores,
            **mixture_figures(model, self.held_out, limit=min(8, settings.evaluation_images or 8)),
        }
        problem = together(lambda: self.accelerator.is_main_process and self._report(model, scores))
        if problem:
            raise TrainingError(f"step {self.course.step}: the pictures and curves cannot be written: {problem}")
        return scores

    def _report(self, model: Farmer, scores: dict[str, Any]) -> None:
        course = self.course
        self.bar.write(
            f"step {course.step}: held out {scores['held_out']:.4f} bits/dim "
            f"(± {scores['held_out_error']:.4f} over {scores['images']} images)"
        )
        of = {"components": model.prior.components, "shared_components": model.prior.redundant_components}
        for name in of.keys() & scores.keys():
            if scores[name] < COLLAPSED < of[name]:
                self.bar.write(f"step {course.step}: {scores[name]:.1f} of {of[name]} {name.replace('_', ' ')} in use")
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        self.accelerator.log({f"held out/{name}": value for name, value in numbers.items()}, step=course.step)
        save_curves([*course.history, {"step": course.step, **scores}], self.run / "curves.png")
        if self.settings.samples:
            self._draw(model)

    def _draw(self, model: Farmer) -> None:
        step = self.course.step
        generator = Generator(model.device).manual_seed(self.settings.seed)
        images = model.sample(model.every_class(self.settings.samples), generator=generator)
        if not images.isfinite().all():
            self.bar.write(f"step {step}: the samples are not finite, and no picture is drawn")
            return
        picture = grid(model.to_uint8(images).cpu(), columns(len(model.class_names)))
        save_image(picture, self.run / "samples" / f"step-{step:08d}.png")
        self.accelerator.get_tracker("tensorboard").log_images(
            {"samples": picture[None].numpy()}, step=step, dataformats="NCHW"
        )

    def save(self, model: nn.Module, folder: Path, held_out: float | None) -> None:
        """Write the averaged model, as ``Farmer.from_pretrained`` reads it."""
        model.save_pretrained(folder)

    def shown(self, figures: dict[str, float]) -> dict[str, str]:
        """Return the loss in its unit, and the log-determinant."""
        uniform, loss = self.config.training.noise.kind == "uniform", figures["loss"]
        return {
            "bits/dim" if uniform else "nats/dim": f"{self._bits(loss) if uniform else loss:.3f}",
            "log-det/dim": f"{figures['logdet']:.2f}",
        }

    def _bits(self, nats: float) -> float:
        """Turn the loss under uniform dequantisation, in nats a dimension, into bits a dimension."""
        return (nats - math.log(2 / self.config.data.grey_levels)) / math.log(2)
