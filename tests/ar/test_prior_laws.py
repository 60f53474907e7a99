"""The laws of the prior: paper, Eq. 11 and 12 and section A.1."""

import math

import pytest
import torch
from farmer_ar import LatentPrior
from farmer_ar import prior as prior_module
from farmer_flow.flow import AutoregressiveBlock
from farmer_guidance import ResamplingGuidance
from torch.distributions import Normal

DIM, LENGTH, CLASSES = 5, 6, 3


def make(informative_dim=3, **changes):
    return LatentPrior(
        **{
            "dim": DIM,
            "length": LENGTH,
            "informative_dim": informative_dim,
            "width": 16,
            "layers": 2,
            "head_dim": 8,
            "components": 3,
            "redundant_components": 4,
            "classes": CLASSES,
            "condition_repeats": 2,
            **changes,
        }
    )


@pytest.fixture(params=[3, 5], ids=["partition", "no partition"])
def prior(request, disturb):
    return disturb(make(request.param), deviation=0.1).double()


def latents(batch=2):
    return torch.randn(batch, LENGTH, DIM, dtype=torch.float64)


LABELS = torch.tensor([1, -1])


def test_one_gaussian_component_is_one_more_block_of_the_flow(disturb):
    """Paper, A.1: with K = 1 and no partition the prior is an affine block under a standard normal.

    The block gets one more token, a zero that the position embedding turns into the condition.
    """
    prior = disturb(make(DIM, components=1, condition_repeats=1), deviation=0.2).double()
    block = AutoregressiveBlock(DIM, LENGTH + 1, width=16, layers=2, head_dim=8).double()
    block.transformer.load_state_dict(prior.transformer.state_dict())
    label = 1
    with torch.no_grad():
        block.embed.weight.copy_(prior.embed.weight)
        block.embed.bias.copy_(prior.embed.bias)
        block.position.copy_(prior.position)
        block.position[0] += prior.condition.weight[label] - prior.embed.bias
        # the head gives (logit, loc, log scale), the block (mu, log sigma = - log scale)
        weight, bias = prior.informative.linear.weight[1:], prior.informative.linear.bias[1:]
        block.out.weight.copy_(torch.cat([weight[:DIM], -weight[DIM:]]))
        block.out.bias.copy_(torch.cat([bias[:DIM], -bias[DIM:]]))
    z = latents()
    u, logdet = block(torch.cat([torch.zeros_like(z[:, :1]), z], dim=1))
    expected = Normal(0.0, 1.0).log_prob(u[:, 1:]).sum((1, 2)) + logdet
    torch.testing.assert_close(prior.log_prob(z, torch.full((2,), label)), expected, atol=1e-8, rtol=0)


def test_redundant_parts_may_be_permuted_and_informative_ones_not():
    prior = make().double()
    z, order = latents(), torch.tensor([3, 0, 5, 1, 2, 4])
    permuted = torch.cat([z[..., :3], z[:, order, 3:]], dim=-1)
    torch.testing.assert_close(prior.log_prob(permuted, LABELS), prior.log_prob(z, LABELS))
    permuted = torch.cat([z[:, order, :3], z[..., 3:]], dim=-1)
    assert not torch.allclose(prior.log_prob(permuted, LABELS), prior.log_prob(z, LABELS))


def test_the_factors_depend_on_what_eq_11_and_12_say(prior):
    """The density of a prefix must not move with later tokens; that of redundant parts sees all informative ones."""
    z = latents(1)
    informative = z[..., : prior.informative_dim]

    def parts(part):
        return prior.transformer(
            torch.cat([prior._condition(None, 1), prior.embed(part[:, : prior._read])], 1) + prior.position
        )[:, prior.condition_repeats - 1 :]

    reads = torch.autograd.functional.jacobian(lambda part: parts(part).sum((0, 2)), informative).abs().sum((1, 3))
    expected = torch.ones(reads.shape, dtype=torch.bool).tril(-1)
    assert torch.equal(reads > 0, expected)


