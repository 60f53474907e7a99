"""``farmer sample``: draw images with their exact densities."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from farmer_examples.guidance import Guides
from farmer_examples.model import Density, Farmer, Inverse
from farmer_examples.pictures import grid, save_image, save_sheet
from farmer_examples.storage import published

__all__ = ["SamplingError", "check_empty", "draw", "save_samples"]

UNGUIDED = Guides()


class SamplingError(RuntimeError):
    """Samples that cannot be drawn or kept; the message says why."""


@torch.no_grad()
def draw(
    model: Farmer,
    labels: Tensor,
    *,
    seed: int,
    batch_size: int,
    guides: Guides = UNGUIDED,
    redundant_scale: float = 1.0,
    inverse: Inverse = "sequential",
) -> tuple[Tensor, Density]:
    """Draw one image for each of ``(count,)`` labels, with a progress bar.

    Args:
        model: on any device.
        labels: negative for no class.
        seed: same seed, labels and batch size: same images.
        batch_size: images drawn at once.
        guides: see :class:`~farmer_examples.guidance.Setting`.
        redundant_scale: factor on the variances of the prior's shared mixture.
        inverse: see :meth:`~farmer_examples.model.Farmer.sample`. Whatever it is, the density is that of the flow.

    Returns:
        uint8 ``(count, channels, size, size)``, and the density of the images before rounding to grey levels.

    Raises:
        SamplingError: if the model's samples are not finite.
    """
    generator = Generator(model.device).manual_seed(seed)
    images, densities = [], []
    with tqdm(total=len(labels), unit="image", disable=len(labels) <= batch_size) as bar:
        for part in labels.to(model.device).split(batch_size):
            try:
                drawn = model.sample(
                    part,
                    **guides._asdict(),
                    redundant_scale=redundant_scale,
                    inverse=inverse,
                    generator=generator,
                )
            except FloatingPointError as error:
                raise SamplingError(f"the samples are not finite: {error}") from None
            if not drawn.isfinite().all():
                raise SamplingError("the samples are not finite: the model's training has diverged, or the guidance")
            images.append(model.to_uint8(drawn).cpu())
            densities.append(model(drawn, part))
            bar.update(len(part))
    log_prior, logdet = (torch.cat(terms).cpu() for terms in zip(*densities, strict=True))
    return torch.cat(images), Density(log_prior, logdet)


def check_empty(output: Path) -> None:
    """Refuse a folder with something in it: samples of two draws must not mix.

    Raises:
        SamplingError: if there is.
    """
    # a name that begins with .partial- is what a killed process has left of a file
    if output.is_dir() and any(not path.name.startswith(".partial-") for path in output.iterdir()):
        raise SamplingError(f"the folder {output} is not empty: choose another, or remove it")


def save_samples(
    model: Farmer,
    labels: Tensor,
    output: Path,
    *,
    seed: int = 0,
    batch_size: int = 64,
    columns: int = 10,
    files: bool = False,
    guides: Guides = UNGUIDED,
    redundant_scales: Sequence[float] = (1.0,),
    inverse: Inverse = "sequential",
) -> None:
    """Draw images into a folder: ``grid.png``, ``samples.csv`` and, if ``files``, ``CLASS/000000.png``.

    Each row of the CSV: index, class, redundant scale, log-likelihood, log p(z), log-determinant, all in nats, and
    nats per dimension. Arguments as in :func:`draw`, and the columns of the grid. With several redundant scales all
    images are drawn with each, from the same random numbers, and the grid has a titled part for each.

    Raises:
        SamplingError: as :func:`draw`; if there is something in the folder; or if a redundant scale is asked for
            that cannot be.
    """
    check_empty(output)
    if tuple(redundant_scales) != (1.0,) and getattr(model.prior, "redundant", True) is None:
        raise SamplingError("this model has no redundant channels to scale: its informative_dim is all of a token")
    if guides.need_classes and (labels < 0).all():
        raise SamplingError("guidance contrasts classes with none: name classes, or leave guidance out")
    names = [model.class_names[label] if label >= 0 else "none" for label in labels.tolist()]
    sheet, rows, pictures = [], [], []
    for factor in redundant_scales:
        used = guides if factor else guides._replace(redundant_guide=None)  # 0 leaves no density to guide
        images, density = draw(
            model,
            labels,
            seed=seed,
            batch_size=batch_size,
            guides=used,
            redundant_scale=factor,
            inverse=inverse,
        )
        picture = grid(images, columns)
        sheet.append((f"redundant variance x {factor:g}", picture))
        for name, image, prior, logdet in zip(names, images, *(t.tolist() for t in density), strict=True):
            total = prior + logdet
            figures = [f"{figure:.4f}" for figure in (total, prior, logdet, -total / model.dimensions)]
            rows.append([len(rows), name, f"{factor:g}", *figures])
            pictures.append((name, image))
    if len(sheet) == 1:
        save_image(sheet[0][1], output / "grid.png")
    else:
        save_sheet(sheet, output / "grid.png")
    with published(output / "samples.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["index", "class", "redundant_scale", "log_likelihood", "log_prior", "logdet", "nats_per_dim"]
        writer.writerows([header, *rows])
    if files:
        for index, (name, image) in enumerate(pictures):
            folder = name.replace("/", "-").strip(".") or "-"  # whatever a class is called, it stays in the output
            save_image(image, output / folder / f"{index:06d}.png")
