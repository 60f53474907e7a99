"""``farmer sample``: draw images with their exact densities."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from farmer_examples.model import Density, Farmer
from farmer_examples.pictures import grid, save_image
from farmer_examples.storage import published

__all__ = ["SamplingError", "draw", "save_samples"]


class SamplingError(RuntimeError):
    """Samples that cannot be drawn or kept; the message says why."""


@torch.no_grad()
def draw(model: Farmer, labels: Tensor, *, seed: int, batch_size: int) -> tuple[Tensor, Density]:
    """Draw one image for each of ``(count,)`` labels, with a progress bar.

    Args:
        model: on any device.
        labels: negative for no class.
        seed: same seed, labels and batch size: same images.
        batch_size: images drawn at once.

    Returns:
        uint8 ``(count, channels, size, size)``, and the density of the images before rounding to grey levels.

    Raises:
        SamplingError: if the model's samples are not finite.
    """
    generator = Generator(model.device).manual_seed(seed)
    images, densities = [], []
    with tqdm(total=len(labels), unit="image", disable=len(labels) <= batch_size) as bar:
        for part in labels.to(model.device).split(batch_size):
            drawn = model.sample(part, generator=generator)
            if not drawn.isfinite().all():
                raise SamplingError("the model's samples are not finite: its training has diverged")
            images.append(model.to_uint8(drawn).cpu())
            densities.append(model(drawn, part))
            bar.update(len(part))
    log_prior, logdet = (torch.cat(terms).cpu() for terms in zip(*densities, strict=True))
    return torch.cat(images), Density(log_prior, logdet)


def save_samples(
    model: Farmer,
    labels: Tensor,
    output: Path,
    *,
    seed: int = 0,
    batch_size: int = 64,
    columns: int = 10,
    files: bool = False,
) -> None:
    """Draw images into a folder: ``grid.png``, ``samples.csv`` and, if ``files``, ``CLASS/000000.png``.

    Each row of the CSV: index, class, log-likelihood, log p(z), log-determinant, all in nats, and nats per
    dimension. Arguments as in :func:`draw`, and the columns of the grid.

    Raises:
        SamplingError: as :func:`draw`, or if there is something in the folder: samples of two draws must not mix.
    """
    if output.is_dir() and any(output.iterdir()):
        raise SamplingError(f"the folder {output} is not empty: choose another, or remove it")
    images, density = draw(model, labels, seed=seed, batch_size=batch_size)
    names = [model.class_names[label] if label >= 0 else "none" for label in labels.tolist()]
    save_image(grid(images, columns, scale=max(1, 64 // model.image_size)), output / "grid.png")
    with published(output / "samples.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "class", "log_likelihood", "log_prior", "logdet", "nats_per_dim"])
        for index, (name, prior, logdet) in enumerate(zip(names, *(t.tolist() for t in density), strict=True)):
            total = prior + logdet
            figures = [f"{figure:.4f}" for figure in (total, prior, logdet, -total / model.dimensions)]
            writer.writerow([index, name, *figures])
    if files:
        for index, (name, image) in enumerate(zip(names, images, strict=True)):
            folder = name.replace("/", "-").strip(".") or "-"  # whatever a class is called, it stays in the output
            save_image(image, output / folder / f"{index:06d}.png")
