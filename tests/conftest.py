"""What all tests share: one seed, and models whose fresh identity has been disturbed."""

import pytest
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("project", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def disturb():
    """Return a function that gives every parameter a random value, so that no law holds for being zero."""

    def disturbed(module: nn.Module, deviation: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
        return module

    return disturbed
