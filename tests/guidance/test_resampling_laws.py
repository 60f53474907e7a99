"""The laws of guidance by resampling: paper, Eq. 15, Algorithm 1 and A.2.

Draws are compared with quadrature by Pearson's statistic over 24 bins of equal probability under the target. Its
threshold is the 1 - 1e-6 quantile of the chi-squared law: a false alarm in a million runs a case if the draws were of
the target itself. What bias the candidates leave raises the rate, and the seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from farmer_ar import DiagonalMixture
from farmer_guidance import PRESETS, ComponentGuidance, CosineSchedule, LinearSchedule, ResamplingGuidance
from farmer_guidance.distributions import log_density
from scipy.stats import chi2
from torch.distributions import (
    Categorical,
    Distribution,
    Exponential,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    Weibull,
    constraints,
)

BINS = 24
THRESHOLD = chi2.isf(1e-6, BINS - 1)
GRID = torch.linspace(-12, 12, 48001, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(logits, loc, scale, dtype=torch.float32):
    weights, loc, scale = (torch.tensor(p, dtype=dtype) for p in (logits, loc, scale))
    return MixtureSameFamily(Categorical(logits=weights), Normal(loc, scale))


def pair(dtype=torch.float32):
    return (
        mixture([0.0, 0.5], [-1.0, 1.5], [0.5, 0.8], dtype),
        mixture([0.4, 0.0, 0.0], [-2.0, 0.0, 1.0], [1.0, 1.5, 0.9], dtype),
    )


def target(conditional, unconditional, scale):
    """Return log p' on the grid, unnormalised."""
    log_c, log_u = (p.log_prob(GRID) for p in (conditional, unconditional))
    return (1 + scale) * log_c - scale * log_u


def statistic(draws, log_density):
    """Pearson's statistic of one-dimensional draws against a log-density on the grid."""
    cumulative = (log_density - log_density.max()).exp().cumsum(0)
    cumulative /= cumulative[-1].clone()
    position = torch.searchsorted(GRID, draws.double().clamp(-12, 12)).clamp(max=len(GRID) - 1)
    counts = torch.bincount((cumulative[position] * BINS).long().clamp(max=BINS - 1), minlength=BINS)
    expected = len(draws) / BINS
    return ((counts - expected).square() / expected).sum().item()


WEIGHTINGS = ["balance", "per-proposal"]


def guidance(scale, candidates=128, **changes):
    counts = {"conditional_candidates": candidates, "unconditional_candidates": candidates}
    return ResamplingGuidance(scale, **{**counts, **changes})


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_draws_converge_to_the_guided_density(weighting, scale):
    """256 candidates pass; of 2 the same statistic sees that they do not suffice."""
    conditional, unconditional = pair()
    guide = guidance(scale, weighting=weighting)
    draws = guide(conditional, unconditional, (6000,), generator=generator())
    log_density = target(conditional, unconditional, scale)
    assert statistic(draws, log_density) < THRESHOLD
    few = guidance(scale, 1, weighting=weighting)(conditional, unconditional, (6000,), generator=generator())
    assert statistic(few, log_density) > 2 * THRESHOLD


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("counts", [(512, 0), (0, 512), (500, 12)])
def test_either_proposal_may_stand_alone(weighting, counts):
    conditional, unconditional = pair()
    guide = ResamplingGuidance(
        1.0, conditional_candidates=counts[0], unconditional_candidates=counts[1], weighting=weighting
    )
    drawn = guide.draw(conditional, unconditional, (6000,), generator=generator())
    assert statistic(drawn.sample, target(conditional, unconditional, 1.0)) < THRESHOLD
    if not all(counts):
        assert (drawn.from_conditional == bool(counts[0])).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_temperatures_give_the_target_that_the_docstring_states(weighting):
    """``q_c (v_c / v_u)^w``; per-proposal weights keep to it with candidates of the conditional alone."""
    conditional, unconditional = pair()
    temperatures = {
        "weight_temperature": 1.3,
        "scale_temperature": 0.8,
        "density_weight_temperature": 0.2,
        "density_scale_temperature": 1.2,
    }
    counts = {} if weighting == "balance" else {"unconditional_candidates": 0, "conditional_candidates": 512}
    draws = guidance(1.5, 256, weighting=weighting, **temperatures, **counts)(
        conditional, unconditional, (5000,), generator=generator()
    )
    q_c = mixture([0.0, 1.3 * 0.5], [-1.0, 1.5], [0.8 * 0.5, 0.8 * 0.8])
    v_c = mixture([0.0, 0.2 * 0.5], [-1.0, 1.5], [1.2 * 0.5, 1.2 * 0.8])
    v_u = mixture([0.2 * 0.4, 0.0, 0.0], [-2.0, 0.0, 1.0], [1.2, 1.2 * 1.5, 1.2 * 0.9])
    log_density = q_c.log_prob(GRID) + 1.5 * (v_c.log_prob(GRID) - v_u.log_prob(GRID))
    assert statistic(draws, log_density) < THRESHOLD
    assert statistic(draws, target(conditional, unconditional, 1.5)) > 2 * THRESHOLD


