"""Can the classes of a run's samples be told apart? A small classifier, trained on the real images, says so.

    python -m benchmarks.classifier runs/quickstart
    python -m benchmarks.classifier RUN --train SHARDS --held-out SHARDS --epochs 2

Trains a convolutional network on the training part of the embedded image set, or on --train, states how well it labels
the real held-out images, then labels 40 guided EMA samples of each class, sampled with the run's own sampling options.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steering import real
from data_prep.sources.openmoji import OpenMoji
from megapix.diffusion.condition import classes as of_classes
from megapix.diffusion.flow import to_images
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.shards.pixels import decode
from megapix.weights.read import load_weights, network

PER_CLASS = 40


def real_images(split: Literal["train", "heldout"], shards: Path | None, size: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, size, size] in [-1, 1] and labels [N] of shards, or of one part of the embedded set."""
    if shards:
        stored, found = real(shards)
        return to_images(stored), torch.tensor(found)
    source = OpenMoji.open(split)
    pixels = np.stack([decode(source.reader.read(item, size)) for item in source.items])
    labels = torch.tensor([item.label for item in source.items])
    return to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2)), labels


def classifier(classes: int) -> nn.Sequential:
    """Three strided convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, classes))


def train(images: Tensor, labels: Tensor, classes: int, epochs: int, batch: int = 64) -> nn.Sequential:
    """Train with mirroring, shifts by two pixels, and noise."""
    net = classifier(classes)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            x = images[chosen]
            x = x.flip(-1) if torch.rand(()) < 0.5 else x
            x = torch.roll(x, torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            x = x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.15
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def right(net: nn.Sequential, images: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Share of each class that is labelled as such."""
    hits = net(images).argmax(1) == labels
    return [hits[labels == label].float().mean().item() for label in range(classes)]


def main() -> None:
    """Print a table: class, share of real held-out images and of samples labelled correctly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run, checkpoint or exported file")
    parser.add_argument("--train", type=Path, help="shards it was trained on, if not the embedded set")
    parser.add_argument("--held-out", type=Path, help="shards of the same classes that it has not seen")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the classifier: fewer for larger sets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the classifier and of the samples' noise")
    arguments = parser.parse_args()
    if (arguments.train is None) != (arguments.held_out is None):
        parser.error("--train and --held-out belong together")
    torch.manual_seed(arguments.seed)

    loaded = load_weights(arguments.run)
    names, size, sampling = loaded.about.classes, loaded.about.image_size, loaded.about.sampling
    net = train(*real_images("train", arguments.train, size), len(names), arguments.epochs)
    held_out = right(net, *real_images("heldout", arguments.held_out, size), len(names))

    labels = torch.arange(len(names)).repeat_interleave(PER_CLASS)
    noise = seeded_noise(arguments.seed, list(range(len(labels))), (size, size), torch.device("cpu"))
    model = network(loaded)
    samples = [
        generate_as(model, n, of_classes(y, len(names)), sampling)
        for n, y in zip(noise.split(50), labels.split(50), strict=True)
    ]
    pixels = to_images(torch.from_numpy(to_uint8(torch.cat(samples))).permute(0, 3, 1, 2))
    samples = right(net, pixels, labels, len(names))

    print(f"{'class':10} {'held-out images':>16} {f'{PER_CLASS} EMA samples':>16}")
    for row in zip([*names, "mean"], [*held_out, np.mean(held_out)], [*samples, np.mean(samples)], strict=True):
        print(f"{row[0]:10} {row[1]:16.1%} {row[2]:16.1%}")


if __name__ == "__main__":
    main()
