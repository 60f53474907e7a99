"""One-step inverses of autoregressive flows, learned by distillation."""

from farmer_distill.loss import block_errors, distillation_loss
from farmer_distill.student import OneStepInverse

__all__ = ["OneStepInverse", "block_errors", "distillation_loss"]
