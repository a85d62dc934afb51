"""What `benchmarks.gpu_checks` runs, a process each, the most telling first.

Seconds are estimates for one H100, with the start of a process (15 s), PixelDiT-XL's weights and engine (15 s) and
compilation where a kind of block is compiled for the first time (60 s; torch's cache on disk makes later ones shorter).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["card", "parity", "noise", "step", "plain"]


@dataclass(frozen=True)
class Way:
    """One process and what it measures."""

    name: str
    kind: Kind
    """'card': the fastest matmul; 'parity': blocks against the blocks as written; 'noise': the device's numbers against
    the CPU's; 'step': training steps of ours; 'plain': those of `benchmarks.plain_eager`."""
    needs: int = 60
    """Seconds that it is expected to take: with less left it is not begun."""
    limit: int = 180
    """Seconds after which it is ended."""
    preset: str = "xl-256"
    precision: str = "bf16"
    micro: int = 0
    """Images of a step; 0 takes what `megapix train` would take."""
    compiled: bool = False
    """Of the plain network and of the blocks of a parity check."""
    fused: bool = False
    """Triton's pixel kernels, of the blocks of a parity check."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Options under `machine` that are not the default."""
    policies: tuple[tuple[str, str | int], ...] = (("none", "none"),)
    """Checkpointing of pixel and patch pathway, of a parity check."""

    def on_cpu(self) -> Way:
        """The same with a small network, and as much time as it takes."""
        preset = "t2i-tiny" if self.preset.startswith("t2i") else "tiny"
        precision = self.precision if self.kind == "parity" else "fp32"
        return replace(self, preset=preset, precision=precision, needs=0, limit=3600)

    @property
    def needs_gpu(self) -> bool:
        """Whether it has nothing to run on a CPU: Triton's kernels, and the choice of attention's."""
        return self.fused or self.machine.get("pixel_kernels") == "triton" or "attention" in self.machine


MICRO = 32
"""Images of the steps that are compared with each other (docs/performance.md has predictions for them)."""
POLICIES: tuple[tuple[str, str | int], ...] = (
    ("selective", "none"),
    ("selective_modulation", "none"),
    ("full", "none"),
    ("chunked", "none"),
    ("offload", "none"),
    ("full", 2),
    ("full", "full"),
)
FUSABLE = tuple(policy for policy in POLICIES if policy[0] != "chunked")
"""The fused kernels take all patches at once."""


def _step(name: str, micro: int = MICRO, needs: int = 60, preset: str = "xl-256", **machine: Any) -> Way:
    return Way(name, "step", needs, 3 * needs, preset, micro=micro, machine=machine)


def _policy(pixel: str, patch: str | int) -> Way:
    name = f"ours, compiled, pixel {pixel}, patch {patch}"
    return _step(name, needs=45, compile=True, pixel_checkpointing=pixel, patch_checkpointing=patch)


EAGER = {"compile": False, "pixel_checkpointing": "none"}
COMPILED = {"compile": True, "pixel_checkpointing": "none"}
WAYS = [
    Way("best matmul", "card", 20, 60),
    Way("blocks, bf16", "parity", 20, 60),
    Way("blocks compiled, bf16", "parity", 50, 150, compiled=True),
    Way("blocks fused, bf16", "parity", 25, 90, fused=True),
    _step("ours, default", 0, needs=100),
    Way("plain PyTorch", "plain", 40, 120, micro=MICRO),
    Way("plain PyTorch, compiled", "plain", 80, 240, micro=MICRO, compiled=True),
    # Up to here it takes five minutes or a little more, if nothing was compiled before.
    _step("ours, compiled", **COMPILED),
    _step("ours, compiled, Triton kernels", needs=80, pixel_kernels="triton", **COMPILED),
    _step("ours, as written", needs=45, **EAGER),
    _step("ours, as written, pixel full", needs=45, compile=False, pixel_checkpointing="full"),
    Way("noise", "noise", 20, 60),
    Way("blocks fused and compiled, bf16", "parity", 40, 120, fused=True, compiled=True),
    Way("blocks, fp32", "parity", 20, 60, precision="fp32"),
    Way("blocks compiled, fp32", "parity", 50, 150, precision="fp32", compiled=True),
    Way("blocks fused, fp32", "parity", 25, 90, precision="fp32", fused=True),
    *(_policy(*policy) for policy in POLICIES if policy != ("full", 2)),
    Way("policies, bf16", "parity", 30, 90, policies=POLICIES),
    Way("policies fused, bf16", "parity", 30, 90, fused=True, policies=FUSABLE),
    *(_step("ours, compiled", micro, 40, **COMPILED) for micro in (64, 128, 16, 8)),
    _step("ours, default, 512 pixels", 0, 120, "xl-512"),
    _step("ours, default, text, 1024 pixels", 0, 150, "t2i-1024-ms"),
    # What a run of 25 minutes has time for only if the card is faster than the estimates.
    *(_step(f"ours, compiled, attention {name}", needs=45, attention=name, **COMPILED) for name in ("cudnn", "flash")),
    Way("policies compiled, bf16", "parity", 150, 300, compiled=True, policies=POLICIES),
]
"""In order. No two have the same name and micro batch."""


def of(name: str, micro: int, ways: list[Way]) -> Way:
    """The way of that name, with that micro batch, which may be none of the list's.

    Raises:
        KeyError: no way has that name.
    """
    return replace({way.name: way for way in ways}[name], micro=micro)
