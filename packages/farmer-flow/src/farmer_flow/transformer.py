"""The causal pre-norm Transformer behind every block of the flow and behind the prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KVCache", "Transformer"]

FEW_ROWS = 64
"""How many rows are few for :class:`Linear`: up to here it was 1.2 to 2.5 times as fast (widths 192 and 768, AVX2)."""

LARGE_WEIGHT = 2**15
"""How many numbers make a weight large for it: below, the call costs more than the product."""

VAST_WEIGHT = 2**19
"""From here on a single row is multiplied in parts: two threads took 0.4 to 0.8 times as long (widths 512 and 768)."""

PARTS = 16


class KVCache:
    """The keys and values of the tokens that a :class:`Transformer` has read so far.

    An explicit value: make one with :meth:`Transformer.new_cache`, hand it to every call, drop it when done.
    Storage for the whole sequence is allocated once and written in place. Where gradients are needed
    autograd forbids overwriting, so the keys and values are concatenated instead: slower, same numbers.

    Attributes:
        position: how many tokens have been read.
        length: how many fit.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        # (layers, batch, heads, length, head_dim); unbound so that each layer owns one tensor of the list
        self.keys, self.values = list(keys.unbind()), list(values.unbind())
        self.length = keys.shape[3]
        self.position = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new ``(batch, heads, new, head_dim)`` and return all it has so far."""
        start, end = self.position, self.position + keys.shape[2]
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        if torch.is_grad_enabled() and (keys.requires_grad or stored_keys.requires_grad):
            self.keys[layer] = torch.cat([stored_keys[:, :, :start], keys], dim=2)
            self.values[layer] = torch.cat([stored_values[:, :, :start], values], dim=2)
            return self.keys[layer], self.values[layer]
        stored_keys[:, :, start:end] = keys
        stored_values[:, :, start:end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]


class Linear(nn.Linear):
    """A linear map whose weight comes first in the product where a few rows meet a large weight on the CPU.

    That is decoding. ``W x^T`` is ``(x W^T)^T``, but the BLAS of torch's x86 builds takes half the time for it. A
    single row meets a small weight as a vector, and the parts of a vast one in one batched product, since that BLAS
    divides batches among threads, but no product with a vector.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        rows = x.numel() // self.in_features
        # torch.compile has products of its own
        if not 1 <= rows <= FEW_ROWS or not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        # autocast would leave the first in float32, and cast the parts of the second again at every call
        if rows == 1 and not torch.is_autocast_enabled("cpu"):
            if self.weight.numel() < VAST_WEIGHT or self.out_features % PARTS:
                return torch.addmv(self.bias, self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
            weight, bias = self.weight.unflatten(0, (PARTS, -1)), self.bias.view(PARTS, -1, 1)
            column = x.reshape(1, 1, -1).expand(PARTS, -1, -1).mT  # whose strides keep to the fast path
            return torch.baddbmm(bias, weight, column).view(*x.shape[:-1], -1)
        if self.weight.numel() < LARGE_WEIGHT:
            return super().forward(x)
        product = torch.addmm(self.bias.unsqueeze(1), self.weight, x.reshape(-1, self.in_features).T)
        return product.T.reshape(*x.shape[:-1], self.out_features)


class Attention(nn.Module):
    """Causal self-attention with heads of ``head_dim`` channels."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """Map ``(batch, new, width)`` to the same shape, attending to the cache's tokens as well."""
        # (batch, new, 3 heads dim) -> three of (batch, heads, new, dim); einops would slow down decoding, and
        # gradients of parts that are unbound after the transposition would have to be put in order by a copy
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(2, (3, -1, self.head_dim)).unbind(2))
        mask = None
        if cache is not None:
            past, new = cache.position, x.shape[1]
            k, v = cache.append(layer, k, v)
            if past > 0 and new > 1:  # is_causal would align the triangle with the first key, not the last
                mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past)
        causal = mask is None and x.shape[1] > 1
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected


class Layer(nn.Module):
    """One pre-norm layer: attention, then an MLP four times as wide, each added to its input."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, head_dim)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map ``(batch, new, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), cache, layer)
        residual: Tensor = self.mlp(self.mlp_norm(x))
        return x + residual


class Transformer(nn.Module):
    """A causal pre-norm Transformer with a final normalisation, and no embedding of its own.

    Output ``i`` depends on inputs ``0..i`` only. Position and condition are the caller's to add.

    Args:
        width: channels of each token; a multiple of ``head_dim``.
        layers: number of layers.
        head_dim: channels of an attention head.

    Raises:
        ValueError: if ``width`` is not a multiple of ``head_dim``, or ``layers`` is below 1.

    Example:
        >>> import torch
        >>> from farmer_flow import Transformer
        >>> transformer = Transformer(width=64, layers=2, head_dim=32).eval()
        >>> x = torch.randn(1, 5, 64)
        >>> with torch.inference_mode():
        ...     whole = transformer(x)
        ...     cache = transformer.new_cache(batch=1, length=5)
        ...     steps = [transformer(token, cache) for token in x.split(1, dim=1)]
        >>> torch.allclose(whole, torch.cat(steps, dim=1), atol=1e-5)
        True
    """

    def __init__(self, width: int, layers: int, head_dim: int = 64) -> None:
        super().__init__()
        if width % head_dim or width < head_dim:
            raise ValueError(f"width must be a multiple of head_dim, got width={width} and head_dim={head_dim}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.width, self.head_dim = width, head_dim
        self.layers = nn.ModuleList(Layer(width, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Read ``x``, after the tokens in ``cache`` if one is given, and advance the cache past it.

        Args:
            x: ``(batch, new, width)``.
            cache: from :meth:`new_cache`; written in place.

        Returns:
            ``(batch, new, width)``.

        Raises:
            ValueError: if the new tokens do not fit into the cache.
        """
        if cache is not None and cache.position + x.shape[1] > cache.length:
            raise ValueError(
                f"the cache holds {cache.length} tokens and has {cache.position}: no room for {x.shape[1]} more"
            )
        for index, layer in enumerate(self.layers):
            x = layer(x) if cache is None else layer(x, cache, index)  # compiled for one index, or for none
        if cache is not None:
            cache.position += x.shape[1]
        normalised: Tensor = self.norm(x)
        return normalised

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Allocate a cache for ``batch`` sequences of ``length`` tokens, in the precision now in force."""
        weight = self.norm.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        shape = (len(self.layers), batch, self.width // self.head_dim, length, self.head_dim)
        return KVCache(weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype))
