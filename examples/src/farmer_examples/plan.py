"""What a training will take, found without computing it: memory, the batch that fits, and days."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import farmer_ar.prior
import torch
from farmer_flow import Transformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from farmer_examples.config import Config
from farmer_examples.model import Farmer
from farmer_examples.parallel import checkpoint_activations

__all__ = ["DEVICES", "Device", "Memory", "Plan", "Rehearsal", "Step", "Way", "bounds", "fixed_memory", "plan"]

GIB = 2**30
FLOAT = 4
CPU = torch.device("cpu")

USABLE = 0.9
"""The share of a device's memory to fill: the rest is for its context, for workspaces and for fragmentation."""


class Device(NamedTuple):
    """One GPU: its memory in GiB, and its rate of dense matrix products in bfloat16 in TFLOP/s."""

    memory: float
    rate: float


DEVICES = {
    "a100": Device(80, 312),
    "h100": Device(80, 989),
    "h200": Device(141, 989),
    "b200": Device(180, 2250),
}
"""The SXM forms, without sparsity, from NVIDIA's data sheets of the A100 80GB, the H100, the H200 and the HGX B200."""


class Step(NamedTuple):
    """What a training step takes: FLOPs, and the most bytes held in each of its parts, beside weights and gradients."""

    flops: float
    forward: float
    mixtures_backward: float
    prior_backward: float
    flow_backward: float

    @property
    def peak(self) -> float:
        """The most bytes held at a time."""
        return max(self[1:])


class Way(NamedTuple):
    """A training that keeps its activations, or one that computes them again."""

    flops: float
    """For an image; attention counts as if it were not causal."""
    activations: float
    """Bytes an image, about the largest batch."""
    held: float
    """Bytes for the images that the configuration lets a GPU compute at once, with weights in bfloat16 and the like."""
    batch: int
    """The most images that a GPU can compute at once; 0 if there is no room for one."""
    speed: float
    """Images a second, on all GPUs."""
    days: float
    """For all images of the training."""


class Memory(NamedTuple):
    """What a GPU holds whatever it computes, in bytes."""

    weights: float
    gradients: float
    optimiser: float
    average: float
    exchanged: float
    """With other GPUs: weights that are gathered, and gradients that are to be reduced."""


class Plan(NamedTuple):
    """What a training takes."""

    device: Device
    gpus: int
    images: int
    """That the training sees, over all its steps and GPUs."""
    at_once: int
    """Images that a GPU computes at once as configured."""
    tokens: int
    """Of an image."""
    flow: int
    """Parameters, as those of the prior."""
    prior: int
    memory: Memory
    kept: Way
    """With the activations kept."""
    recomputed: Way
    """With activation checkpointing."""

    def table(self) -> str:
        """Return the plan as text."""
        once = [
            ("parameters of the flow", f"{self.flow / 1e6:,.1f} M"),
            ("parameters of the prior", f"{self.prior / 1e6:,.1f} M"),
            ("parameters", f"{(self.flow + self.prior) / 1e6:,.1f} M"),
            ("tokens an image", f"{self.tokens:,}"),
            ("images in all", f"{self.images / 1e6:,.1f} M"),
            ("", ""),
            (f"on each GPU, of {self.device.memory:g} GiB", "GiB"),
            *((name, f"{size / GIB:,.2f}") for name, size in self.memory._asdict().items()),
            ("all of these", f"{sum(self.memory) / GIB:,.2f}"),
            ("", ""),
        ]
        ways = (self.kept, self.recomputed)
        both = [
            ("activations", ["kept", "recomputed"]),
            ("GFLOP an image", [f"{way.flops / 1e9:,.1f}" for way in ways]),
            ("GiB an image", [f"{way.activations / GIB:,.4f}" for way in ways]),
            (f"GiB for {self.at_once:,} images at once", [f"{way.held / GIB:,.2f}" for way in ways]),
            ("GiB with all of the above", [f"{(sum(self.memory) + way.held) / GIB:,.2f}" for way in ways]),
            ("images at once on a GPU, at most", [f"{way.batch:,}" if way.batch else "none" for way in ways]),
            (f"images/s on {self.gpus} GPU{'s' * (self.gpus > 1)}", [f"{way.speed:,.1f}" for way in ways]),
            ("days", [f"{way.days:,.2f}" for way in ways]),
        ]
        lines = [f"{name:34}{value:>12}" for name, value in once]
        lines += [f"{name:34}{''.join(f'{value:>12}' for value in values)}" for name, values in both]
        return "\n".join(line.rstrip() for line in lines)


