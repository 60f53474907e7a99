"""Patches lose nothing."""

import pytest
import torch
from farmer_flow import patchify, unpatchify
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_undoes_patchify(channels, patch, rows, columns):
    images = torch.randn(2, channels, rows * patch, columns * patch)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, rows * columns, channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch, rows * patch, columns * patch), images)


def test_tokens_are_patches_in_raster_order():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert patchify(images, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="got 3 for 4x4 images"):
        patchify(torch.zeros(1, 1, 4, 4), 3)
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\), got \(4, 4\)"):
        patchify(torch.zeros(4, 4), 2)
    with pytest.raises(ValueError, match=r"got \(1, 4, 3\)"):
        unpatchify(torch.zeros(1, 4, 3), 2, 4, 4)
