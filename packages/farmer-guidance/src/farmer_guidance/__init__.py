"""Classifier-free guidance for any pair of torch distributions."""

from farmer_guidance.component import ComponentGuidance
from farmer_guidance.resampling import PRESETS, GuidedDraw, ResamplingGuidance
from farmer_guidance.schedules import CosineSchedule, LinearSchedule

__all__ = ["PRESETS", "ComponentGuidance", "CosineSchedule", "GuidedDraw", "LinearSchedule", "ResamplingGuidance"]
