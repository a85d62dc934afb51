"""One rank of the parity test: a handful of cases of the table, on this launch's ranks.

usage: python -m tests.worker_parity
"""

from __future__ import annotations

from megapix import dist, engine, parity
from megapix.parity import Case

HANDFUL = [
    Case(clip="not hit", accumulation=4, overlap_comm=True, buckets="small"),
    Case(offload=True, accumulation=4, pixel_checkpointing="full", patch_checkpointing="full"),
    Case(precision="bf16"),
    Case(precision="bf16", accumulation=4, clip="not hit", contiguous_gradients=False, reduce_scatter=False),
    Case(accumulation=4, bucket_allreduce=True),
    Case(precision="bf16", accumulation=4, offload=True, buckets="small"),
]


def main() -> None:
    world = dist.from_environment()
    device = engine.start(world)
    results = parity.measure(HANDFUL, world, device)
    for r in results:
        assert r.holds, f"{parity.describe(r.case)}: {r.difference}"
    assert len(results) == (len(HANDFUL) if world.main else 0)
    # Gradients kept in bf16 are seen at once: so nearness above says that they are not.
    chosen = {name: types for name, types in parity.GRADIENT_TYPES.items() if "bf16" in name}
    for r in parity.measure([Case(precision="bf16", accumulation=4)], world, device, chosen):
        assert r.difference.gradient > 100 * parity.TOLERANCES["bf16"].gradient, r
    engine.leave(world, 0)


if __name__ == "__main__":
    main()
