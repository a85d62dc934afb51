"""Has a commit made something slower? The same benchmark in two working trees, by turns, and a verdict.

    python -m benchmarks.compare BASE HEAD [--rounds 5] [--command "python -m megapix bench step tiny --out {out}"]

BASE and HEAD are commits of this repository, each checked out into a temporary git worktree, or folders. The command
runs in the folder itself, with the folder first in PYTHONPATH, and writes a JSON file where it says {out}; --key is the
number that is compared in it, less being better unless --higher-is-better. Where BASE spells the command in another
way, --base-command is what is run there. The rounds go BASE HEAD, HEAD BASE and so on, so that what drifts on the
machine meets both; one round before them is not counted.

HEAD has regressed (exit code 1) if its median is worse by more than --margin, and its better quartile is worse than
BASE's worse quartile: by more than the margin, and outside of the spread. Exit code 2: bad input, or a failed command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megapix.errors import InputError

COMMAND = "python -m megapix bench step tiny --out {out}"


@dataclass(frozen=True)
class Sample:
    """The numbers that one side gave, a number a round."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile, the smallest and largest numbers counted in; of one number, the number."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return lower, upper

    def __str__(self) -> str:
        lower, upper = self.quartiles
        ends = f"quartiles {lower:.6g} to {upper:.6g}, all {min(self.values):.6g} to {max(self.values):.6g}"
        return f"median {self.median:.6g} ({ends})"


def verdict(base: Sample, head: Sample, margin: float, higher_is_better: bool = False) -> str:
    """'regression', 'better', or 'no difference', which holds within the margin or within the spread."""
    low, high = (head, base) if higher_is_better else (base, head)  # head is worse if `high` is above `low`
    if high.median > low.median * (1 + margin) and high.quartiles[0] > low.quartiles[1]:
        return "regression"
    if low.median > high.median * (1 + margin) and low.quartiles[0] > high.quartiles[1]:
        return "better"
    return "no difference"


@contextmanager
def tree(what: str, repository: Path) -> Iterator[Path]:
    """The folder `what`, or a temporary worktree of the commit `what`.

    Raises:
        InputError: neither a folder nor a commit.
    """
    if Path(what).is_dir():
        yield Path(what).resolve()
        return
    git = ["git", "-C", str(repository)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{what}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise InputError(f"{what!r} is neither a folder nor a commit of {repository}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", path, found.stdout.strip()], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", path], check=True)


def measure(command: str, folder: Path, key: str, option: str = "--command") -> float:
    """Run the command in a folder and return the number at the dotted `key` of its JSON; `option` named the command.

    Raises:
        InputError: it cannot be run, fails, or writes no such number.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out.json"
        arguments = [part.replace("{out}", str(out)) for part in shlex.split(command)]
        path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        # `python` is the one that runs this file.
        arguments[0] = sys.executable if arguments[0] == "python" else arguments[0]
        try:
            done = subprocess.run(
                arguments, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
            )
        except OSError as error:
            raise InputError(f"{option}: {arguments[0]!r} cannot be run: {error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise InputError(f"{option} failed in {folder} with code {done.returncode}: {last}")
        try:
            value = json.loads(out.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{option} wrote no JSON to {{out}} in {folder}: {error}") from error
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"--key {key}: expected a number above 0 in what {option} wrote, found {value!r}")
    return float(value)


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Parse and check.

    Raises:
        InputError: naming option, value and what would be right.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="commit or folder to compare with")
    parser.add_argument("head", metavar="HEAD", help="commit or folder that may have regressed")
    parser.add_argument("--command", default=COMMAND, help=f"what is run in each (default: {COMMAND})")
    parser.add_argument("--base-command", metavar="COMMAND", help="what is run in BASE, where that is another command")
    parser.add_argument("--key", default="step.median", help="number of its JSON (default: step.median, in seconds)")
    parser.add_argument("--higher-is-better", action="store_true", help="the number is a speed, not a time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--margin", type=float, default=0.03, help="share by which it must differ (default: 0.03)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds}: expected at least 1")
    if not 0 <= options.margin < 1:
        raise InputError(f"--margin {options.margin}: expected a share, 0 to 1")
    for option, command in (("--command", options.command), ("--base-command", options.base_command)):
        if command is not None and "{out}" not in command:
            raise InputError(f"{option} {command!r}: expected {{out}} where it writes its JSON")
    return options


def main(arguments: list[str], repository: Path) -> int:
    """Run the comparison; returns the exit code."""
    options = options_of(arguments)
    commands = {"base": ("--command", options.command), "head": ("--command", options.command)}
    if options.base_command is not None:
        commands["base"] = "--base-command", options.base_command
    values: dict[str, list[float]] = {"base": [], "head": []}
    with ExitStack() as trees:
        folders = {side: trees.enter_context(tree(getattr(options, side), repository)) for side in values}
        for number in range(options.rounds + 1):
            for side in ("base", "head") if number % 2 else ("head", "base"):
                option, command = commands[side]
                value = measure(command, folders[side], options.key, option)
                if number:
                    values[side].append(value)
                    print(f"round {number} of {options.rounds}: {side} {value:.6g}", flush=True)
    base, head = (Sample(values[side]) for side in ("base", "head"))
    found = verdict(base, head, options.margin, options.higher_is_better)
    base_command = f", of BASE {options.base_command!r}" if options.base_command is not None else ""
    print(f"{options.key} of {options.command!r}{base_command}")
    print(f"BASE {options.base}: {base}")
    print(f"HEAD {options.head}: {head}")
    print(f"HEAD / BASE: {head.median / base.median:.4f}; {found} at a margin of {100 * options.margin:g} %")
    return 1 if found == "regression" else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], Path.cwd()))
    except InputError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        sys.exit(2)
