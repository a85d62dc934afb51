"""The network's door: between time and velocity as everything outside knows them, and as the network does.

Outside, t runs from 0 (noise) to 1 (image), and the velocity is image - noise. A network of model.convention
'released', as the authors' text-to-image network, has 1000 at noise and 0 at the image, and predicts noise - image. Its
embedding of the time is not linear, so a network must be trained with the convention that it is to be called with.
"""

from __future__ import annotations

from torch import Tensor

from megapix.config import Convention

STEPS = 1000.0
"""The time at noise."""


def time_inside(t: Tensor, convention: Convention, training: bool) -> Tensor:
    """What the network is called with at the times t [B] in [0, 1]: float32 [B].

    In training the released network knows integers alone (its code cuts them off; the nearest are meant by as many
    times above as below). The noisy image keeps its own t, at most half a step away.
    """
    if convention == "paper":
        return t
    time = (1.0 - t.float()) * STEPS
    return time.round() if training else time


def velocity_outside(predicted: Tensor, convention: Convention) -> Tensor:
    """Image - noise from what the network predicts."""
    return predicted if convention == "paper" else -predicted