def test_resampling_temperature_is_a_power_of_the_weights():
    conditional, unconditional = pair()
    guide = guidance(1.0, conditional_candidates=512, unconditional_candidates=0, resampling_temperature=2.0)
    draws = guide(conditional, unconditional, (5000,), generator=generator())
    assert statistic(draws, target(conditional, unconditional, 2.0)) < THRESHOLD
    assert statistic(draws, target(conditional, unconditional, 1.0)) > 2 * THRESHOLD


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_discrete_distributions_too(weighting):
    conditional, unconditional = (Categorical(logits=0.3 * torch.randn(BINS)) for _ in range(2))
    draws = guidance(1.0, 512, weighting=weighting)(conditional, unconditional, (6000,), generator=generator())
    expected = 6000 * (2 * conditional.logits - unconditional.logits).softmax(0)
    assert expected.min() > 20
    counts = torch.bincount(draws, minlength=BINS)
    assert ((counts - expected).square() / expected).sum() < THRESHOLD


@pytest.mark.parametrize("pooled", [False, True])
def test_vectors_and_batches_converge(pooled):
    """Two dimensions, two elements: the first channel's marginal against quadrature over both channels."""
    logits, loc, scale = torch.randn(2, 2, 3), torch.randn(2, 2, 3, 2), torch.rand(2, 2, 3, 2) * 0.5 + 0.4
    scale[1] += 0.3  # the unconditional is wider
    conditional, unconditional = (DiagonalMixture(*(p[i].double() for p in (logits, loc, scale))) for i in (0, 1))
    guide = guidance(1.0, 256, pooled=pooled)
    if pooled:  # draws of one pool depend on each other: one from each of many pools
        wide = [p.expand((4000, 2)) for p in (conditional, unconditional)]
        draws = guide(*wide, (1,), generator=generator())[0]
    else:
        draws = guide(conditional, unconditional, (4000,), generator=generator())
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis).unsqueeze(1)
    log_density = 2 * conditional.log_prob(plane) - unconditional.log_prob(plane)
    for element in range(2):
        marginal = log_density[:, element].reshape(301, 301).logsumexp(1)
        fine = torch.from_numpy(np.interp(GRID, axis, marginal, left=-1e3, right=-1e3))
        assert statistic(draws[:, element, 0], fine) < THRESHOLD


def gaussians(dim=3):
    conditional = Independent(Normal(torch.randn(2, dim), torch.rand(2, dim) * 0.3 + 0.5), 1)
    return conditional, Independent(Normal(torch.randn(2, dim), torch.rand(2, dim) * 0.3 + 1.0), 1)


