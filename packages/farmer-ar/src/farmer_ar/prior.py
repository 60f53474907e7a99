"""The autoregressive latent model with its channel partition (paper, section 3.3, Eq. 11 and 12)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from farmer_flow import Transformer
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from farmer_ar.mixture import DiagonalMixture

__all__ = ["LatentPrior"]

Guide = Callable[..., Tensor]
"""See :meth:`LatentPrior.sample`."""

LOG_SCALE_BOUND = 8.0
"""No standard deviation leaves ``exp(-8)..exp(8)``."""

CHUNK_NUMBERS = 2**25
"""How many mixture parameters the informative heads hold at once: 128 MiB in float32."""


class MixtureHead(nn.Module):
    """Map hidden states to mixtures of diagonal Gaussians, and score values under them.

    ``log sigma = 8 tanh(s / 8)`` of the output ``s``, so that no scale overflows or vanishes.
    """

    def __init__(self, width: int, dim: int, components: int) -> None:
        super().__init__()
        self.dim, self.components = dim, components
        self.linear = nn.Linear(width, components * (1 + 2 * dim))

    @property
    def numbers(self) -> int:
        """How many numbers describe one mixture."""
        return self.linear.out_features

    def forward(self, hidden: Tensor, value: Tensor) -> Tensor:
        """Return the log-densities of values ``(*batch, dim)`` under the mixtures of ``(*batch, width)`` hidden states.

        Values share a mixture along a dimension of size 1.
        """
        return self.mixture(hidden).log_prob(value)

    def mixture(self, hidden: Tensor) -> DiagonalMixture:
        """Map ``(*batch, width)`` to mixtures of that batch shape, in float32 or wider."""
        raw = self.linear(hidden)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        logits, loc, log_scale = raw.split([self.components, *[self.components * self.dim] * 2], dim=-1)
        loc, log_scale = (rearrange(p, "... (k d) -> ... k d", k=self.components) for p in (loc, log_scale))
        scale = (LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)).exp()
        return DiagonalMixture(logits, loc, scale, validate_args=False)


class LatentPrior(nn.Module):
    r"""The density of a sequence of latent tokens, given a class.

    The channels are split into informative ones (the first ``informative_dim``) and redundant ones (the rest), and
    no information is lost (FARMER, arXiv 2510.23588, Eq. 11 and 12):

        ``P(Z|c) = prod_i GMM_i(z^I_i | z^I_<i, c)  *  prod_i GMM_{N+1}(z^R_i | Z^I, c)``

    Informative channels are modelled token by token, each with its own mixture of ``components`` Gaussians;
    redundant channels by ONE mixture of ``redundant_components`` Gaussians, shared by all tokens, that has seen the
    whole informative sequence. A causal Transformer reads the class embedding ``condition_repeats`` times, then
    ``z^I_1..z^I_N``: the output at the last condition token predicts token 1, that at ``z^I_i`` token ``i + 1``,
    and that at ``z^I_N`` the shared mixture.

    Args:
        dim: channels of a token.
        length: tokens of a sequence.
        informative_dim: how many channels are informative, 1 to ``dim``; ``dim`` for no partition.
        width: of the Transformer; a multiple of ``head_dim``.
        layers: of the Transformer.
        components: of each informative mixture.
        redundant_components: of the shared mixture; not used where ``informative_dim == dim``.
        classes: number of classes; 0 for an unconditional prior, which accepts labels and does not use them.
        condition_repeats: how often the condition stands before the tokens.
        head_dim: channels of an attention head.

    Raises:
        ValueError: if a size is out of its range.

    Example:
        >>> import torch
        >>> from farmer_ar import LatentPrior
        >>> prior = LatentPrior(6, 16, informative_dim=4, width=64, layers=1, components=3,
        ...                     redundant_components=5, classes=10)
        >>> z = prior.sample(torch.tensor([3, 7, -1]), generator=torch.Generator().manual_seed(0))
        >>> z.shape, prior.log_prob(z, torch.tensor([3, 7, -1])).shape
        (torch.Size([3, 16, 6]), torch.Size([3]))
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        informative_dim: int,
        width: int,
        layers: int,
        components: int,
        redundant_components: int = 1,
        classes: int = 0,
        condition_repeats: int = 1,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        sizes = {
            "dim": dim,
            "length": length,
            "informative_dim": informative_dim,
            "components": components,
            "redundant_components": redundant_components,
            "condition_repeats": condition_repeats,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if informative_dim > dim or classes < 0:
            raise ValueError(
                f"informative_dim must be at most dim={dim} and classes at least 0, "
                f"got informative_dim={informative_dim} and classes={classes}"
            )
        self.dim, self.length, self.informative_dim = dim, length, informative_dim
        self.width, self.layers, self.head_dim = width, layers, head_dim
        self.components, self.redundant_components = components, redundant_components
        self.classes, self.condition_repeats = classes, condition_repeats

        self.condition = nn.Embedding(classes + 1, width)  # the last row: no class
        self.embed = nn.Linear(informative_dim, width)
        # without a partition nothing is predicted from the last token, and it is not read
        self._read = length if informative_dim < dim else length - 1
        self.position = nn.Parameter(torch.randn(condition_repeats + self._read, width) * 0.02)
        self.transformer = Transformer(width, layers, head_dim)
        self.informative = MixtureHead(width, informative_dim, components)
        self.redundant = (
            MixtureHead(width, dim - informative_dim, redundant_components) if informative_dim < dim else None
        )

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the log-density of sequences, in nats, summed over tokens and channels.

        Args:
            z: ``(batch, length, dim)``.
            labels: ``(batch,)`` int64, negative for no class; None for no class at all.

        Returns:
            ``(batch,)``, float32 whatever the autocast (float64 for float64 parameters).

        Raises:
            ValueError: if the latents or the labels have the wrong shape, or a label is out of range. Where gradients
                are enabled on a GPU, which would have to wait to find out, such a label fails a CUDA assertion instead.
        """
        hidden, informative, redundant = self._read_through(z, labels)
        log_prob = self._log_prob_informative(hidden[:, : self.length], informative)
        if self.redundant is not None:
            # of batch shape (batch, 1): one mixture for all tokens
            log_prob = log_prob + self.redundant(hidden[:, -1:], redundant).sum(1)
        return log_prob

    def mixtures(self, z: Tensor, labels: Tensor | None = None) -> tuple[DiagonalMixture, DiagonalMixture | None]:
        """Return the mixtures by which :meth:`log_prob` scores sequences, to look into them.

        Arguments and errors are those of :meth:`log_prob`. All are made at once, unlike there: for the paper's sizes
        16 MB an image.

        Returns:
            Those of the informative channels, of batch shape ``(batch, length)``; and the one of the redundant channels
            that all tokens share, ``(batch, 1)``, or None where all channels are informative.
        """
        hidden, _, _ = self._read_through(z, labels)
        shared = None if self.redundant is None else self.redundant.mixture(hidden[:, -1:])
        return self.informative.mixture(hidden[:, : self.length]), shared

    def _read_through(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states that predict, and the channels that are informative and redundant."""
        if z.ndim != 3 or z.shape[1:] != (self.length, self.dim):
            raise ValueError(f"latents must be (batch, length={self.length}, dim={self.dim}), got {tuple(z.shape)}")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        informative, redundant = z.split([self.informative_dim, self.dim - self.informative_dim], dim=-1)
        tokens = self._embedded(informative[:, : self._read])
        condition = self._condition(labels, z.shape[0])
        hidden = self.transformer(torch.cat([condition, tokens], dim=1) + self.position)
        return hidden[:, self.condition_repeats - 1 :], informative, redundant

    def _log_prob_informative(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Score each token under its own mixture, some tokens at a time where all would take much memory."""
        tokens = max(1, CHUNK_NUMBERS // (self.informative.numbers * max(1, z.shape[0])))
        if tokens >= z.shape[1] or not torch.is_grad_enabled():
            parts = [
                self._log_prob_chunk(h, t) for h, t in zip(hidden.split(tokens, 1), z.split(tokens, 1), strict=True)
            ]
        else:  # the mixtures are made again in the backward pass rather than kept
            parts = [
                checkpoint(self._log_prob_chunk, h, t, use_reentrant=False, preserve_rng_state=False)
                for h, t in zip(hidden.split(tokens, 1), z.split(tokens, 1), strict=True)
            ]
        return torch.stack(parts).sum(0)

    def _log_prob_chunk(self, hidden: Tensor, z: Tensor) -> Tensor:
        scores: Tensor = self.informative(hidden, z)
        return scores.sum(1)

    @torch.no_grad()
    def sample(
        self,
        labels_or_batch: Tensor | int,
        *,
        guide: Guide | None = None,
        redundant_guide: Guide | None = None,
        redundant_scale: float = 1.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw sequences token by token, then all redundant channels at once.

        A guide is called as ``guide(conditional, unconditional, sample_shape)`` with the mixtures given the labels and
        given no class, both of batch shape ``(batch,)``, and returns ``(*sample_shape, batch, dim)``: any callable
        will do, as those of the package farmer-guidance. If it has the parameters ``progress``, the token's position
        from 0 to 1, or ``generator``, it is given them too. The mixtures of both come from one pass of twice the
        batch, unless the guides have an attribute ``uses_unconditional`` that is False, or there are no labels;
        the conditional then stands for both.

        Args:
            labels_or_batch: ``(batch,)`` int64 classes, negative for none; or how many sequences without a class.
            guide: draws the informative channels of a token; a plain draw of the conditional if None.
            redundant_guide: draws the redundant channels, those of all tokens in one call with
                ``sample_shape=(length,)``; likewise.
            redundant_scale: factor on the variances of the shared mixture; changes colour and detail, not
                structure (paper, Figure 7). 0 gives the components' means.
            generator: of random numbers, on the parameters' device.

        Returns:
            ``(batch, length, dim)``.

        Raises:
            ValueError: if the labels have the wrong shape or one is out of range, the factor is negative, or it is 0
                beside a redundant guide, which needs densities.
            FloatingPointError: if the parameters, or what a guide has drawn, lead to mixtures that are not finite.
        """
        if redundant_scale < 0:
            raise ValueError(f"redundant_scale must not be negative, got {redundant_scale}")
        if redundant_scale == 0 and _uses_unconditional(redundant_guide):
            raise ValueError("redundant_scale must be above 0 beside a redundant_guide: at 0 there are no densities")
        labels = None if isinstance(labels_or_batch, int) else labels_or_batch.to(self.position.device)
        batch = labels_or_batch if isinstance(labels_or_batch, int) else labels_or_batch.shape[0]
        contrast = labels is not None and self.classes > 0
        paths = 2 if contrast and any(_uses_unconditional(g) for g in (guide, redundant_guide)) else 1
        draw, draw_redundant = _call(guide), _call(redundant_guide)
        condition = self._condition(labels, batch)
        if paths == 2:
            condition = torch.cat([condition, self._condition(None, batch)])

        cache = self.transformer.new_cache(paths * batch, self.position.shape[0])
        hidden = self.transformer(condition + self.position[: self.condition_repeats], cache)[:, -1:]
        drawn: list[Tensor] = []
        for i in range(self.length):
            mixture = self.informative.mixture(hidden.reshape(paths, batch, -1))
            progress = i / max(1, self.length - 1)
            token = draw(*_paths(mixture), (), progress=progress, generator=generator)
            drawn.append(token.unsqueeze(1))
            if i < self._read:
                embedded = self._embedded(drawn[-1]) + self.position[self.condition_repeats + i]
                hidden = self.transformer(embedded.repeat(paths, 1, 1), cache)
        informative = torch.cat(drawn, dim=1)
        if self.redundant is None:
            return informative
        shared = self.redundant.mixture(hidden.reshape(paths, batch, -1)).temper(scale=math.sqrt(redundant_scale))
        redundant = draw_redundant(*_paths(shared), (self.length,), progress=1.0, generator=generator)
        return torch.cat([informative, redundant.transpose(0, 1)], dim=-1)

    def _embedded(self, informative: Tensor) -> Tensor:
        embedded: Tensor = self.embed(informative.to(self.embed.weight.dtype))
        return embedded

    def _condition(self, labels: Tensor | None, batch: int) -> Tensor:
        """Return the condition's embedding, repeated: ``(batch, condition_repeats, width)``."""
        if labels is None or not self.classes:
            labels = torch.full((batch,), -1, device=self.position.device)
        elif labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(f"labels must be ({batch},) integers, got {tuple(labels.shape)} of {labels.dtype}")
        elif labels.is_cuda and torch.is_grad_enabled():  # a training is not to wait for the GPU here
            torch._assert_async((labels < self.classes).all(), f"labels must be below classes={self.classes}")
        elif not torch.compiler.is_compiling() and batch and int(labels.max()) >= self.classes:
            raise ValueError(f"labels must be below classes={self.classes}, got {int(labels.max())}")
        embedded: Tensor = self.condition(labels.where(labels >= 0, self.classes))
        return embedded.unsqueeze(1).expand(-1, self.condition_repeats, -1)


def _uses_unconditional(guide: Guide | None) -> bool:
    return guide is not None and getattr(guide, "uses_unconditional", True)


def _call(guide: Guide | None) -> Guide:
    """Return a guide that takes both options, whatever it has parameters for; for None a plain conditional draw."""
    if guide is None:
        return lambda conditional, _, shape, *, progress, generator: conditional.sample(shape, generator=generator)
    parameters = inspect.signature(guide).parameters
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = [name for name in ("progress", "generator") if everything or name in parameters]

    def call(
        conditional: DiagonalMixture, unconditional: DiagonalMixture, shape: tuple[int, ...], **options: Any
    ) -> Tensor:
        return guide(conditional, unconditional, shape, **{name: options[name] for name in accepted})

    return call


def _paths(mixture: DiagonalMixture) -> tuple[DiagonalMixture, DiagonalMixture]:
    """Part mixtures ``(paths, batch)`` into the conditional, the first, and the unconditional, the last."""
    if not (mixture.logits.isfinite().all() and mixture.loc.isfinite().all()):
        raise FloatingPointError("a mixture is not finite: the parameters, or what a guide has drawn, have diverged")
    first, last = (
        DiagonalMixture(mixture.logits[path], mixture.loc[path], mixture.scale[path], validate_args=False)
        for path in (0, -1)
    )
    return first, last
