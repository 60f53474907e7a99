"""Invertible autoregressive flows over sequences of tokens, with exact likelihoods."""

from farmer_flow.flow import AutoregressiveBlock, AutoregressiveFlow, check_tokens
from farmer_flow.inversion import BlockInversion, Inversion
from farmer_flow.patches import patchify, unpatchify
from farmer_flow.transform import FlowTransform
from farmer_flow.transformer import KVCache, Transformer
from farmer_flow.whitening import Whitening

__all__ = [
    "AutoregressiveBlock",
    "AutoregressiveFlow",
    "BlockInversion",
    "FlowTransform",
    "Inversion",
    "KVCache",
    "Transformer",
    "Whitening",
    "check_tokens",
    "patchify",
    "unpatchify",
]
