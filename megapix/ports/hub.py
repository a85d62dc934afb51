"""The Hugging Face hub: a run as a model repository there, and a repository as a folder here.

huggingface_hub is imported late, and comes with transformers. Its environment counts: HF_TOKEN, HF_HOME, HF_ENDPOINT.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapix.checkpoint.find import find
from megapix.dist import World
from megapix.errors import InputError
from megapix.ports import diffusers
from megapix.ports.card import card
from megapix.ports.history import History, history_of
from megapix.weights.about import exported_file
from megapix.weights.read import stored_weights

SCHEME = "hf://"
NAME = r"[\w-][\w.-]*/[\w.-]+"
"""OWNER/NAME of a repository."""


def local(path: str | Path) -> Path:
    """A path as it is; of hf://OWNER/NAME, maybe with @REVISION behind it, the folder that it is downloaded to.

    Raises:
        InputError: no such name or repository, or the hub cannot be reached.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    name, _, revision = str(path).removeprefix(SCHEME).partition("@")
    _check(name, str(path))
    from huggingface_hub import snapshot_download

    with _said(str(path)):
        return Path(snapshot_download(name, revision=revision or None))


def push(path: Path, repo: str, licence: str, ema: bool | None, private: bool, shard_bytes: int) -> str:
    """Make a repository of the weights at `path` (a run, a checkpoint, an exported file or an imported folder), as
    `diffusers.write` makes a folder, with a card of what the run says; returns its address.

    Args:
        licence: of the weights, as the hub names it, such as 'apache-2.0' or 'other'.

    Raises:
        InputError: bad options, no weights, or the hub refuses or cannot be reached.
    """
    _check(repo, f"REPO = {repo!r}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise InputError(f"--license = {licence!r}: expected the hub's name of one, such as 'apache-2.0' or 'other'")
    from huggingface_hub import HfApi

    weights = stored_weights(path, ema)
    history = History() if exported_file(path) else history_of(find(path, World(), hashed=False))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        diffusers.write(weights, folder, shard_bytes, card(weights.about, licence, history.sections))
        for name, data in history.pictures.items():
            (folder / name).write_bytes(data)
        api = HfApi()
        with _said(repo):
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{weights.about.kind} after {weights.about.images_seen:,} images",
            )
    return str(address)


def _check(name: str, shown: str) -> None:
    if not re.fullmatch(NAME, name):
        raise InputError(f"{shown}: expected a repository's OWNER/NAME")


@contextmanager
def _said(shown: str) -> Iterator[Any]:
    """Whatever the hub's client raises, in one line."""
    try:
        yield
    except Exception as error:  # the client has errors of its own, of its HTTP library's, and OSErrors
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{shown}: the hub says: {type(error).__name__}: {reason}") from error
