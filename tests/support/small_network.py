"""The small network with random weights in every layer, as a module and as an imported folder."""

from __future__ import annotations

from pathlib import Path

import torch

from megapix.config import SamplingConfig, TextConfig
from megapix.engine.network import build_network
from megapix.model import PixelDiT
from megapix.weights.about import About, Weights
from megapix.weights.write import write_model
from tests.support.small_run import SMALL


def class_network() -> PixelDiT:
    """What starts at zero would hide what lies before it."""
    net, generator = build_network(SMALL.model, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def imported(folder: Path, net: PixelDiT) -> Path:
    """An imported folder of it."""
    about = About(SMALL.model, SamplingConfig(steps=2), 16, TextConfig(), ("a", "b", "c"), True, "random", 7)
    write_model(folder, Weights({name: p.detach() for name, p in net.named_parameters()}, about))
    return folder
