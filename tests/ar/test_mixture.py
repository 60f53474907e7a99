"""`DiagonalMixture` against torch's own mixture."""

import math

import pytest
import torch
from farmer_ar import DiagonalMixture
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils._python_dispatch import TorchDispatchMode

K, DIM = 4, 3


def parameters(*batch, dtype=torch.float64):
    logits, loc = torch.randn(*batch, K, dtype=dtype), torch.randn(*batch, K, DIM, dtype=dtype)
    return logits, loc, torch.rand(*batch, K, DIM, dtype=dtype) + 0.1


def oracle(logits, loc, scale):
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, scale), 1))


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["own", "one", "expanded"])), max_size=3),
)
def test_log_prob_is_torchs_for_every_way_of_sharing(sample, batch):
    """Parameters may be missing in a dimension, have size 1, or be expanded; the density must not care."""
    full = [size for size, _ in batch]
    stored = [size if kind == "own" else 1 for size, kind in batch]
    shown = [1 if kind == "one" else size for size, kind in batch]
    tensors = parameters(*stored)
    expanded = [p.expand(*shown, *p.shape[len(shown) :]) for p in tensors]
    mixture = DiagonalMixture(*expanded)
    assert mixture.batch_shape == torch.Size(shown)
    value = torch.randn(*sample, *full, DIM, dtype=torch.float64)
    expected = oracle(*(p.expand(*full, *p.shape[len(shown) :]) for p in tensors)).log_prob(value)
    torch.testing.assert_close(mixture.log_prob(value), expected)
    again = DiagonalMixture(*tensors).expand(shown)
    torch.testing.assert_close(again.log_prob(value), expected)


def test_gradients_are_torchs():
    value = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    tensors = [p.requires_grad_() for p in parameters(2, 1)]
    shared = DiagonalMixture(*tensors).log_prob(value).sum()
    plain = oracle(*(p.expand(2, 7, *p.shape[2:]) for p in tensors)).log_prob(value).sum()
    for ours, theirs in zip(
        torch.autograd.grad(shared, [value, *tensors]), torch.autograd.grad(plain, [value, *tensors]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_moments_are_torchs():
    ours, theirs = DiagonalMixture(*(tensors := parameters(5))), oracle(*tensors)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    torch.testing.assert_close(ours.stddev, theirs.stddev)


def test_it_shows_torchs_attributes():
    logits, loc, scale = parameters(5)
    mixture = DiagonalMixture(logits, loc, scale)
    rebuilt = MixtureSameFamily(mixture.mixture_distribution, mixture.component_distribution)
    value = torch.randn(5, DIM, dtype=torch.float64)
    torch.testing.assert_close(rebuilt.log_prob(value), mixture.log_prob(value))


@pytest.mark.parametrize(("centre", "spread"), [(1000, 0), (1000, 1), (0, 1000)])
def test_large_means_and_small_scales_keep_two_decimals(centre, spread):
    """Means of 1000, of one sign and of both, with scales of 1e-3 in float32, shared by 64 values, against float64."""
    loc = (centre + spread * torch.randn(1, 8, 5)).float()
    scale = torch.full((1, 8, 5), 1e-3)
    value = loc[0, torch.arange(64) % 8] + 2e-3 * torch.randn(64, 5)
    logits = torch.randn(1, 8)
    exact = oracle(logits.double(), loc.double(), scale.double()).log_prob(value.double())
    assert exact.abs().max() < 1000
    ours = DiagonalMixture(logits, loc, scale).log_prob(value)
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).abs().max() < 5e-3


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):  # a view has a storage of its base's size
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_shared_mixtures_never_expand():
    """Forward and backward, nothing is larger than the largest of values, parameters and (values, K) scores."""
    batch, length, k, dim = 2, 48, 32, 40
    tensors = [torch.randn(batch, 1, k), torch.randn(batch, 1, k, dim), torch.rand(batch, 1, k, dim) + 0.5]
    tensors = [t.requires_grad_() for t in tensors]
    value = torch.randn(batch, length, dim, requires_grad=True)
    with LargestTensor() as seen:
        DiagonalMixture(*tensors).log_prob(value).sum().backward()
    assert seen.numel <= batch * max(length * dim, k * dim, length * k)
    with LargestTensor() as plain:
        oracle(*(t.expand(batch, length, *t.shape[2:]) for t in tensors)).log_prob(value).sum().backward()
    assert plain.numel >= batch * length * k * dim  # the instrument can see what is to be avoided


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (4, 1), (1, 5)])
def test_sample_shapes(shape, batch):
    mixture = DiagonalMixture(*parameters(*batch))
    assert mixture.sample(shape).shape == (*shape, *batch, DIM)
    if batch:
        expanded = mixture.expand((4, 5) if len(batch) == 2 else (6, 4))
        assert expanded.sample(shape).shape == (*shape, *expanded.batch_shape, DIM)


@pytest.mark.parametrize("form", ["own", "shared", "mixed"])
def test_samples_have_the_mixtures_moments(form):
    """Mean and variance within 5 standard errors: a false alarm in 4,000 runs for the 36 figures, seed fixed."""
    mixture = DiagonalMixture(*parameters(3, dtype=torch.float32)[:3])
    count = 20000
    if form == "own":
        samples = torch.stack([mixture.sample() for _ in range(2000)])
    elif form == "shared":
        samples = mixture.sample((count,))
    else:
        one = DiagonalMixture(mixture.logits[:, None], mixture.loc[:, None], mixture.scale[:, None])
        samples = one.expand((3, count)).sample().transpose(0, 1)
    error = (mixture.variance / len(samples)).sqrt()
    assert ((samples.mean(0) - mixture.mean).abs() < 5 * error).all()
    squares = (samples - mixture.mean).square()
    error = squares.std(0) / math.sqrt(len(samples))
    assert ((squares.mean(0) - mixture.variance).abs() < 5 * error).all()


def test_samples_of_different_owners_come_from_their_own_mixtures():
    loc = torch.arange(6.0).reshape(2, 3)[..., None, None] * 100
    mixture = DiagonalMixture(torch.zeros(2, 3, 1), loc, torch.ones(2, 3, 1, 1))
    samples = mixture.sample((7,))
    torch.testing.assert_close(samples, loc[..., 0, :].expand(7, 2, 3, 1), atol=10, rtol=0)


def test_same_seed_same_samples():
    mixture = DiagonalMixture(*parameters(5))
    draws = [mixture.sample((3,), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_temper():
    logits, loc, scale = parameters(5)
    tempered = DiagonalMixture(logits, loc, scale).temper(weight=0.2, scale=0.9)
    value = torch.randn(5, DIM, dtype=torch.float64)
    torch.testing.assert_close(tempered.log_prob(value), oracle(0.2 * logits, loc, 0.9 * scale).log_prob(value))
    still = DiagonalMixture(logits, loc, scale).temper(scale=0.0).sample((50,))
    assert (still.unsqueeze(-2) == loc).all(-1).any(-1).all()


def test_wrong_shapes_are_named():
    logits, loc, scale = parameters(5)
    with pytest.raises(ValueError, match=r"got \(5, 4\), \(5, 3, 3\)"):
        DiagonalMixture(logits, loc[:, :3], scale)
    with pytest.raises(ValueError, match="constraint"):
        DiagonalMixture(logits, loc, -scale, validate_args=True)  # torch.compile turns the default off
