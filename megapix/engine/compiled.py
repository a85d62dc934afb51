"""Compilation: which sizes of a graph are open, how many graphs each kind of block has, and what a failure says.

A kind is a function that many blocks share, such as the forward pass of a patch block under one policy: it is compiled
once for all of them. A graph is made for each kind with and without gradients. Sizes that change in a run are open in
it from the first step on, so that a new one makes no other graph: a late graph costs a minute of every rank's time. The
others are fixed, which lets the compiler do more. One more graph is left for batches of one image, which torch.compile
always treats apart.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megapix.dist import stops_held_back, warn
from megapix.errors import InputError

MOST_GRAPHS = 3
"""Graphs of a kind that a run has at most."""
READS = 8
"""What several kernels of a GPU want is computed by each of them, if it takes no more reads than these: Inductor would
write it in fp32 and read it again from 5 on (4 of queries and keys, with their norms' gradients)."""
IN_TRAINING, IN_SAMPLING = "LTNHW", "BN"
"""Sizes that are open with gradients, where images or texts have several sizes; and those that always are without:
sampling and validation have batches of their own. A chunk's, C, is open everywhere: the last one has fewer patches."""

Run = Callable[..., Any]


class Kind:
    """A function that is compiled, and how often it has been.

    Args:
        name: of the block, with its policy.
        function: called with the block, or the network, and its tensors.
        sizes: those of each of these tensors: a letter each, B images, L patches, T tokens, N = B·L, C patches of a
            chunk, H and W pixels, and a dot for one that never changes; a tuple of tensors has one entry for all.
        varied: whether images or texts of the run have several sizes.
    """

    def __init__(self, name: str, function: Run, sizes: tuple[str, ...], varied: bool) -> None:
        self.name, self.graphs = name, 0
        self._run: Run = torch.compile(function, fullgraph=True)
        letters = "C" + IN_TRAINING * varied
        self._open_in_training, self._open_in_sampling = _dims(sizes, letters), _dims(sizes, letters + IN_SAMPLING)

    def __call__(self, *args: Any) -> Any:
        """Run it; the first argument is the block.

        Raises:
            InputError: it cannot be compiled.
        """
        args = tuple(_alone(arg) for arg in args)
        # A mark is a request: a size of 1, or one that follows from others, is fixed all the same.
        for number, dims in self._open_in_training if torch.is_grad_enabled() else self._open_in_sampling:
            if number < len(args):
                for tensor in args[number] if isinstance(args[number], tuple) else (args[number],):
                    if isinstance(tensor, Tensor):
                        torch._dynamo.maybe_mark_dynamic(tensor, dims)
        before = _graphs()
        with said_in_one_line(self.name), stops_held_back():
            out = self._run(*args)
        if made := _graphs() - before:
            self.graphs += made
            if self.graphs > MOST_GRAPHS:
                warn(
                    f"machine.compile: {self.name} has been compiled {self.graphs} times, more than the {MOST_GRAPHS} "
                    "that the sizes of a run should need; each costs a step its time (TORCH_LOGS=recompiles says why)"
                )
        return out


def _alone(arg: Any) -> Any:
    """A tensor that is a view, as none: a graph is of its inputs' bases too, whose sizes are nobody's concern."""
    return arg.data if isinstance(arg, Tensor) and arg._is_view() and not arg.requires_grad else arg


def _dims(sizes: tuple[str, ...], letters: str) -> list[tuple[int, list[int]]]:
    """Of each argument that has such sizes: its number, the block's being 0, and their dimensions."""
    found = [(n, [dim for dim, letter in enumerate(each) if letter in letters]) for n, each in enumerate(sizes, 1)]
    return [(number, dims) for number, dims in found if dims]


@dataclass
class Compiled:
    """A kind for one block: what takes the place of its forward pass. A copy of the block gets one of its own."""

    kind: Kind
    block: Any

    def __call__(self, *args: Any) -> Any:
        """Run it on the block."""
        return self.kind(self.block, *args)


class Kinds:
    """The kinds of a network, by name.

    Args:
        varied: whether images or texts of the run have several sizes.
    """

    def __init__(self, varied: bool) -> None:
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor

        if torch.cuda.is_available():
            inductor.realize_reads_threshold = READS
        self._varied = varied
        self.by_name: dict[str, Kind] = {}
        # Beyond MOST_GRAPHS a warning is the right answer, and not the end of a run.
        torch._dynamo.config.recompile_limit = 64
        # A backward pass that cannot be compiled is found with its forward pass, and not in the midst of autograd.
        functorch.force_non_lazy_backward_lowering = True
        # The blocks do write in place, but in autograd functions, into tensors of their own.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_expected)

    def of(self, name: str, function: Run, sizes: tuple[str, ...]) -> Kind:
        """The kind of this name; `function` is compiled when it is first asked for."""
        if name not in self.by_name:
            self.by_name[name] = Kind(name, function, sizes, self._varied)
        return self.by_name[name]


def compile_methods(owner: Any, sizes: dict[str, tuple[str, ...]], kinds: Kinds) -> None:
    """Compile some methods of an object: name -> sizes of its tensors (`Kind`)."""
    for name, each in sizes.items():
        setattr(owner, name, Compiled(kinds.of(name, getattr(type(owner), name), each), owner))


@contextmanager
def compilation(begins: Callable[[], None], ends: Callable[[bool], None]) -> Iterator[None]:
    """Call these as torch.compile begins to compile, and as it ends, with whether it failed, in any thread and at any
    step."""
    from torch._dynamo.callback import callback_handler  # late: a second of imports that only compiled runs need

    start = callback_handler.register_start_callback(lambda _: begins())
    end = callback_handler.register_end_callback(lambda _: ends(sys.exc_info()[0] is not None))
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


@contextmanager
def said_in_one_line(name: str) -> Iterator[None]:
    """Turn the compiler's errors about `name` into bad input that names --machine.no-compile.

    Raises:
        InputError: with the first line of the cause; what a full disk or too little memory is the cause of, as it is.
    """
    try:
        yield
    except Exception as error:
        if not _by_the_compiler(error):
            raise
        cause: BaseException = error
        while isinstance(inner := getattr(cause, "inner_exception", None), BaseException):
            cause = inner
        if isinstance(cause, torch.OutOfMemoryError | InputError | OSError):
            raise cause from error
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
        raise InputError(
            f"machine.compile: {name} cannot be compiled: {type(cause).__name__}: {first}; expected a compiler that "
            "can, or --machine.no-compile"
        ) from error


def _by_the_compiler(error: Exception) -> bool:
    from torch._dynamo import exc as dynamo  # late: a second of imports that only compiled runs need
    from torch._inductor import exc as inductor

    return isinstance(error, (*_errors(dynamo), *_errors(inductor)))


def _errors(module: ModuleType) -> tuple[type, ...]:
    """The errors that a module defines."""
    defined = (kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__)
    return tuple(kind for kind in defined if issubclass(kind, Exception))


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _expected(record: logging.LogRecord) -> bool:
    return "in-place ops" not in record.getMessage()