@pytest.mark.parametrize("scale", [0.5, 3.0, torch.tensor([0.7, 2.0])])
@pytest.mark.parametrize("form", ["independent", "normal", "mixture of one"])
def test_gaussians_are_sampled_exactly(scale, form):
    """In closed form, against quadrature channel by channel, and as many draws as one likes."""
    conditional, unconditional = gaussians()
    given = [conditional, unconditional]
    if form == "normal":
        given = [p.base_dist for p in given]
        scale = scale[:, None] if isinstance(scale, torch.Tensor) else scale
    elif form == "mixture of one":
        given = [DiagonalMixture(torch.zeros(2, 1), p.mean[:, None], p.stddev[:, None]) for p in given]
    drawn = ResamplingGuidance(scale).draw(*given, (5000,), generator=generator())
    assert drawn.effective_sample_size.isinf().all()
    assert not (drawn.from_conditional | drawn.from_unconditional | drawn.fell_back).any()
    scales = torch.as_tensor(scale).flatten().expand(2)
    for row in range(2):
        for channel in range(3):
            p_c, p_u = (
                Normal(p.mean[row, channel].double(), p.stddev[row, channel].double())
                for p in (conditional, unconditional)
            )
            assert statistic(drawn.sample[:, row, channel], target(p_c, p_u, scales[row].double())) < THRESHOLD


def test_resampling_agrees_with_the_closed_form():
    """Also tempered; Normal tempers by its scale alone."""
    conditional, unconditional = Normal(torch.tensor([0.3]), torch.tensor([0.8])), Normal(torch.tensor([0.0]), 1.1)
    temperatures = {"scale_temperature": 0.9, "density_scale_temperature": 1.2}
    q_c, v_c, v_u = Normal(0.3, 0.72), Normal(0.3, 0.96), Normal(0.0, 1.32)
    log_density = q_c.log_prob(GRID) + 2 * (v_c.log_prob(GRID) - v_u.log_prob(GRID))
    for exact in (True, False):
        draws = guidance(2.0, exact=exact, **temperatures)(conditional, unconditional, (6000,), generator=generator())
        assert statistic(draws[:, 0], log_density) < THRESHOLD


