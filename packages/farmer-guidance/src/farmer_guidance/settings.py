"""What all guides are set by."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields

from farmer_guidance.schedules import Scale, Temperature, check, is_zero, temperature_at

__all__ = ["GuidanceSettings"]


@dataclass(frozen=True, eq=False)
class GuidanceSettings:
    """The scale and the temperatures of a guide; a field whose name ends in ``temperature`` is one.

    Args:
        scale: w, at least 0.
        weight_temperature: a factor on the logits of mixture weights.
        scale_temperature: a factor on standard deviations.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if it is neither number, tensor nor function.
    """

    scale: Scale
    _: KW_ONLY
    weight_temperature: Temperature = 1.0
    scale_temperature: Temperature = 1.0

    def __post_init__(self) -> None:
        check("scale", self.scale)
        for name in self._temperatures():
            check(name, getattr(self, name), positive=True)

    @property
    def uses_unconditional(self) -> bool:
        """Whether the unconditional matters: not where the scale is 0 throughout."""
        return not is_zero(self.scale)

    def _temperatures(self) -> list[str]:
        return [field.name for field in fields(self) if field.name.endswith("temperature")]

    def _temperatures_at(self, progress: float) -> dict[str, float]:
        """Return every temperature at a position, 0 to 1."""
        return {name: temperature_at(name, getattr(self, name), progress) for name in self._temperatures()}
