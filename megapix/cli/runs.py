"""`megapix runs`, `diff` and `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from megapix import console
from megapix.dist import World
from megapix.files import check_writable


@dataclass(frozen=True)
class RunsOptions:
    """A table of all runs below a folder: state, images seen, loss, validation loss and score of the EMA, speed. A run
    is running, finished, stopped (saved where it stands), or interrupted (it has logged steps that are not saved)."""

    folder: tyro.conf.Positional[Path]
    """Folder with run folders in it, or a run folder."""


@dataclass(frozen=True)
class DiffOptions:
    """What two runs differ in: configuration, data, and the versions that their last processes had."""

    a: tyro.conf.Positional[Path]
    """Run folder."""
    b: tyro.conf.Positional[Path]
    """Another one."""


@dataclass(frozen=True)
class ReportOptions:
    """A run as one HTML page that needs nothing else: curves, sample grids over time, health, checkpoints, data,
    machines and configuration. Made from the run folder, of a run at work, too, and without a network."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path | None = None
    """File to write; RUN/report.html by default."""


def runs(arguments: list[str], world: World) -> int:
    """Print the table of runs."""
    options: RunsOptions = console.parse(RunsOptions, arguments, "megapix runs", world.main)
    from megapix.report.tables import runs_table

    print(runs_table(options.folder))
    return 0


def diff(arguments: list[str], world: World) -> int:
    """Print what two runs differ in."""
    options: DiffOptions = console.parse(DiffOptions, arguments, "megapix diff", world.main)
    from megapix.report.run_facts import read_run
    from megapix.report.tables import diff_text

    print(diff_text(read_run(options.a), read_run(options.b)))
    return 0


def report(arguments: list[str], world: World) -> int:
    """Write a run's page."""
    options: ReportOptions = console.parse(ReportOptions, arguments, "megapix report", world.main)
    from megapix.report.page import write_page
    from megapix.report.run_facts import read_run

    run = read_run(options.run, pictures=True)
    out = options.out or options.run / "report.html"
    check_writable("--out", out)
    size = write_page(run, out)
    print(f"megapix: {out}: {size / 1000:,.0f} kB")
    return 0
