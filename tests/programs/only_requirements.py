"""A program in the folder where it stands, with nothing to import but what the folder's requirements.txt names.

usage: python -I only_requirements.py FOLDER PROGRAM

Every package that is installed but is none of these, nor needed by one of them, is as if it were not there.
"""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def needed(requirements: list[str]) -> set[str]:
    """Distributions that these requirements bring along, without extras."""
    found, todo = set[str](), list(requirements)
    while todo:
        name = re.split(r"[\s<>=!~;\[(]", todo.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            more = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        todo += [line for line in more if "extra ==" not in line]
    return found


class Only:
    """In place of all finders: they are asked, but for what is not to be there."""

    def __init__(self, folder: Path) -> None:
        allowed = needed((folder / "requirements.txt").read_text().split())
        self._finders, self._hidden = (
            list(sys.meta_path),
            {
                top
                for top, distributions in metadata.packages_distributions().items()
                if not {name.lower().replace("_", "-") for name in distributions} & allowed
            }
            | {"megapix", "data_prep", "tests"},
        )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None where nobody finds it."""
        if name.split(".")[0] in self._hidden:
            return None
        return next((spec for finder in self._finders if (spec := finder.find_spec(name, path, target))), None)

    def find_distributions(self, *context: Any) -> Any:
        """What is installed, for those that ask for their own version."""
        asked = [finder for finder in self._finders if hasattr(finder, "find_distributions")]
        return (found for finder in asked for found in finder.find_distributions(*context))


if __name__ == "__main__":
    here = Path(sys.argv[1])
    sys.meta_path[:] = [Only(here)]
    sys.path.insert(0, str(here))
    exec(sys.argv[2])
