"""What REPA's encoder costs: FLOPs of DINOv2 ViT-B/14 for an image beside a training step's, and bytes of its features.

    python -m benchmarks.repa_cost

The encoder is transformers' Dinov2Model at its base size on the meta device, without weights, counted by PyTorch's
counter. It is not trained, so it runs forward alone; a training step counts three times the network's forward pass.
"""

from __future__ import annotations

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megapix import config
from megapix.costs import flops
from megapix.encoders.image import grid_of


def encoder_flops(size: int) -> int:
    """Of the forward pass for one image of size × size pixels, resized as REPA does."""
    rows, columns = grid_of(size, size)
    with torch.device("meta"):
        net = transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, image_size=14 * rows))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(pixel_values=torch.zeros(1, 3, 14 * rows, 14 * columns, device="meta"))
    return int(counter.get_total_flops())


def main() -> None:
    width = transformers.Dinov2Config().hidden_size
    for size in (256, 512):
        cost, (rows, columns) = encoder_flops(size), grid_of(size, size)
        print(f"{size} pixels: the encoder's forward pass takes {cost / 1e9:.1f} GFLOPs per image")
        for name in ("b", "l", "xl"):
            step = flops.training(config.preset(f"{name}-{size}").model, size)
            print(f"  {name}-{size}: {step / 1e9:,.0f} GFLOPs per image in training, so {cost / step:.1%} more")
        print(f"  features of an image: {rows} x {columns} x {width}, {rows * columns * width * 2:,} bytes in bf16")


if __name__ == "__main__":
    main()
