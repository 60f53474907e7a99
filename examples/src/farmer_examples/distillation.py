"""``farmer distill``: teach a student to invert a model's flow in one parallel pass a block (paper, section 3.5)."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from farmer_distill import OneStepInverse, distillation_loss
from farmer_flow import AutoregressiveFlow
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from farmer_examples.batches import Batch
from farmer_examples.config import Config, ConfigError
from farmer_examples.loop import Course, Loop, TrainingError
from farmer_examples.model import Farmer
from farmer_examples.pictures import columns, grid, save_error_curve, save_sheet
from farmer_examples.storage import checkpoints, published

__all__ = ["STUDENT", "Distilling", "decibels", "distill", "load_student", "save_student"]

STUDENT = "student.safetensors"


def distill(config: Config, folder: Path, run: Path, *, resume: bool = False) -> Course:
    """Teach a student the inverse of a model's flow, and put it beside the model as soon as it is the best so far.

    Args:
        config: of the model's training; its section ``distillation`` is the course.
        folder: of the model, which gets ``student.safetensors``, unless it has one that comes nearer to the flow.
        run: the folder of the distillation.
        resume: go on from the newest checkpoint in ``run``, if there is one.

    Raises:
        TrainingError, DataError: as :class:`~farmer_examples.loop.Loop`.
        ConfigError: if the model's flow cannot be distilled, or the images are not such as it was made for.
        OSError: if the model cannot be read.
    """
    return Distilling(config, run, folder, resume=resume).train()


class Lesson(nn.Module):
    """The student and its loss in one module, as processes that train together need it."""

    def __init__(self, student: OneStepInverse) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, labels: Tensor, model: Farmer, **settings: Any) -> Tensor:
        """Return the loss, whose last term is in pixels; see :func:`farmer_distill.distillation_loss`."""
        return distillation_loss(self.student, model.flow, x, labels, decode=model.detokenise, **settings)


class Distilling(Loop):
    """The training of a :class:`~farmer_distill.OneStepInverse` by a model's flow.

    Args:
        config: as in :class:`~farmer_examples.loop.Loop`.
        run: as there.
        folder: of the model; its weights are not changed.
        resume: as there.
    """

    section = "distillation"

    def __init__(self, config: Config, run: Path, folder: Path, *, resume: bool) -> None:
        self.folder, self.model = folder, Farmer.load(folder).eval().requires_grad_(False)
        if not isinstance(self.model.flow, AutoregressiveFlow):
            raise ConfigError(f"a {type(self.model.flow).__name__} has no sequential inverse to distil")
        config.data.check_size(self.model)
        teachers = [_metadata(saved.model / STUDENT).get("flow") for saved in checkpoints(run) if resume]
        if teachers and not any(teachers):
            raise TrainingError(f"{run} has no sound checkpoint of a distillation")
        if set(teachers) - {None, fingerprint(self.model.flow)}:
            raise TrainingError(f"{run} distils another model than {folder}: choose another --output, or remove it")
        super().__init__(config, run, resume=resume)

    def build(self) -> Lesson:
        """Return a student that starts from the flow's own blocks."""
        self.config.data.check_classes(self.model, self.data.class_names)
        self.model.to(self.accelerator.device)
        return Lesson(OneStepInverse.from_flow(self.model.flow))

    def prepare(self) -> None:
        """Draw the images to learn from."""
        if self.settings.prior_share:
            _ = self.pool

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor]:
        """The images of the model itself to learn from: tokens and labels, see :meth:`_drawn`."""
        return self._drawn(self.settings.prior_images, "to learn from")

    @cached_property
    def examined(self) -> tuple[Tensor, Tensor]:
        """The images that the student is scored on."""
        return self._drawn(self.settings.evaluation_latents, "to be scored on")

    @torch.no_grad()
    def _drawn(self, count: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Draw images from the model: the flow's tokens of them, ``(count, length, dim)``, and labels, on the CPU.

        Each purpose has random numbers of its own, and none has those of samples drawn with the same seed.
        """
        seed = hashlib.sha256(f"{self.settings.seed} {purpose}".encode()).digest()
        # 4 bytes, because generators on the CPU take no more of a seed
        generator = Generator(self.model.device).manual_seed(int.from_bytes(seed[:4], "big"))
        model = self.model
        labels, parts = model.every_class(count), []
        silent = not self.accelerator.is_main_process
        with tqdm(total=count, desc="drawing from the model", unit="image", leave=False, disable=silent) as bar:
            for part in labels.split(self.settings.drawn_at_once):
                z = model.permute(model.prior.sample(part, generator=generator))
                parts.append(model.flow.inverse(z, part).cpu())
                bar.update(len(part))
        tokens = torch.cat(parts)
        if not tokens.isfinite().all():
            raise TrainingError("the model's own samples are not finite: its training has diverged")
        return tokens, labels.cpu()

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on a batch of images, of which a share is drawn from the model instead."""
        model, settings, labels = self.model, self.settings, batch.labels
        tokens, _ = model.tokenise(model.noised(batch.images, 1.0, generator=self.generators(batch.draws)))
        generator = next(self.generators(batch.draws[:1], purpose=2))
        if settings.prior_share:
            pool, pool_labels = self.pool
            chosen = torch.randint(len(pool), (len(labels),), device=labels.device, generator=generator).cpu()
            share = torch.rand(len(labels), device=labels.device, generator=generator) < settings.prior_share
            tokens = torch.where(share[:, None, None], pool[chosen].to(tokens.device), tokens)
            labels = torch.where(share, pool_labels[chosen].to(labels.device), labels)
        course = {"max_noise": settings.max_noise, "data_weight": settings.pixel_weight}
        return self.module(tokens, labels, model, **course, generator=generator), {}

    def evaluate(self, lesson: nn.Module, train: float | None) -> dict[str, Any]:
        """Compare the student's images with the exact ones from the same latents of the prior, in full precision."""
        scores = self._compare(lesson.student, train) if self.accelerator.is_main_process else {}
        shared: dict[str, Any] = broadcast_object_list([scores])[0]
        return shared

    @torch.no_grad()
    def _compare(self, student: OneStepInverse, train: float | None) -> dict[str, Any]:
        step, device = self.course.step, self.accelerator.device
        errors, images, exact = [], [], []
        for x, labels in zip(*(part.split(self.settings.drawn_at_once) for part in self.examined), strict=True):
            states = self.model.flow.trajectory(x.to(device), labels.to(device))
            reached = student.trajectory(states[-1], labels.to(device))
            apart = zip(reached[:-1], states[:-1], strict=True)
            errors.append(torch.stack([(ours - theirs).square().mean(dim=(1, 2)) for ours, theirs in apart]))
            images.append(self.model.detokenise(reached[0]).clamp(-1, 1))
            exact.append(self.model.detokenise(states[0]).clamp(-1, 1))
        error = (torch.cat(images) - torch.cat(exact)).square().mean().item()
        scores = {
            "train": train,
            "held_out": error,
            "blocks": torch.cat(errors, dim=1).mean(dim=1).tolist(),
            "psnr": decibels(error),
        }
        if not math.isfinite(error):
            return scores
        self.bar.write(f"step {step}: {scores['psnr']:.2f} dB between the student's images and the exact ones")
        self.accelerator.log({"held out/dB": scores["psnr"]}, step=step)
        save_error_curve([*self.course.history, {"step": step, **scores}], self.run / "curves.png")
        if self.settings.samples:
            sheet = []
            for title, shown in [("exact inverse", exact), (f"one step, {scores['psnr']:.1f} dB", images)]:
                pixels = self.model.to_uint8(torch.cat(shown)[: self.settings.samples]).cpu()
                sheet.append((title, grid(pixels, columns(len(self.model.class_names)))))
            save_sheet(sheet, self.run / "samples" / f"step-{step:08d}.png")
        return scores

    def save(self, lesson: nn.Module, folder: Path, held_out: float | None) -> None:
        """Write the averaged student, and put it beside the model if it is the best there."""
        error = math.inf if held_out is None else held_out
        save_student(lesson.student, self.model.flow, folder, error)
        if error <= min(entry["held_out"] for entry in self.course.history):
            there = student_error(self.folder, self.model.flow)
            if there is None or error <= there:
                save_student(lesson.student, self.model.flow, self.folder, error)
            else:
                self.bar.write(f"{self.folder / STUDENT} stays: its {decibels(there):.2f} dB are better")

    def shown(self, figures: dict[str, float]) -> dict[str, str]:
        """Return the loss, and the last score."""
        return {"loss": f"{figures['loss']:.4f}", "dB": f"{self.course.history[-1]['psnr']:.2f}"}


def decibels(error: float) -> float:
    """Return the peak signal-to-noise ratio of a mean squared error of images in [-1, 1], in dB."""
    return 10 * math.log10(4 / error) if error else math.inf


def save_student(student: OneStepInverse, flow: nn.Module, folder: Path, error: float = math.inf) -> None:
    """Put a student beside the model whose flow it inverts, with its error; the file appears whole."""
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    with published(folder / STUDENT) as partial:
        save_file(weights, partial, metadata={"flow": fingerprint(flow), "error": str(error)})


def load_student(folder: str | Path, flow: AutoregressiveFlow) -> OneStepInverse:
    """Return the student that lies beside a model, on the device of its flow.

    Raises:
        FileNotFoundError: if there is none, saying how to make one.
        OSError: if the file is damaged, or holds the inverse of another flow.
    """
    file = Path(folder) / STUDENT
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {STUDENT}: make one with farmer distill")
    student = OneStepInverse.from_flow(flow)
    try:
        weights = load_file(file)
        if _metadata(file).get("flow") != fingerprint(flow):
            raise OSError(f"{file} inverts another flow than this model's: distil it anew, or remove the file")
        student.load_state_dict(weights)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{file} holds no student: {error}; distil it anew, or remove the file") from error
    return student.eval()


def student_error(folder: Path, flow: nn.Module) -> float | None:
    """Return the error of a flow's student in a folder, the mean square in pixels; None if there is none of it."""
    metadata = _metadata(folder / STUDENT)
    return float(metadata.get("error", math.inf)) if metadata.get("flow") == fingerprint(flow) else None


def _metadata(file: Path) -> dict[str, str]:
    """Return what is written beside a student's weights; nothing if there is no sound file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def fingerprint(flow: nn.Module) -> str:
    """Return what tells a flow's weights from others: a digest of some numbers of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in flow.state_dict().items():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.flatten()[:: max(1, parameter.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
