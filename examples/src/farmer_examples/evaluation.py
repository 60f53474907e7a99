"""Held-out bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Generator
from torch.distributions import Categorical

from farmer_examples.data import ImageData
from farmer_examples.hardware import lacks_float64
from farmer_examples.model import Farmer

__all__ = ["evaluate", "mixture_figures"]


def evaluate(
    model: Farmer,
    data: ImageData,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Score images under their own labels, with the same noise for an image at every call.

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
        of the log-determinant in nats/dim, the largest log-determinant of an image, ``logdet_max`` (images with an
        abnormally large one are blurred: paper, Figure 8), and the number of ``images``.
    """
    positions = data.spread(limit or len(data))
    processes = PartialState(cpu=lacks_float64())
    scored = []
    for batch in range(processes.process_index, -(-len(positions) // batch_size), processes.num_processes):
        chosen = positions[batch * batch_size : (batch + 1) * batch_size]
        images, labels = (part.to(model.device) for part in data.__getitems__(chosen))
        own = [Generator(model.device).manual_seed(hash((seed, position)) % 2**63) for position in chosen]
        scores = model.bits_per_dim(images, labels, draws=draws, generator=own)
        figures = torch.stack([scores.mean, scores.density.log_prior, scores.density.logdet]).double().cpu()
        scored.append((batch, figures))
    in_order = sorted(gather_object(scored), key=lambda part: part[0])
    bits, log_prior, logdet = torch.cat([figures for _, figures in in_order], dim=1)
    return {
        "held_out": bits.mean().item(),
        "held_out_error": bits.std().item() / math.sqrt(len(positions)),
        "log_prior": log_prior.mean().item() / model.dimensions,
        "logdet": logdet.mean().item() / model.dimensions,
        "logdet_max": logdet.max().item() / model.dimensions,
        "images": len(positions),
    }


@torch.no_grad()
def mixture_figures(model: Farmer, data: ImageData, *, limit: int = 8) -> dict[str, float]:
    """Return what tells of mixtures that collapse, over a few images, for a model with a LatentPrior.

    Returns:
        ``components``: how many are in use, the perplexity of the mixture's weights averaged over tokens and images,
        between 1 and K; ``smallest_scale``, the smallest standard deviation; and both, with ``shared_`` before them,
        of the mixture of the redundant channels.
    """
    images, labels = data.__getitems__(data.spread(limit))
    labels = labels.to(model.device)
    z, _ = model.encode(images.to(model.device), labels)
    figures = {}
    for prefix, mixture in zip(("", "shared_"), model.prior.mixtures(z, labels), strict=True):
        if mixture is not None:
            weights = mixture.logits.softmax(-1).flatten(0, -2).mean(0)
            figures[f"{prefix}components"] = Categorical(weights).entropy().exp().item()
            figures[f"{prefix}smallest_scale"] = mixture.scale.min().item()
    return figures
