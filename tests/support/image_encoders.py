"""Small random encoders for the tests of REPA, as local folders that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH = 24
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "initializer_range": 0.3,  # far from the mean, so that features of two images differ
}


def make(folder: Path, kind: str = "dinov2", seed: int = 0, **sizes: Any) -> Path:
    """Save an encoder of random weights: 'dinov2', 'registers' (three of them), or 'dinov3' (two)."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dinov2":
            model: Any = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES | sizes))
        elif kind == "registers":
            config = transformers.Dinov2WithRegistersConfig(
                **SIZES | {"num_register_tokens": 3, "patch_size": 14} | sizes
            )
            model = transformers.Dinov2WithRegistersModel(config)
        else:
            config = transformers.DINOv3ViTConfig(
                **SIZES | {"intermediate_size": 48, "num_register_tokens": 2, "patch_size": 16} | sizes
            )
            model = transformers.DINOv3ViTModel(config)
        with torch.no_grad():  # what starts at zero or one must not hide a mistake
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.1)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder
