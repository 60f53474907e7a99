"""``farmer distill``: teach a student to invert a model's flow in one parallel pass a block (paper, section 3.5)."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from farmer_distill import OneStepInverse, distillation_loss
from farmer_flow import AutoregressiveFlow
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from farmer_examples.config import Config, ConfigError
from farmer_examples.loop import Course, Loop, TrainingError
from farmer_examples.model import Farmer
from farmer_examples.pictures import columns, grid, save_error_curve, save_sheet
from farmer_examples.storage import checkpoints, find_model, published

__all__ = ["STUDENT", "Distilling", "distill", "load_student", "save_student"]

STUDENT = "student.safetensors"

DRAWN_AT_ONCE = 256
"""Images drawn from the model at once."""


def distill(config: Config, model_folder: Path, run: Path, *, resume: bool = False) -> Course:
    """Teach a student the inverse of a model's flow, and put it beside the model.

    Args:
        config: of the model's training; its section ``distillation`` is the course.
        model_folder: of the model, which gets ``student.safetensors``.
        run: the folder of the distillation.
        resume: go on from the newest checkpoint in ``run``, if there is one.

    Raises:
        TrainingError, DataError: as :class:`~farmer_examples.loop.Loop`.
        ConfigError: if the model's flow cannot be distilled, or its images are not those of the configuration.
    """
    model = Farmer.from_pretrained(model_folder)
    if not isinstance(model.flow, AutoregressiveFlow):
        raise ConfigError(f"a {type(model.flow).__name__} is not distilled: its inverse is no sequence of steps")
    if (config.data.image_size, config.data.channels) != (model.image_size, model.channels):
        raise ConfigError(f"the model's images are not of the size or channels of {config.data.source} as configured")
    distilling = Distilling(config, run, model, resume=resume)
    course = distilling.train()
    if distilling.accelerator.is_main_process:
        student = load_student(find_model(run), model.flow)
        save_student(student, model.flow, model_folder)
    return course


class Lesson(nn.Module):
    """The student and its loss in one module, as processes that train together need it.

    Args:
        student: the module to train.
        model: whose flow is the teacher; neither trained nor saved.
    """

    def __init__(self, student: OneStepInverse, model: Farmer) -> None:
        super().__init__()
        self.student = student
        self._model = [model]  # in a list, it is no part of this module

    def forward(self, x: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        """Return the loss, its error of the data in pixels; see :func:`farmer_distill.distillation_loss`."""
        (model,) = self._model
        return distillation_loss(self.student, model.flow, x, labels, decode=model.detokenise, **settings)


class Distilling(Loop):
    """The training of a :class:`~farmer_distill.OneStepInverse` by a model's flow.

    Args:
        config: as in :class:`~farmer_examples.loop.Loop`.
        run: as there.
        model: the teacher; it is not changed.
        resume: as there.
    """

    section = "distillation"

    def __init__(self, config: Config, run: Path, model: Farmer, *, resume: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        for saved in checkpoints(run)[-1:]:
            if resume and _taught_by(saved.model / STUDENT) != fingerprint(model.flow):
                raise TrainingError(f"{run} distils another model than this: choose another --output, or remove it")
        super().__init__(config, run, resume=resume)
        examined = self.settings.evaluation_latents
        drawn, self.labels = self._drawn(examined + self.settings.prior_images)
        self.pool, self.pool_labels = drawn[examined:], self.labels[examined:]
        self.labels = self.labels[:examined].to(self.model.device)
        with torch.no_grad():
            self.states = self.model.flow.trajectory(drawn[:examined].to(self.model.device), self.labels)

    def build(self) -> Lesson:
        """Return a student that starts from the flow's own blocks."""
        self.model.to(self.accelerator.device)
        return Lesson(OneStepInverse.from_flow(self.model.flow), self.model)

    @torch.no_grad()
    def _drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the tokens, ``(count, length, dim)``, and labels of images drawn from the model, on the CPU."""
        model, settings = self.model, self.settings
        labels = model.every_class(count)
        generator = Generator(model.device).manual_seed(settings.seed)
        parts = []
        with tqdm(
            total=count, desc="drawing from the model", unit="image", disable=not self.accelerator.is_main_process
        ) as bar:
            for part in labels.split(DRAWN_AT_ONCE):
                z = model.prior.sample(part, generator=generator)
                parts.append(model.flow.inverse(model.permute(z), part).cpu())
                bar.update(len(part))
        return torch.cat(parts), labels.cpu()

    def loss(self, images: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss on a batch of images, of which a share is drawn from the model instead."""
        model, settings, generator = self.model, self.settings, self.generator
        dropped = torch.rand(len(labels), device=labels.device, generator=generator) < settings.label_dropout
        tokens, _ = model.tokenise(model.noised(images, 1.0, generator=generator))
        labels = labels.masked_fill(dropped, -1)
        if len(self.pool) and settings.prior_share:
            chosen = torch.randint(len(self.pool), (len(labels),), device=labels.device, generator=generator).cpu()
            share = torch.rand(len(labels), device=labels.device, generator=generator) < settings.prior_share
            tokens = torch.where(share[:, None, None], self.pool[chosen].to(tokens.device), tokens)
            labels = torch.where(share, self.pool_labels[chosen].to(labels.device), labels)
        loss = self.module(
            tokens, labels, max_noise=settings.max_noise, data_weight=settings.pixel_weight, generator=generator
        )
        return loss, {}

    def evaluate(self, train: float | None) -> dict[str, Any]:
        """Compare the student's images with the exact ones from the same latents of the prior."""
        student, step = self.ema.module.student, self.course.step
        with torch.no_grad():
            reached = student.trajectory(self.states[-1], self.labels)
        images, exact = (self.model.detokenise(states[0]).clamp(-1, 1) for states in (reached, self.states))
        error = (images - exact).square().mean().item()
        blocks = [(a - b).square().mean().item() for a, b in zip(reached[:-1], self.states[:-1], strict=True)]
        scores = {"train": train, "held_out": error, "blocks": blocks, "psnr": decibels(error)}
        if not math.isfinite(error):
            return scores
        self.bar.write(f"step {step}: {scores['psnr']:.2f} dB between the student's images and the exact ones")
        self.accelerator.log({"held out/dB": scores["psnr"]}, step=step)
        save_error_curve([*self.course.history, {"step": step, **scores}], self.run / "curves.png")
        if self.settings.samples:
            shown = [("exact inverse", exact), (f"one step, {scores['psnr']:.1f} dB", images)]
            sheet = []
            for title, part in shown:
                pixels = self.model.to_uint8(part[: self.settings.samples]).cpu()
                sheet.append((title, grid(pixels, columns(len(self.model.class_names)))))
            save_sheet(sheet, self.run / "samples" / f"step-{step:08d}.png")
        return scores

    def save(self, folder: Path) -> None:
        """Write the averaged student."""
        save_student(self.ema.module.student, self.model.flow, folder)

    def shown(self, loss: float, figures: dict[str, float]) -> dict[str, str]:
        """Return the loss, and the last score."""
        return {"loss": f"{loss:.4f}", "dB": f"{self.course.history[-1]['psnr']:.2f}"}


