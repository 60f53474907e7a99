"""How samples are drawn, guided or not, as the command line says it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import yaml
from farmer_guidance import PRESETS, ComponentGuidance, CosineSchedule, LinearSchedule, ResamplingGuidance

from farmer_examples.config import ConfigError, nearest, number

__all__ = ["METHODS", "SCHEDULES", "Guides", "Setting", "read_options", "settings_of"]

Guide = ResamplingGuidance | ComponentGuidance

METHODS: dict[str, type[Guide]] = {"resampling": ResamplingGuidance, "component": ComponentGuidance}

SCHEDULES = {"linear": LinearSchedule, "cosine": CosineSchedule}

POOL = 64
"""Candidates of each proposal for the redundant channels, shared by all tokens of an image. Of their number the paper
says only that it is larger than a token's."""


class Guides(NamedTuple):
    """The guides of a prior's informative and redundant channels; None for plain draws."""

    guide: Any = None
    redundant_guide: Any = None

    @property
    def need_classes(self) -> bool:
        """Whether they contrast classes with none."""
        return any(guide is not None and guide.uses_unconditional for guide in self)


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    Args:
        scale: w.
        method: a key of :data:`METHODS`: ``"resampling"``, or ``"component"`` for the naive baseline.
        preset: one of the paper's settings of resampling (Table 6), which ``options`` change.
        schedule: ``"constant"``, or a key of :data:`SCHEDULES`: the scale of the informative channels then grows from
            0 at the first token to ``scale`` at the last.
        options: further arguments of the method, such as its temperatures.
        inverse: how latents become images: a method of the flow, ``"auto"``, or ``"one-step"`` for the student.
    """

    scale: float
    method: str = "resampling"
    preset: str | None = None
    schedule: str = "constant"
    options: dict[str, Any] = field(default_factory=dict)
    inverse: str = "sequential"

    def __str__(self) -> str:
        parts = [f"w = {self.scale:.12g}", self.preset or self.method] if self.scale else ["no guidance"]
        parts += [self.schedule] if self.schedule != "constant" else []
        parts += [f"{name} {value}" for name, value in self.options.items()]
        parts += [self.inverse] if self.inverse != "sequential" else []
        return ", ".join(parts)

    def guides(self) -> Guides:
        """Return guides of both kinds of channels; that of the redundant ones resamples from one pool an image.

        Raises:
            ConfigError: if an option is unknown, of the wrong type or out of its range, or the settings contradict.
        """
        if self.preset is not None and self.method != "resampling":
            raise ConfigError("a preset is a setting of resampling: leave out the preset or the method")
        known = known_options(self.method)
        for name, value in self.options.items():
            if name not in known:
                raise ConfigError(f"{self.method} guidance has no option {name!r}{nearest(name, list(known))}")
            kinds = {float: (int, float), int: int, str: str}[type(known[name])]
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{self.method} guidance: {name} cannot be {value!r}")
        arguments = {**PRESETS.get(self.preset or "", {}), **self.options, "scale": self.scale}
        try:
            constant = METHODS[self.method](**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.method} guidance: {error}") from None
        guide = constant
        if self.schedule != "constant":
            guide = replace(constant, scale=SCHEDULES[self.schedule](0.0, self.scale))
        return Guides(guide, _of_pool(constant))


def known_options(method: str) -> dict[str, Any]:
    """Return the options of a method with their defaults."""
    return {f.name: f.default for f in fields(METHODS[method]) if f.name not in ("scale", "pooled", "exact")}


def _of_pool(guide: Guide) -> Guide:
    if isinstance(guide, ComponentGuidance):
        return guide
    counts = {
        name: getattr(guide, name) and max(POOL, getattr(guide, name))
        for name in ("conditional_candidates", "unconditional_candidates")
    }
    return replace(guide, pooled=True, **counts)


def settings_of(
    scales: list[float],
    methods: list[str],
    *,
    preset: str | None = None,
    schedule: str = "constant",
    options: dict[str, list[Any]] | None = None,
    inverses: Sequence[str] = ("sequential",),
) -> list[Setting]:
    """Return every combination, each once, with the options that matter to it.

    At scale 0 only the temperatures of the proposals matter.

    Args:
        scales: guidance scales.
        methods: of guidance; the preset is of resampling.
        preset: see :class:`Setting`.
        schedule: see :class:`Setting`.
        options: values for each option; of the methods, those that have it take it.
        inverses: see :class:`Setting`.

    Raises:
        ConfigError: if a combination cannot be.
    """
    options = options or {}
    for name, values in options.items():
        if not any(name in known_options(method) for method in methods):
            known = list(dict.fromkeys(known for method in methods for known in known_options(method)))
            raise ConfigError(f"{' and '.join(methods)} guidance has no option {name!r}{nearest(name, known)}")
        if not values:
            raise ConfigError(f"the list of values of {name} is empty")
    chosen: list[Setting] = []
    drawn = itertools.product(scales, methods, itertools.product(*options.values()), inverses)
    for scale, method, values, inverse in drawn:
        known = known_options(method)
        given = {name: value for name, value in zip(options, values, strict=True) if name in known}
        setting = Setting(scale, method, preset if method == "resampling" else None, schedule, given, inverse)
        setting.guides()
        if scale == 0:
            given = {**PRESETS.get(setting.preset or "", {}), **given}
            temperatures = ("weight_temperature", "scale_temperature")
            given = {name: given[name] for name in temperatures if given.get(name, 1) != 1}
            setting = Setting(0.0, options=given, inverse=inverse)
        if setting not in chosen:
            chosen.append(setting)
    return chosen


def read_options(texts: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts, the values in YAML.

    Raises:
        ConfigError: if a text is something else.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = None
        if not equals or read is None:
            raise ConfigError(f"{text}: expected KEY=VALUE, as in scale_temperature=0.9")
        options[key] = [number(item) for item in read] if isinstance(read, list) else number(read)
    return options
