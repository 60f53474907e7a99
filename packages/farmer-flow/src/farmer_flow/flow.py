"""The autoregressive flow: blocks of masked affine maps (paper, section 3.2, Eq. 8-10)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from farmer_flow.transformer import Transformer

__all__ = ["AutoregressiveFlow"]

LOG_SCALE_BOUND = 8.0
"""No scale leaves ``exp(-8)..exp(8)``."""


class AutoregressiveBlock(nn.Module):
    r"""One affine map whose parameters for a token depend on the tokens before it.

    ``z_1 = x_1`` and, for ``i > 1``, ``z_i = (x_i - mu(x_<i)) * sigma(x_<i)`` (Eq. 8). The causal Transformer
    reads ``x_1..x_{N-1}``; its output at ``x_{i-1}`` gives ``mu`` and ``log sigma`` of token ``i``.
    The output layer starts at zero, so that a fresh block is the identity.

    ``log sigma = c * tanh(s / c)`` of the network's output ``s``, with ``c = 8``: nearly ``s`` where it is small,
    and a scale that can neither overflow nor vanish where it is not. Eq. 8-10 hold for any function of ``x_<i``;
    forward, inverse and log-determinant all use the bounded value, so they agree exactly.

    Args:
        dim: channels of a token.
        length: tokens of a sequence, at least 2.
        width: of the Transformer.
        layers: of the Transformer.
        head_dim: channels of an attention head.
        classes: number of classes; 0 for none.
        reverse: read the tokens from the last to the first.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        width: int,
        layers: int,
        head_dim: int = 64,
        classes: int = 0,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.embed = nn.Linear(dim, width)
        self.position = nn.Parameter(torch.randn(length - 1, width) * 0.02)
        self.class_embed = nn.Embedding(classes + 1, width) if classes else None  # the last row: no class
        self.transformer = Transformer(width, layers, head_dim)
        self.out = nn.Linear(width, 2 * dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` to ``z`` in one parallel pass (Eq. 8).

        Args:
            x: ``(batch, length, dim)``, float32 or wider.
            labels: ``(batch,)``, or None for no class.

        Returns:
            ``z``, shaped as ``x``, and ``log|det dz/dx|``, ``(batch,)`` (Eq. 10).
        """
        x = self._in_order(x)
        hidden = self.transformer(self._tokens(x[:, :-1], labels, start=0))
        mu, log_sigma = self._affine(hidden, x.dtype)
        z = torch.cat([x[:, :1], (x[:, 1:] - mu) * log_sigma.exp()], dim=1)
        return self._in_order(z), log_sigma.sum(dim=(1, 2))

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map ``z`` to ``x``, one token after another (Eq. 9), both ``(batch, length, dim)``."""
        z = self._in_order(z)
        cache = self.transformer.new_cache(z.shape[0], z.shape[1] - 1)
        x = [z[:, :1]]
        for i in range(1, z.shape[1]):
            hidden = self.transformer(self._tokens(x[-1], labels, start=i - 1), cache)
            mu, log_sigma = self._affine(hidden, z.dtype)
            x.append(z[:, i : i + 1] * (-log_sigma).exp() + mu)
        return self._in_order(torch.cat(x, dim=1))

    def _in_order(self, tokens: Tensor) -> Tensor:
        return tokens.flip(1) if self.reverse else tokens

    def _tokens(self, x: Tensor, labels: Tensor | None, start: int) -> Tensor:
        tokens: Tensor = self.embed(x.to(self.embed.weight.dtype)) + self.position[start : start + x.shape[1]]
        if self.class_embed is not None:
            null = self.class_embed.num_embeddings - 1
            if labels is None:
                labels = torch.full((x.shape[0],), null, device=x.device)
            tokens = tokens + self.class_embed(labels.where(labels >= 0, null)).unsqueeze(1)
        return tokens

    def _affine(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``mu`` and the bounded ``log sigma`` in ``dtype``, whatever the Transformer's precision."""
        mu, raw = self.out(hidden).to(dtype).chunk(2, dim=-1)
        return mu, LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)


class AutoregressiveFlow(nn.Module):
    r"""An invertible map between sequences of tokens, with an exact log-determinant.

    A stack of affine blocks ``Z^0 = x, ..., Z^n = z``, each autoregressive over tokens (FARMER, arXiv 2510.23588,
    Eq. 8-10):

        ``z_1 = x_1``,  ``z_i = (x_i - mu(x_<i)) * sigma(x_<i)``

    Blocks read the tokens in raster and in reversed order by turns. The forward direction is one parallel pass a
    block; the inverse takes ``blocks * length`` steps with a key/value cache. A fresh flow is the identity.
    Scales are bounded by ``exp(+-8)`` in every block, see :class:`AutoregressiveBlock`, which leaves forward,
    inverse and log-determinant in exact agreement.

    Args:
        dim: channels of a token.
        length: tokens of a sequence, at least 2: a single token would have nothing to depend on.
        width: of each block's Transformer; a multiple of ``head_dim``.
        blocks: number of blocks.
        layers: Transformer layers a block.
        head_dim: channels of an attention head.
        classes: number of classes that every block is conditioned on; 0, the default, for none, and then labels
            are accepted and not used.

    Raises:
        ValueError: if a size is out of its range.

    Example:
        >>> import torch
        >>> from farmer_flow import AutoregressiveFlow
        >>> flow = AutoregressiveFlow(dim=3, length=16, width=64, blocks=2, layers=1)
        >>> x = torch.randn(4, 16, 3)
        >>> z, logdet = flow(x)
        >>> z.shape, logdet.shape
        (torch.Size([4, 16, 3]), torch.Size([4]))
        >>> with torch.no_grad():
        ...     torch.allclose(flow.inverse(z), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        width: int,
        blocks: int,
        layers: int,
        head_dim: int = 64,
        classes: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in [
            ("dim", dim, 1),
            ("length", length, 2),
            ("blocks", blocks, 1),
            ("classes", classes, 0),
        ]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.dim, self.length, self.width, self.layers = dim, length, width, layers
        self.head_dim, self.classes = head_dim, classes
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(
                dim,
                length,
                width=width,
                layers=layers,
                head_dim=head_dim,
                classes=classes,
                reverse=index % 2 == 1,
            )
            for index in range(blocks)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latents.

        Args:
            x: ``(batch, length, dim)``.
            labels: ``(batch,)`` int64, negative for no class; None for no class at all.

        Returns:
            ``z``, shaped as ``x``, and ``log|det dz/dx|`` in nats, ``(batch,)``. Both are float32, whatever the
            autocast, or float64 for float64 tokens.

        Raises:
            ValueError: if the tokens or the labels have the wrong shape, or a label is out of range.
        """
        z = self._checked(x, labels)
        logdet = z.new_zeros(z.shape[0])
        for block in self.blocks:
            z, block_logdet = block(z, labels)
            logdet = logdet + block_logdet
        return z, logdet

    def inverse(
        self, z: Tensor, labels: Tensor | None = None, *, method: Literal["sequential"] = "sequential"
    ) -> Tensor:
        """Map latents to data.

        Differentiable; wrap the call in ``torch.no_grad()`` or ``torch.inference_mode()`` where gradients are not
        needed, and it overwrites its cache instead of copying it.

        Args:
            z: ``(batch, length, dim)``.
            labels: as in :meth:`forward`.
            method: ``"sequential"``, exact: one token after another.

        Returns:
            ``x``, shaped as ``z``.

        Raises:
            ValueError: as :meth:`forward`, or if the method is unknown.
        """
        if method != "sequential":
            raise ValueError(f'method must be "sequential", got {method!r}')
        x = self._checked(z, labels)
        for block in reversed(self.blocks):
            x = block.inverse(x, labels)  # type: ignore[operator]  # a ModuleList forgets its modules' types
        return x

    def trajectory(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return ``[Z^0, ..., Z^n]``: the data, and the tokens after each block.

        Arguments and errors are those of :meth:`forward`.
        """
        states = [self._checked(x, labels)]
        for block in self.blocks:
            states.append(block(states[-1], labels)[0])
        return states

    def _checked(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """Return the tokens in at least float32, or say what is wrong with them or the labels."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.length, self.dim):
            raise ValueError(f"tokens must be (batch, length={self.length}, dim={self.dim}), got {tuple(tokens.shape)}")
        if labels is not None:
            check_labels(labels, tokens.shape[0], self.classes)
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Raise ValueError unless ``labels`` is ``(batch,)`` integers below ``classes`` (any, if that is 0)."""
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ValueError(f"labels must be ({batch},) integers, got {tuple(labels.shape)} of {labels.dtype}")
    if classes and not torch.compiler.is_compiling() and batch and int(labels.max()) >= classes:
        raise ValueError(f"labels must be below classes={classes}, got {int(labels.max())}")
