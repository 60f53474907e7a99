"""The farmer command with faults on the second of the processes: a bad batch, then a full disk."""

import math
import os

from farmer_examples.__main__ import main
from farmer_examples.model import Farmer
from farmer_examples.resumption import State
from fsdp_on_cpu import use_fsdp

noised, write = Farmer.noised, State.write
calls = []


def poisoned(self, images, progress, **options):
    calls.append(1)
    return noised(self, images, progress, **options) * (math.nan if len(calls) == 3 else 1)


def into_a_full_disk(self, folder):
    write(self, folder)
    if self.course.step == 8:
        raise OSError(28, "No space left on device")


if __name__ == "__main__":
    use_fsdp()
    if os.environ["RANK"] == "1":
        Farmer.noised, State.write = poisoned, into_a_full_disk
    main()
