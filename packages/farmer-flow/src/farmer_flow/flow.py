"""The autoregressive flow: blocks of masked affine maps (paper, section 3.2, Eq. 8-10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from farmer_flow.inversion import (
    FEW,
    METHODS,
    BlockInversion,
    Inversion,
    Method,
    fastest_methods,
    fixed_point,
    segment_length,
)
from farmer_flow.transformer import KVCache, Linear, Transformer

__all__ = ["AutoregressiveBlock", "AutoregressiveFlow", "check_tokens"]

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
        self.embed = Linear(dim, width)
        self.position = nn.Parameter(torch.randn(length - 1, width) * 0.02)
        self.class_embed = nn.Embedding(classes + 1, width) if classes else None  # the last row: no class
        self.transformer = Transformer(width, layers, head_dim)
        self.out = Linear(width, 2 * dim)
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
        x = self.in_order(x)
        mu, log_sigma = self._affine(x[:, :-1], self.condition(labels, x))
        z = torch.cat([x[:, :1], (x[:, 1:] - mu) * log_sigma.exp()], dim=1)
        return self.in_order(z), log_sigma.sum(dim=(1, 2))

    def inversion(
        self, z: Tensor, labels: Tensor | None = None, method: Method = "sequential", *, tolerance: float = 1e-5
    ) -> tuple[Tensor, BlockInversion]:
        """Map ``z`` to ``x``, both ``(batch, length, dim)``, by one of the methods of the flow, and say what it took.

        A segment of one token at a time is the sequential inverse (Eq. 9), the whole sequence is Jacobi's iteration,
        and what lies between is Gauss-Seidel-Jacobi (arXiv 2505.12849), which keeps the tokens of earlier segments.
        """
        z, condition = self.in_order(z), self.condition(labels, z)
        if method == "sequential":
            x = self._sequential(z, condition)
            iterations = torch.full((len(z),), z.shape[1] - 1, device=z.device)
            fell_back = torch.zeros_like(iterations, dtype=torch.bool)
        else:
            with torch.no_grad():
                x, iterations, fell_back = self._by_segments(z, condition, method, tolerance)
        return self.in_order(x), BlockInversion(method, iterations, fell_back)

    def _sequential(self, z: Tensor, condition: Tensor | None) -> Tensor:
        cache = self.transformer.new_cache(z.shape[0], z.shape[1] - 1)
        x = [z[:, :1]]
        for latent in z[:, 1:].split(1, dim=1):
            x.append(self.undo(x[-1], latent, condition, cache))
        return torch.cat(x, dim=1)

    def _by_segments(
        self, z: Tensor, condition: Tensor | None, method: Method, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, length = z.clone(), z.shape[1]
        iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        fell_back = torch.zeros_like(iterations, dtype=torch.bool)
        segment = segment_length(method, length - 1)
        cache = self.transformer.new_cache(len(z), length - 1) if segment < length - 1 else None
        for start in range(1, length, segment):
            part = slice(start, start + segment)
            x[:, part], taken, diverged = self._settle(
                x[:, start - 1 : start], z[:, part], condition, cache, ~fell_back, tolerance
            )
            iterations += taken
            fell_back |= diverged
        if fell_back.any():
            x[fell_back] = self._sequential(z[fell_back], None if condition is None else condition[fell_back])
        return x, iterations, fell_back

    def _settle(
        self,
        before: Tensor,
        z: Tensor,
        condition: Tensor | None,
        cache: KVCache | None,
        live: Tensor,
        tolerance: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Iterate a segment after the token ``before`` to its fixed point, and advance the cache past it."""
        start = 0 if cache is None else cache.position

        def step(x: Tensor, rows: Tensor) -> Tensor:
            if cache is not None:
                cache.position = start
            shifted = torch.cat([before[rows], x[:, :-1]], dim=1)
            return self.undo(shifted, z[rows], None if condition is None else condition[rows], cache)

        return fixed_point(step, z, live, tolerance=tolerance, drop_settled=cache is None)

    def undo(self, before: Tensor, z: Tensor, condition: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Return the tokens whose latents are ``z``, given the token before each (Eq. 9).

        Args:
            before: ``(batch, new, dim)``, in this block's order as all here.
            z: ``(batch, new, dim)``.
            condition: from :meth:`condition`.
            cache: of the tokens before these, which it is advanced past; None if there are none.
        """
        mu, log_sigma = self._affine(before, condition, cache)
        return z * (-log_sigma).exp() + mu

    def condition(self, labels: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return what is added to every embedded token, ``(batch, 1, width)``; None where there are no classes."""
        if self.class_embed is None:
            return None
        null = self.class_embed.num_embeddings - 1
        if labels is None:
            labels = torch.full((tokens.shape[0],), null, device=tokens.device)
        embedded: Tensor = self.class_embed(labels.where(labels >= 0, null)).unsqueeze(1)
        return embedded

    def in_order(self, tokens: Tensor) -> Tensor:
        """Put ``(batch, length, dim)`` into the order in which this block reads, or back."""
        return tokens.flip(1) if self.reverse else tokens

    def _affine(self, before: Tensor, condition: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """Return ``mu`` and the bounded ``log sigma`` of the tokens after ``before``, in its precision.

        Whatever the Transformer's precision; see above for the bound.
        """
        start = 0 if cache is None else cache.position
        tokens = self.embed(before.to(self.embed.weight.dtype)) + self.position[start : start + before.shape[1]]
        if condition is not None:
            tokens = tokens + condition
        mu, raw = self.out(self.transformer(tokens, cache)).to(before.dtype).chunk(2, dim=-1)
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
            ValueError: if the tokens or the labels have the wrong shape, or a label is out of range. Where gradients
                are enabled on a GPU, which would have to wait to find out, such a label fails a CUDA assertion instead.
        """
        z = self._checked(x, labels)
        logdet = z.new_zeros(z.shape[0])
        for block in self.blocks:
            z, block_logdet = block(z, labels)
            logdet = logdet + block_logdet
        return z, logdet

    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        method: Method | Literal["auto"] | Sequence[Method] = "sequential",
        tolerance: float = 1e-5,
    ) -> Tensor:
        """Map latents to data.

        Every method solves each block's equation, the sequential one to rounding and the others to the tolerance:

        - ``"sequential"``: one token after another, ``length - 1`` passes over one token a block (Eq. 9).
        - ``"jacobi"``: all tokens at once, again and again until they no longer change. After ``k`` iterations the
          first ``k + 1`` tokens are exact, so there are ``length - 1`` at most; a well-behaved block needs few.
          Samples that have converged are not computed any further.
        - ``"gauss-seidel-jacobi"``: a quarter of the tokens at a time in this way, with a cache of those before
          (arXiv 2505.12849).
        - ``"auto"``: the fastest for each block, measured on the first few latents; see :meth:`fastest_inverse`.
        - a method for each of ``flow.blocks``.

        A sample for which a block's iteration diverges is inverted sequentially in that block;
        :meth:`inversion` tells.

        The sequential inverse is differentiable; wrap the call in ``torch.no_grad()`` or ``torch.inference_mode()``
        where gradients are not needed, and it overwrites its cache instead of copying it. The others are not
        differentiable, and take no gradient to the flow's parameters.

        Args:
            z: ``(batch, length, dim)``.
            labels: as in :meth:`forward`.
            method: see above.
            tolerance: a block's iteration ends when ``|new - old| <= tolerance (1 + |new|)`` for every number of a
                sample, and the change does not grow. How far ``x`` is then from the sequential inverse depends on how
                much the blocks amplify: for contracting ones it is of the tolerance's size. Under reduced precision
                rounding may keep the changes above a small tolerance, and samples then fall back.

        Returns:
            ``x``, shaped as ``z``.

        Raises:
            ValueError: as :meth:`forward`, if the method is unknown or the tolerance is not positive, or if gradients
                to ``z`` are wanted of another method than the sequential.
        """
        return self.inversion(z, labels, method=method, tolerance=tolerance).x

    def inversion(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        method: Method | Literal["auto"] | Sequence[Method] = "sequential",
        tolerance: float = 1e-5,
    ) -> Inversion:
        """Return :meth:`inverse` with the iterations that each block took, and where it fell back.

        Arguments and errors are those of :meth:`inverse`.
        """
        x = self._checked(z, labels)
        reports = []
        methods = self._methods(method, x, labels, tolerance)
        if set(methods) != {"sequential"} and torch.is_grad_enabled() and z.requires_grad:
            raise ValueError("only the sequential inverse is differentiable: take it, or detach the latents")
        for block, chosen in zip(reversed(self.blocks), reversed(methods), strict=True):
            x, report = cast(AutoregressiveBlock, block).inversion(x, labels, chosen, tolerance=tolerance)
            reports.append(report)
        return Inversion(x, reports[::-1])

    def fastest_inverse(
        self, z: Tensor, labels: Tensor | None = None, *, batch: int | None = None, tolerance: float = 1e-5
    ) -> list[Method]:
        """Measure which method inverts each block in the least time, for :meth:`inverse` to use again and again.

        Args:
            z: a few latents as those to be inverted, ``(few, length, dim)``, at least one.
            labels: theirs, as in :meth:`forward`.
            batch: how many latents are to be inverted at once; ``few`` if None.
            tolerance: as in :meth:`inverse`.

        Returns:
            A method for each of ``flow.blocks``.

        Raises:
            ValueError: as :meth:`inverse`, or if there are no latents.
        """
        x = self._checked(z, labels)
        _check_tolerance(tolerance)
        if not len(x):
            raise ValueError("at least one latent is needed to measure an inverse")
        blocks = [cast(AutoregressiveBlock, block) for block in self.blocks]
        return fastest_methods(blocks, x, labels, tolerance=tolerance, batch=batch or len(x))

    def _methods(self, method: str | Sequence[str], z: Tensor, labels: Tensor | None, tolerance: float) -> list[Method]:
        _check_tolerance(tolerance)
        if method == "auto":
            if not len(z):
                return ["sequential"] * len(self.blocks)
            few = None if labels is None else labels[:FEW]
            return self.fastest_inverse(z[:FEW], few, batch=len(z), tolerance=tolerance)
        methods = [method] * len(self.blocks) if isinstance(method, str) else list(method)
        if not set(methods) <= set(METHODS) or len(methods) != len(self.blocks):
            known = ", ".join(map(repr, (*METHODS, "auto")))
            raise ValueError(f"method must be one of {known}, or one for each of {len(self.blocks)} blocks: {method!r}")
        return cast(list[Method], methods)

    def trajectory(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return ``[Z^0, ..., Z^n]``: the data, and the tokens after each block.

        Arguments and errors are those of :meth:`forward`.
        """
        states = [self._checked(x, labels)]
        for block in self.blocks:
            states.append(block(states[-1], labels)[0])
        return states

    def _checked(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        return check_tokens(tokens, labels, self.length, self.dim, self.classes)


def check_tokens(tokens: Tensor, labels: Tensor | None, length: int, dim: int, classes: int) -> Tensor:
    """Return the tokens in at least float32, or say what is wrong with them or the labels."""
    if tokens.ndim != 3 or tokens.shape[1:] != (length, dim):
        raise ValueError(f"tokens must be (batch, length={length}, dim={dim}), got {tuple(tokens.shape)}")
    if labels is not None:
        check_labels(labels, tokens.shape[0], classes)
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Raise ValueError unless ``labels`` is ``(batch,)`` integers below ``classes`` (any, if that is 0)."""
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ValueError(f"labels must be ({batch},) integers, got {tuple(labels.shape)} of {labels.dtype}")
    if not classes or not batch or torch.compiler.is_compiling():
        return
    if labels.is_cuda and torch.is_grad_enabled():  # a training is not to wait for the GPU here
        torch._assert_async(labels.max() < classes, f"labels must be below classes={classes}")
    elif int(labels.max()) >= classes:
        raise ValueError(f"labels must be below classes={classes}, got {int(labels.max())}")


def _check_tolerance(tolerance: float) -> None:
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
