"""What is done to a model from outside before it is trained: activation checkpointing, compilation, sharding."""

from __future__ import annotations

import os

from accelerate.utils import FullyShardedDataParallelPlugin
from farmer_ar import LatentPrior
from farmer_distill import InverseBlock
from farmer_flow import AutoregressiveBlock, Transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["checkpoint_activations", "compile_parts", "sharding"]


def checkpoint_activations(module: nn.Module) -> None:
    """Let backward passes compute activations anew, a block of a flow or student at a time, or else a layer.

    What is kept is the input of every block and layer. Names in state dicts stay as they are.
    """
    for name, child in module.named_children():
        if isinstance(child, AutoregressiveBlock | InverseBlock):
            setattr(module, name, checkpoint_wrapper(child, preserve_rng_state=False))
        elif isinstance(child, Transformer):
            child.layers = nn.ModuleList(checkpoint_wrapper(layer, preserve_rng_state=False) for layer in child.layers)
        else:
            checkpoint_activations(child)


def compile_parts(module: nn.Module, *, whole_blocks: bool = True) -> None:
    """Compile, in place, the parts that a model has many of, so that all of one kind share compiled functions.

    Those are the blocks of a flow or student, the layers of a prior, and the head of its informative mixtures. Each
    shape has a function of its own: a checkpoint must compute again by the function that it has run before, which one
    for all sizes might replace meanwhile.

    Args:
        module: anything that contains such; its blocks and layers may be checkpointed already.
        whole_blocks: compile the layers of a block one by one if False, which FSDP needs: it gathers each for itself.
    """
    for child in module.children():
        inner = getattr(child, "_checkpoint_wrapped_module", child)
        if whole_blocks and isinstance(inner, AutoregressiveBlock | InverseBlock):
            child.compile(dynamic=False)
            continue
        if isinstance(inner, LatentPrior):
            inner.informative.compile(dynamic=False)
        if isinstance(inner, Transformer):
            for layer in inner.layers:
                layer.compile(dynamic=False)
        else:
            compile_parts(child, whole_blocks=whole_blocks)


def sharding() -> FullyShardedDataParallelPlugin | None:
    """Return how FSDP is to shard, None where it is not in use; Accelerate's configuration says all but the precision.

    Weights are gathered, and gradients reduced, in float32, and autocast chooses what is computed in bfloat16, as in
    every other layout. Accelerate's own policy would also round the inputs, and with them the log-determinants.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
