"""``farmer sweep``: samples drawn in many ways, measured and laid side by side."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from farmer_examples.data import ImageData
from farmer_examples.guidance import Setting
from farmer_examples.judge import Judge, Quality, judge_of
from farmer_examples.model import Farmer, Inverse
from farmer_examples.pictures import grid, read_picture, save_image, save_sheet
from farmer_examples.sampling import SamplingError, check_empty, draw
from farmer_examples.storage import published

__all__ = ["stamp", "sweep", "table"]

EFFORT = ["effective_candidates", "from_conditional", "fell_back"]
COLUMNS = [
    "name",
    "scale",
    "method",
    "preset",
    "schedule",
    "options",
    "inverse",
    "student",
    *Quality._fields,
    "log_likelihood",
    *EFFORT,
    "seconds",
]

GRID = 10
"""Images in a row of a picture; the contact sheet shows two rows of each setting."""

FEWEST = 10
"""Images below which features have neither third neighbours nor a covariance worth the name."""

REAL = 10_000
"""Real images that samples are measured against, at most."""

LONGEST = 100
"""Characters of a setting's name in the name of its picture."""

HELD_OUT = "real images, held out"


class Effort:
    """Stands for a resampling guide, and keeps what its draws say about the candidates."""

    def __init__(self, guide: Any) -> None:
        self.guide = guide
        self.uses_unconditional = guide.uses_unconditional
        self.draws: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, conditional: Any, unconditional: Any, sample_shape: Any = (), **options: Any) -> Tensor:
        """Draw, see :meth:`farmer_guidance.ResamplingGuidance.draw`."""
        drawn = self.guide.draw(conditional, unconditional, sample_shape, **options)
        size = drawn.effective_sample_size
        resampled = size.isfinite()
        self.draws.append((size[resampled], drawn.from_conditional[resampled], drawn.fell_back[resampled]))
        sample: Tensor = drawn.sample
        return sample

    def figures(self) -> dict[str, float]:
        """Return the means over resampled draws of what :data:`EFFORT` names; nothing if there were none."""
        size, conditional, fell_back = (torch.cat(parts).float() for parts in zip(*self.draws, strict=True))
        if not len(size):
            return {}
        return dict(zip(EFFORT, (f.mean().item() for f in (size, conditional, fell_back)), strict=True))


def sweep(
    model: Farmer,
    settings: list[Setting],
    output: Path,
    *,
    train: ImageData,
    held_out: ImageData,
    judge_file: Path,
    count: int,
    seed: int = 0,
    batch_size: int = 100,
    origin: str = "",
    inverses: Mapping[str, Inverse] | None = None,
    student: str = "",
) -> list[dict[str, Any]]:
    """Draw images at every setting from the same labels and seed, measure them, and lay them side by side.

    Leaves ``sweep.csv``, ``sheet.png`` and a picture of each setting in the folder, and renews them after each
    setting. Called again for the same model, judge, seed, count and batch size, a sweep goes on where it was
    interrupted, and further settings join it. A setting whose samples are not finite is reported, and tried again the
    next time.

    Args:
        model: on any device.
        settings: see :func:`~farmer_examples.guidance.settings_of`.
        output: a folder of its own.
        train: real images with their classes, to measure distances from and to train the judge on.
        held_out: more of them, the judge's test, and measured as samples are, for comparison. Where they are fewer
            than ``count`` their distance comes out larger than that of as many.
        judge_file: see :func:`~farmer_examples.judge.judge_of`.
        count: images at each setting; classes by turns.
        seed: of the images.
        batch_size: images drawn at once.
        origin: what tells the model and its data from others; a folder holds the sweeps of one.
        inverses: what the settings' ``inverse`` stand for where that is no method of the flow.
        student: what tells the student among these from others: settings with another are measured anew.

    Returns:
        A row for each setting, after one of held-out real images: what was set; ``consistency``, ``frechet``,
        ``precision``, ``recall`` (see :class:`~farmer_examples.judge.Quality`); ``log_likelihood``, the median over
        samples of log p(x|c) in nats per dimension; of resampling the mean number of effective candidates of the
        informative channels' draws, the share of draws that the conditional proposed, and the share that fell back;
        ``seconds`` an image. Or ``failed``, why there are no samples.

    Raises:
        SamplingError: if the folder holds something else, or the images are too few.
        DataError: if the real images have no classes.
    """
    fewest = min(count, len(train), len(held_out))
    if fewest < FEWEST:
        raise SamplingError(f"distances need at least {FEWEST} images of each kind, and there are {fewest}")
    begun = _begun(output)
    judge, accuracy = judge_of(judge_file, train, held_out, model.device)
    identity = {"model": origin, "judge": stamp(judge_file), "count": count, "seed": seed, "batch_size": batch_size}
    if begun is not None and begun["of"] != identity:
        raise SamplingError(f"{output} holds a sweep of {begun['of']}, and this is one of {identity}: name another")
    rows: dict[str, dict[str, Any]] = {} if begun is None else begun["rows"]
    if student:
        rows = {name: row for name, row in rows.items() if row.get("student", "") in ("", student)}
    _keep(output, identity, rows)

    labels = model.every_class(count).cpu()
    real_features, _ = judge.look(train.__getitems__(train.spread(REAL))[0])
    if HELD_OUT not in rows:
        images, asked = held_out.__getitems__(held_out.spread(count))
        quality = judge.quality(images, asked, real_features)
        _picture(output, HELD_OUT, images)
        rows[HELD_OUT] = {"name": HELD_OUT, **quality._asdict(), "consistency": accuracy}
    failed: dict[str, dict[str, Any]] = {}
    with tqdm(settings, unit="setting") as bar:
        for setting in bar:
            name = str(setting)
            bar.set_postfix_str(name)
            if name in rows:
                continue
            try:
                inverse = (inverses or {}).get(setting.inverse, setting.inverse)
                row = _measured(model, setting, output, judge, real_features, labels, seed, batch_size, inverse)
                rows[name] = {**row, "student": student if setting.inverse == "one-step" else ""}
            except SamplingError as error:
                failed[name] = {"name": name, "failed": str(error)}
            _keep(output, identity, rows)
    return [rows[HELD_OUT], *({**rows, **failed}[str(setting)] for setting in settings)]


