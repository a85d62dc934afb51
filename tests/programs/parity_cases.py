"""One rank of the parity test: a handful of cases of the table, on this launch's ranks.

usage: python -m tests.programs.parity_cases
"""

from __future__ import annotations

from megapix.dist import from_environment, leave
from megapix.engine import processes
from megapix.parity.cases import Case, describe
from megapix.parity.compare import GRADIENT_TYPES, TOLERANCES, measure

HANDFUL = [
    Case(clip="not hit", accumulation=4, overlap_comm=True, buckets="small"),
    Case(offload=True, accumulation=4, pixel_checkpointing="full", patch_checkpointing="full"),
    Case(precision="bf16"),
    Case(precision="bf16", accumulation=4, clip="not hit", contiguous_gradients=False, reduce_scatter=False),
    Case(accumulation=4, bucket_allreduce=True),
    Case(precision="bf16", accumulation=4, offload=True, buckets="small"),
]


def main() -> None:
    world = from_environment()
    device = processes.start(world)
    results = measure(HANDFUL, world, device)
    for r in results:
        assert r.holds, f"{describe(r.case)}: {r.difference}"
    assert len(results) == (len(HANDFUL) if world.main else 0)
    # Gradients kept in bf16 are seen at once: so nearness above says that they are not.
    chosen = {name: types for name, types in GRADIENT_TYPES.items() if "bf16" in name}
    for r in measure([Case(precision="bf16", accumulation=4)], world, device, chosen):
        assert r.difference.gradient > 100 * TOLERANCES["bf16"].gradient, r
    leave(world, 0)


if __name__ == "__main__":
    main()
