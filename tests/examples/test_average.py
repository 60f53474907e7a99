"""The moving average of the weights."""

import pytest
import torch
from farmer_examples.average import Average
from torch import nn


def test_the_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    average, expected = Average(model, 0.5), None
    average.follow(model)
    for n in range(20):
        nn.init.constant_(model.weight, float(n * n))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n * n) if n == 0 else decay * expected + (1 - decay) * n * n
        with average.whole() as averaged:
            assert averaged.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 19 * 19


def test_without_decay_the_newest_weights_stand_for_the_average_and_take_no_memory():
    model = nn.Linear(3, 2)
    average = Average(model, 0.0)
    average.follow(model)
    with torch.no_grad():
        model.weight.add_(1)
    average.update()
    with average.whole() as averaged:
        assert averaged.weight.data_ptr() == model.weight.data_ptr()
        assert not averaged.weight.requires_grad
    assert model.weight.requires_grad
    assert average.kept == {}


def test_the_average_has_weights_only_while_they_are_asked_for_and_the_buffers_of_training():
    model = nn.BatchNorm1d(3)
    average = Average(model, 0.9)
    average.follow(model)
    model.running_mean.fill_(5)
    assert average.module.weight.is_meta
    with average.whole() as averaged:
        assert torch.equal(averaged.weight, torch.ones(3))
        assert torch.equal(averaged.running_mean, torch.full((3,), 5.0))
        assert not averaged.training
    assert average.module.weight.is_meta
