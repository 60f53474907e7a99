"""What a sweep measures, and which settings it takes."""

import math

import pytest
import torch
from farmer_examples import judge as judge_module
from farmer_examples.config import ConfigError
from farmer_examples.data import DataError, ImageData
from farmer_examples.guidance import Setting, settings_of
from farmer_examples.judge import Judge, judge_of


class Pixels(Judge):
    """A judge whose features are pixels, and whose logits favour the class that the first pixel names."""

    def __init__(self):
        super().__init__(2, 1, 3)

    def forward(self, images):
        features = images.flatten(1).float()
        return features, torch.nn.functional.one_hot(features[:, 0].long(), 256)[:, :3].float()


def images(*shape, low, high):
    return torch.randint(low, high, (*shape, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_quality_of_known_samples():
    """Shifted samples are their shift squared away, and collapsed ones are within the real images, but not they in
    them; a real image is its own class by its first pixel.
    """
    judge, real = Pixels(), images(400, low=0, high=60)
    features, labels = judge.look(real)
    same = judge.quality(real, labels, features)
    assert same.consistency == 1
    assert same.frechet == pytest.approx(0, abs=1e-4)
    assert same.precision == same.recall == 1
    shifted = judge.quality(real + 150, labels, features)
    assert shifted.frechet == pytest.approx(4 * 150**2, rel=1e-3)
    assert shifted.precision == shifted.recall == 0
    middle = (real[:50] // 12) + 28  # real images spread over 0..59, these over 28..32
    collapsed = judge.quality(middle, torch.full((50,), -1), features)
    assert math.isnan(collapsed.consistency)
    assert collapsed.precision > 0.9
    assert collapsed.recall < 0.1


def test_a_judge_learns_and_is_kept(tmp_path, monkeypatch):
    """Bright against dark: nearly always right, where chance is one half; the second time without training."""
    monkeypatch.setattr(judge_module, "MOST_EPOCHS", 5)
    dark, bright = images(128, low=0, high=100), images(128, low=156, high=256)
    data = ImageData(torch.cat([dark, bright]), torch.arange(2).repeat_interleave(128), ("dark", "bright"))
    file = tmp_path / "judge.safetensors"
    judge, accuracy = judge_of(file, data, data, torch.device("cpu"))
    assert accuracy > 0.95
    before = file.stat().st_mtime_ns
    again, kept = judge_of(file, data, data, torch.device("cpu"))
    assert kept == accuracy
    assert file.stat().st_mtime_ns == before
    assert torch.equal(judge.look(dark)[0], again.look(dark)[0])
    other = ImageData(torch.cat([bright, dark]), data.labels, ("dark", "bright"))
    with pytest.raises(OSError, match="judges other images; name another file with --judge"):
        judge_of(file, other, data, torch.device("cpu"))
    with pytest.raises(DataError, match="two classes or more"):
        judge_of(file, ImageData(dark, torch.full((128,), -1)), data, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"images must be \(batch, 1, 2, 2\), got \(3, 1, 4, 4\)"):
        judge.look(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))


def test_settings_are_all_that_differ():
    """Options go to the methods that have them; at scale 0 only the proposals' temperatures matter."""
    options = {"conditional_candidates": [5, 32], "scale_temperature": [1.0, 0.9]}
    names = [str(setting) for setting in settings_of([0.0, 2.0], ["resampling", "component"], options=options)]
    assert names == [
        "no guidance",
        "no guidance, scale_temperature 0.9",
        "w = 2, resampling, conditional_candidates 5, scale_temperature 1.0",
        "w = 2, resampling, conditional_candidates 5, scale_temperature 0.9",
        "w = 2, resampling, conditional_candidates 32, scale_temperature 1.0",
        "w = 2, resampling, conditional_candidates 32, scale_temperature 0.9",
        "w = 2, component, scale_temperature 1.0",
        "w = 2, component, scale_temperature 0.9",
    ]
    of_preset = settings_of([0.0, 2.5], ["resampling"], preset="1.1b-p16")
    assert [str(s) for s in of_preset] == ["no guidance, scale_temperature 0.9", "w = 2.5, 1.1b-p16"]
    assert of_preset[1].guides().guide.density_weight_temperature == 0.2
    with pytest.raises(ConfigError, match="did you mean 'weighting'"):
        settings_of([1.0], ["resampling", "component"], options={"weigthing": ["balance"]})


def test_redundant_channels_are_guided_at_the_same_scale_from_a_pool():
    guide, redundant = Setting(2.0, schedule="linear", options={"conditional_candidates": 100}).guides()
    assert (guide.scale(0.0), guide.scale(1.0), redundant.scale) == (0, 2, 2)
    assert (guide.conditional_candidates, redundant.conditional_candidates) == (100, 100)
    assert (guide.unconditional_candidates, redundant.unconditional_candidates) == (5, 64)
    assert redundant.pooled
    assert not guide.pooled
