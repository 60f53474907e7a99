"""Autoregressive mixture priors over sequences of continuous tokens."""

from farmer_ar.mixture import DiagonalMixture
from farmer_ar.prior import LatentPrior

__all__ = ["DiagonalMixture", "LatentPrior"]