def test_where_the_guided_precision_is_not_positive_resampling_takes_over():
    """Row by row: the first row has no guided Gaussian, the second has."""
    conditional = Independent(Normal(torch.zeros(2, 2), 1.0), 1)
    unconditional = Independent(Normal(torch.zeros(2, 2), torch.tensor([[0.5, 2.0], [2.0, 2.0]])), 1)
    drawn = ResamplingGuidance(1.0).draw(conditional, unconditional, (50,), generator=generator())
    assert drawn.sample.isfinite().all()
    assert torch.equal(drawn.effective_sample_size.isinf(), torch.tensor([False, True]).expand(50, 2))
    assert (drawn.from_conditional | drawn.from_unconditional)[:, 0].all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_scale_zero_is_the_plain_conditional(weighting):
    conditional, _ = pair()

    class Untouchable(Distribution):
        batch_shape = event_shape = torch.Size()

        def sample(self, *_, **__):
            raise AssertionError

        log_prob = sample

    guide = guidance(0.0, weighting=weighting)
    torch.manual_seed(1)
    expected = conditional.sample((50,))
    torch.manual_seed(1)
    assert torch.equal(guide(conditional, Untouchable(validate_args=False), (50,)), expected)
    unconditional = Untouchable(validate_args=False)
    for zero in (torch.tensor(0.0), LinearSchedule(torch.tensor(0.0), torch.tensor(2.0))):
        torch.manual_seed(1)
        assert torch.equal(guidance(zero, weighting=weighting)(conditional, unconditional, (50,)), expected)
    assert not guide.uses_unconditional
    assert not guidance(torch.zeros(3)).uses_unconditional
    assert not guidance(LinearSchedule(0.0, 0.0)).uses_unconditional
    assert guidance(LinearSchedule(0.0, 1.0)).uses_unconditional


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_batch_may_mix_scales(weighting):
    """Each element draws as it would if all had its scale; that of scale 0 follows the conditional exactly."""
    conditional, unconditional = (p.expand((3,)) for p in pair())
    mixed = guidance(torch.tensor([0.0, 1.0, 2.5]), 8, weighting=weighting)
    drawn = mixed.draw(conditional, unconditional, (6000,), generator=generator())
    assert statistic(drawn.sample[:, 0], conditional.log_prob(GRID[:, None])[:, 0]) < THRESHOLD
    assert drawn.from_conditional[:, 0].all()
    assert not drawn.fell_back.any()
    for element, scale in [(1, 1.0), (2, 2.5)]:
        alone = guidance(scale, 8, weighting=weighting)(conditional, unconditional, (6000,), generator=generator())
        assert torch.equal(drawn.sample[:, element], alone[:, element])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_elements_of_a_batch_do_not_see_each_other(weighting, pooled):
    """Whatever happens in the second element, the first draws the same: fall-backs and infinite ratios included."""
    guide = guidance(2.0, 6, weighting=weighting, pooled=pooled, conditional_candidates=0)
    drawn, fell_back = [], []
    for low, high in [(0.0, 2.0), (5.0, 7.0), (0.2, 0.8)]:
        conditional = Uniform(torch.tensor([0.0, low]), torch.tensor([1.0, high]))
        unconditional = Uniform(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
        random = generator()
        draws = [guide.draw(conditional, unconditional, (100,), generator=random) for _ in range(3)]
        drawn.append(torch.stack([d.sample[:, 0] for d in draws]))
        fell_back.append(torch.stack([d.fell_back[:, 1] for d in draws]).any())
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert fell_back[1]
    assert not fell_back[0]


class Shifted(Distribution):
    """A distribution whose log-density is off by a constant."""

    arg_constraints = {}  # noqa: RUF012  # torch declares it so
    support = constraints.real

    def __init__(self, base, shift):
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.shift = base, shift

    def sample(self, sample_shape=()):
        return self.base.sample(sample_shape)

    def log_prob(self, value):
        return self.base.log_prob(value) + self.shift


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shift", [-3000.0, 7.0, 1e4])
def test_a_constant_in_both_log_densities_changes_nothing(weighting, shift):
    conditional, unconditional = pair(torch.float64)
    guide = guidance(2.0, 5, weighting=weighting)
    expected = guide(conditional, unconditional, (200,), generator=generator())
    shifted = guide(Shifted(conditional, shift), Shifted(unconditional, shift), (200,), generator=generator())
    assert torch.equal(shifted, expected)


def test_a_constant_in_one_changes_nothing_for_one_proposal():
    conditional, unconditional = pair()
    for counts in [(5, 0), (0, 5)]:
        guide = ResamplingGuidance(
            2.0, conditional_candidates=counts[0], unconditional_candidates=counts[1], weighting="per-proposal"
        )
        expected = guide(conditional, unconditional, (200,), generator=generator())
        shifted = guide(Shifted(conditional, 30.0), Shifted(unconditional, -50.0), (200,), generator=generator())
        assert torch.equal(shifted, expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_same_seed_same_draws_and_the_global_generator_stays_as_it_was(pooled):
    """Also for distributions whose ``sample`` takes no generator, which go on where it stood."""
    conditional, unconditional = pair()
    guide = guidance(1.0, 4, pooled=pooled)
    before = torch.get_rng_state()
    one, other = generator(1), generator(1)
    first, second = ([guide(conditional, unconditional, (9,), generator=g) for _ in range(2)] for g in (one, other))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(guide(conditional, unconditional, (9,)), guide(conditional, unconditional, (9,)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_supports_may_differ(weighting):
    """Inside only the unconditional: never drawn. Inside only the conditional: infinitely favoured, by p_c^(1 + w)."""
    guide = guidance(1.0, 64, weighting=weighting)
    wide, narrow = Uniform(torch.tensor(-1.0), 3.0), Uniform(torch.tensor(0.0), 1.0)
    inside = guide(narrow, wide, (4000,), generator=generator())
    assert (inside >= 0).all()
    assert (inside < 1).all()
    assert statistic(inside, torch.where((GRID >= 0) & (GRID < 1), 0.0, -torch.inf)) < THRESHOLD
    conditional = Exponential(torch.tensor(0.5))
    drawn = guidance(1.0, 256, weighting=weighting).draw(conditional, narrow, (4000,), generator=generator())
    assert (drawn.sample > 1).all()
    assert not drawn.fell_back.any()
    expected = torch.where(GRID > 1, -2 * 0.5 * GRID, -torch.inf)  # (p_c)^2 outside
    assert statistic(drawn.sample, expected) < THRESHOLD


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_that_are_all_zero_fall_back_to_the_conditional(weighting, pooled):
    """All candidates come from the unconditional here, outside the conditional's support."""
    guide = ResamplingGuidance(
        1.0, conditional_candidates=0, unconditional_candidates=3, weighting=weighting, pooled=pooled
    )
    conditional = Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0]))
    unconditional = Uniform(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0]))
    drawn = guide.draw(conditional, unconditional, (500,), generator=generator())
    assert drawn.fell_back[:, 1].all()
    assert drawn.from_conditional[:, 1].all()
    assert torch.equal(drawn.effective_sample_size == 0, drawn.fell_back)
    assert ((drawn.sample >= conditional.low) & (drawn.sample <= conditional.high)).all()
    assert drawn.sample[:, 1].unique().numel() > 450
    if not pooled:  # three candidates, each out of support with probability 1/2: within 5 standard errors
        assert drawn.fell_back[:, 0].float().mean() == pytest.approx(1 / 8, abs=5 * math.sqrt(1 / 8 * 7 / 8 / 500))


