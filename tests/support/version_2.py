"""An index as version 2 of its format has it, written here without the code that it is compared with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapix.shards.index import Index, read_index


def listed(index: Index) -> dict[str, Any]:
    """What its file held; without `base` and `text` it is what its digest was of."""
    names = ("samples", "base", "table_sha256", "captions_sha256", "image_policy", "source", "rejected")
    about = {"format": "megapix-shards", "version": 2} | {name: getattr(index, name) for name in names}
    about |= {"classes": [asdict(one) for one in index.classes], "shards": [asdict(one) for one in index.shards]}
    return about if index.text is None else about | {"text": index.text}


def make_listed(folder: Path) -> Path:
    """Write the index of a folder again as version 2 did, and nothing beside it that version 2 did not have."""
    data = listed(read_index(folder))
    (folder / "shards.bin").unlink()
    (folder / "index.json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    return folder
