"""How samples are guided, as the command line says it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

from farmer_guidance import ComponentGuidance, CosineSchedule, LinearSchedule, ResamplingGuidance

from farmer_examples.config import ConfigError, nearest

__all__ = ["METHODS", "SCHEDULES", "Guide", "Guides", "make_guides"]

Guide = ResamplingGuidance | ComponentGuidance

METHODS: dict[str, type[Guide]] = {"resampling": ResamplingGuidance, "component": ComponentGuidance}

SCHEDULES = {"linear": LinearSchedule, "cosine": CosineSchedule}

POOL = 64
"""Candidates of each proposal for the redundant channels, shared by all tokens of an image. Of their number the paper
says only that it is larger than a token's."""


class Guides(NamedTuple):
    """The guides of a prior's informative and redundant channels; None for plain draws."""

    guide: Guide | None = None
    redundant_guide: Guide | None = None


def make_guides(
    scale: float | None = None,
    *,
    preset: str | None = None,
    method: Literal["resampling", "component"] = "resampling",
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    options: dict[str, Any] | None = None,
) -> Guides:
    """Return guides of both kinds of channels; that of the redundant ones resamples from one pool an image.

    Args:
        scale: w; the preset's if None, and no guidance if there is no preset either.
        preset: one of the paper's settings (Table 6), which ``options`` change.
        method: ``"resampling"``, or ``"component"`` for the naive baseline.
        schedule: let the scale of the informative channels grow from 0 at the first token to ``scale`` at the last.
        options: further arguments of the method, such as its temperatures.

    Raises:
        ConfigError: if an option is unknown, of the wrong type or out of its range, or the settings contradict.
    """
    options = options or {}
    if scale is None and preset is None:
        if options or schedule != "constant":
            raise ConfigError("guidance options and schedules need a guidance scale or a preset")
        return Guides()
    known = {f.name: f.default for f in fields(METHODS[method]) if f.name not in ("scale", "pooled", "exact")}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{method} guidance has no option {name!r}{nearest(name, list(known))}")
        if isinstance(value, bool) or not isinstance(value, int if type(known[name]) is int else float | int | str):
            raise ConfigError(f"{method} guidance: {name} cannot be {value!r}")
    if preset is not None and method != "resampling":
        raise ConfigError("a preset is a setting of resampling: leave out the preset or the method")
    try:
        if preset is not None:
            guide: Guide = ResamplingGuidance.preset(preset, **options)
        else:
            guide = METHODS[method](0.0, **options)
        constant = replace(guide, scale=guide.scale if scale is None else scale)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{method} guidance: {error}") from None
    guide = constant
    if schedule != "constant":
        guide = replace(constant, scale=SCHEDULES[schedule](0.0, constant.scale))
    return Guides(guide, _of_pool(constant))


def _of_pool(guide: Guide) -> Guide:
    if isinstance(guide, ComponentGuidance):
        return guide
    counts = {
        name: getattr(guide, name) and max(POOL, getattr(guide, name))
        for name in ("conditional_candidates", "unconditional_candidates")
    }
    return replace(guide, pooled=True, **counts)