def test_log_prob_is_the_product_of_its_factors(prior):
    """Against a token-by-token evaluation by cached decoding: exactly what sampling draws from."""
    z = latents(2)
    with torch.no_grad():
        cache = prior.transformer.new_cache(2, prior.position.shape[0])
        prefix = prior._condition(LABELS, 2) + prior.position[: prior.condition_repeats]
        hidden = prior.transformer(prefix, cache)[:, -1:]
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(LENGTH):
            token = z[:, i : i + 1, : prior.informative_dim]
            total += prior.informative.mixture(hidden).log_prob(token).sum(1)
            if i < prior._read:
                embedded = prior.embed(token) + prior.position[prior.condition_repeats + i]
                hidden = prior.transformer(embedded, cache)
        if prior.redundant is not None:
            for i in range(LENGTH):
                total += prior.redundant.mixture(hidden[:, 0]).log_prob(z[:, i, prior.informative_dim :])
        torch.testing.assert_close(prior.log_prob(z, LABELS), total)


def test_the_mixtures_are_those_that_score(prior):
    z = latents()
    informative, shared = prior.mixtures(z, LABELS)
    scored = informative.log_prob(z[..., : prior.informative_dim]).sum(1)
    if shared is not None:
        scored = scored + shared.log_prob(z[..., prior.informative_dim :]).sum(1)
    torch.testing.assert_close(scored, prior.log_prob(z, LABELS))
    assert informative.batch_shape == (2, LENGTH)
    assert (shared is None) == (prior.informative_dim == DIM)


@pytest.mark.parametrize("label", [-1, 2])
@pytest.mark.parametrize("change", ["narrower", "shifted", "any weight"])
def test_samples_follow_the_density(prior, label, change):
    """E_p[q / p] = 1 for another normalised density q: the mean over 4,000 samples within 5 standard errors.

    q is near p, so that the ratio has a finite variance: a false alarm has a chance below 1e-5 a case.
    """
    other = make(prior.informative_dim).double()
    other.load_state_dict(prior.state_dict())
    with torch.no_grad():
        for head in filter(None, [other.informative, other.redundant]):
            _, loc, log_scale = head.linear.bias.split([head.components, *[head.components * head.dim] * 2])
            if change == "narrower":
                log_scale.sub_(0.05)
            elif change == "shifted":
                loc.add_(0.05)
        if change == "any weight":
            for parameter in other.parameters():
                parameter.add_(0.005 * torch.randn_like(parameter))
        labels = torch.full((4000,), label)
        z = prior.sample(labels, generator=torch.Generator().manual_seed(3))

        def deviation(samples):
            ratio = (other.log_prob(samples, labels) - prior.log_prob(samples, labels)).exp()
            return (ratio.mean() - 1).abs() / (ratio.std() / math.sqrt(len(ratio)))

        assert deviation(z) < 5
        if change == "narrower":  # samples 10% too wide are found out
            assert deviation(z.mean(0) + 1.1 * (z - z.mean(0))) > 10


def test_first_tokens_have_their_mixtures_moments(prior):
    """The first token's mixture depends on nothing but the class, so its moments are known: mean and variance of
    20,000 samples within 5 standard errors.
    """
    with torch.no_grad():
        labels = torch.full((20000,), 1)
        z = prior.sample(labels, generator=torch.Generator().manual_seed(0))[:, 0, : prior.informative_dim]
        prefix = prior._condition(labels[:1], 1) + prior.position[: prior.condition_repeats]
        first = prior.informative.mixture(prior.transformer(prefix)[:, -1])
        error = (first.variance[0] / len(z)).sqrt()
        assert ((z.mean(0) - first.mean[0]).abs() < 5 * error).all()
        squares = (z - first.mean[0]).square()
        assert ((squares.mean(0) - first.variance[0]).abs() < 5 * squares.std(0) / math.sqrt(len(z))).all()


def test_density_integrates_to_one(disturb):
    """One token of two channels, one informative and one redundant, on a grid."""
    prior = make(1, dim=2, length=1)
    prior = disturb(prior, deviation=0.1).double()
    axis = torch.linspace(-10, 10, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    with torch.inference_mode():
        density = prior.log_prob(grid, torch.full((len(grid),), 2)).exp().sum()
    assert density.item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


def test_chunks_change_neither_value_nor_gradient(prior, monkeypatch):
    z = latents()

    def value_and_gradients():
        prior.zero_grad()
        value = prior.log_prob(z, LABELS)
        value.sum().backward()
        return [value.detach(), *(p.grad.clone() for p in prior.parameters())]

    whole = value_and_gradients()
    calls = []
    prior.informative.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[1]))
    monkeypatch.setattr(prior_module, "CHUNK_NUMBERS", 2 * 4 * prior.informative.numbers)
    for ours, expected in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(ours, expected)
    assert calls == [4, 2, 2, 4]  # two chunks, made again in the backward pass


