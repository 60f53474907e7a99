"""What a run keeps on disk. Everything appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Checkpoint", "checkpoints", "clear", "find_model", "prune", "published", "set_aside"]

METRICS = "metrics.json"


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a name to write a file or folder under, which then takes the place of ``path`` in one rename.

    Whatever stops the writing, also SIGKILL, leaves ``path`` as it was. Only a folder that takes the place of another
    needs two renames, and for an instant neither is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers choose the format by it
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    _remove(partial)  # of a process that was killed and had the same number
    try:
        yield partial
        _publish(partial, path)
    finally:
        _remove(partial)


def _publish(partial: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # a folder cannot be replaced by a rename
        old = _aside(path)
        partial.replace(path)
        shutil.rmtree(old)
    else:
        partial.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Rename a folder that is to go, so that a removal that is killed midway leaves nothing that looks whole."""
    aside = path.with_name(f".partial-{os.getpid()}-old-{path.name}")
    _remove(aside)
    return path.rename(aside)


class Checkpoint:
    """A folder ``step-XXXXXXXX``: ``model/``, the averaged weights; ``state/``, to resume from; the metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.rpartition("-")[2])
        self.model, self.state = path / "model", path / "state"

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures at this step, none if they are damaged; ``held_out`` is the score, if there is one.

        The lower the better.
        """
        try:
            metrics: dict[str, Any] = json.loads((self.path / METRICS).read_text())
        except ValueError:
            return {}
        return metrics

    @classmethod
    def unpublished(cls, run: Path, step: int) -> Checkpoint:
        """Return the checkpoint that is to be written at a step: hidden, and the same for all processes that write."""
        return cls(run / "checkpoints" / f".partial-step-{step:08d}")

    def begin(self) -> None:
        """Make the folder, empty."""
        self.discard()
        self.path.mkdir(parents=True)

    def discard(self) -> None:
        """Remove the folder, if there is one."""
        _remove(self.path)

    def publish(self, metrics: dict[str, Any]) -> None:
        """Let the checkpoint, which is complete but for its metrics, join the run."""
        (self.path / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        _publish(self.path, self.path.with_name(f"step-{self.step:08d}"))


def checkpoints(run: Path) -> list[Checkpoint]:
    """Return a run's complete checkpoints, oldest first."""
    return [Checkpoint(path) for path in sorted((run / "checkpoints").glob("step-*")) if (path / METRICS).is_file()]


def best(run: Path) -> Checkpoint | None:
    """Return the checkpoint with the lowest held-out score; None if none has a score."""
    scored = [checkpoint for checkpoint in checkpoints(run) if "held_out" in checkpoint.metrics]
    return min(scored, key=lambda checkpoint: checkpoint.metrics["held_out"], default=None)


def set_aside(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint that cannot be read to ``damaged-step-XXXXXXXX``, which is no longer one of its run."""
    target = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
    _remove(target)
    checkpoint.path.rename(target)


def prune(run: Path, keep: int) -> None:
    """Point ``best`` at the best checkpoint's model, and delete all but it and the ``keep`` newest."""
    winner = best(run)
    if winner is not None:
        with published(run / "best") as link:
            link.symlink_to(winner.model.relative_to(run), target_is_directory=True)
    for old in checkpoints(run)[:-keep]:
        if winner is None or old.path != winner.path:
            shutil.rmtree(_aside(old.path))
    clear(run)


def clear(run: Path) -> None:
    """Remove what a run that was killed while it wrote has left of a checkpoint."""
    for partial in (run / "checkpoints").glob(".partial-*"):
        shutil.rmtree(partial)


def find_model(path: str | Path) -> Path:
    """Return the folder of the model that a path stands for: a run's best, or a saved model itself.

    Raises:
        FileNotFoundError: if there is none, saying what was looked for.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    winner = best(path) if path.is_dir() else None
    if winner is None:
        raise FileNotFoundError(
            f"{path} is neither a run with a checkpoint that has a score nor a saved model (a folder with config.json)"
            if path.exists()
            else f"there is no folder {path}"
        )
    return winner.model