def test_components_of_zero_probability_and_ties_are_handled():
    """Weights of -inf in a mixture; candidates that are all the same."""
    logits, probs = torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, 0.0])
    for first, second in [
        (Categorical(logits=logits), Categorical(logits=logits.flip(0))),
        (Categorical(probs=probs), Categorical(probs=probs.flip(0))),
    ]:
        conditional = MixtureSameFamily(first, Normal(torch.tensor([0.0, 50.0]), 1.0))
        unconditional = MixtureSameFamily(second, Normal(torch.tensor([0.0, 1.0]), 2.0))
        for guide in (
            ResamplingGuidance(2.0),
            ResamplingGuidance(2.0, density_weight_temperature=0.2),
            ResamplingGuidance(2.0, weight_temperature=0.2),
            ComponentGuidance(0.1, weight_temperature=0.2),
        ):
            drawn = guide(conditional, unconditional, (500,), generator=generator())
            assert (drawn.abs() < 20).all()
    certain = Categorical(logits=logits)
    drawn = ResamplingGuidance(2.0).draw(certain, certain, (500,), generator=generator())
    assert (drawn.sample == 0).all()
    torch.testing.assert_close(drawn.effective_sample_size, torch.full((500,), 10.0))


def test_half_precision_is_weighed_in_float32():
    """Log-densities of thousands of nats, whose differences bfloat16 cannot tell, against float64."""
    one = torch.ones(3000, dtype=torch.bfloat16)
    pair = [Independent(Normal(m * one, one), 1) for m in (0.0, 0.0078125)]
    exact = [Independent(Normal(m * one.double(), one.double()), 1) for m in (0.0, 0.0078125)]
    value = pair[0].sample((20,))
    assert value.dtype == torch.bfloat16
    ours = log_density(pair[0], value, value) - log_density(pair[1], value, value)
    expected = exact[0].log_prob(value.double()) - exact[1].log_prob(value.double())
    assert (ours - expected).abs().max() < 0.02
    assert (pair[0].log_prob(value) - pair[1].log_prob(value) - expected).abs().max() > 1
    drawn = ResamplingGuidance(1.0, exact=False).draw(*pair, (50,), generator=generator())
    assert drawn.sample.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guide", [ResamplingGuidance(1.0), ComponentGuidance(1.0)])
