"""The farmer command with FSDP on the CPU, which Accelerate has for accelerators alone."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from farmer_examples.__main__ import main

original = AcceleratorState.__init__


def initialise(self, *arguments, fsdp_plugin=None, **options):
    original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:  # which a further view of the state that there is lacks
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def use_fsdp():
    """Let Accelerate shard on the CPU where its environment asks for it."""
    AcceleratorState.__init__ = initialise


if __name__ == "__main__":
    use_fsdp()
    main()
