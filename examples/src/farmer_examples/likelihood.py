"""``farmer likelihood``: exact likelihoods of images, a CSV row each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from farmer_examples.data import ImageData
from farmer_examples.model import Farmer
from farmer_examples.storage import published

__all__ = ["save_likelihoods"]

COLUMNS = ["image", "class", "nats_per_dim", "bits_per_dim", "bits_per_dim_error", "log_prior", "logdet"]


def save_likelihoods(
    model: Farmer,
    names: Sequence[str],
    data: ImageData,
    output: Path,
    *,
    draws: int = 8,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Score images and write a CSV row each, averaged over draws of the dequantisation noise.

    ``nats_per_dim`` is the negative log-density in [-1, 1], ``bits_per_dim`` that of the discrete image with its
    standard error over the draws, ``log_prior`` and ``logdet`` the two terms of the log-density in nats.

    Args:
        model: on any device.
        names: of the images, for the first column.
        data: the images, and the classes under which to score them.
        output: the CSV.
        draws: of the noise.
        batch_size: images scored at once.
        seed: of the noise.

    Returns:
        The bits per dimension, ``(count,)``.
    """
    generator = Generator(model.device).manual_seed(seed)
    loader = DataLoader(data, batch_size=batch_size, collate_fn=data.collate)
    remaining, scored = iter(names), []
    with published(output) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for images, labels in tqdm(loader, unit="batch", disable=len(loader) < 2):
            scores = model.bits_per_dim(
                images.to(model.device), labels.to(model.device), draws=draws, generator=generator
            )
            nats = -scores.density.log_prob / model.dimensions
            columns = [nats, scores.mean, scores.standard_error, *scores.density]
            for label, *figures in zip(labels.tolist(), *(c.tolist() for c in columns), strict=True):
                name = model.class_names[label] if label >= 0 else "none"
                writer.writerow([next(remaining), name, *(f"{figure:.6f}" for figure in figures)])
            scored.append(scores.mean.cpu())
    return torch.cat(scored)