def test_half_precision_has_the_closed_form_of_float64(guide, dtype):
    """Scales whose precision overflows float16; the standard deviation of 20,000 draws within 5 standard errors, and
    what rounding a draw to 8 bits adds.
    """
    scales = torch.tensor([0.003, 0.006], dtype=dtype)
    pair = [Normal(torch.zeros((), dtype=dtype), scale) for scale in scales]
    own, other = scales.double() ** -2
    expected = (2 * own - other) ** -0.5
    draws = guide(*pair, (20000,), generator=generator())
    assert draws.dtype == dtype
    assert draws.double().std() == pytest.approx(expected.item(), rel=5 / math.sqrt(2 * 20000) + 1e-3)


def test_per_proposal_weights_of_two_temperatures_are_never_taken_for_a_closed_form():
    conditional, unconditional = Normal(torch.zeros(1), 1.0), Normal(torch.ones(1), 1.0)
    for weighting, exact in [("balance", True), ("per-proposal", False)]:
        guide = ResamplingGuidance(1.0, weighting=weighting, density_scale_temperature=2.0)
        drawn = guide.draw(conditional, unconditional, (10,), generator=generator())
        assert drawn.effective_sample_size.isinf().all() == exact


@pytest.mark.parametrize("exact", [True, False])
def test_a_wider_scale_does_not_widen_the_draws(exact):
    conditional, unconditional = Normal(torch.zeros(2), 1.0), Normal(torch.ones(2), 1.0)
    guide = ResamplingGuidance(torch.tensor([1.0, 2.0], dtype=torch.float64), exact=exact)
    assert guide(conditional, unconditional).dtype == torch.float32


def test_draws_that_round_onto_the_edge_of_the_support_weigh_nothing():
    """Their density is infinite or undefined, through no fault of the parameters."""
    for build in (
        lambda a: TransformedDistribution(Normal(torch.full((64,), a), 3.0), [TanhTransform()]),
        lambda a: Weibull(torch.full((64,), 1.0), 0.05 + a / 100),
    ):
        conditional = build(0.0)

        def sound(value, conditional=conditional):
            inside = conditional.support.check(value)
            return inside & conditional.log_prob(value.where(inside, 0.5)).isfinite()

        drawn = ResamplingGuidance(1.0).draw(conditional, build(1.0), (200,), generator=generator())
        assert sound(drawn.sample)[~drawn.fell_back].all()
        assert drawn.fell_back.float().mean() < 0.05
        assert not sound(conditional.sample((200,))).all()  # edges are met


def test_what_only_inherits_from_a_gaussian_is_not_taken_for_one():
    class Half(Normal):
        """A normal folded to the positive side."""

        support = constraints.positive

        def sample(self, sample_shape=()):
            return super().sample(sample_shape).abs()

        def log_prob(self, value):
            return super().log_prob(value) + math.log(2)

    pair = Half(torch.zeros(3), 1.0), Half(torch.zeros(3), 1.5)
    drawn = ResamplingGuidance(1.0).draw(*pair, (500,), generator=generator())
    assert (drawn.sample >= 0).all()
    assert drawn.effective_sample_size.isfinite().all()
    with pytest.raises(TypeError, match="a Half cannot be tempered"):
        ResamplingGuidance(1.0, scale_temperature=0.9)(*pair)


def test_far_apart_distributions_give_finite_draws():
    conditional, unconditional = Normal(torch.zeros(1, 2000), 1e-3), Normal(torch.full((1, 2000), 1e3), 1e-3)
    pair = [Independent(p, 1) for p in (conditional, unconditional)]
    for weighting in WEIGHTINGS:
        drawn = ResamplingGuidance(3.0, exact=False, weighting=weighting).draw(*pair, (20,), generator=generator())
        assert drawn.sample.isfinite().all()
        assert (drawn.sample.abs() < 1).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_diagnostics(weighting):
    """Where both are the same, weights are equal: every candidate counts, and each proposal has its share."""
    conditional, unconditional = pair()
    guide = ResamplingGuidance(2.0, conditional_candidates=6, unconditional_candidates=2, weighting=weighting)
    drawn = guide.draw(conditional, conditional, (4000,), generator=generator())
    torch.testing.assert_close(drawn.effective_sample_size, torch.full((4000,), 8.0))
    assert torch.equal(drawn.from_conditional, ~drawn.from_unconditional)
    assert drawn.from_conditional.float().mean() == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 4000))
    drawn = guide.draw(conditional, unconditional, (4000,), generator=generator())
    assert ((drawn.effective_sample_size >= 1) & (drawn.effective_sample_size < 8)).all()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (5,), (5, 1), (0,)])
