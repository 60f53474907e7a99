"""FARMER: a flow and a prior composed into a density of images (paper, section 3, Eq. 6)."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from farmer_ar import LatentPrior
from farmer_flow import AutoregressiveFlow, Whitening, patchify, unpatchify
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Generator, Tensor, nn

__all__ = ["BitsPerDim", "Density", "Farmer", "Inverse", "TrainingNoise", "UnknownClassError"]

Inverse = str | Sequence[str] | Callable[[Tensor, Tensor | None], Tensor]
"""How latents become data: a method of the flow, one for each of its blocks, or a function of latents and labels."""

Randomness = Generator | Iterable[Generator] | None
"""Where random numbers come from: a generator, one for each image, or torch's own."""

COMPONENTS: dict[str, type[nn.Module]] = {
    "AutoregressiveFlow": AutoregressiveFlow,
    "LatentPrior": LatentPrior,
}
"""The modules that a config.json may name. Add a class of your own, whose constructor arguments are attributes."""


class UnknownClassError(ValueError):
    """A class that a model does not know."""


class Density(NamedTuple):
    """The two terms of ``log p(x|c)`` (Eq. 6), each ``(batch,)`` float32, in nats."""

    log_prior: Tensor
    """``log p(z|c)``."""
    logdet: Tensor
    """``log|det dz/dx|``. Samples for which it is abnormally large tend to be blurred (paper, Figure 8)."""

    @property
    def log_prob(self) -> Tensor:
        """Return ``log p(x|c)``, ``(batch,)``."""
        return self.log_prior + self.logdet


class BitsPerDim(NamedTuple):
    """Bits per dimension of images, averaged over draws of the dequantisation noise, each ``(batch,)``."""

    mean: Tensor
    standard_error: Tensor
    """Of the mean over the draws; NaN for a single draw."""
    density: Density
    """The averages of the density's two terms over the same draws."""


class TrainingNoise(NamedTuple):
    """The noise added to images in training.

    ``uniform`` spreads every image over its grey level, and the density is then one of discrete images.
    ``gaussian`` has a standard deviation annealed from ``start`` to ``end`` by a cosine (paper, section 2), and the
    density is one of noisy images.
    """

    kind: Literal["uniform", "gaussian"] = "uniform"
    start: float = 0.1
    end: float = 0.005

    def deviation(self, progress: float) -> float:
        """Return the Gaussian's standard deviation after this share, 0 to 1, of the training."""
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def encode_component(module: nn.Module) -> dict[str, Any]:
    """Return the JSON form of a flow or prior: its class and its constructor's arguments."""
    encoded: dict[str, Any] = {"type": type(module).__name__}
    if type(module) not in COMPONENTS.values():
        return encoded  # it can be used, but not saved
    for argument in inspect.signature(type(module)).parameters:
        value = getattr(module, argument)
        encoded[argument] = len(value) if isinstance(value, nn.ModuleList) else value  # a flow's blocks
    return encoded


def decode_component(encoded: dict[str, Any]) -> nn.Module:
    """Build a flow or prior from its JSON form."""
    arguments = dict(encoded)
    name = arguments.pop("type", None)
    if name not in COMPONENTS:
        raise ValueError(f"config.json names the component {name!r}; known: {', '.join(COMPONENTS)}")
    return COMPONENTS[name](**arguments)


