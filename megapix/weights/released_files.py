"""Released weights in safetensors files: one, or several with an index of them, or a folder that holds either."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapix.errors import InputError

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def holds_safetensors(path: Path) -> bool:
    """Whether a path is for `read`: by its name, or because it is a folder."""
    return path.is_dir() or path.name.endswith((".safetensors", INDEX))


def read(path: Path) -> dict[str, Tensor]:
    """All tensors by name, in their dtypes.

    Args:
        path: a file, one of several (NAME-00001-of-00003.safetensors), their index, or a folder with one of these,
            maybe under transformer/, as diffusers has it.

    Raises:
        InputError: there is none, a file is missing or damaged, or two hold one name.
    """
    found = dict[str, Tensor]()
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                if twice := [name for name in names if name in found]:
                    raise InputError(f"{file}: {twice[0]} is in another of the files, too")
                found |= {name: opened.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot be read as safetensors: {error}") from error
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        for folder in (path, path / "transformer"):
            indexes, files = sorted(folder.glob(f"*{INDEX}")), sorted(folder.glob("*.safetensors"))
            if len(indexes) == 1 or len(files) == 1:
                return _files(indexes[0] if indexes else files[0])
        raise InputError(
            f"{str(path)!r} holds neither one .safetensors file nor one {INDEX}; expected the file to import"
        )
    if path.name.endswith(INDEX):
        try:
            places = json.loads(path.read_text())["weight_map"]
            return [path.parent / name for name in sorted(set(places.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read as an index of safetensors files: {error!r}") from error
    if shard := SHARD.fullmatch(path.name):
        name, _, count = shard.groups()
        return [path.with_name(f"{name}-{number:05d}-of-{count}.safetensors") for number in range(1, int(count) + 1)]
    return [path]
