"""One-step inverses of autoregressive flows, learned by distillation."""

from farmer_distill.loss import block_errors, distillation_loss
from farmer_distill.student import InverseBlock, OneStepInverse

__all__ = ["InverseBlock", "OneStepInverse", "block_errors", "distillation_loss"]