@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("pooled", [False, True])
def test_shapes(shape, batch, event, pooled):
    conditional, unconditional = (Independent(Gamma(torch.rand(*batch, 3) + a, 1.0), event) for a in (1.0, 0.5))
    drawn = ResamplingGuidance(1.0, pooled=pooled).draw(conditional, unconditional, shape)
    inner = batch if event else (*batch, 3)
    assert drawn.sample.shape == (*shape, *batch, 3)
    for figure in drawn[1:]:
        assert figure.shape == (*shape, *inner)


def test_a_pool_is_shared_and_own_candidates_are_not():
    conditional, unconditional = pair()
    pooled = guidance(1.0, 4, pooled=True)(conditional, unconditional, (500,), generator=generator())
    own = guidance(1.0, 4)(conditional, unconditional, (500,), generator=generator())
    assert pooled.unique().numel() <= 8
    assert own.unique().numel() == 500


def test_schedules():
    linear, cosine = LinearSchedule(1.0, 3.0), CosineSchedule(1.0, 3.0)
    assert [linear(t) for t in (0, 0.25, 1)] == [1, 1.5, 3]
    assert [cosine(t) for t in (0, 0.5, 1)] == pytest.approx([1, 2, 3])
    assert cosine(1e-3) - 1 < 1e-5 < linear(1e-3) - 1
    per_sample = LinearSchedule(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(per_sample(0.5), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize(
    "setting", ["scale", "weight_temperature", "density_scale_temperature", "resampling_temperature"]
)
def test_every_setting_may_follow_the_position(setting):
    conditional, unconditional = pair()
    for progress, value in [(0.0, 0.5), (1.0, 2.0)]:
        scheduled = guidance(**{"scale": 1.0, "candidates": 8, setting: LinearSchedule(0.5, 2.0)})
        constant = guidance(**{"scale": 1.0, "candidates": 8, setting: value})
        drawn, expected = (
            guide(conditional, unconditional, (200,), progress=progress, generator=generator())
            for guide in (scheduled, constant)
        )
        assert torch.equal(drawn, expected)


def test_presets_are_the_papers_table():
    """Table 6: T_pi, T_sigma, s_c, s_u, T_pi,v, T_sigma,v, T_s, w."""
    table = {
        "1.1b-p16": (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 2.5),
        "1.1b-p8": (1.0, 1.0, 5, 5, 0.2, 0.9, 1.1, 2.0),
        "1.9b-p16": (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 3.5),
        "1.9b-p8": (1.0, 1.0, 5, 5, 0.1, 1.0, 1.1, 1.5),
    }
    assert set(PRESETS) == set(table)
    for name, row in table.items():
        guide = ResamplingGuidance.preset(name)
        assert row == (
            guide.weight_temperature,
            guide.scale_temperature,
            guide.conditional_candidates,
            guide.unconditional_candidates,
            guide.density_weight_temperature,
            guide.density_scale_temperature,
            guide.resampling_temperature,
            guide.scale,
        )
        assert guide.weighting == "per-proposal"
    assert ResamplingGuidance.preset("1.1b-p8", scale=9.0, pooled=True).scale == 9


def test_temperatures_are_the_same_for_torchs_mixture_and_ours():
    logits, loc, scale = torch.randn(2, 4), torch.randn(2, 4, 3), torch.rand(2, 4, 3) + 0.2
    torchs = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, scale), 1))
    ours = DiagonalMixture(logits, loc, scale)
    preset = ResamplingGuidance.preset("1.1b-p16")
    draws = [
        preset(p, Independent(Normal(torch.zeros(2, 3), 1.0), 1), (3000,), generator=generator())
        for p in (torchs, ours)
    ]
    error = (draws[0].var(0) + draws[1].var(0)).div(3000).sqrt()
    assert ((draws[0].mean(0) - draws[1].mean(0)).abs() < 5 * error).all()


