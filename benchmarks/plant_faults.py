"""Plants faults one at a time in a copy of the tree, and sees whether the test that is named for each catches it.

    python -m benchmarks.plant_faults                      # all of them; writes the table of docs/testing.md
    python -m benchmarks.plant_faults --only resilience    # those whose file or words have this in them; only prints

A fault is caught if its test, run alone, fails by an assertion (no import error, no error in a fixture) and passes
without it. Each test runs first as the tree is; then each fault is planted, tried and taken out again. Two at a time,
each in a copy of its own, so the working tree is never touched.
"""

from __future__ import annotations

import argparse
import ast
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS, TESTING = ROOT / "benchmarks" / "faults.jsonl", ROOT / "docs" / "testing.md"
HEADING = "## Planted faults"
"""Of the table, which is the last part of docs/testing.md."""
COPIED = ("megapix", "data_prep", "tests", "benchmarks", "ds_configs", "docs", "launch.sh", "pyproject.toml")
BY_ASSERTION = ("AssertionError", "assert ", "Failed: ")
"""How pytest begins the message of a failed assertion, and of an exception or warning that did not come."""


@dataclass(frozen=True)
class Fault:
    """A line of benchmarks/faults.jsonl."""

    about: str
    """What is wrong, in words."""
    file: str
    """Where, from the root of the repository."""
    old: str
    """What stands there, once."""
    new: str
    """What is planted in its place."""
    test: str
    """pytest's id of the test that fails with it; one of the default tests."""
    number: bool = True
    """Whether the fault is a wrong number, and no exception."""


@dataclass(frozen=True)
class Outcome:
    """What a test said."""

    passed: bool
    by_assertion: bool
    message: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="plant those whose file or words have this in them")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    chosen = [f for f in read() if options.only in f.file or options.only in f.about]
    wrong = [f"{f.about}: {problem}" for f in chosen if (problem := check(f))]
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 2
    with copies(options.workers) as free, ThreadPoolExecutor(options.workers) as pool:
        tests = sorted({f.test for f in chosen})
        healthy = dict(zip(tests, pool.map(lambda test: run(free, test), tests), strict=True))
        for test, outcome in healthy.items():
            if not outcome.passed:
                print(f"fails without a fault: {test}: {outcome.message}", file=sys.stderr)
        outcomes = list(pool.map(lambda fault: run(free, fault.test, fault), chosen))
    caught = [o.by_assertion and healthy[f.test].passed for f, o in zip(chosen, outcomes, strict=True)]
    for fault, outcome, found in zip(chosen, outcomes, caught, strict=True):
        print("caught  " if found else "SURVIVED", f"{outcome.seconds:5.1f} s  {fault.about}  {outcome.message[:100]}")
    print(f"{sum(caught)} of {len(chosen)} faults caught")
    if not options.only:
        before, heading, _ = TESTING.read_text().partition(f"{HEADING}\n")
        TESTING.write_text(before + heading + table(chosen, outcomes))
    return 0 if all(caught) else 1


def read() -> list[Fault]:
    """All faults, in the order of the packages."""
    return [Fault(**json.loads(line)) for line in FAULTS.read_text().splitlines()]


def check(fault: Fault) -> str:
    """Why a fault cannot be planted, or its test not be run; or nothing."""
    path = ROOT / fault.file
    if not path.is_file():
        return f"{fault.file} is not there"
    healthy = path.read_text()
    if (count := healthy.count(fault.old)) != 1:
        return f"its text is {count} times in {fault.file}"
    if path.suffix == ".py":
        try:
            ast.parse(healthy.replace(fault.old, fault.new))
        except SyntaxError as error:
            return f"{fault.file} is no Python with it: {error}"
    module, _, test = fault.test.partition("::")
    if not (ROOT / module).is_file() or f"\ndef {test.partition('[')[0]}(" not in (ROOT / module).read_text():
        return f"{fault.test} is not there"
    return ""


@contextmanager
def copies(count: int) -> Iterator[queue.Queue[Path]]:
    """Copies of the tree, to be taken and given back."""
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="megapix-faults-") as folder:
        for number in range(count):
            copy = Path(folder) / str(number)
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, copy / name)
            free.put(copy)
        yield free


def run(free: queue.Queue[Path], test: str, fault: Fault | None = None) -> Outcome:
    """Run one test, with a fault or without."""
    copy = free.get()
    try:
        if fault is None:
            return run_in(copy, test)
        path = copy / fault.file
        healthy = path.read_text()
        path.write_text(healthy.replace(fault.old, fault.new))
        try:
            return run_in(copy, test)
        finally:
            path.write_text(healthy)
    finally:
        free.put(copy)


def run_in(copy: Path, test: str) -> Outcome:
    """pytest on one test of a copy."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
    start = time.monotonic()
    done = subprocess.run([*command, test], cwd=copy, capture_output=True, text=True)
    seconds = time.monotonic() - start
    found = ElementTree.parse(report).getroot() if report.is_file() else None
    failures = [] if found is None else [f.get("message", "") for f in found.iter("failure")]
    ran = found is not None and sum(1 for case in found.iter("testcase") if case.find("skipped") is None)
    said = (done.stdout.strip() or done.stderr.strip() or f"nothing said, code {done.returncode}").splitlines()[-1]
    message = (failures or [said])[0]
    by_assertion = bool(failures) and failures[0].startswith(BY_ASSERTION)
    return Outcome(done.returncode == 0 and bool(ran), by_assertion, " ".join(message.split()), seconds)


def table(faults: list[Fault], outcomes: list[Outcome]) -> str:
    """The result, in Markdown."""
    numbers = sum(f.number for f in faults)
    survivors = [f.about for f, o in zip(faults, outcomes, strict=True) if not o.by_assertion]
    lines = [
        "",
        f"`python -m benchmarks.plant_faults` plants {len(faults)} faults one at a time ({numbers} of them a wrong",
        "number and no exception), and runs the test that is named for each. Seconds are those of the whole process,",
        f"two at a time on two cores. Survivors: {', '.join(survivors) or 'none'}.",
        "",
        "| file | fault | test | seconds |",
        "|---|---|---|---|",
    ]
    for fault, outcome in zip(faults, outcomes, strict=True):
        lines.append(f"| `{fault.file}` | {fault.about} | `{fault.test}` | {outcome.seconds:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
