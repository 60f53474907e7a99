"""A fixed linear map that gives tokens mean zero and unit covariance before a flow reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Whitening"]

LEAST_VARIANCE = 1e-8
"""No direction counts as narrower than this share of the widest one's variance."""


class Whitening(nn.Module):
    r"""An invertible linear map of each token's channels, fitted to data once and then fixed.

    ``z_i = Q^T (x_i - m) / s``, with ``m`` the mean of the tokens, ``Q`` the orthonormal eigenvectors of their
    covariance and ``s`` the roots of its eigenvalues, widest first; ``log|det dz/dx| = -length * sum log s``. The
    fitted tokens get mean zero and unit covariance (principal component analysis).

    The affine blocks of an autoregressive flow treat the channels of a token as independent given the tokens before
    it, and learn scales by small steps. Neighbouring pixels are neither independent nor of unit scale: a flow that
    reads whitened patches starts from the best Gaussian model of single patches instead of from raw pixels.
    The widest directions come first, so that a prior's first channels are the ones with most variance.

    Forward and inverse have the form of a flow's. They are computed in float64, which keeps autocast and TF32 away from
    them, and stays when the module is converted to another precision. A fresh one is the identity.

    Args:
        dim: channels of a token.

    Example:
        >>> import torch
        >>> from farmer_flow import Whitening
        >>> x = torch.randn(64, 16, 3) @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0.1]]) + 5
        >>> whitening = Whitening(3).fit(x)
        >>> z, logdet = whitening(x)
        >>> torch.allclose(z.flatten(0, 1).T.cov(), torch.eye(3), atol=1e-4)
        True
        >>> logdet.shape, torch.allclose(whitening.inverse(z), x, atol=1e-5)
        (torch.Size([64]), True)
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("directions", torch.eye(dim, dtype=torch.float64))  # one a column
        self.register_buffer("deviations", torch.ones(dim, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, x: Tensor) -> Whitening:
        """Take mean and covariance from tokens, and return the module itself.

        Args:
            x: ``(batch, length, dim)``: many more tokens than channels, with the noise that the flow will see.

        Raises:
            ValueError: if the shape is wrong, a value is not finite, or all tokens are equal.
        """
        tokens = self._checked(x).flatten(0, 1)
        if len(tokens) < 2 or not tokens.isfinite().all():
            raise ValueError(f"expected at least 2 tokens, all finite, got {len(tokens)}")
        variances, directions = torch.linalg.eigh(tokens.T.cov().reshape(self.dim, self.dim))  # narrowest first
        widest = variances[-1]
        if widest <= 0:
            raise ValueError("tokens that are all equal cannot be whitened")
        self.mean.copy_(tokens.mean(0))
        self.directions.copy_(directions.flip(1))
        self.deviations.copy_(variances.flip(0).clamp_min(LEAST_VARIANCE * widest).sqrt())
        return self

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten tokens.

        Args:
            x: ``(batch, length, dim)``.
            labels: not used; every flow takes them.

        Returns:
            ``z``, shaped as ``x``, and ``log|det dz/dx|`` in nats, ``(batch,)``, both in ``x``'s precision, but at
            least float32.

        Raises:
            ValueError: if the tokens have the wrong shape.
        """
        z = (self._checked(x) - self.mean) @ self.directions / self.deviations
        logdet = -x.shape[1] * self.deviations.log().sum()
        return z.to(_precision(x)), logdet.to(_precision(x)).expand(x.shape[0])

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Undo :meth:`forward`: ``x_i = Q (s z_i) + m``, both ``(batch, length, dim)``."""
        x = (self._checked(z) * self.deviations) @ self.directions.mT + self.mean
        return x.to(_precision(z))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Whitening:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for name, buffer in exact.items():  # moved, but not rounded
            device = getattr(self, name).device
            moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            setattr(self, name, moved)
        return self

    def _checked(self, tokens: Tensor) -> Tensor:
        """Return the tokens in float64, or say what is wrong with them."""
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f"tokens must be (batch, length, dim={self.dim}), got {tuple(tokens.shape)}")
        return tokens.double()


def _precision(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)
