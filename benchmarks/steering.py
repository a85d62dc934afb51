"""Whether captions steer: pictures sampled from held-out captions, sorted by the nearest class of real pictures.

    python -m benchmarks.steering runs/quickstart-t2i --train runs/openmoji-64 --held-out runs/openmoji-64-held-out

A class's centroid is the mean of the EfficientNet-Lite0 features (each of length 1) of its real training pictures. A
picture belongs to the class of the nearest centroid. Of 200 held-out captions, sampled once each from the EMA with the
run's own sampling options, the table says how often that is the caption's class; beside it the same for the real
held-out pictures, which is the most that can be hoped for, and for the samples with the captions shuffled, which
is chance. Captions are taken from the classes in turns, so that a large class does not outweigh the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megapix.conditioning import prompts
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import Decoder, FirstCaptions, ShardReader
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.encoders.scoring import EfficientNetLite0
from megapix.weights.read import load_weights, network

CAPTIONS, BATCH, SHUFFLES = 200, 20, 1000


def real(folder: Path) -> tuple[Tensor, list[int]]:
    """Images uint8 [N, 3, H, W] of a shard folder, and their classes."""
    located = locate(DataConfig(path=str(folder)))
    reader, decoder = ShardReader(located, DataConfig(path=str(folder))), Decoder(located.index)
    found = [reader.read(n) for n in range(located.index.samples)]
    images = np.stack([decoder(one.data, one.bucket) for one in found])
    return torch.from_numpy(images), [one.label for one in found]


@torch.no_grad()
def features(extractor: EfficientNetLite0, images: Tensor) -> Tensor:
    """Features of length 1: uint8 [N, 3, H, W] -> [N, D]."""
    return torch.cat([F.normalize(extractor(some)[0], dim=-1) for some in images.split(BATCH)])


def in_turns(labels: Sequence[int], count: int) -> list[int]:
    """Places of `count` samples, taken from the classes in turns."""
    of_class = {label: [n for n, found in enumerate(labels) if found == label] for label in sorted(set(labels))}
    chosen: list[int] = []
    while len(chosen) < count and any(of_class.values()):
        chosen += [places.pop(0) for places in of_class.values() if places]
    return chosen[:count]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run, checkpoint or exported file that takes text")
    parser.add_argument("--train", type=Path, required=True, help="its training shards")
    parser.add_argument("--held-out", type=Path, required=True, help="shards of the same classes that it has not seen")
    parser.add_argument("--encoder", default="", help="its text encoder, where the shards hold no text features")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    extractor, loaded = EfficientNetLite0(), load_weights(options.run)
    index = locate(DataConfig(path=str(options.held_out))).index
    names = index.class_names
    images, labels = real(options.train)
    known, classes = features(extractor, images), torch.tensor(labels)
    centroids = F.normalize(torch.stack([known[classes == c].mean(0) for c in range(len(names))]), dim=-1)

    images, labels = real(options.held_out)
    chosen = in_turns(labels, CAPTIONS)
    truth = torch.tensor([labels[n] for n in chosen])
    held_out = (features(extractor, images[chosen]) @ centroids.T).argmax(1) == truth

    net, cpu, captions = network(loaded), torch.device("cpu"), FirstCaptions(options.held_out, index)
    conditioner = prompts.of_prompts(loaded.about, options.held_out, captions, cpu, options.encoder).conditioner
    size, drawn = loaded.about.image_size, []
    for start in range(0, len(chosen), BATCH):
        numbers = list(range(start, min(start + BATCH, len(chosen))))
        noise = seeded_noise(options.seed, numbers, (size, size), cpu)
        condition = conditioner.of_subjects([chosen[n] for n in numbers])
        drawn.append(generate_as(net, noise, condition, loaded.about.sampling))
    pixels = torch.from_numpy(to_uint8(torch.cat(drawn))).permute(0, 3, 1, 2).contiguous()
    found = (features(extractor, pixels) @ centroids.T).argmax(1)
    generator = torch.Generator().manual_seed(options.seed)
    shuffled = [
        (found == truth[torch.randperm(len(truth), generator=generator)]).float().mean().item() for _ in range(SHUFFLES)
    ]

    print(f"{len(chosen)} held-out captions, {loaded.about.kind} of {loaded.about.source}\n")
    print("| class | captions | real pictures | samples |\n|---|---|---|---|")
    for c, name in enumerate(names):
        of = truth == c
        if of.any():
            share = [hits[of].float().mean().item() for hits in (held_out, found == truth)]
            print(f"| {name} | {int(of.sum())} | {share[0]:.1%} | {share[1]:.1%} |")
    hits = (found == truth).float().mean().item()
    print(f"| all | {len(truth)} | {held_out.float().mean().item():.1%} | {hits:.1%} |")
    print(f"\nwith shuffled captions: {np.mean(shuffled):.1%}, at most {max(shuffled):.1%} in {SHUFFLES} shuffles")


if __name__ == "__main__":
    main()
