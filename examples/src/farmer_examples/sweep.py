"""``farmer sweep``: samples at many guidance settings, measured and laid side by side."""

from __future__ import annotations

import csv
import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from farmer_examples.data import ImageData
from farmer_examples.guidance import Guides, make_guides
from farmer_examples.judge import Judge, Quality
from farmer_examples.model import Farmer
from farmer_examples.pictures import grid, read_picture, save_image, save_sheet
from farmer_examples.sampling import SamplingError, check_empty, draw
from farmer_examples.storage import published

__all__ = ["Setting", "settings_of", "sweep", "table"]

COLUMNS = ["setting", *Quality._fields, "log_likelihood", "effective_candidates", "fell_back", "seconds"]
GRID = 10
"""Images in a row of a picture; the contact sheet shows two rows of each setting."""
FEWEST = 10
REAL = 10_000
"""Real images that samples are measured against, at most."""


@dataclass(frozen=True)
class Setting:
    """One way to guide; the arguments of :func:`~farmer_examples.guidance.make_guides`."""

    scale: float
    method: str = "resampling"
    preset: str | None = None
    schedule: str = "constant"
    options: dict[str, Any] = field(default_factory=dict)

    def guides(self) -> Guides:
        """Return the guides; errors as there."""
        return make_guides(
            self.scale, preset=self.preset, method=self.method, schedule=self.schedule, options=self.options
        )

    def __str__(self) -> str:
        parts = [f"w = {self.scale:g}", self.preset or self.method] if self.scale else ["no guidance"]
        parts += [self.schedule] if self.schedule != "constant" and self.scale else []
        return ", ".join(parts + [f"{name} {value}" for name, value in self.options.items()])


def settings_of(
    scales: list[float],
    methods: list[str],
    *,
    preset: str | None = None,
    schedule: str = "constant",
    options: dict[str, list[Any]] | None = None,
) -> list[Setting]:
    """Return every combination, each once: at scale 0 all methods are the same.

    Args:
        scales: guidance scales.
        methods: of guidance.
        preset: of resampling; stands below the options.
        schedule: of the scale.
        options: values for each option of the method.

    Raises:
        ConfigError: if a combination cannot be.
    """
    options = options or {}
    settings = []
    for scale, values in itertools.product(scales, itertools.product(*options.values())):
        for method in methods if scale else methods[:1]:
            chosen = dict(zip(options, values, strict=True))
            setting = Setting(scale, method, preset if method == "resampling" else None, schedule, chosen)
            setting.guides()
            if setting not in settings:
                settings.append(setting)
    return settings


class Effort:
    """Stands for a guide, and keeps what its draws say about the candidates."""

    def __init__(self, guide: Any) -> None:
        self.guide = guide
        self.uses_unconditional = guide.uses_unconditional
        self.size: list[Tensor] = []
        self.fell_back: list[Tensor] = []

    def __call__(self, conditional: Any, unconditional: Any, sample_shape: Any = (), **options: Any) -> Tensor:
        """Draw, see :meth:`farmer_guidance.ResamplingGuidance.draw`."""
        drawn = self.guide.draw(conditional, unconditional, sample_shape, **options)
        self.size.append(drawn.effective_sample_size.flatten())
        self.fell_back.append(drawn.fell_back.flatten())
        sample: Tensor = drawn.sample
        return sample

    def figures(self) -> dict[str, float]:
        """Return the mean number of effective candidates of a draw, and the share of draws that fell back."""
        size = torch.cat(self.size)
        return {
            "effective_candidates": size[size.isfinite()].mean().item(),
            "fell_back": torch.cat(self.fell_back).float().mean().item(),
        }


