"""The composed density of images: paper, Eq. 6, and bits per dimension."""

import json
import math
import re

import pytest
import torch
from einops import rearrange
from farmer_ar import LatentPrior
from farmer_examples import Farmer
from farmer_examples.model import TrainingNoise, UnknownClassError
from farmer_flow import AutoregressiveFlow, patchify
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn


def make(blocks=2, size=4, patch=2, grey_levels=17, classes=("cat", "dog"), informative_dim=3, **changes):
    length, dim = (size // patch) ** 2, patch**2
    flow = AutoregressiveFlow(dim, length, width=16, blocks=blocks, layers=1, head_dim=8, classes=len(classes))
    prior = LatentPrior(
        dim,
        length,
        informative_dim=informative_dim,
        width=16,
        layers=1,
        head_dim=8,
        components=2,
        redundant_components=2,
        classes=len(classes),
    )
    return Farmer(
        flow,
        prior,
        image_size=size,
        channels=1,
        patch_size=patch,
        grey_levels=grey_levels,
        class_names=list(classes),
        **changes,
    )


@pytest.fixture(params=[False, True], ids=["plain", "whitening"])
def model(request, disturb):
    model = disturb(make(whitening=request.param), deviation=0.1).double()
    if request.param:
        model.fit_whitening(torch.randn(50, 1, 4, 4, dtype=torch.float64).cumsum(-1))
    return model


LABELS = torch.tensor([0, 1, -1])


def test_density_is_that_of_the_change_of_variables(model):
    """Against the Jacobian of the whole map from pixels to the latents that the prior reads."""
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64) * 2 - 1
    label = torch.tensor([1])

    def latents(pixels):
        return model.encode(pixels, label)[0]

    logdet = torch.autograd.functional.jacobian(latents, image).reshape(16, 16).slogdet().logabsdet
    expected = model.prior.log_prob(latents(image), label) + logdet
    torch.testing.assert_close(model.log_prob(image, label), expected, atol=1e-8, rtol=0)
    density = model(image, label)
    torch.testing.assert_close(density.log_prior + density.logdet, density.log_prob)


@pytest.mark.parametrize(("blocks", "flips"), [(1, True), (2, False), (3, True)])
def test_the_prior_reads_against_the_last_block(blocks, flips):
    """Odd numbers of blocks end in raster order, which the prior must then reverse."""
    model = make(blocks)
    tokens = torch.arange(4.0).reshape(1, 4, 1).expand(1, 4, 4)
    assert torch.equal(model.permute(tokens), tokens.flip(1) if flips else tokens)
    assert torch.equal(make(blocks, final_permute=False).permute(tokens), tokens)


@pytest.mark.parametrize("blocks", [2, 3])
def test_samples_go_through_the_same_maps(disturb, blocks):
    """Latents drawn by the prior come back when the sample is mapped forward."""
    model = disturb(make(blocks, whitening=True), deviation=0.1).double()
    model.fit_whitening(torch.randn(50, 1, 4, 4, dtype=torch.float64).cumsum(-1))
    drawn = model.prior.sample(LABELS, generator=torch.Generator().manual_seed(1))
    images = model.sample(LABELS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.encode(images, LABELS)[0], drawn, atol=1e-8, rtol=0)


def test_encoding_is_made_of_patches_whitening_flow_and_permutation(disturb):
    model = disturb(make(blocks=3, whitening=True), deviation=0.1).double()
    images = torch.randn(50, 1, 4, 4, dtype=torch.float64).cumsum(-1)
    model.fit_whitening(images)
    whitened, first = model.whitening(patchify(images, 2))
    z, second = model.flow(whitened)
    latents, logdet = model.encode(images)
    assert torch.equal(latents, z.flip(1))
    torch.testing.assert_close(logdet, first + second)
    covariance = model.whitening(patchify(images, 2))[0].flatten(0, 1).T.cov()
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_model_without_whitening_says_so():
    with pytest.raises(ValueError, match="whitening=True"):
        make().fit_whitening(torch.zeros(2, 1, 4, 4))


class Identity(nn.Module):
    """A flow that does nothing."""

    dim, length = 4, 4

    def forward(self, x, labels=None):
        return x, x.new_zeros(len(x))


