"""`megapix sample` and `megapix evaluate`."""

from __future__ import annotations

from megapix import console
from megapix.dist import World
from megapix.evaluation.options import EvaluateOptions
from megapix.sample.options import SampleOptions, check


def sample(arguments: list[str], world: World) -> int:
    """Sample images and write them as PNG."""
    options: SampleOptions = console.parse(SampleOptions, arguments, "megapix sample", world.main)
    check(options)

    from megapix.sample.command import sample

    return sample(options)


def evaluate(arguments: list[str], world: World) -> int:
    """Score samples of a network; every rank calls it."""
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    options: EvaluateOptions = console.parse(EvaluateOptions, arguments, "megapix evaluate", world.main)

    from megapix.evaluation.run import evaluate

    return evaluate(options, world)
