"""Compiled networks: few graphs for all sizes of a run, the same numbers, and one line where the compiler fails."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from megapix.config import MachineConfig, ModelConfig, PixelPolicy
from megapix.engine import chunked
from megapix.engine.compiled import MOST_GRAPHS, Kind, compilation, said_in_one_line
from megapix.engine.network import build_network
from megapix.errors import InputError
from megapix.model import Alignment, PixelDiT, embed
from tests.support.launch import start
from tests.support.small_run import arguments

CLASSES = ModelConfig(patch_size=2, width=16, depth=2, heads=2, pixel_width=8, pixel_depth=1, num_classes=3)
TEXT = dataclasses.replace(CLASSES, num_classes=0, text_width=10, text_tokens=150)
# Images as (height, width), and tokens of the longest caption: several buckets, transposed, and as many tokens as
# patches; the first is square, so that sizes that happen to be equal in it must not count as one.
RUNS = {
    "classes": (CLASSES, 1, [(16, 16, 0)]),
    "buckets": (CLASSES, 3, [(16, 16, 0), (10, 24, 0), (24, 10, 0)]),
    "text": (TEXT, 3, [(16, 16, 64), (10, 24, 1), (24, 10, 65), (16, 16, 150)]),
}


def asked(config: ModelConfig, images: int, height: int, width: int, tokens: int) -> tuple[Tensor, ...]:
    """Inputs of these sizes; captions have from one token to all."""
    generator = torch.Generator().manual_seed(images)
    x, t = torch.randn(images, 3, height, width, generator=generator), torch.rand(images, generator=generator)
    if not tokens:
        return x, t, torch.arange(images) % (config.num_classes + 1)
    lengths = torch.linspace(1, tokens, images).int() if images > 1 else torch.tensor([tokens])
    y = torch.randn(images, tokens, config.text_width, generator=generator)
    return x, t, y, torch.arange(tokens) < lengths[:, None]


def network(
    config: ModelConfig,
    buckets: int = 1,
    pixel: PixelPolicy = "none",
    patch: Any = "none",
    compiled: bool = True,
    alignment: Alignment | None = None,
) -> PixelDiT:
    machine = MachineConfig(compile=compiled, pixel_checkpointing=pixel, patch_checkpointing=patch)
    net = build_network(config, 0, machine, alignment, buckets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """Those that are compiled, by the front half of the compiler, which decides on graphs."""
    real, found = torch.compile, list[Kind]()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend="aot_eager"))
    made = Kind.__init__

    def note(kind: Kind, *args: Any) -> None:
        made(kind, *args)
        found.append(kind)

    monkeypatch.setattr(Kind, "__init__", note)
    return found


def walk_through(name: str, net: PixelDiT, plain: PixelDiT) -> None:
    """A run's sizes: training on every bucket, twice; then validation and samples, in batches that never were."""
    config, _, sizes = RUNS[name]
    for size in (*sizes, sizes[0]):
        results = []
        for each in (net, plain):
            each.zero_grad()
            out = each(*asked(config, 2, *size))
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        for images in (5, 16, 1, 2):
            for size in sizes:
                given = asked(config, images, *size)
                torch.testing.assert_close(net(*given), plain(*given), rtol=1e-4, atol=1e-5)


def graphs(kinds: list[Kind]) -> dict[str, int]:
    return {kind.name: kind.graphs for kind in kinds}


