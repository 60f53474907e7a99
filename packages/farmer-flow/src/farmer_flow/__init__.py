"""Invertible autoregressive flows over sequences of tokens, with exact likelihoods."""

from farmer_flow.flow import AutoregressiveFlow
from farmer_flow.patches import patchify, unpatchify
from farmer_flow.transform import FlowTransform
from farmer_flow.transformer import KVCache, Transformer

__all__ = ["AutoregressiveFlow", "FlowTransform", "KVCache", "Transformer", "patchify", "unpatchify"]
