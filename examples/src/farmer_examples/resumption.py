"""The state that a training resumes from: sharded as it lies on the processes, and read by any number of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from farmer_examples.average import Average
from farmer_examples.batches import Feed

__all__ = ["State", "together"]

FAILURES = (
    RuntimeError,
    ValueError,
    KeyError,
    OSError,
    EOFError,
    UnpicklingError,
    SafetensorError,
    CheckpointException,
)
"""What reading and writing raise on a full disk or a damaged file: every library has its own."""

COURSE = "course.json"


def together(action: Callable[[], Any]) -> str:
    """Do something on every process, and return what went wrong on one of them: the same on all, empty if nothing."""
    problem = ""
    try:
        action()
    except FAILURES as error:
        problem = str(_cause(error)) or type(error).__name__
    return next(filter(None, gather_object([problem])), "")


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong on the first of the processes that wrote or read together, without its traceback."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class State:
    """All that a resumed training needs, in a folder.

    Weights, optimiser and average lie in torch's distributed checkpoint, to which every process adds what it holds: so
    nothing is gathered, and any other layout can read it, with other processes, sharded or not. ``course.json`` has
    what all processes share, and ``process-R-of-N.pt`` what is the process's own: its random numbers, and its place in
    the data, which another number of processes cannot take up unless it is the same for all.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    course: _Stateful
    feed: Feed

    def write(self, folder: Path) -> None:
        """Write what this process holds; all processes call it."""
        with _alone_or_not():
            dcp.save(self._tensors(), checkpoint_id=folder)
        own = {"random": torch.get_rng_state(), "feed": self.feed.state_dict()}
        if self._on_gpu:
            own["random on the GPU"] = torch.cuda.get_rng_state()
        torch.save(own, folder / self._own)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            shared = {
                **self.course.state_dict(),
                "updates": self.average.updates,
                "processes": self.accelerator.num_processes,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            (folder / COURSE).write_text(json.dumps(shared, indent=2) + "\n")

    def read(self, folder: Path) -> None:
        """Take up what another training, of any layout, has written; all processes call it."""
        tensors = self._tensors()
        with _alone_or_not():
            dcp.load(tensors, checkpoint_id=folder)
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        shared = json.loads((folder / COURSE).read_text())
        scaler, processes, self.average.updates = (shared.pop(key) for key in ("scaler", "processes", "updates"))
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.course.load_state_dict(shared)
        own = {"feed": {}}
        if processes == self.accelerator.num_processes:
            own = torch.load(folder / self._own, weights_only=True)
            torch.set_rng_state(own["random"])
            if self._on_gpu and "random on the GPU" in own:
                torch.cuda.set_rng_state(own["random on the GPU"])
        if not self.feed.load_state_dict(own["feed"]) and not self.feed.seek(shared["images"]):
            self.accelerator.print("other processes or workers than before read the stream, and do so in a new order")

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer, "average": self.average.kept}

    @property
    def _own(self) -> str:
        return f"process-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.pt"

    @property
    def _on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """Keep torch from warning that a process on its own is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