class Uniform(nn.Module):
    """The density that is constant on [-1, 1]."""

    dim, length = 4, 4

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def log_prob(self, z, labels=None):
        inside = (z.abs() <= 1).all(dim=(1, 2))
        return torch.where(inside, -16 * math.log(2.0), -math.inf)


def test_a_component_of_ones_own_can_be_used_but_not_saved_unregistered(tmp_path):
    model = Farmer(Identity(), Uniform(), image_size=4, channels=1, patch_size=2)
    with pytest.raises(TypeError, match="add Identity to"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_costs_the_logarithm_of_the_levels(levels):
    model = Farmer(Identity(), Uniform(), image_size=4, channels=1, patch_size=2, grey_levels=levels)
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    bits = model.bits_per_dim(images, draws=4)
    torch.testing.assert_close(bits.mean, torch.full((3,), math.log2(levels)))
    torch.testing.assert_close(bits.standard_error, torch.zeros(3), atol=1e-6, rtol=0)


def test_discrete_probabilities_add_up_to_at_most_one(disturb):
    """All 81 images of 2x2 pixels with three levels, against quadrature over the pixels' intervals.

    2^(-bits d) sums to at most the mass on [-1, 1]^4, and for each image the bits are the average of the log-density
    over its cell, within 5 standard errors: a false alarm has a chance below 1e-4, and the seed is fixed.
    """
    model = disturb(make(size=2, patch=1, grey_levels=3, classes=(), informative_dim=1), deviation=0.1)
    levels = torch.cartesian_prod(*[torch.arange(3)] * 4).reshape(-1, 1, 2, 2)
    images = (levels * 127.5).round().to(torch.uint8)
    bits = model.bits_per_dim(images, draws=64)
    points = 8  # of the midpoint rule, a cell and pixel
    axis = torch.linspace(-1, 1, 3 * points + 1)[:-1] + 1 / (3 * points)
    grid = torch.cartesian_prod(*[axis] * 4).reshape(-1, 1, 2, 2)
    with torch.inference_mode():
        density = torch.cat([model.log_prob(part) for part in grid.split(50_000)]).double()
    cells = rearrange(
        density, "(a i b j c k d l) -> (a b c d) (i j k l)", a=3, b=3, c=3, i=points, j=points, k=points, l=points
    )
    exact = -(cells.mean(1) + 4 * math.log(2 / 3)) / (4 * math.log(2))
    assert ((bits.mean - exact).abs() < 5 * bits.standard_error + 1e-3).all()
    mass = (cells.exp().mean(1) * (2 / 3) ** 4).sum().item()
    assert (2.0 ** (-4 * exact)).sum().item() < mass < 1


def test_bits_are_unbiased_and_their_error_is_honest(model):
    """Over 300 estimates of 4 draws, 300 of 1: means agree, and the stated error is the observed one within 15%."""
    images = torch.randint(0, 256, (1, 1, 4, 4), dtype=torch.uint8).expand(300, 1, 4, 4)
    labels = torch.zeros(300, dtype=torch.int64)
    four = model.bits_per_dim(images, labels, draws=4)
    one = model.bits_per_dim(images, labels, draws=1)
    assert one.standard_error.isnan().all()
    spread = math.sqrt(four.mean.var().item() / 300 + one.mean.var().item() / 300)
    assert abs(four.mean.mean() - one.mean.mean()).item() < 4 * spread
    assert four.standard_error.square().mean().sqrt().item() == pytest.approx(four.mean.std().item(), rel=0.15)
    nats = -four.density.log_prob / 16
    torch.testing.assert_close(four.mean, (nats - math.log(2 / 17)) / math.log(2), check_dtype=False)


@given(st.sampled_from([2, 3, 17, 100, 255, 256]))
def test_every_grey_level_survives_every_form(levels):
    model = make(grey_levels=levels)
    grey = torch.arange(levels).repeat(1, 1, 16, 1)[..., :levels]
    grey = torch.nn.functional.pad(grey, (0, 256 - levels)).reshape(-1, 1, 4, 4)
    middle = 2 * (grey + 0.5) / levels - 1
    ends = 2 * grey / (levels - 1) - 1
    for images in (middle, ends, model.to_uint8(middle), model.to_uint8(ends), model.dequantise(grey)):
        assert torch.equal(model.quantise(images), grey)
    assert model.to_uint8(ends).max() == 255


def test_training_noise():
    uniform, gaussian = make(), make(noise=["gaussian", 0.1, 0.005])
    images = torch.zeros(400, 1, 4, 4, dtype=torch.uint8)
    noised = uniform.noised(images, 0.0)
    assert noised.min() >= -1
    assert noised.max() < -1 + 2 / 17
    for progress, deviation in [(0.0, 0.1), (0.5, 0.0525), (1.0, 0.005), (2.0, 0.005)]:
        assert gaussian.noise.deviation(progress) == pytest.approx(deviation)
        noised = gaussian.noised(images, progress)
        assert noised.mean().item() == pytest.approx(1 / 17 - 1, abs=5 * deviation / 80)
        assert noised.std().item() == pytest.approx(deviation, rel=0.05)


def test_saving_keeps_every_number_and_config_json_rebuilds_the_model(disturb, tmp_path):
    model = disturb(make(blocks=3, noise=["gaussian", 0.2, 0.01], whitening=True), deviation=0.1)
    model.fit_whitening(torch.randn(50, 1, 4, 4))
    model.save_pretrained(tmp_path)
    loaded = Farmer.from_pretrained(tmp_path)
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(loaded(images, LABELS).log_prior, model(images, LABELS).log_prior)
    assert torch.equal(loaded(images, LABELS).logdet, model(images, LABELS).logdet)
    assert loaded.class_names == ["cat", "dog"]
    assert loaded.noise == TrainingNoise("gaussian", 0.2, 0.01)
    assert loaded.grey_levels == 17
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flow"]["blocks"] == 3
    again = Farmer.from_pretrained(tmp_path)
    for ours, theirs in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("missing", ["whitening.mean", "flow.blocks.0.embed.bias"])
def test_weights_that_are_incomplete_are_refused(tmp_path, missing):
    make(whitening=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=re.escape(missing)):
        Farmer.from_pretrained(tmp_path)


def test_a_push_that_fails_leaves_the_model_on_disk(tmp_path, monkeypatch):
    asked = []

    def unreachable(self, repo_id, **options):
        asked.append((repo_id, options))
        raise ConnectionError

    monkeypatch.setattr(Farmer, "push_to_hub", unreachable)
    with pytest.raises(ConnectionError):
        make().save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert asked == [("mine", {"private": True})]
    assert Farmer.from_pretrained(tmp_path / "mine").class_names == ["cat", "dog"]


def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() >= {"config.json", "model.safetensors"}

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    other = make(blocks=3)
    with pytest.raises(OSError, match="no space"):
        other.save_pretrained(tmp_path)
    other.flow = Identity()
    with pytest.raises(TypeError, match="COMPONENTS"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_config_that_names_an_unknown_component_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["flow"]["type"] = "os.system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'os\.system'; known: AutoregressiveFlow"):
        Farmer.from_pretrained(tmp_path)


def test_same_seed_same_images(model):
    draws = [model.sample(LABELS, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert model.sample(2).shape == (2, 1, 4, 4)


def test_classes_by_name_and_number():
    model = make(classes=("Cat", "dog", "10"))
    assert [model.label(name) for name in ("Cat", "cat", "dog", 1, "2", "10", "none", -1)] == [0, 0, 1, 1, 2, 2, -1, -1]
    with pytest.raises(UnknownClassError, match="no class 'cow'; known, by name or number: Cat, dog, 10"):
        model.label("cow")
    with pytest.raises(UnknownClassError):
        model.label(3)


def test_wrong_input_is_named(model):
    with pytest.raises(ValueError, match=r"\(batch, 1, 4, 4\), got \(2, 3, 4, 4\)"):
        model.log_prob(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"finite and in \[-1, 1\]"):
        model.bits_per_dim(torch.full((1, 1, 4, 4), 1.5))
    with pytest.raises(ValueError, match="finite"):
        model.bits_per_dim(torch.full((1, 1, 4, 4), math.nan))
    with pytest.raises(ValueError, match="draws"):
        model.bits_per_dim(torch.zeros(1, 1, 4, 4), draws=0)
    with pytest.raises(ValueError, match=r"uint8 or floats.*int64"):
        model.bits_per_dim(torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="the flow takes 4 of 4"):
        Farmer(model.flow, model.prior, image_size=8, channels=1, patch_size=2)
