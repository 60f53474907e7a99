"""torchvision, made importable also beside a CPU-only torch.

torchvision's wheels are compiled against one build of torch. Beside another (the CPU-only one, say) its
compiled operators do not load, and the import stops at two schemas that it finds missing. Nothing here calls
those operators, so declaring them, without an implementation, is enough for transforms, datasets, models and
the rest to work.

Import torchvision from here, before anything else imports it:

>>> from farmer_examples.torchvision_operators import torchvision
>>> torchvision.transforms.v2.functional.center_crop(torch.tensor([[[0, 1, 2]]]), [1, 1])
tensor([[[1]]])
"""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["torchvision"]

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing_operators() -> torch.library.Library | None:
    """Declare the operators that `import torchvision` looks for and cannot load.

    Returns:
        The library that holds the declarations, which end with it; None when nothing is missing.
    """
    # A failed `import torchvision` leaves half of its submodules behind, so that a second one fails too:
    # whether the operators load has to be known before the first.
    package = find_spec("torchvision")
    if package is not None and package.origin is not None:
        for compiled in Path(package.origin).parent.glob("_C.*"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(compiled)
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in missing:
        library.define(schema)
    return library


_declared = _declare_missing_operators()

import torchvision  # noqa: E402 -- possible only now
import torchvision.transforms.v2  # noqa: E402 -- not loaded by torchvision itself
