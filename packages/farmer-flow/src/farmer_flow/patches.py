"""Images to tokens and back. No dimension is lost."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

__all__ = ["patchify", "unpatchify"]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, in raster order: one token a patch.

    Args:
        images: ``(batch, channels, height, width)``.
        patch_size: side of a patch in pixels; divides height and width.

    Returns:
        ``(batch, (height / p) * (width / p), channels * p * p)``, channels outermost within a token.

    Raises:
        ValueError: if ``images`` has not four dimensions, or ``patch_size`` does not divide its sides.

    Example:
        >>> import torch
        >>> from farmer_flow import patchify, unpatchify
        >>> images = torch.randn(2, 3, 8, 4)
        >>> tokens = patchify(images, patch_size=4)
        >>> tokens.shape
        torch.Size([2, 2, 48])
        >>> torch.equal(unpatchify(tokens, 4, height=8, width=4), images)
        True
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
    _check_divides(patch_size, *images.shape[2:])
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Undo :func:`patchify`.

    Args:
        tokens: ``(batch, length, dim)``.
        patch_size: side of a patch in pixels.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        ``(batch, dim / p**2, height, width)``.

    Raises:
        ValueError: if the tokens do not make up images of this size.
    """
    _check_divides(patch_size, height, width)
    rows, columns = height // patch_size, width // patch_size
    if tokens.ndim != 3 or tokens.shape[1] != rows * columns or tokens.shape[2] % patch_size**2:
        raise ValueError(
            f"tokens must be (batch, {rows * columns}, channels * {patch_size**2}) for {height}x{width} images "
            f"in patches of {patch_size}, got {tuple(tokens.shape)}"
        )
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def _check_divides(patch_size: int, height: int, width: int) -> None:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide height and width, got {patch_size} for {height}x{width} images")
