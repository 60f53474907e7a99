"""What is done to a model from outside before it is trained: activation checkpointing, compilation, sharding."""

from __future__ import annotations

import os

from accelerate.utils import FullyShardedDataParallelPlugin
from farmer_distill import InverseBlock
from farmer_flow import AutoregressiveBlock, Transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["checkpoint_activations", "compile_layers", "sharding"]


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


def compile_layers(module: nn.Module) -> None:
    """Compile the layers of every Transformer, in place: all of one shape share one compiled function."""
    for child in module.modules():
        if isinstance(child, Transformer):
            for layer in child.layers:
                layer.compile()


def sharding() -> FullyShardedDataParallelPlugin | None:
    """Return how FSDP is to shard, None where it is not in use; Accelerate's configuration says all but the precision.

    Weights are gathered, and gradients reduced, in float32, and autocast chooses what is computed in bfloat16, as in
    every other layout. Accelerate's own policy would also round the inputs, and with them the log-determinants.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
