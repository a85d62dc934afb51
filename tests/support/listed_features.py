"""Features as version 1 of their manifests lists them, written here without the code that reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def records(table: Path) -> list[tuple[int, ...]]:
    """The counts of each file, out of the table of files."""
    data = table.read_bytes()
    (files,) = struct.unpack_from("<Q", data, 8)
    counts = (len(data) - 48) // files // 8
    return [struct.unpack_from(f"<{counts}Q", data, 48 + 8 * counts * place) for place in range(files)]


def make_listed(folder: Path) -> Path:
    """Write the manifest of a folder, of text or of images, again as version 1 did, with the files themselves."""
    of_images = (folder / "features.json").exists()
    path, kind = (folder / "features.json", "features") if of_images else (folder / "index.json", "text")
    data = json.loads(path.read_text())
    about, files = data if of_images else data["text"], list[dict[str, Any]]()
    for place, counts in enumerate(records(table := folder / f"{kind}-files.bin")):
        name = f"{kind}-{place:06d}.safetensors"
        size = (folder / name).stat().st_size
        if of_images:
            files.append({"name": name, "samples": counts[0], "grid": list(counts[1:]), "bytes": size})
        else:
            named = dict(zip(("samples", "captions", "tokens", "cut", "tables"), counts, strict=True))
            files.append({"name": name, **named, "bytes": size})
    about |= {"version": 1, "files": files}
    table.unlink()
    path.write_text(json.dumps(data, indent=1, sort_keys=not of_images) + "\n")
    return folder
