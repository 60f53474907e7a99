"""Pictures of samples and of the course of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
from torch import Tensor

from farmer_examples.storage import published
from farmer_examples.torchvision_operators import torchvision

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend without a screen

__all__ = ["columns", "grid", "read_picture", "save_curves", "save_error_curve", "save_image", "save_sheet"]


def columns(classes: int) -> int:
    """Return how many images a grid's row has, so that a column is a class where there are some, but not many."""
    return min(classes, 10) if classes > 1 else 8


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay uint8 ``(batch, channels, height, width)`` images out in rows, small ones magnified to about 64 pixels."""
    scale = max(1, 64 // images.shape[-1])
    magnified = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    laid_out: Tensor = torchvision.utils.make_grid(magnified, nrow=columns, padding=2, pad_value=128)
    return laid_out


def save_image(image: Tensor, path: Path) -> None:
    """Write one uint8 ``(channels, height, width)`` image as PNG."""
    with published(path) as partial:
        torchvision.transforms.v2.functional.to_pil_image(image).save(partial)


def read_picture(path: Path) -> Tensor:
    """Read a picture that was written here, as uint8 ``(3, height, width)``."""
    with PIL.Image.open(path) as image:
        picture: Tensor = torchvision.transforms.v2.functional.pil_to_tensor(image.convert("RGB"))
    return picture


def save_sheet(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """Write pictures, uint8 ``(channels, height, width)``, below each other, each under its title."""
    pictures = [picture for _, picture in rows]
    width = max(3.0, *(picture.shape[2] / 100 for picture in pictures))
    heights = [picture.shape[1] / 100 + 0.3 for picture in pictures]
    size = (width + 0.2, sum(heights) + 0.1)
    figure, axes = pyplot.subplots(len(rows), figsize=size, layout="constrained", height_ratios=heights, squeeze=False)
    for axis, (title, _), picture in zip(axes[:, 0], rows, pictures, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_anchor("W")
        axis.set_title(title, fontsize=9, loc="left", pad=3)
        axis.axis("off")
    with published(path) as partial:
        figure.savefig(partial, dpi=100)
    pyplot.close(figure)


def save_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the training and held-out curves of the entries ``step``, ``train``, ``held_out``, ``train_unit``."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["held_out"] for entry in history], "o-", label="held out, averaged weights")
    trained = [entry for entry in history if entry["train"] is not None]
    if trained and trained[0]["train_unit"] == "bits/dim":
        axes.plot([e["step"] for e in trained], [e["train"] for e in trained], "--", label="training")
    lowest = min(history, key=lambda entry: entry["held_out"])
    axes.axhline(lowest["held_out"], color="grey", linewidth=0.7)
    axes.set(xlabel="step", ylabel="bits per dimension", title=f"best held out: {lowest['held_out']:.3f} bits/dim")
    axes.legend()
    with published(path) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)


def save_error_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the ``psnr`` of the entries in dB, and the mean squared errors of their ``blocks``, over their ``step``."""
    steps = [entry["step"] for entry in history]
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(6, 6), layout="constrained")
    above.plot(steps, [entry["psnr"] for entry in history], "o-")
    above.set(ylabel="dB", title=f"images against the exact inverse: {history[-1]['psnr']:.2f} dB")
    for index, errors in enumerate(zip(*(entry["blocks"] for entry in history), strict=True)):
        below.semilogy(steps, errors, label=f"Z^{index}")
    below.set(xlabel="step", ylabel="mean squared error of the states")
    if len(history[-1]["blocks"]) <= 10:
        below.legend()
    with published(path) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)