def plan(
    config: Config,
    device: Device,
    *,
    gpus: int = 1,
    sharded: bool = False,
    utilisation: float = 0.4,
    dtype: torch.dtype = torch.bfloat16,
    classes: int = 1000,
) -> Plan:
    """Find what a training takes.

    Gradients count in full beside the activations, as they are from the second accumulated part of a batch on.

    Args:
        config: of the training.
        device: each of the GPUs.
        gpus: how many there are.
        sharded: divide weights, gradients, optimiser and average among them (FSDP), in place of a copy on each (DDP).
        utilisation: the share of the device's rate that is reached.
        dtype: of matrix products.
        classes: how many there are where the configuration does not name them.

    Raises:
        ConfigError: if the GPUs cannot have equal shares of a batch.
    """
    names = config.data.class_names or [str(label) for label in range(classes)]
    with torch.device("meta"):
        model = config.build(names)
    memory = fixed_memory(config, model, gpus, sharded=sharded)
    room = USABLE * device.memory * GIB - sum(memory)
    images, rate = config.training.steps * config.training.batch_size, gpus * device.rate * 1e12 * utilisation
    at_once = config.training.batch_size // (gpus * config.training.parts(gpus))
    mixtures = max(1, farmer_ar.prior.CHUNK_NUMBERS // model.prior.informative.numbers)
    kept, recomputed = (
        bounds(Rehearsal(config, names, dtype, checkpointing=checkpointing), mixtures, room, at_once, images, rate)
        for checkpointing in (False, True)
    )
    flow, prior = _numbers(model.flow), _numbers(model.prior)
    return Plan(device, gpus, images, at_once, config.length, flow, prior, memory, kept, recomputed)


def fixed_memory(config: Config, model: Farmer, gpus: int, *, sharded: bool) -> Memory:
    """Return what each GPU holds whatever it computes; arguments and errors are those of :func:`plan`."""
    size = FLOAT * _numbers(model)
    weights = size / gpus if sharded else size
    # the parts of a batch are accumulated on each GPU before they are reduced to its share
    gradients = weights if config.training.parts(gpus) == 1 else size
    exchanged = 0 if gpus == 1 else _gathered(model) if sharded else size  # DDP's buckets are copies of the gradients
    return Memory(weights, gradients, 2 * weights, weights if config.training.ema_decay else 0, exchanged)


def _gathered(model: Farmer) -> int:
    """Return the bytes that FSDP has whole, weights and gradients: two layers, and all that is in no layer."""
    layers = [_numbers(layer) for part in model.modules() if isinstance(part, Transformer) for layer in part.layers]
    return 2 * FLOAT * (_numbers(model) - sum(layers) + 2 * max(layers))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bounds(rehearsal: Rehearsal, mixtures: int, room: float, at_once: int, images: int, rate: float) -> Way:
    """Bound what a batch takes in each part of a step by a line through two batches.

    The prior makes so many ``mixtures`` at a time, or one for every image. Both batches have more, and all but as many
    at a time, so that larger ones take no more for them until they are a token each. Where such do not fit, the line
    goes through batches whose mixtures are made at once.
    """
    whole = mixtures // rehearsal.length
    few, many = (
        max(range(least, 2 * least), key=lambda batch: mixtures // batch * batch)
        for least in (2 * (whole + 1), 4 * (whole + 1))
    )
    first = rehearsal.step(few)
    in_parts = first.peak <= room
    if not in_parts:
        few, many = 1, max(2, whole)
        first = rehearsal.step(few)
    flops, *slopes = ((b - a) / (many - few) for a, b in zip(first, rehearsal.step(many), strict=True))
    lines = [(slope, held - few * slope) for held, slope in zip(first[1:], slopes, strict=True)]
    lasting = mixtures if mixtures >= many else math.inf
    fits, activations = min(((room - working) / slope, slope) for slope, working in lines)
    if fits > lasting:
        activations = max(slope + working / lasting for slope, working in lines)
        fits = room / activations
    if in_parts and at_once > whole:
        held = max(working * max(1, at_once / lasting) + at_once * slope for slope, working in lines)
    else:
        held = rehearsal.step(at_once).peak
    return Way(flops, activations, held, max(0, int(fits)), speed=rate / flops, days=images * flops / rate / 86400)


class Rehearsal:
    """Runs training steps of a model on tensors without numbers.

    They say that they are on the CPU, whose fused attention keeps what that of a GPU does, and whose autocast casts
    alike. Two shallow flows stand for a deep one: each part of a step takes most in the last block or behind it, where
    all blocks hold the same, so that is affine in their number. It stays odd or even, for the last block's direction.
    """

    def __init__(self, config: Config, class_names: list[str], dtype: torch.dtype, *, checkpointing: bool) -> None:
        self.dtype, self.length, self.mode = dtype, config.length, FakeTensorMode()
        self.blocks, fewer = config.model.flow.blocks, 2 + config.model.flow.blocks % 2
        depths = (fewer, fewer + 2) if self.blocks > fewer + 2 else (self.blocks,)
        self.models = {blocks: self._build(config, blocks, class_names, checkpointing) for blocks in depths}

    def step(self, batch: int) -> Step:
        """Return what a step with so many images takes."""
        (fewer, shallow), *deeper = ((blocks, self._step(model, batch)) for blocks, model in self.models.items())
        for more, deep in deeper:
            share = (self.blocks - fewer) / (more - fewer)
            return Step(*(a + (b - a) * share for a, b in zip(shallow, deep, strict=True)))
        return shallow

    def _build(self, config: Config, blocks: int, class_names: list[str], checkpointing: bool) -> Farmer:
        flow = config.model.flow.model_copy(update={"blocks": blocks})
        shallow = config.model.model_copy(update={"flow": flow})
        with self.mode:
            model = config.model_copy(update={"model": shallow}).build(class_names)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        if checkpointing:
            checkpoint_activations(model)
        for part in (model.flow, model.prior.transformer):
            part.register_forward_hook(self._mark)
        return model

    def _mark(self, part: nn.Module, inputs: Any, outputs: Any) -> None:
        """Let the backward pass take a new turn when it comes to this part."""
        (outputs[0] if isinstance(outputs, tuple) else outputs).register_hook(self._turn)

    def _turn(self, gradient: Tensor | None = None) -> None:
        self.peaks.append(self.account.peak)
        self.account.peak = self.account.held

    def _step(self, model: Farmer, batch: int) -> Step:
        gradients = [parameter.grad for parameter in model.parameters()]
        self.peaks: list[int] = []
        self.account = _Account([*model.parameters(), *gradients, *model.buffers()])
        with self.mode, self.account:
            images = torch.empty(batch, *model.shape)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                loss = -model(images).log_prob.mean() / model.dimensions
            self._turn()
            loss.backward()
            self._turn()
        return Step(self.account.flops, *self.peaks)


class _Account(TorchDispatchMode):
    """Counts operations, and the bytes of what they make for as long as anything holds it.

    Args:
        owned: tensors that are not to count.
    """

    formulas: dict[Any, Any] = {  # noqa: RUF012  torch's own lack the attention of the CPU
        **flop_registry,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
        ),
    }

    def __init__(self, owned: list[Any]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in owned}
        self.held = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two calls of three, and slow below
            return CPU
        made = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return made

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._strike, key, size)

    def _strike(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size