def sweep(
    model: Farmer,
    settings: list[Setting],
    output: Path,
    *,
    judge: Judge,
    real: ImageData,
    count: int,
    seed: int = 0,
    batch_size: int = 100,
    of: str = "",
) -> list[dict[str, Any]]:
    """Draw images at every setting from the same labels and seed, measure them, and lay them side by side.

    Leaves ``sweep.csv``, ``sheet.png`` and a picture of each setting in the folder. Each setting is kept as soon as it
    is done; called again for the same model, seed and count, a sweep goes on where it was interrupted, and further
    settings join it.

    Args:
        model: on any device.
        settings: see :func:`settings_of`.
        output: a folder of its own.
        judge: of images like the model's.
        real: images to measure distances from.
        count: images at each setting; classes by turns.
        seed: of the images.
        batch_size: images drawn at once.
        of: what the model is called; a folder holds the sweeps of one.

    Returns:
        A row for each setting: what was set; ``consistency``, ``frechet``, ``precision``, ``recall`` (see
        :class:`~farmer_examples.judge.Quality`); ``log_likelihood``, the median over samples of log p(x|c) in nats
        per dimension; ``effective_candidates`` and ``fell_back`` of resampling; ``seconds`` an image.

    Raises:
        SamplingError: if the folder holds something else, the images are too few, or a setting's samples are not
            finite.
    """
    if count < FEWEST:
        raise SamplingError(f"distances need at least {FEWEST} images at each setting, got {count}")
    identity = {"model": of, "count": count, "seed": seed, "batch_size": batch_size}
    rows = _begun(output, identity)
    classes = len(model.class_names)
    labels = torch.arange(count) % classes if classes else torch.full((count,), -1)
    positions = real.spread(REAL)
    real_features, _ = judge.look(real.__getitems__(positions)[0])
    with tqdm(settings, unit="setting") as bar:
        for setting in bar:
            name = str(setting)
            bar.set_postfix_str(name)
            if name in rows:
                continue
            start = time.perf_counter()
            guides = setting.guides()
            effort = Effort(guides.guide) if hasattr(guides.guide, "draw") and setting.scale else None
            images, density = draw(
                model, labels, seed=seed, batch_size=batch_size, guides=guides._replace(guide=effort or guides.guide)
            )
            seconds = (time.perf_counter() - start) / count
            quality = judge.quality(images, labels, real_features)
            rows[name] = {
                "setting": name,
                **quality._asdict(),
                "log_likelihood": (density.log_prob / model.dimensions).median().item(),
                **(effort.figures() if effort else {}),
                "seconds": seconds,
            }
            picture = grid(images[: GRID**2], GRID, scale=max(1, 64 // model.image_size))
            save_image(picture, _picture(output, name))
            with published(output / "sweep.json") as partial:
                partial.write_text(json.dumps({**identity, "rows": rows}, indent=2) + "\n")
    with published(output / "sweep.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows.values())
    save_sheet([(_title(row), _shown(output, row)) for row in rows.values()], output / "sheet.png")
    return [rows[str(setting)] for setting in settings]


def _begun(output: Path, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a sweep that was begun in the folder."""
    file = output / "sweep.json"
    if not file.exists():
        check_empty(output)
        return {}
    try:
        kept = json.loads(file.read_text())
        rows: dict[str, dict[str, Any]] = kept.pop("rows")
    except (ValueError, KeyError, AttributeError) as error:
        raise SamplingError(f"{file} cannot be read: {error}; remove the folder to begin again") from None
    if kept != identity:
        raise SamplingError(f"{output} holds a sweep of {kept}, and this one is of {identity}: choose another folder")
    return {name: row for name, row in rows.items() if _picture(output, name).exists()}


def _picture(output: Path, name: str) -> Path:
    return output / "settings" / f"{name.replace(', ', '_').replace(' ', '')}.png"


def _shown(output: Path, row: dict[str, Any]) -> Tensor:
    picture = read_picture(_picture(output, row["setting"]))
    side = (picture.shape[-1] - 2) // GRID  # an image with its border
    return picture[:, : 2 * side + 2]


def _title(row: dict[str, Any]) -> str:
    consistency = "" if math.isnan(row["consistency"]) else f"{row['consistency']:.1%} consistent, "
    return f"{row['setting']}: {consistency}Frechet {row['frechet']:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a sweep as text."""
    lines = [f"{'':44s} consistency  Frechet  precision  recall  log-lik.  candidates  fell back"]
    for row in rows:
        effort = "".join(
            f"{row[name]:{width}}" if name in row else " " * 12
            for name, width in [("effective_candidates", "12.1f"), ("fell_back", "11.2%")]
        )
        lines.append(
            f"{row['setting']:44s} {row['consistency']:11.1%} {row['frechet']:8.2f} {row['precision']:10.3f} "
            f"{row['recall']:7.3f} {row['log_likelihood']:9.3f}{effort}"
        )
    return "\n".join(lines)
