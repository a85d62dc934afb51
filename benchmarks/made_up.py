"""What a network is told of made-up images, for measurements that do not depend on what they show."""

from __future__ import annotations

import torch

from megapix.config import ModelConfig
from megapix.diffusion.condition import Cond


def told(model: ModelConfig, images: int, tokens: int) -> Cond:
    """Class 0, int64 [B]; or random text features, bf16 [B, T, C_text], with a mask, bool [B, T], that lets all in."""
    if not model.text_width:
        return (torch.zeros(images, dtype=torch.long),)
    return torch.randn(images, tokens, model.text_width).bfloat16(), torch.ones(images, tokens, dtype=torch.bool)
