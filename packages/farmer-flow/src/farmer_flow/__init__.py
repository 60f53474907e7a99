"""Invertible autoregressive flows over sequences of tokens, with exact likelihoods."""

from farmer_flow.flow import AutoregressiveFlow
from farmer_flow.patches import patchify, unpatchify
from farmer_flow.transform import FlowTransform
from farmer_flow.transformer import KVCache, Transformer
from farmer_flow.whitening import Whitening

__all__ = ["AutoregressiveFlow", "FlowTransform", "KVCache", "Transformer", "Whitening", "patchify", "unpatchify"]
