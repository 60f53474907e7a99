"""Scores and what tells of mixtures that collapse."""

import math

import pytest
import torch
from farmer_examples.config import load_config
from farmer_examples.evaluation import evaluate, mixture_figures

SMALL = [
    "model.flow={width: 16, blocks: 2, layers: 1, head_dim: 8}",
    "model.prior={width: 16, layers: 1, head_dim: 8, informative_dim: 3, components: 8, redundant_components: 4}",
]


@pytest.fixture
def model(disturb):
    return disturb(load_config("digits", SMALL).build([str(digit) for digit in range(10)]), deviation=0.1)


@pytest.fixture(scope="module")
def data():
    return load_config("digits").data.load("test")


def test_the_score_does_not_depend_on_the_batches(model, data):
    """Each image has noise of its own; sums are rounded in another order."""
    scores = [evaluate(model, data, batch_size=size, limit=50, draws=2) for size in (7, 50)]
    assert scores[0]["held_out"] == pytest.approx(scores[1]["held_out"], rel=1e-6)
    assert scores[0]["logdet_max"] >= scores[0]["logdet"]
    assert evaluate(model, data, limit=50, draws=2, seed=1)["held_out"] != scores[0]["held_out"]


def test_mixtures_that_collapse_are_told(model, data):
    """Equal weights are all in use; a logit far above the others leaves one component."""
    for head, name, components in [(model.prior.informative, "", 8), (model.prior.redundant, "shared_", 4)]:
        with torch.no_grad():
            head.linear.weight[:components] = 0
            head.linear.bias[:components] = 0
        assert mixture_figures(model, data)[f"{name}components"] == pytest.approx(components, rel=1e-4)
        with torch.no_grad():
            head.linear.bias[0] = 20
            head.linear.weight[-1] = 0
            head.linear.bias[-1] = -50
        figures = mixture_figures(model, data)
        assert figures[f"{name}components"] == pytest.approx(1, abs=1e-3)
        smallest = math.exp(-8 * math.tanh(50 / 8))
        assert figures[f"{name}smallest_scale"] == pytest.approx(smallest, rel=1e-3)
