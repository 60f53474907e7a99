"""Whitening: an exact linear change of variables."""

import pytest
import torch
from farmer_flow import Whitening
from torch.distributions import MultivariateNormal, Normal

DIM, LENGTH = 5, 4


@pytest.fixture
def tokens():
    """Correlated channels of very different scales, far from zero."""
    mixing = torch.randn(DIM, DIM, dtype=torch.float64) * torch.tensor([10.0, 1, 1, 0.1, 1e-2])
    return torch.randn(200, LENGTH, DIM, dtype=torch.float64) @ mixing.T + 3


def test_it_gives_mean_zero_and_unit_covariance(tokens):
    whitening = Whitening(DIM).fit(tokens)
    z, _ = whitening(tokens)
    z = z.flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(DIM).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(DIM).double(), atol=1e-6, rtol=0)
    assert (whitening.deviations.diff() <= 0).all()  # the widest direction first


def test_logdet_is_that_of_the_jacobian_and_inverse_undoes_forward(tokens):
    whitening = Whitening(DIM).fit(tokens)
    x = tokens[:1]
    z, logdet = whitening(x)
    size = x.numel()
    jacobian = torch.autograd.functional.jacobian(lambda t: whitening(t)[0], x).reshape(size, size)
    assert abs(logdet - jacobian.slogdet().logabsdet).item() < 1e-8
    torch.testing.assert_close(whitening.inverse(z), x, atol=1e-8, rtol=0)


def test_a_standard_normal_after_it_is_the_fitted_gaussian(tokens):
    """Its density is that of the one Gaussian with the data's mean and covariance."""
    z, logdet = Whitening(DIM).fit(tokens)(tokens)
    flat = tokens.flatten(0, 1)
    expected = MultivariateNormal(flat.mean(0), flat.T.cov()).log_prob(tokens).sum(1)
    torch.testing.assert_close(Normal(0.0, 1.0).log_prob(z).sum((1, 2)) + logdet, expected, rtol=1e-6, atol=1e-6)


def test_a_channel_that_never_changes_stays_invertible(tokens):
    tokens[..., 2] = 7.0
    whitening = Whitening(DIM).fit(tokens)
    z, logdet = whitening(tokens)
    assert logdet.isfinite().all()
    torch.testing.assert_close(whitening.inverse(z), tokens, atol=1e-8, rtol=0)


def test_a_fresh_one_is_the_identity(tokens):
    z, logdet = Whitening(DIM)(tokens)
    assert torch.equal(z, tokens)
    assert torch.equal(logdet, torch.zeros(200).double())


def test_autocast_leaves_it_exact(tokens):
    whitening = Whitening(DIM).fit(tokens)
    x = tokens.float()
    z, logdet = whitening(x)
    back = whitening.inverse(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whitening(x)[0], z)
        assert torch.equal(whitening.inverse(z), back)
    assert z.dtype == logdet.dtype == torch.float32
    assert whitening(x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("convert", ["float", "bfloat16", "half", "double"])
def test_converting_the_module_leaves_it_exact(tokens, convert):
    whitening = Whitening(DIM).fit(tokens)
    expected = whitening(tokens)[0]
    assert torch.equal(getattr(whitening, convert)()(tokens)[0], expected)
    whitening.to("meta").to_empty(device="cpu").load_state_dict(Whitening(DIM).fit(tokens).state_dict())
    assert torch.equal(whitening(tokens)[0], expected)


def test_a_single_channel_can_be_whitened():
    x = torch.randn(50, 3, 1) * 4 + 1
    assert Whitening(1).fit(x)(x)[0].std().item() == pytest.approx(1, abs=1e-5)


def test_saving_and_loading_keeps_the_numbers(tokens):
    whitening, other = Whitening(DIM).fit(tokens), Whitening(DIM)
    other.load_state_dict(whitening.state_dict())
    assert torch.equal(other(tokens)[0], whitening(tokens)[0])


def test_wrong_input_is_named(tokens):
    with pytest.raises(ValueError, match=r"dim=5\), got \(2, 3, 4\)"):
        Whitening(DIM)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="all equal"):
        Whitening(DIM).fit(torch.ones(2, 3, DIM))
    tokens[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Whitening(DIM).fit(tokens)
    with pytest.raises(ValueError, match="at least 1"):
        Whitening(0)
