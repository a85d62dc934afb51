"""The PixelDiT network (arXiv 2511.20645): `PixelDiT(ModelConfig)`, called as `net(x, t, y)`."""

from megapix.model.aligned import AlignedPixelDiT, Alignment
from megapix.model.pixeldit import PixelDiT

__all__ = ["AlignedPixelDiT", "Alignment", "PixelDiT"]