def test_gradients_reach_every_parameter(prior):
    prior.log_prob(latents(4), torch.tensor([0, 1, 2, -1])).sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_null_class_is_any_negative_label_and_none(prior):
    z = latents(1)
    without = prior.log_prob(z)
    assert torch.equal(prior.log_prob(z, torch.tensor([-1])), without)
    assert torch.equal(prior.log_prob(z, torch.tensor([-9])), without)
    assert not torch.allclose(prior.log_prob(z, torch.tensor([0])), without)


def test_same_seed_same_samples(prior):
    draws = [prior.sample(LABELS, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert prior.sample(3).shape == (3, LENGTH, DIM)


def test_redundant_scale_scales_the_variance_alone():
    prior = make().double()
    draws = [
        prior.sample(LABELS, redundant_scale=s, generator=torch.Generator().manual_seed(1)) for s in (0.0, 1.0, 4.0)
    ]
    assert torch.equal(draws[0][..., :3], draws[2][..., :3])
    torch.testing.assert_close((draws[2] - draws[0])[..., 3:], 2 * (draws[1] - draws[0])[..., 3:])
    with pytest.raises(ValueError, match="must not be negative"):
        prior.sample(1, redundant_scale=-1.0)


def test_bfloat16_autocast_keeps_float32_densities():
    prior, z = make(), latents().float()
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = prior.log_prob(z, LABELS)
        assert prior.sample(LABELS).dtype == torch.float32
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, prior.log_prob(z, LABELS), atol=0.5, rtol=0.05)


def test_bfloat16_weights_and_latents_give_float32_densities():
    prior, z = make(), latents().float()
    expected = prior.log_prob(z, LABELS)
    log_prob = prior.bfloat16().log_prob(z.bfloat16(), LABELS)
    assert log_prob.dtype == prior.sample(LABELS).dtype == torch.float32
    torch.testing.assert_close(log_prob, expected, atol=0.5, rtol=0.05)


def test_saving_and_loading_keeps_the_numbers(prior, tmp_path):
    torch.save(prior.state_dict(), tmp_path / "prior.pt")
    other = make(prior.informative_dim).double()
    other.load_state_dict(torch.load(tmp_path / "prior.pt"))
    assert torch.equal(other.log_prob(z := latents(), LABELS), prior.log_prob(z, LABELS))


def test_parameters_of_the_papers_prior():
    with torch.device("meta"):
        prior = LatentPrior(
            768,
            256,
            informative_dim=128,
            width=768,
            layers=12,
            components=64,
            redundant_components=200,
            classes=1000,
            condition_repeats=64,
        )
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(295e6, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"components": 0}, "components must be at least 1"),
        ({"condition_repeats": 0}, "condition_repeats must be at least 1"),
        ({"informative_dim": 6}, "at most dim=5"),
        ({"classes": -1}, "classes at least 0"),
    ],
)
def test_sizes_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_wrong_input_is_named(prior):
    with pytest.raises(ValueError, match=r"length=6, dim=5\), got \(2, 6, 4\)"):
        prior.log_prob(torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match=r"\(2,\) integers, got \(3,\)"):
        prior.log_prob(latents(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="below classes=3, got 3"):
        prior.sample(torch.tensor([3]))


class Recorder:
    """A guide that draws from the conditional and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, conditional, unconditional, sample_shape=(), *, progress, generator):
        self.calls.append((conditional, unconditional, progress))
        return conditional.sample(sample_shape, generator=generator)


def test_guides_meet_the_mixtures_of_both_paths(prior):
    """Their product over tokens, at what was drawn, is log_prob with the labels and log_prob without."""
    guide, redundant = Recorder(), Recorder()
    z = prior.sample(LABELS, guide=guide, redundant_guide=redundant, generator=torch.Generator().manual_seed(0))
    informative, rest = z.split([prior.informative_dim, DIM - prior.informative_dim], dim=-1)
    for path, labels in [(0, LABELS), (1, None)]:
        total = sum(call[path].log_prob(token) for call, token in zip(guide.calls, informative.unbind(1), strict=True))
        for call in redundant.calls:
            total = total + call[path].log_prob(rest.transpose(0, 1)).sum(0)
        torch.testing.assert_close(total, prior.log_prob(z, labels))
    assert [progress for *_, progress in guide.calls] == [i / (LENGTH - 1) for i in range(LENGTH)]
    assert len(redundant.calls) == (prior.redundant is not None)
    plain = prior.sample(LABELS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z, plain)


def test_a_guide_of_scale_zero_gives_and_costs_the_plain_draw(prior):
    rows = []
    prior.transformer.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    guides = {"guide": ResamplingGuidance(0.0), "redundant_guide": ResamplingGuidance(0.0, pooled=True)}
    plain, unguided = (prior.sample(LABELS, generator=torch.Generator().manual_seed(0), **g) for g in ({}, guides))
    assert torch.equal(plain, unguided)
    assert set(rows) == {2}
    prior.sample(LABELS, guide=ResamplingGuidance(1.0))
    assert rows[-1] == 4
    prior.sample(2, guide=ResamplingGuidance(1.0))  # without classes both paths are the same
    assert rows[-1] == 2


def test_any_callable_is_a_guide(prior):
    z = prior.sample(LABELS, guide=lambda conditional, unconditional, sample_shape: unconditional.mean)
    repeated = prior.sample(LABELS, guide=lambda conditional, unconditional, *_, **__: unconditional.mean)
    informative = slice(prior.informative_dim)
    assert torch.equal(z[..., informative], repeated[..., informative])
    torch.testing.assert_close(z[0, :, informative], z[1, :, informative])  # the unconditional path sees no label


def test_guided_tokens_follow_the_guided_mixture():
    """The first token of sequences that mix scales: means of 4,000 against the guided density's, by weighing
    20,000 plain draws; within 5 standard errors of both.
    """
    prior = make().double()
    scale = torch.tensor([0.0, 0.2]).repeat(4000)
    guide = ResamplingGuidance(scale, conditional_candidates=64, unconditional_candidates=64)
    labels = torch.full((8000,), 2)
    with torch.no_grad():
        z = prior.sample(labels, guide=guide, generator=torch.Generator().manual_seed(1))[:, 0, : prior.informative_dim]
        first = [
            prior.informative.mixture(
                prior.transformer(prior._condition(c, 1) + prior.position[: prior.condition_repeats])[:, -1]
            )
            for c in (labels[:1], None)
        ]
    draws = first[0].sample((20000,), generator=torch.Generator().manual_seed(2))
    ratio = first[0].log_prob(draws) - first[1].log_prob(draws)
    for guidance in scale[:2]:
        weights = (guidance * ratio).softmax(0)
        mean = (weights.unsqueeze(-1) * draws).sum(0)[0]
        error = (weights.square().unsqueeze(-1) * (draws - mean).square()).sum(0)[0].sqrt()
        mine = z[scale == guidance]
        deviations = (mine.mean(0) - mean).abs() / (error.square() + mine.var(0) / len(mine)).sqrt()
        assert (deviations < 5).all()
    assert ((z[scale == 0].mean(0) - mean).abs() > 5 * error).any()  # the test can tell the two apart


def test_mixtures_that_are_not_finite_are_named(prior):
    with pytest.raises(FloatingPointError, match="what a guide has drawn"):
        prior.sample(LABELS, guide=lambda conditional, *_: torch.full_like(conditional.sample(), torch.inf))
    with torch.no_grad():
        prior.embed.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="a mixture is not finite"):
        prior.sample(LABELS)


def test_redundant_guides_need_densities():
    with pytest.raises(ValueError, match="redundant_scale must be above 0 beside a redundant_guide"):
        make().sample(LABELS, redundant_guide=ResamplingGuidance(1.0, pooled=True), redundant_scale=0.0)