def _measured(
    model: Farmer,
    setting: Setting,
    output: Path,
    judge: Judge,
    real_features: Tensor,
    labels: Tensor,
    seed: int,
    batch_size: int,
    inverse: Inverse,
) -> dict[str, Any]:
    """Return the row of a setting."""
    start = time.perf_counter()
    guides = setting.guides()
    effort = Effort(guides.guide) if setting.method == "resampling" else None
    if effort is not None:
        guides = guides._replace(guide=effort)
    images, density = draw(model, labels, seed=seed, batch_size=batch_size, guides=guides, inverse=inverse)
    seconds = (time.perf_counter() - start) / len(labels)
    _picture(output, str(setting), images)
    return {
        "name": str(setting),
        **asdict(setting),
        **judge.quality(images, labels, real_features)._asdict(),
        "log_likelihood": (density.log_prob / model.dimensions).median().item(),
        **(effort.figures() if effort is not None else {}),
        "seconds": seconds,
    }


def stamp(file: Path) -> str:
    """Return what tells a file from another that takes its place."""
    status = file.stat()
    return f"{file.resolve()}, {status.st_size} bytes of {status.st_mtime_ns}"


def _begun(output: Path) -> dict[str, Any] | None:
    """Return what a sweep that was begun in the folder has kept."""
    file = output / "sweep.json"
    if not file.exists():
        check_empty(output)
        return None
    try:
        kept = json.loads(file.read_text())
        of = dict(kept["of"])
        rows = {row["name"]: {**row, "frechet": float(row["frechet"])} for row in kept["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SamplingError(f"{file} cannot be read ({error!r}): remove {output} to begin again") from None
    return {"of": of, "rows": {name: row for name, row in rows.items() if _file(output, name).exists()}}


def _keep(output: Path, identity: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Write down the sweep, its table and its contact sheet."""
    with published(output / "sweep.json") as partial:
        partial.write_text(json.dumps({"of": identity, "rows": list(rows.values())}, indent=2) + "\n")
    with published(output / "sweep.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({**row, "options": json.dumps(row.get("options", {}))} for row in rows.values())
    if rows:
        titles = [f"{name}: {row['consistency']:.1%}, Frechet {row['frechet']:.2f}" for name, row in rows.items()]
        shown = [_shown(read_picture(_file(output, name))) for name in rows]
        save_sheet(list(zip(titles, shown, strict=True)), output / "sheet.png")


def _file(output: Path, name: str) -> Path:
    short = name.replace(", ", "_").replace(" ", "")
    if len(short) > LONGEST:
        short = f"{short[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return output / "settings" / f"{short}.png"


def _picture(output: Path, name: str, images: Tensor) -> None:
    save_image(grid(images[: GRID**2], GRID), _file(output, name))


def _shown(picture: Tensor) -> Tensor:
    side = (picture.shape[-1] - 2) // GRID  # an image with its border
    return picture[:, : 2 * side + 2]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a sweep as text."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}s} consistency  Frechet  precision  recall  log-lik.  candidates  fell back"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:{width}s} {row['failed']}")
            continue
        figures = [("consistency", "11.1%"), ("frechet", "8.2f"), ("precision", "10.3f"), ("recall", "7.3f")]
        figures += [("log_likelihood", "9.3f"), ("effective_candidates", "11.1f"), ("fell_back", "10.2%")]
        cells = (f"{row[n]:{form}}" if n in row else " " * int(form.partition(".")[0]) for n, form in figures)
        lines.append(f"{row['name']:{width}s} {' '.join(cells)}")
    return "\n".join(lines)
