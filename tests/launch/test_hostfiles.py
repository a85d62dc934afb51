"""Hostfiles in the forms that people have them, and arguments that reach other nodes as they were typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapix.errors import InputError
from megapix.launch import hostfile
from megapix.launch.hostfile import Node
from megapix.launch.words import quoted, unquoted
from tests.support.launch import ROOT
from tests.support.played_launcher import HERE, finish, play, start

TWO = [Node("node01", 2), Node("node02", 1)]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node01 slots=2\nnode02 slots=1\n", TWO),
        ("\ufeffnode01 slots=2\r\nnode02 slots=1\r\n", TWO),
        ("node01 slots=2 # rack 1\n# node03 slots=4\n#\nnode02 slots=1#", TWO),
        ("  node01   slots=2  \n\t\n \n\nnode02\tslots=1", TWO),
        ("me@node01 slots=2\nyou@10.0.0.7 slots=1\n", [Node("me@node01", 2), Node("you@10.0.0.7", 1)]),
    ],
)
def test_forms(text: str, nodes: list[Node], tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode())
    assert hostfile.read(str(path)) == nodes
    assert hostfile.read(str(hostfile.write(tmp_path / "clean", nodes))) == nodes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"node01 slots=8\n\n# two\nnode02 8\n", "line 'node02 8': expected 'HOST slots=RANKS'"),
        (b"node01\r\n", "line 'node01': expected 'HOST slots=RANKS'"),
        (b"node01 slots=0", "line 'node01 slots=0': expected"),
        (b"node01 slots=2 max_slots=4", "line 'node01 slots=2 max_slots=4': expected"),
        (b"node[01-04] slots=2", "line 'node[01-04] slots=2': expected 'HOST slots=RANKS', a line for each host"),
        (b"-oProxyCommand=x slots=2", "line '-oProxyCommand=x slots=2': expected"),
        (b"node01 slots=2\n\nnode01 slots=2", "lines 1 and 3 name 'node01': expected one, with all its slots"),
        (b"node01 slots=2\nme@node01 slots=1", "lines 1 and 2 name 'node01'"),
        (b"\r\n# none\r\n", "names no host"),
        (b"node\xff slots=2", "cannot be read: it is no UTF-8 text"),
    ],
)
def test_a_line_that_is_wrong_is_named(text: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(text)
    with pytest.raises(InputError) as error:
        hostfile.read(str(path))
    assert f"--hostfile {path}" in str(error.value)
    assert words in str(error.value)
    assert str(error.value).isprintable(), "a carriage return would hide the message"


@pytest.mark.optional_programs  # pdsh and ssh, which are played
def test_deepspeed_gets_what_was_read(tmp_path: Path) -> None:
    play(tmp_path, pdsh="exit 9", ssh=HERE.format(folder=tmp_path))
    path = tmp_path / "hostfile"
    path.write_bytes(b"\xef\xbb\xbfme@node01 slots=2 # first\r\n\r\nnode02\tslots=1\r\n")
    code, out, err = finish(start(tmp_path, 'cat "$6"', "--hostfile", path, "tiny", checked="run"))
    assert (code, out) == (0, "me@node01 slots=2\nnode02 slots=1\n"), err
    path.write_bytes(b"node01 slots=2 gpus=1\r\n")
    code, out, err = finish(start(tmp_path, "exit 9", "--hostfile", path, "tiny", checked="run"))
    line = (
        f"launch.sh: error: --hostfile {path}: line 'node01 slots=2 gpus=1': expected 'HOST slots=RANKS', a line for "
    )
    assert (code, err) == (2, f"{line}each host\n")


ODD = [
    "plain-word_1.5/x:y=z,@+",
    "$HOME `id` $(id)",
    'it\'s "quoted" \\ twice',
    " blanks  within\tand around ",
    "two\nlines\n",
    "",
    "~",
    "*?[a-z]{1,2}",
    "%h %n %u %41 100%",
    "a;b|c&d>e<f(g)!h#i^j",
    "日本語 é",
    "no UTF-8: \udcff",
]


def test_no_shell_changes_a_quoted_argument() -> None:
    words = quoted(ODD)
    assert words[0] == ODD[0], "a plain word can be read in a list of processes"
    seen = subprocess.run(["sh", "-c", f"printf '%s\\n' {' '.join(words)}"], capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines() == words
    assert not any(f"%{letter}" in word for word in words for letter in "hnu"), "pdsh replaces them"
    assert unquoted(words) == ODD


PDSH = """shift 5
sh -c "$(echo "$*" | sed "s/%n/0/g; s/%h/node01/g; s/%u/me/g")" """
"""pdsh with one host, which is this machine."""
TOLD = """
import json, os, sys
if "RANK" in os.environ and "megapix" in sys.orig_argv:
    from megapix.cli import environment
    typed = environment.prepare(sys.orig_argv[sys.orig_argv.index("megapix") + 1:])
    print(json.dumps([typed, "MEGAPIX_QUOTED" in os.environ]), flush=True)
    os._exit(0)
"""


@pytest.mark.optional_programs  # pdsh and ssh, which are played
def test_arguments_arrive_as_they_were_typed(tmp_path: Path) -> None:
    """Through DeepSpeed's own runner and launcher, and the shell that ssh starts."""
    play(tmp_path, pdsh=PDSH, ssh=HERE.format(folder=tmp_path))
    (tmp_path / "sitecustomize.py").write_text(TOLD)
    (tmp_path / "hostfile").write_text("node01 slots=1\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = ["--hostfile", tmp_path / "hostfile", "--master-addr", "127.0.0.1", "tiny", *ODD]
    code, out, err = finish(start(tmp_path, f'exec {sys.executable} "$@"', *command, checked="run", PYTHONPATH=path))
    assert code == 0, err
    told = next(line for line in out.splitlines() if line.startswith("[["))
    assert json.loads(told) == [["train", "tiny", *ODD], False]
