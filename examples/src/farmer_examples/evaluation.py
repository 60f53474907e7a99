"""Held-out bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader, Subset

from farmer_examples.data import ImageData
from farmer_examples.model import Farmer

__all__ = ["evaluate"]


def evaluate(
    model: Farmer,
    data: ImageData,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Score images under their own labels, with the same noise at every call.

    Args:
        model: on any device.
        data: the images.
        batch_size: images scored at once.
        limit: score so many images, evenly spread over the data; all if None.
        draws: of the dequantisation noise.
        seed: of the noise.

    Returns:
        ``held_out`` in bits/dim, its standard error over images ``held_out_error``, the averages of log p(z) and
        of the log-determinant in nats/dim, and the number of ``images``.
    """
    positions = data.spread(limit or len(data))
    subset = Subset(data, positions)
    generator = Generator(model.device).manual_seed(seed)
    bits, log_prior, logdet = [], [], []
    for images, labels in DataLoader(subset, batch_size=batch_size, collate_fn=data.collate):
        scores = model.bits_per_dim(images.to(model.device), labels.to(model.device), draws=draws, generator=generator)
        bits.append(scores.mean.cpu())
        log_prior.append(scores.density.log_prior.cpu())
        logdet.append(scores.density.logdet.cpu())
    scored = torch.cat(bits).double()
    return {
        "held_out": scored.mean().item(),
        "held_out_error": scored.std().item() / math.sqrt(len(positions)),
        "log_prior": torch.cat(log_prior).double().mean().item() / model.dimensions,
        "logdet": torch.cat(logdet).double().mean().item() / model.dimensions,
        "images": len(positions),
    }
