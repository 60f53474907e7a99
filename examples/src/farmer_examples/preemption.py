"""The end that a batch system announces: SIGTERM, which asks a training to save and to be resumed elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from accelerate import Accelerator

__all__ = ["PreemptedError", "ignore_sigterm", "triggered_by_sigterm"]


class PreemptedError(RuntimeError):
    """A training that has saved its state because it was told to end, and is to be resumed."""


def ignore_sigterm(worker: int) -> None:
    """Leave SIGTERM, which batch systems send to every process of a job, to the process that saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def triggered_by_sigterm(accelerator: Accelerator) -> Iterator[None]:
    """Let SIGTERM, the warning of batch systems, set the trigger that all processes check after a step."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    accelerator.check_trigger()  # which makes it
    before = signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
