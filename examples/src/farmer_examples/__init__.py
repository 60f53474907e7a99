"""Train FARMER on images, draw samples and score exact likelihoods."""

from farmer_examples.model import BitsPerDim, Density, Farmer

__all__ = ["BitsPerDim", "Density", "Farmer"]