def decibels(error: float) -> float:
    """Return the peak signal-to-noise ratio of a mean squared error of images in [-1, 1], in dB."""
    return 10 * math.log10(4 / error) if error else math.inf


def save_student(student: OneStepInverse, flow: nn.Module, folder: Path) -> None:
    """Put a student beside the model whose flow it inverts; the file appears whole."""
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    with published(folder / STUDENT) as partial:
        save_file(weights, partial, metadata={"flow": fingerprint(flow)})


def load_student(folder: Path, flow: AutoregressiveFlow) -> OneStepInverse:
    """Return the student that lies beside a model, on the device of its flow.

    Raises:
        FileNotFoundError: if there is none, saying how to make one.
        OSError: if the file is damaged, or holds the inverse of another flow.
    """
    file = folder / STUDENT
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {STUDENT}: make one with farmer distill")
    student = OneStepInverse.from_flow(flow)
    try:
        if _taught_by(file) != fingerprint(flow):
            raise OSError(f"{file} inverts another flow than this model's: distil it anew, or remove the file")
        student.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{file} holds no student: {error}; distil it anew, or remove the file") from error
    return student.eval()


def _taught_by(file: Path) -> str | None:
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("flow")


def fingerprint(flow: nn.Module) -> str:
    """Return what tells a flow's weights from others: a digest of some numbers of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in flow.state_dict().items():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.flatten()[:: max(1, parameter.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
