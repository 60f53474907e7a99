"""Cached decoding equals the uncached pass, and costs one token a token."""

import shutil

import pytest
import torch
from farmer_flow import Transformer
from farmer_flow.transformer import FEW_ROWS, LARGE_WEIGHT, VAST_WEIGHT, Linear
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def transformer(disturb):
    return disturb(Transformer(16, 2, head_dim=8)).double()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_any_division_into_chunks_gives_the_whole(chunks):
    transformer = Transformer(16, 2, head_dim=8).double()
    x = torch.randn(2, sum(chunks), 16, dtype=torch.float64)
    with torch.inference_mode():
        cache = transformer.new_cache(2, sum(chunks))
        parts = [transformer(part, cache) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x))
    assert cache.position == sum(chunks)


def test_cached_gradients_are_those_of_the_whole(transformer):
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 16, dtype=torch.float64)
    (expected,) = torch.autograd.grad((transformer(x) * weights).sum(), x)
    cache = transformer.new_cache(2, 5)
    steps = torch.cat([transformer(token, cache) for token in x.split(1, dim=1)], dim=1)
    (cached,) = torch.autograd.grad((steps * weights).sum(), x)
    torch.testing.assert_close(cached, expected)


def test_decoding_reads_each_token_once_and_never_reallocates(transformer):
    read = []
    transformer.layers[0].register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))
    with torch.inference_mode():
        cache = transformer.new_cache(1, 6)
        storage = [keys.data_ptr() for keys in cache.keys]
        for token in torch.randn(1, 6, 16, dtype=torch.float64).split(1, dim=1):
            transformer(token, cache)
    assert read == [1] * 6
    assert [keys.data_ptr() for keys in cache.keys] == storage


def test_a_full_cache_is_refused_and_left_as_it_was(transformer):
    with torch.inference_mode():
        cache = transformer.new_cache(1, 3)
        transformer(torch.randn(1, 2, 16, dtype=torch.float64), cache)
        with pytest.raises(ValueError, match="holds 3 tokens and has 2: no room for 2 more"):
            transformer(torch.randn(1, 2, 16, dtype=torch.float64), cache)
    assert cache.position == 2


def test_cache_takes_the_precision_in_force(transformer):
    transformer = transformer.float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cache = transformer.new_cache(1, 3)
        assert cache.keys[0].dtype == torch.bfloat16
        transformer(torch.randn(1, 3, 16), cache)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_decoding_gives_the_same(transformer):
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    compiled = torch.compile(transformer)
    with torch.inference_mode():
        cache = transformer.new_cache(1, 4)
        steps = [compiled(token, cache) for token in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), transformer(x))


@pytest.mark.parametrize("rows", [0, 1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("features", [(8, 16), (128, LARGE_WEIGHT // 128), (512, VAST_WEIGHT // 512)])
def test_few_rows_give_what_many_do(rows, features):
    """Whatever the weight's strides, and in bfloat16 to its rounding."""
    linear = Linear(*features).double()
    x = torch.randn(rows, 1, features[0], dtype=torch.float64)
    with torch.no_grad():
        drawn = linear(x)
        assert drawn.shape == (rows, 1, features[1])
        torch.testing.assert_close(drawn, torch.nn.functional.linear(x, linear.weight, linear.bias))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = linear.float()(x.float())
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.double(), drawn, atol=0.05, rtol=0.05)
        linear.double()
        linear.weight.data = linear.weight.data.T.contiguous().T
        torch.testing.assert_close(linear(x), drawn, atol=1e-6, rtol=1e-6)
