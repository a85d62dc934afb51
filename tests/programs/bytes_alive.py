"""One rank: a step of a real engine in bf16 and fp32; prints as JSON what is alive in it, and what it sends.

usage: python -m tests.programs.bytes_alive PRESET
"""

from __future__ import annotations

import gc
import json
import sys
import time
import weakref
from dataclasses import replace
from typing import Any

import torch

from benchmarks.bytes_sent import Sent, in_one_step, step
from megapix import config
from megapix.config import Config
from megapix.dist import World, from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.engine.optim import EMA


def configuration(preset: str, precision: str, ranks: int) -> Config:
    """A tiny preset with one image a rank, so that states are nearly all that is alive; fp32 with the fused AdamW."""
    c = config.preset(preset)
    machine = replace(c.machine, fused_adamw=precision == "fp32")
    return replace(c, precision=precision, machine=machine, optim=replace(c.optim, global_batch=ranks))


def storages(tensors: list[Any]) -> int:
    """Bytes of their storages, each once."""
    with_grads = [x for t in tensors for x in (t, t.grad if t.is_leaf else None) if x is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in with_grads)}.values())


def alive() -> int:
    """Bytes of the storages of every tensor that Python knows of."""
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return storages(found)


def measure(preset: str, precision: str, world: World) -> dict[str, Any]:
    """What a rank holds between two steps, as a bucket is reduced, and as the optimizer steps."""
    before = alive()
    c = configuration(preset, precision, world.size)
    e = zero2.build(c, config.batch_layout(c, world.size), build_network(c.model, 0))
    zero, held = e.deepspeed.optimizer, {}
    reduced: list[weakref.ref[torch.Tensor]] = []
    assert zero.optimizer.fused == c.machine.fused_adamw
    average, optimizer_step = zero.average_tensor, zero.optimizer.step

    def reducing(*args: Any) -> None:
        held["bucket"] = storages([b for bucket in zero.ipg_buckets.values() for b in bucket.buffer])
        # One rank's bucket is all-reduced as it is, and in bf16 added, gradient by gradient, to the fp32 partition.
        owner, name = torch.distributed, "reduce"
        if world.size == 1:
            owner, name = (zero, "_add_to_grad_partition_buffer") if precision == "bf16" else (owner, "all_reduce")
        original = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            held["as a bucket is reduced"] = max(alive() - before, held.get("as a bucket is reduced", 0))
            reduced.extend(weakref.ref(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            return original(*args, **kwargs)

        setattr(owner, name, noting)
        average(*args)
        setattr(owner, name, original)

    def stepping() -> Any:
        # gloo's threads let go of what they have reduced a moment after the reduction has ended; they need the GIL.
        until = time.monotonic() + 30
        while any(x() is not None for x in reduced) and time.monotonic() < until:
            time.sleep(0.001)
        held["as AdamW steps"] = alive() - before
        held["gradients"] = storages([p.grad for p in zero.single_partition_of_fp32_groups])
        return optimizer_step()

    sent: Sent = in_one_step(e, c, 1, 1)
    zero.average_tensor, zero.optimizer.step = reducing, stepping
    step(e, c, 1, 1)
    held["between steps"] = alive() - before
    (partition,) = zero.single_partition_of_fp32_groups
    state = zero.optimizer.state[partition]
    held["weights"] = storages(list(e.network.parameters()))
    held["masters"], held["ema"] = storages([partition]), storages([state[EMA]])
    held["moments"] = storages([state["exp_avg"], state["exp_avg_sq"]])
    calls = {f"{name} {dtype}": n for (name, dtype), n in sent.numbers.items() if n > 1}
    e.close()
    return {"held": held, "sent": sent.bytes(world.size), "calls": calls}


def main(preset: str) -> None:
    world = from_environment()
    processes.start(world)
    found = {precision: measure(preset, precision, world) for precision in ("bf16", "fp32")}
    print(json.dumps(found), flush=True)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
