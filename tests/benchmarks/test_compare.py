"""`python -m benchmarks.compare` on a small git repository whose commits say themselves how slow they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Sample, verdict
from megapix.errors import InputError
from tests.support.programs import needs

COMMAND = "python benchmarks.py {out}"
PROGRAM = """
import json, sys
from pathlib import Path
runs = Path(__file__).resolve().with_name("runs")
number = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (number + 1))
Path({log!r}).open("a").write("{name} ")
json.dump({{"step": {{"median": {times}[number], "rate": 1 / {times}[number], "whole": True}}}}, open(sys.argv[1], "w"))
"""
TIMES = {
    "base": [9.0, 1.00, 1.02, 0.98, 1.01, 0.99],  # the first is not counted
    "same": [9.0, 1.02, 1.01, 0.99, 1.00, 1.03],
    "slow": [9.0, 1.10, 1.12, 1.09, 1.11, 1.10],
    "noisy": [9.0, 1.40, 0.90, 1.50, 1.05, 0.95],
}


@pytest.fixture(scope="module", params=[pytest.param("git", marks=needs("git"))])
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch for each of TIMES; `log` beside it tells in what order they were run."""
    folder = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name, times in TIMES.items():
        text = PROGRAM.format(log=str(folder.parent / f"{folder.name}.log"), name=name, times=times)
        (folder / "benchmarks.py").write_text(text)
        subprocess.run([*git, "add", "benchmarks.py"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", name], check=True)
        subprocess.run([*git, "branch", name], check=True)
    return folder


def run(repository: Path, base: str, head: str, *options: str) -> int:
    return compare.main([base, head, "--command", COMMAND, *options], repository)


def test_a_regression(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = repository.parent / f"{repository.name}.log"
    log.unlink(missing_ok=True)
    assert run(repository, "base", "slow") == 1
    out = capsys.readouterr().out
    assert "BASE base: median 1 (quartiles 0.99 to 1.01, all 0.98 to 1.02)" in out
    assert "HEAD slow: median 1.1 (quartiles 1.1 to 1.11, all 1.09 to 1.12)" in out
    assert "HEAD / BASE: 1.1000; regression at a margin of 3 %" in out
    pair, reverse = ["base", "slow"], ["slow", "base"]
    assert log.read_text().split() == reverse + pair + reverse + pair + reverse + pair
    left = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1, "the temporary worktrees are gone"


def test_what_is_no_regression(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repository, "slow", "base") == 0
    assert "; better at a margin of 3 %" in capsys.readouterr().out
    assert run(repository, "base", "same", "--key", "step.rate", "--higher-is-better") == 0
    assert "; no difference at a margin of 3 %" in capsys.readouterr().out


def test_two_folders(repository: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("base", "slow"):
        folder = tmp_path / name
        folder.mkdir()
        text = PROGRAM.format(log=str(tmp_path / "log"), name=name, times=TIMES[name])
        (folder / "benchmarks.py").write_text(text)
        folders.append(str(folder))
    assert run(repository, *folders) == 1


def test_a_command_of_its_own_for_the_base(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark's file was another one there."""
    folders = []
    for name, script in (("base", "bench.py"), ("same", "benchmarks.py")):
        folder = tmp_path / name
        folder.mkdir()
        text = PROGRAM.format(log=str(tmp_path / "log"), name=name, times=TIMES[name])
        (folder / script).write_text(text)
        folders.append(str(folder))
    assert run(repository, *folders, "--base-command", "python bench.py {out}") == 0
    out = capsys.readouterr().out
    assert f"step.median of '{COMMAND}', of BASE 'python bench.py {{out}}'" in out
    assert "HEAD / BASE: 1.0100; no difference" in out
    for options, words in (((), "--command"), (("--base-command", "python other.py {out}"), "--base-command")):
        (tmp_path / "same" / "runs").unlink()
        with pytest.raises(InputError, match=rf"^{words} failed in .*base with code 2"):
            run(repository, *folders, *options)


def test_verdicts() -> None:
    base, same, slow, noisy = (Sample(TIMES[name][1:]) for name in ("base", "same", "slow", "noisy"))
    assert verdict(base, same, 0.03) == "no difference"
    assert verdict(base, slow, 0.03) == "regression"
    assert verdict(slow, base, 0.03) == "better"
    assert verdict(base, slow, 0.15) == "no difference", "within the margin"
    assert noisy.median == 1.05
    assert verdict(base, noisy, 0.03) == "no difference", "more than the margin, but within the spread"
    assert verdict(slow, base, 0.03, higher_is_better=True) == "regression"
    assert Sample([2.0]).quartiles == (2.0, 2.0)


def test_bad_input(repository: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["nope", "base"], "'nope' is neither a folder nor a commit of"),
        (["base", "base", "--rounds", "0"], "--rounds 0: expected at least 1"),
        (["base", "base", "--margin", "3"], "--margin 3.0: expected a share, 0 to 1"),
        (["base", "base", "--command", "true"], "--command 'true': expected {out} where it writes its JSON"),
        (["base", "base", "--base-command", "true"], "--base-command 'true': expected {out} where it writes its JSON"),
        (["base", "base", "--command", "/no/such {out}"], "--command: '/no/such' cannot be run: No such file"),
        (["base", "base", "--command", "true {out}"], "--command wrote no JSON to {out}"),
        (["base", "base", "--command", "python -c 'raise SystemExit(\"so it is\")' {out}"], "with code 1: so it is"),
        (["base", "base", "--command", COMMAND, "--key", "step.mean"], "--key step.mean: expected a number"),
        (["base", "base", "--command", COMMAND, "--key", "step.whole"], "found True"),
    ):
        with pytest.raises(InputError) as raised:
            compare.main(arguments, repository)
        assert words in str(raised.value), arguments
        assert "\n" not in str(raised.value)
