"""Component guidance against the mixture of guided Gaussians that it draws from."""

import pytest
import torch
from farmer_ar import DiagonalMixture
from farmer_guidance import ComponentGuidance, LinearSchedule
from scipy.stats import kstest
from torch.distributions import Categorical, Gamma, Independent, MixtureSameFamily, Normal

LOGITS, LOC, SCALE = torch.tensor([0.3, -0.4]), torch.tensor([-1.0, 2.0]), torch.tensor([0.6, 0.9])
OTHER_LOC, OTHER_SCALE = torch.tensor([0.0, 0.5]), torch.tensor([1.2, 1.0])


def generator():
    return torch.Generator().manual_seed(0)


def pair():
    return (
        MixtureSameFamily(Categorical(logits=LOGITS), Normal(LOC, SCALE)),
        MixtureSameFamily(Categorical(logits=torch.zeros(2)), Normal(OTHER_LOC, OTHER_SCALE)),
    )


def guided(scale, weight=1.0, factor=1.0):
    """Eq. 15 for each component: precisions and precision-weighted means add up with exponents 1 + w and -w."""
    own, other = (factor * SCALE.double()) ** -2, (factor * OTHER_SCALE.double()) ** -2
    precision = (1 + scale) * own - scale * other
    mean = ((1 + scale) * own * LOC - scale * other * OTHER_LOC) / precision
    return MixtureSameFamily(Categorical(logits=weight * LOGITS), Normal(mean, precision**-0.5))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, torch.tensor(1.5)])
@pytest.mark.parametrize("temperatures", [{}, {"weight_temperature": 2.0, "scale_temperature": 0.5}])
def test_it_draws_from_the_mixture_of_guided_components(scale, temperatures):
    """Kolmogorov and Smirnov's test of 5,000 draws at level 1e-6; it also sees that the scale matters."""
    draws = ComponentGuidance(scale, **temperatures)(*pair(), (5000,), generator=generator()).double()
    settings = temperatures.get("weight_temperature", 1.0), temperatures.get("scale_temperature", 1.0)

    def p_value(expected):
        return kstest(draws.numpy(), lambda value: expected.cdf(torch.from_numpy(value)).numpy()).pvalue

    assert p_value(guided(scale, *settings)) > 1e-6
    assert p_value(guided(scale + 0.5, *settings)) < 1e-6


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (5,), (5, 1)])
def test_shapes_and_forms(shape, batch):
    """torch's mixture and ours, same seed, same draws; vectors, batches, and a scale for each element."""
    parameters = [(torch.randn(*batch, 3), torch.randn(*batch, 3, 2), torch.rand(*batch, 3, 2) + 0.2) for _ in range(2)]
    torchs = [MixtureSameFamily(Categorical(logits=w), Independent(Normal(m, s), 1)) for w, m, s in parameters]
    ours = [DiagonalMixture(*p) for p in parameters]
    guide = ComponentGuidance(torch.full(batch, 1.5))
    first, second = (guide(*mixtures, shape, generator=generator()) for mixtures in (torchs, ours))
    assert first.shape == (*shape, *batch, 2)
    torch.testing.assert_close(first, second)
    constant = ComponentGuidance(LinearSchedule(0.0, 1.5))(*ours, shape, progress=1.0, generator=generator())
    torch.testing.assert_close(constant, second)


def test_a_channel_without_a_guided_density_is_drawn_from_the_conditional():
    conditional = Independent(Normal(torch.zeros(2), 1.0), 1)
    unconditional = Independent(Normal(torch.tensor([5.0, 5.0]), torch.tensor([0.5, 2.0])), 1)
    draws = ComponentGuidance(1.0)(conditional, unconditional, (5000,), generator=generator())
    assert kstest(draws[:, 0].numpy(), "norm").pvalue > 1e-6
    assert draws[:, 1].mean() < -0.5


def test_scale_zero_is_the_plain_conditional():
    conditional, unconditional = pair()
    torch.manual_seed(1)
    expected = conditional.sample((9,))
    torch.manual_seed(1)
    assert torch.equal(ComponentGuidance(0.0)(conditional, unconditional, (9,)), expected)
    assert not ComponentGuidance(0.0).uses_unconditional
    assert ComponentGuidance(1.0).uses_unconditional


def test_what_it_refuses():
    conditional, _ = pair()
    with pytest.raises(TypeError, match="needs diagonal Gaussians or mixtures of them, got Gamma and Gamma"):
        ComponentGuidance(1.0)(Gamma(torch.tensor(1.0), 1.0), Gamma(torch.tensor(1.0), 1.0))
    with pytest.raises(ValueError, match="needs as many in both, got 2 and 1"):
        ComponentGuidance(1.0)(conditional, Normal(torch.tensor(0.0), 1.0))
    with pytest.raises(ValueError, match="same batch shape"):
        ComponentGuidance(1.0)(Normal(torch.zeros(2), 1.0), Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="does not broadcast"):
        ComponentGuidance(torch.ones(3))(Normal(torch.zeros(2), 1.0), Normal(torch.zeros(2), 1.0))
    for settings in (
        {"scale": -1.0},
        {"scale": 1.0, "weight_temperature": 0.0},
        {"scale": 1.0, "scale_temperature": -1},
    ):
        with pytest.raises(ValueError, match="must be finite and"):
            ComponentGuidance(**settings)
