"""megapix: pretraining of PixelDiT, the pixel-space diffusion transformer, on DeepSpeed.

net = megapix.load_model("runs/quickstart")                    # the EMA, in eval mode
told = megapix.condition.classes(labels, num_classes=5)
images = megapix.sample.generate(net, noise, told, steps=50, guidance=2.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapix import condition as condition
    from megapix import sample as sample
    from megapix.weights import load_model as load_model

__version__ = "0.1.0"
__all__ = ["condition", "load_model", "sample"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is used: the command line answers --help without it."""
    import importlib

    if name == "load_model":
        return importlib.import_module("megapix.weights").load_model
    if name in ("condition", "sample"):
        return importlib.import_module(f"megapix.{name}")
    raise AttributeError(f"module 'megapix' has no attribute {name!r}")
