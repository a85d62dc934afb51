"""Which noise images start from: that of the run whose weights they are drawn with, through a run's copies too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megapix import config
from megapix.cli import main as cli
from megapix.config import Generator, SamplingConfig, TextConfig
from megapix.diffusion.condition import classes
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate, seeded_noise
from megapix.errors import InputError
from megapix.sample.outputs import metadata_of
from megapix.weights.about import About, Weights, parsed
from megapix.weights.read import about, load_weights
from megapix.weights.write import write_model
from tests.support.small_network import class_network
from tests.support.small_run import SMALL


@pytest.mark.parametrize("generator", ["torch", "philox"])
def test_samples_have_the_weights_own_noise(generator: Generator, tmp_path: Path) -> None:
    """With seeds of their own, each column has its seed; else numbers go on from row to row, whatever the batch."""
    net = class_network().eval()
    own = About(SMALL.model, SamplingConfig(steps=2), 16, TextConfig(), ("a", "b", "c"), True, "random", 7)
    tensors = {name: p.detach() for name, p in net.named_parameters()}
    write_model(tmp_path / "net", Weights(tensors, replace(own, generator=generator)))
    assert about(tmp_path / "net").generator == load_weights(tmp_path / "net").about.generator == generator
    cpu, sampling = torch.device("cpu"), ("ab2", 2, 2.75, (0.1, 0.9))
    for options, noise in (
        (["--seeds", "3", "3", "8", "--batch", "4"], [(seed, 0) for _ in "abc" for seed in (3, 3, 8)]),
        (["--seed", "5", "--batch", "4"], [(5, number) for number in range(9)]),
    ):
        singles = tmp_path / options[0]
        command = ["sample", str(tmp_path / "net"), "--out", str(tmp_path / "g.png"), "--per-class", "3", *options]
        assert cli.main([*command, "--singles", str(singles)]) == 0
        paths = sorted(singles.iterdir())
        for n, (path, (seed, number)) in enumerate(zip(paths, noise, strict=True)):
            start = seeded_noise(seed, [number], (16, 16), cpu, generator)
            drawn = generate(net, start, classes(torch.tensor([n // 3]), 3), *sampling)  # type: ignore[arg-type]
            found = np.asarray(Image.open(path)).astype(int)
            assert np.abs(found - to_uint8(drawn)[0]).max() <= 1, path.name
            said = metadata_of(path)
            assert said is not None
            assert said.get("generator", "torch") == generator


def test_an_exported_file_that_names_no_generator_has_torchs(tmp_path: Path) -> None:
    made = About(SMALL.model, SamplingConfig(steps=2), 16, TextConfig(), (), True, "", 7, generator="philox")
    data = config.to_dict(made)
    assert parsed(data, tmp_path).generator == "philox"
    del data["generator"]
    assert parsed(data, tmp_path).generator == "torch"
    with pytest.raises(InputError, match="generator = 'dice'"):
        parsed(data | {"generator": "dice"}, tmp_path)
