"""megapix: pretraining of PixelDiT, the pixel-space diffusion transformer, on DeepSpeed.

pipeline = megapix.load("runs/quickstart")                     # the EMA, with the run's sampling settings
images = pipeline(classes=[0, "flags"], seed=1)                # PIL images; prompts=[...] where it takes text

net = megapix.load_model("runs/quickstart")                    # the network alone, in eval mode
images = megapix.sample.generate(net, noise, labels, steps=50, guidance=2.0)   # labels [B] int64

For a network that takes text, or a callable of your own, give a `megapix.condition.Condition` in place of the labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapix.diffusion import condition as condition
    from megapix.ports.load import load as load
    from megapix.ports.load import load_model as load_model

__version__ = "0.2.0"
"""pyproject.toml reads it here."""
__all__ = ["condition", "load", "load_model", "sample"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is used: the command line answers --help without it."""
    import importlib

    if name in ("load", "load_model"):
        return getattr(importlib.import_module("megapix.ports.load"), name)
    if name == "condition":
        return importlib.import_module("megapix.diffusion.condition")
    if name == "sample":
        return importlib.import_module("megapix.sample")
    raise AttributeError(f"module 'megapix' has no attribute {name!r}")
