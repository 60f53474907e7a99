"""Held-out bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Generator

from farmer_examples.data import ImageData
from farmer_examples.model import Farmer, lacks_float64

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
    """Score images under their own labels, with the same noise at every call with the same ``batch_size``.

    Processes that train together share the batches out, and all of them must call it: the score is that of one process.

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
    generator, processes = Generator(model.device), PartialState(cpu=lacks_float64())
    scored = []
    for batch in range(processes.process_index, -(-len(positions) // batch_size), processes.num_processes):
        images, labels = data.__getitems__(positions[batch * batch_size : (batch + 1) * batch_size])
        generator.manual_seed(hash((seed, batch)) % 2**63)  # the batch's own, whichever process scores it
        scores = model.bits_per_dim(images.to(model.device), labels.to(model.device), draws=draws, generator=generator)
        figures = torch.stack([scores.mean, scores.density.log_prior, scores.density.logdet]).double().cpu()
        scored.append((batch, figures))
    in_order = sorted(gather_object(scored), key=lambda part: part[0])
    bits, log_prior, logdet = torch.cat([figures for _, figures in in_order], dim=1)
    return {
        "held_out": bits.mean().item(),
        "held_out_error": bits.std().item() / math.sqrt(len(positions)),
        "log_prior": log_prior.mean().item() / model.dimensions,
        "logdet": logdet.mean().item() / model.dimensions,
        "images": len(positions),
    }
