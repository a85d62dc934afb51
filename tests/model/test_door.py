"""The released convention: the network inside is called otherwise, and everything outside knows nothing of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megapix.config import FlowConfig, RepaConfig
from megapix.diffusion import flow, repa, sampler
from megapix.diffusion.condition import Condition
from megapix.model import Alignment, PixelDiT, build
from tests.model.test_pixeldit_t2i import TEXT, inputs, randomised
from tests.support import second_network

RELEASED = replace(TEXT, convention="released")


def twin(alignment: Alignment | None = None) -> tuple[PixelDiT, PixelDiT]:
    """A network of the released convention, and the paper's with the same weights, which is the one inside."""
    net = randomised(RELEASED) if alignment is None else build(RELEASED, alignment)
    inside = build(TEXT, alignment)
    inside.load_state_dict(net.state_dict())
    return net, inside


def test_sampling_calls_it_with_floats_from_1000_to_0() -> None:
    net, (x, t, y, _) = twin()[0].eval(), inputs()
    everything = torch.ones(y.shape[:2], dtype=torch.bool)
    expected = -second_network.pixeldit(net.state_dict(), TEXT.patch_size, x, 1000 - 1000 * t.double(), y, everything)
    torch.testing.assert_close(net(x, t, y).double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1, "the network does something"


def test_training_calls_it_with_the_nearest_integers() -> None:
    """Also a quarter above 0 and below 1000, and as much above an integer as below."""
    net, inside = twin()
    x, _, y, mask = inputs()
    for times, expected in (((0.62345, 0.62355), (377.0, 376.0)), ((0.99975, 0.0004), (0.0, 1000.0))):
        found = net.train()(x, torch.tensor(times), y, mask)
        assert torch.equal(found, -inside(x, torch.tensor(expected), y, mask))
    t = torch.tensor((0.62345, 0.62355))
    assert torch.equal(net.eval()(x, t, y, mask), -inside(x, (1 - t) * 1000, y, mask))


def test_the_objective_is_theirs_turned_around() -> None:
    """Loss and gradients of our objective are those of theirs, noise - image, on the network inside."""
    net, inside = twin()
    x, _, y, mask = inputs(8, 8)
    images = torch.randint(256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    condition = Condition((y, mask), (y[:1, :1], mask[:1, :1]))
    config, positions = FlowConfig(time_shift=3.0, generator="philox", label_dropout=0.0), np.arange(5, 7)
    losses, t = flow.training_loss(net.train(), images, condition, positions, 11, config)
    losses.sum().backward()

    batch = flow.noisy_batch(images, condition, positions, 11, config)
    clean = images.float() / 127.5 - 1
    sigma = (1 - t).view(-1, 1, 1, 1)
    noise = (batch.x_t - (1 - sigma) * clean) / sigma
    predicted = inside(batch.x_t, (1000 * (1 - t)).round(), y, mask)
    theirs = (predicted - (noise - clean)).square().flatten(1).mean(1)
    theirs.sum().backward()
    torch.testing.assert_close(losses, theirs, rtol=1e-4, atol=1e-4)
    for (name, ours), other in zip(net.named_parameters(), inside.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_repa_projects_the_same_tokens() -> None:
    net, inside = twin(Alignment(layer=1, features=5))
    x, _, y, mask = inputs(8, 8)
    t = torch.tensor([0.25, 0.5])
    velocity, projected = net.train()(x, t, y, mask, grid=(2, 2))
    other, tokens = inside(x, 1000 * (1 - t), y, mask, grid=(2, 2))
    assert torch.equal(velocity, -other)
    assert torch.equal(projected, tokens)
    assert not repa.active(RepaConfig(), 0)


@pytest.mark.parametrize("name", sampler.SAMPLERS)
def test_samplers_see_no_difference(name: sampler.Sampler) -> None:
    """From noise to image with a network that is turned around by hand."""
    net, inside = twin()
    x, _, y, mask = inputs()
    condition = Condition((y, mask), (y[:1, :2], mask[:1, :2]))

    def by_hand(x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        return -inside.eval()(x, (1 - t) * 1000, *cond)

    ours, theirs = (
        sampler.generate(of, x, condition, name, steps=5, guidance=3.0, shift=4.0) for of in (net.eval(), by_hand)
    )
    assert torch.equal(ours, theirs)
