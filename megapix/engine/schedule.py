"""The learning rate as a function of images seen: constant, then one step down (paper: at 160 of 320 epochs).

Counting images rather than steps keeps the milestone in place when the global batch or the world changes.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from megapix.config import OptimConfig


def learning_rate(images_seen: int, config: OptimConfig) -> float:
    """Learning rate of the step that starts at `images_seen`; `config` is resolved (spans are images or 'never').

    Up to the milestone `lr`, from it on `lr_after`; below `warmup` images it rises linearly from 0.
    """
    after = config.lr_step_at != "never" and images_seen >= int(config.lr_step_at)
    lr = config.lr_after if after else config.lr
    warmup = int(config.warmup)
    return lr * images_seen / warmup if images_seen < warmup else lr


class ImagesSeenSchedule:
    """The scheduler that DeepSpeed steps and saves; it owns `images_seen`, the images of applied steps.

    DeepSpeed calls `step()` after each applied optimizer step and not after a skipped one. It takes no argument on
    purpose: DeepSpeed answers any TypeError from inside it by calling `step(train_batch_size)`, which here fails
    loudly and keeps the first error in its chain.
    """

    def __init__(self, optimizer: Optimizer, config: OptimConfig) -> None:
        self.optimizer = optimizer
        self.config = config
        self.images_seen = 0
        self.apply()

    def apply(self) -> None:
        """Write the current learning rate into the optimizer's groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.images_seen, self.config)

    def step(self) -> None:
        """Count one global batch and set the next step's learning rate."""
        self.images_seen += self.config.global_batch
        self.apply()

    def get_last_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the count. The learning rate follows from it and the configuration."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the count and the learning rate that belongs to it."""
        self.images_seen = state["images_seen"]
        self.apply()
