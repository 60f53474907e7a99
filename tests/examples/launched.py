"""The farmer command as the tests of several processes launch it.

With FSDP on the CPU, which Accelerate has for accelerators alone; and with faults on the second process if FAULTY is
set: a bad batch, then a full disk.
"""

import math
import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from farmer_examples.__main__ import main
from farmer_examples.model import Farmer
from farmer_examples.resumption import State

initialise, noised, write = AcceleratorState.__init__, Farmer.noised, State.write
calls = []


def initialise_with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:  # which a further view of the state that there is lacks
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def poisoned(self, images, progress, **options):
    calls.append(1)
    return noised(self, images, progress, **options) * (math.nan if len(calls) == 3 else 1)


def into_a_full_disk(self, folder):
    write(self, folder)
    if self.course.step == 8:
        raise OSError(28, "No space left on device")


if __name__ == "__main__":
    AcceleratorState.__init__ = initialise_with_fsdp
    if "FAULTY" in os.environ and os.environ["RANK"] == "1":
        Farmer.noised, State.write = poisoned, into_a_full_disk
    main()