PARTS = {"embed", "pixel_condition", "pixel_tokens"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pixel", "patch", "blocks"),
    [
        ("classes", "none", "none", {"PatchBlock", "PiTBlock", "output"}),
        ("text", "full", 2, {"MMDiTBlock", "MMDiTBlock, the last, full", "PiTBlock, full", "output"}),
        ("buckets", "selective", "full", {"PatchBlock, full", "PiTBlock, selective", "output"}),
        ("classes", "offload", "none", None),
    ],
)
def test_three_graphs_of_each_kind_are_enough_for_all_sizes(
    name: str,
    pixel: PixelPolicy,
    patch: Any,
    blocks: set[str] | None,
    kinds: list[Kind],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With gradients, without, and for one image. All of the network is compiled; its numbers are the plain one's."""
    monkeypatch.setattr(chunked, "CHUNK", 50)
    config, buckets, _ = RUNS[name]
    walk_through(name, network(config, buckets, pixel, patch), network(config, compiled=False))
    assert blocks is None or set(graphs(kinds)) == PARTS | blocks
    assert all(1 <= count <= MOST_GRAPHS for count in graphs(kinds).values()), graphs(kinds)


@pytest.mark.long
def test_repas_projector_is_compiled_too(kinds: list[Kind]) -> None:
    net, alignment = network(CLASSES, 2, alignment=Alignment(1, 5)), Alignment(1, 5)
    plain = network(CLASSES, compiled=False, alignment=alignment)
    for height, width in ((16, 16), (8, 24)):
        given = asked(CLASSES, 2, height, width, 0)
        for found, expected in zip(net(*given, grid=(4, 4)), plain(*given, grid=(4, 4)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs(kinds)["project"] == 1
    assert set(graphs(kinds).values()) == {1}


@pytest.mark.long
def test_fixed_sizes_stay_fixed_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open sizes cost the compiler knowledge: the class-conditional run of one size has none while it trains."""
    real, opened = torch.compile, list[bool]()
    torch._dynamo.reset()
    embed.rope_table.cache_clear()  # tables of other tests have open sizes

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        opened.append(any(isinstance(one, torch.SymInt) for one in given))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
    given = asked(CLASSES, 2, 16, 16, 0)
    network(CLASSES)(*given)
    assert opened
    assert not any(opened)
    opened.clear()
    network(CLASSES, buckets=2)(*given)
    assert sum(opened) >= len(opened) - 1


def test_more_graphs_than_promised_are_said(kinds: list[Kind], capsys: pytest.CaptureFixture[str]) -> None:
    kind, block = Kind("Odd", lambda block, x: x + 1, ("B",), False), nn.Identity()
    for dtype in (torch.float32, torch.float64, torch.int32):
        kind(block, torch.ones(2, dtype=dtype))
    assert not capsys.readouterr().err
    kind(block, torch.ones(2, dtype=torch.int64))
    said = capsys.readouterr().err
    assert "machine.compile: Odd has been compiled 4 times, more than the 3" in said
    kind(block, torch.ones(2, dtype=torch.int64))
    assert not capsys.readouterr().err


def test_a_copy_of_a_compiled_network_has_its_own_weights(kinds: list[Kind]) -> None:
    net = network(CLASSES)
    other = copy.deepcopy(net)
    assert other.patch_blocks[1].forward.block is other.patch_blocks[1]
    assert other.embed.block is other  # type: ignore[attr-defined]


@pytest.mark.long
def test_the_kernel_of_attention_is_chosen_in_the_graph(kinds: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the choice of others is as it was."""
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    torch._dynamo.reset()
    chosen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        named = [node for node in graph.graph.nodes if node.target is torch.nn.attention._backend_from_string]
        chosen.append({node.args[0] for node in named[:1]})
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
    machine = MachineConfig(compile=True, pixel_checkpointing="none", attention="math")
    out = build_network(CLASSES, 0, machine)(*asked(CLASSES, 2, 16, 16, 0))
    assert out.shape == (2, 3, 16, 16)
    assert {SDPBackend.MATH.name} in chosen
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before


# ---------------------------------------------------------------------------------------------------------------------
# When it fails
# ---------------------------------------------------------------------------------------------------------------------

BROKEN = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo "this compiler is broken" >&2
exit 1
"""


def test_a_compiler_that_fails_ends_the_run_in_one_line(tmp_path: Path, shards: Path) -> None:
    """It is there, so that nothing is found before the first step, which it cannot compile."""
    broken = tmp_path / "broken-g++"
    broken.write_text(BROKEN)
    broken.chmod(0o755)
    command = arguments(shards, tmp_path / "run", "--machine.compile")
    (rank,) = start(1, "tests.programs.broken_compiler", [broken, *command])
    assert rank.code == 2, rank.err
    (line,) = [line for line in rank.err.splitlines() if line.startswith("megapix: error:")]
    assert line.startswith(
        "megapix: error: machine.compile: embed cannot be compiled: CppCompileError: C++ compile error"
    )
    assert line.endswith("or --machine.no-compile")
    assert "Traceback" not in rank.err


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    calls: list[int] = []

    def compiler(graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        calls.append(len(given))
        if len(calls) == 2:
            raise RuntimeError("no backward pass\nin two lines")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=aot_autograd(fw_compiler=compiler)))
    net = network(CLASSES)
    with pytest.raises(InputError) as refused:
        net(*asked(CLASSES, 2, 16, 16, 0))
    assert str(refused.value) == (
        "machine.compile: embed cannot be compiled: RuntimeError: no backward pass; expected a compiler that can, or "
        "--machine.no-compile"
    )


def test_other_errors_are_as_they_were() -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), said_in_one_line("a block"):
        raise BackendCompilerFailed(lambda: None, full, None)
    with pytest.raises(ZeroDivisionError), said_in_one_line("a block"):
        raise ZeroDivisionError


def test_compilation_is_heard_where_it_begins_and_ends() -> None:
    """Again for another size, and not after the end; with whether it failed, but not the error around it."""
    heard: list[object] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        heard.append("compiles")
        if example[0].numel() == 5:
            raise OSError("a full disk")
        return graph.forward

    @functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    def double(x: Tensor) -> Tensor:
        return x * 2

    with compilation(lambda: heard.append("begins"), heard.append):
        for size in (2, 2, 3):
            double(torch.ones(size))
        with pytest.raises(Exception, match="a full disk"):
            double(torch.ones(5))
    double(torch.ones(4))
    assert heard == [*["begins", "compiles", False] * 2, "begins", "compiles", True, "compiles"]