class Farmer(
    nn.Module,
    PyTorchModelHubMixin,
    coders={nn.Module: (encode_component, decode_component)},
    library_name="farmer-examples",
    tags=["normalizing-flow", "autoregressive", "image-generation", "likelihood", "arxiv:2510.23588"],
    license="mit",
):
    r"""A flow and a prior, composed into an exact density of images.

    ``log p(x|c) = log p_AR(Z|c) + log|det dZ/dX|`` (FARMER, arXiv 2510.23588, Eq. 6), with ``X`` the image's patches.

    Images are uint8 on the usual scale 0..255, whatever the number of grey levels, or floats in [-1, 1]. Grey level
    ``g`` of ``L`` is the interval ``[2g/L - 1, 2(g+1)/L - 1)`` of the density.

    Args:
        flow: an :class:`~farmer_flow.AutoregressiveFlow`, or any module with its ``forward`` and ``inverse``.
        prior: a :class:`~farmer_ar.LatentPrior`, or any module with its ``log_prob`` and ``sample``.
        image_size: side of the square images in pixels; a multiple of ``patch_size``.
        channels: 1 for grey images, 3 for colour.
        patch_size: side of a patch in pixels: each is one token.
        grey_levels: number of values a pixel can take; 256 for photographs.
        class_names: of the classes, in the order of their labels; empty for a model without classes.
        noise: what the model was trained with, see :class:`TrainingNoise`: kind, start and end.
        final_permute: let the prior read the tokens in the direction opposite to the flow's last block.
        whitening: let a :class:`~farmer_flow.Whitening` of the patches come before the flow, as the flow's first map;
            :meth:`fit_whitening` adapts it to images. The paper has none.

    Raises:
        ValueError: if the sizes of flow, prior and images do not fit together.

    Example:
        >>> import torch
        >>> from farmer_ar import LatentPrior
        >>> from farmer_flow import AutoregressiveFlow
        >>> from farmer_examples import Farmer
        >>> flow = AutoregressiveFlow(4, 16, width=64, blocks=2, layers=1)
        >>> prior = LatentPrior(4, 16, informative_dim=2, width=64, layers=1, components=2, redundant_components=3)
        >>> model = Farmer(flow, prior, image_size=8, channels=1, patch_size=2, grey_levels=17)
        >>> images = model.sample(3, generator=torch.Generator().manual_seed(0))
        >>> images.shape
        torch.Size([3, 1, 8, 8])
        >>> model.bits_per_dim(model.to_uint8(images), draws=4).mean.shape
        torch.Size([3])
    """

    def __init__(
        self,
        flow: nn.Module,
        prior: nn.Module,
        *,
        image_size: int,
        channels: int,
        patch_size: int,
        grey_levels: int = 256,
        class_names: list[str] | None = None,
        noise: list[Any] | None = None,
        final_permute: bool = True,
        whitening: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
        length, dim = (image_size // patch_size) ** 2, channels * patch_size**2
        for name, part in [("flow", flow), ("prior", prior)]:
            if (part.length, part.dim) != (length, dim):
                raise ValueError(
                    f"{channels}x{image_size}x{image_size} images in patches of {patch_size} are {length} tokens "
                    f"of {dim} channels, but the {name} takes {part.length} of {part.dim}"
                )
        if not 2 <= grey_levels <= 256:
            raise ValueError(f"grey_levels must be 2 to 256, got {grey_levels}")
        self.flow, self.prior = flow, prior
        self.whitening = Whitening(dim) if whitening else None
        self.image_size, self.channels, self.patch_size = image_size, channels, patch_size
        self.grey_levels = grey_levels
        self.class_names = list(class_names or [])
        self.noise = TrainingNoise(*(noise or []))
        self.final_permute = final_permute
        last_reversed = getattr(flow.blocks[-1], "reverse", False) if hasattr(flow, "blocks") else False
        self._flip = final_permute and not last_reversed

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Save weights and config.json, each file appearing whole; arguments as in ``PyTorchModelHubMixin``.

        Raises:
            TypeError: if the flow or the prior is of a class that config.json could not name.
        """
        for part in (self.flow, self.prior):
            if type(part) not in COMPONENTS.values():
                name = type(part).__name__
                raise TypeError(f"add {name} to farmer_examples.model.COMPONENTS to save a model that contains it")
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=target) as partial:
            card = {name: options.pop(name) for name in ("config", "model_card_kwargs") if name in options}
            super().save_pretrained(partial, **card)
            for name in ("model.safetensors", "config.json"):
                (Path(partial) / name).replace(target / name)
            if not (target / "README.md").exists():
                (Path(partial) / "README.md").replace(target / "README.md")
        return self.push_to_hub(repo_id or target.name, **card, **options) if push_to_hub else None

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> "Farmer":
        """Refuse weights that lack a parameter, which the mixin would leave as initialised."""
        return super()._from_pretrained(strict=strict, **options)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: channels, height, width."""
        return self.channels, self.image_size, self.image_size

    @property
    def dimensions(self) -> int:
        """The number of dimensions of an image."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Density:
        """Return the density of images as they are, no noise added: see :meth:`log_prob`."""
        z, logdet = self.encode(images, labels)
        return Density(self.prior.log_prob(z, labels), logdet)

    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map images to the latents that the prior reads, ``(batch, length, dim)``, with ``log|det dz/dx|``."""
        tokens, whitening_logdet = self.tokenise(images)
        z, logdet = self.flow(tokens, labels)
        return self.permute(z), logdet + whitening_logdet

    def decode(self, z: Tensor, labels: Tensor | None = None, *, inverse: Inverse = "sequential") -> Tensor:
        """Undo :meth:`encode`; for ``inverse`` see :meth:`sample`."""
        z = self.permute(z)
        if callable(inverse):
            return self.detokenise(inverse(z, labels))
        return self.detokenise(self.flow.inverse(z, labels, method=inverse))

    def tokenise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to the tokens that the flow reads, with the log-determinant, ``(batch,)``, of their whitening."""
        tokens = self._tokens(images)
        if self.whitening is None:
            return tokens, tokens.new_zeros(len(tokens))
        whitened: tuple[Tensor, Tensor] = self.whitening(tokens)
        return whitened

    def detokenise(self, tokens: Tensor) -> Tensor:
        """Undo :meth:`tokenise`."""
        if self.whitening is not None:
            tokens = self.whitening.inverse(tokens)
        return unpatchify(tokens, self.patch_size, self.image_size, self.image_size)

    def permute(self, tokens: Tensor) -> Tensor:
        """Turn the order of the tokens between flow and prior; its own inverse."""
        return tokens.flip(1) if self._flip else tokens

    def fit_whitening(self, images: Tensor) -> None:
        """Fit the whitening to ``(batch, channels, size, size)`` images, noised as in training; before training."""
        if self.whitening is None:
            raise ValueError("this model has no whitening; make it with whitening=True")
        self.whitening.fit(self._tokens(images))

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the continuous log-density ``log p(x|c)`` of images, in nats (Eq. 6).

        Args:
            images: ``(batch, channels, size, size)``: floats are taken as they are, uint8 as the middle of its
                grey level's interval.
            labels: ``(batch,)`` int64, negative for no class; None for no class at all.

        Returns:
            ``(batch,)``.

        Raises:
            ValueError: if images or labels have the wrong shape, or a label is out of range.
        """
        return self(images, labels).log_prob

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        draws: int = 8,
        generator: Randomness = None,
    ) -> BitsPerDim:
        """Return the bits that a code built on the model spends on a dimension of discrete images.

        ``-(E_u[log p(x + u)] + d log(2 / L)) / (d log 2)`` with uniform noise ``u`` over one grey level of ``L``: an
        upper bound of the model's own discrete ``-log2 P(x) / d``, estimated without bias.

        Args:
            images: ``(batch, channels, size, size)``, uint8 or floats in [-1, 1]; taken to their grey levels.
            labels: as in :meth:`log_prob`.
            draws: how many draws of the noise to average over.
            generator: of the noise, on the images' device; or a list of them, one for each image, which makes its score
                independent of the others'.

        Raises:
            ValueError: as :meth:`log_prob`, or if ``draws`` is below 1, or images leave [-1, 1].
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        levels = self.quantise(images)
        densities = [self(self.dequantise(levels, generator=generator), labels) for _ in range(draws)]
        log_prior, logdet = (torch.stack(terms) for terms in zip(*densities, strict=True))
        discrete = log_prior + logdet + self.dimensions * math.log(2 / self.grey_levels)
        bits = -discrete / (self.dimensions * math.log(2))
        error = bits.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(bits[0], math.nan)
        return BitsPerDim(bits.mean(0), error, Density(log_prior.mean(0), logdet.mean(0)))

    def quantise(self, images: Tensor) -> Tensor:
        """Return the grey levels of images, int64 in ``0..L-1``, shaped as they are.

        Raises:
            ValueError: if float images leave [-1, 1] or are not finite, or another type comes than these.
        """
        top = self.grey_levels - 1
        if images.dtype == torch.uint8:
            return (images.double() * top / 255).round().long()
        if not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floats in [-1, 1], got {images.dtype}")
        if images.numel() and not (images.abs() <= 1).all():
            raise ValueError(f"float images must be finite and in [-1, 1], got {images.min():g}..{images.max():g}")
        return ((images.double() + 1) / 2 * self.grey_levels).floor().clamp(0, top).long()

    def dequantise(self, levels: Tensor, *, generator: Randomness = None) -> Tensor:
        """Return grey levels as floats in [-1, 1], uniformly spread over each level's interval."""
        return 2 * (levels + self._drawn(torch.rand, levels, generator)) / self.grey_levels - 1

    def noised(self, images: Tensor, progress: float, *, generator: Randomness = None) -> Tensor:
        """Return uint8 images as training sees them after a share ``progress``, 0 to 1, of its course.

        Several generators, one for each image, make its noise independent of its batch.
        """
        levels = self.quantise(images)
        if self.noise.kind == "uniform":
            return self.dequantise(levels, generator=generator)
        centres = 2 * (levels + 0.5) / self.grey_levels - 1
        return centres + self.noise.deviation(progress) * self._drawn(torch.randn, levels, generator)

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor, generator: Randomness) -> Tensor:
        options = {"dtype": self._dtype, "device": like.device}
        if generator is None or isinstance(generator, Generator):
            return draw(like.shape, generator=generator, **options)
        return torch.stack([draw(like.shape[1:], generator=each, **options) for each in generator])

    def to_uint8(self, images: Tensor) -> Tensor:
        """Return float images in [-1, 1] as uint8 on the scale 0..255, at their grey levels."""
        levels = self.quantise(images.clamp(-1, 1))
        return (levels.double() * 255 / (self.grey_levels - 1)).round().to(torch.uint8)

    @torch.no_grad()
    def sample(
        self,
        labels_or_batch: Tensor | int,
        *,
        inverse: Inverse = "sequential",
        guide: Callable[..., Tensor] | None = None,
        redundant_guide: Callable[..., Tensor] | None = None,
        redundant_scale: float = 1.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw images: latents from the prior, then the flow's inverse.

        Args:
            labels_or_batch: ``(batch,)`` int64 classes, negative for none; or how many images without a class.
            inverse: the flow's method of inversion, see :meth:`farmer_flow.AutoregressiveFlow.inverse`; or a function
                of latents and labels to take its place, such as a :class:`farmer_distill.OneStepInverse`.
            guide: of the prior's informative channels, as :class:`farmer_guidance.ResamplingGuidance`.
            redundant_guide: of its redundant channels; see :meth:`farmer_ar.LatentPrior.sample` for both.
            redundant_scale: factor on the variances of the prior's shared mixture (paper, Figure 7).
            generator: of random numbers, on the parameters' device.

        Returns:
            ``(batch, channels, size, size)``, not clamped: noise may carry values a little out of [-1, 1]. Their
            density is ``model(images, labels)``; :meth:`to_uint8` makes pixels of them.
        """
        z = self.prior.sample(
            labels_or_batch,
            guide=guide,
            redundant_guide=redundant_guide,
            redundant_scale=redundant_scale,
            generator=generator,
        )
        labels = None if isinstance(labels_or_batch, int) else labels_or_batch.to(self.device)
        return self.decode(z, labels, inverse=inverse)

    def every_class(self, count: int) -> Tensor:
        """Return ``(count,)`` labels, all classes by turns; no class where the model has none."""
        labels = torch.arange(count, device=self.device)
        return labels % len(self.class_names) if self.class_names else torch.full_like(labels, -1)

    def label(self, name: str | int) -> int:
        """Return the label of a class given by name or number; -1 for ``"none"``.

        Raises:
            UnknownClassError: if there is no such class, naming those there are.
        """
        text = str(name)
        if text.lower() in {"none", "-1"}:
            return -1
        if text in self.class_names:
            return self.class_names.index(text)
        lowered = [known.lower() for known in self.class_names]
        if lowered.count(text.lower()) == 1:
            return lowered.index(text.lower())
        if text.isdecimal() and int(text) < len(self.class_names):
            return int(text)
        known = ", ".join(self.class_names[:20]) + (", ..." if len(self.class_names) > 20 else "")
        raise UnknownClassError(f"no class {text!r}; known, by name or number: {known or 'no classes at all'}; or none")

    @classmethod
    def load(cls, folder: Path) -> "Farmer":
        """Read a model from a folder of its own, as ``from_pretrained`` does.

        Raises:
            OSError: if it cannot be read, whatever the reason.
        """
        try:
            model: Farmer = cls.from_pretrained(folder)
        except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise OSError(f"the model in {folder} cannot be read: {error}") from error
        return model

    def _tokens(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images must be (batch, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            images = 2 * (self.quantise(images).to(self._dtype) + 0.5) / self.grey_levels - 1
        return patchify(images, self.patch_size)