def test_what_cannot_be_tempered_is_refused_only_where_a_temperature_asks_for_it():
    gammas = Gamma(torch.tensor(2.0), 1.0), Gamma(torch.tensor(1.0), 1.0)
    ResamplingGuidance(1.0, resampling_temperature=1.1)(*gammas)
    for name in ("weight_temperature", "scale_temperature", "density_weight_temperature", "density_scale_temperature"):
        with pytest.raises(TypeError, match="a Gamma cannot be tempered: set its temperatures to 1"):
            ResamplingGuidance(1.0, **{name: 0.9})(*gammas)
    lognormals = [MixtureSameFamily(Categorical(torch.ones(2)), LogNormal(torch.zeros(2), 1.0))] * 2
    with pytest.raises(TypeError, match="a MixtureSameFamily cannot be tempered"):
        ResamplingGuidance(1.0, scale_temperature=0.9)(*lognormals)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale must be finite and at least 0, got -1.0"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"scale": torch.tensor([1.0, math.nan])}, "scale must be finite"),
        ({"scale": LinearSchedule(0.0, -2.0)}, "scale.end must be finite and at least 0, got -2.0"),
        ({"conditional_candidates": -1}, "candidates must be whole numbers, and 1 in all, got -1 and 5"),
        ({"conditional_candidates": 0, "unconditional_candidates": 0}, "and 1 in all, got 0 and 0"),
        ({"conditional_candidates": 5.0}, "candidates must be whole numbers"),
        ({"scale_temperature": torch.ones(2)}, "scale_temperature must be one number for the whole batch, got 2"),
        ({"weighting": "none"}, "weighting must be"),
        ({"weight_temperature": 0.0}, "weight_temperature must be finite and above 0, got 0.0"),
        ({"scale_temperature": -1.0}, "scale_temperature must be"),
        ({"density_weight_temperature": math.nan}, "density_weight_temperature must be"),
        ({"density_scale_temperature": 0.0}, "density_scale_temperature must be"),
        ({"resampling_temperature": CosineSchedule(1.0, 0.0)}, "resampling_temperature.end must be"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ResamplingGuidance(**{"scale": 1.0, **settings})


def test_wrong_input_is_named():
    guide, normal = ResamplingGuidance(1.0), Normal(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"same batch shape, got \(3,\) and \(2,\)"):
        guide(normal, Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match=r"same event shape, got \(\) and \(3,\)"):
        guide(Normal(torch.tensor(0.0), 1.0), Independent(normal, 1))
    with pytest.raises(ValueError, match=r"scale of shape \(2,\) does not broadcast to a batch of \(3,\)"):
        ResamplingGuidance(torch.ones(2))(normal, normal)
    with pytest.raises(ValueError, match="scale must be finite and at least 0, got -1"):
        ResamplingGuidance(lambda progress: -progress)(normal, normal, progress=1.0)
    broken = Gamma(torch.tensor([1.0, math.nan, 1.0]), 1.0, validate_args=False)
    with pytest.raises(
        ValueError, match="all log-densities are NaN: the parameters of the Gamma or the Gamma are not finite"
    ):
        guide(Gamma(torch.ones(3), 1.0), broken)
    for scale in (None, [1.0, 2.0], "2", True):
        with pytest.raises(TypeError, match="scale must be a number, a tensor or a function of the position, got"):
            ResamplingGuidance(scale)
    with pytest.raises(ValueError, match="no preset '2b'; known: 1"):
        ResamplingGuidance.preset("2b")
