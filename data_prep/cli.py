"""The command line: `data_prep write | index | merge | mix | demo | verify | inspect | stats | features | embed-text |
finish`.

Bad input: one line, exit code 2.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from data_prep.options import (
    COMMANDS,
    Command,
    Demo,
    EmbedText,
    Finish,
    Inspect,
    MakeFeatures,
    MakeIndex,
    Merge,
    Mix,
    Stats,
    Verify,
    Write,
)
from data_prep.parts.folder import PartDone, join
from data_prep.preparing import (
    access_of,
    finish_parts,
    make_index,
    merge_parts,
    part_of,
    report_faults,
    report_statistics,
    write_shards,
)
from megapix import __version__, console
from megapix.allocator import keep_freed_memory
from megapix.errors import InputError, StorageError, one_of
from megapix.files import check_writable
from megapix.shards.index import read_index

DESCRIPTION = "Make and check WebDataset tar shards, with an index, for `megapix train`."


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return console.until_nobody_reads(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    keep_freed_memory()
    if arguments == ["--version"]:
        print(f"data_prep {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        return _no_command(arguments)
    command = console.parse(COMMANDS[arguments[0]], arguments[1:], f"data_prep {arguments[0]}")
    run: Any = {
        Write: write_shards,
        Demo: write_shards,
        MakeIndex: make_index,
        Merge: merge_parts,
        Mix: _mix,
        Verify: _verify,
        Inspect: _inspect,
        Stats: _stats,
        MakeFeatures: _features,
        EmbedText: _embed_text,
        Finish: finish_parts,
    }[type(command)]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(run(command))
    except PartDone as done:
        print(f"data_prep: {done}")
        return 0
    except InputError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except StorageError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"data_prep: error: {str(error.filename or '')!r}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command resumes from here", file=sys.stderr)
        return 130


def _no_command(arguments: list[str]) -> int:
    """Print the help, or say which commands there are."""
    if arguments and arguments[0] in ("-h", "--help"):
        console.parse(Command, ["--help"], "data_prep", description=DESCRIPTION)
    said = "expected a command"
    if arguments:
        said = f"command {arguments[0]!r} does not exist"
    print(f"data_prep: error: {said}{one_of((arguments or [''])[0], list(COMMANDS))}", file=sys.stderr)
    return 2


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _verify(command: Verify) -> int:
    from data_prep.passes.verify import close, verify, write_report

    part, out, parts = part_of(command), command.out, None
    if out:
        check_writable("--out", out)
        parts = join(out, part, "verify", {"shards": read_index(command.folder).digest[:16]})
    elif not part.whole:
        raise InputError(f"--part {part}: expected --out FILE, in which the faults of all parts come together")
    faults = []
    for fault in verify(command.folder, command.workers, access_of(command), part=part):
        print(f"data_prep: fault: {fault}", file=sys.stderr)
        faults.append(fault)
    if parts:
        faults = parts.leave({"faults": faults}, close)
    elif out:
        write_report(out, faults)
    return report_faults(str(command.folder), faults)


def _mix(command: Mix) -> int:
    from data_prep.passes.mix import mix

    for line in mix(command.sets, command.out):
        print(f"data_prep: {line}")
    return 0


def _inspect(command: Inspect) -> int:
    from data_prep.passes import mix
    from data_prep.passes.inspect import contact_sheet, report
    from megapix.shards.mix.file import is_mix

    if min(command.columns, command.rows) < 1:
        raise InputError(f"--columns = {command.columns}, --rows = {command.rows}: expected at least 1")
    if is_mix(str(command.folder)):
        if command.sheet:
            raise InputError(f"--sheet: {str(command.folder)!r} is a mix file; draw the sheet of each of its sets")
        for line in mix.report(str(command.folder)):
            print(line)
        return 0
    for line in report(command.folder):
        print(line)
    if command.sheet:
        shown = contact_sheet(command.folder, command.sheet, command.columns, command.rows, access_of(command))
        print(f"data_prep: {command.sheet}: {shown} images")
    return 0


def _stats(command: Stats) -> int:
    from data_prep.passes.statistics import stats

    made, was_finished = stats(
        command.shards,
        command.out,
        command.extractor,
        command.extractor_weights,
        command.features,
        command.batch,
        command.workers,
        access_of(command),
        part=part_of(command),
    )
    report_statistics(command.out, made, was_finished)
    return 0


def _features(command: MakeFeatures) -> int:
    from data_prep.passes.image_features import features

    made, was_finished = features(
        command.shards,
        command.encoder,
        command.out,
        command.dtype,
        command.flip,
        command.batch,
        command.workers,
        access_of(command),
        part=part_of(command),
    )
    samples, size = made.table.total("samples"), sum(map(made.bytes_of, made.files)) / 1e6
    print(
        f"data_prep: {command.out} {'was finished already' if was_finished else 'is finished'}: features of "
        f"{samples:,} images{' and their mirror images' if made.flip else ''}, width {made.width}, {made.dtype}, "
        f"in {len(made.files)} files, {size:.1f} MB"
    )
    return 0


def _embed_text(command: EmbedText) -> int:
    from data_prep.passes.text_features import embed_text
    from megapix.shards.text_recipe import INSTRUCTION, Recipe

    c = command
    recipe = Recipe(
        max_tokens=c.max_tokens,
        normalize=c.normalize,
        scale=c.scale,
        prefix=INSTRUCTION if c.prefix is None else c.prefix,
        dtype=c.dtype,
        padding=c.padding,
    )
    made, was_finished, first_cut = embed_text(c.shards, c.encoder, recipe, c.batch, c.replace, part=part_of(c))
    if first_cut:
        print(f"data_prep: {first_cut}")
    captions, tokens, cut = map(made.table.total, ("captions", "tokens", "cut"))
    size = sum(map(made.bytes_of, made.all_files))
    print(
        f"data_prep: {c.shards} {'was finished already' if was_finished else 'is finished'}: text features of "
        f"{captions:,} captions, {tokens:,} tokens of width {made.recipe.width}, {size:,} bytes; {cut:,} captions were "
        f"cut at {made.recipe.max_tokens} tokens"
    )
    return 0
