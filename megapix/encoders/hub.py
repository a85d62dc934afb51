"""Frozen encoders that others have trained, through transformers: a local folder, or a name on the Hugging Face hub.

transformers is imported here alone, and only when an encoder is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapix.errors import InputError


def library() -> Any:
    """transformers, without its progress bars and notices, and the hub's of every try."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_name(name: str, option: str, example: str) -> None:
    """Raise InputError for what is neither a folder nor a name on the hub such as `example`."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"{option} = {name!r}: no such folder, nor a name on the hub such as {example!r}")


@contextmanager
def named(name: str, option: str) -> Iterator[None]:
    """Whatever goes wrong in loading becomes one InputError that names option and encoder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a foreign configuration ends in whatever its values lead to
        missing = "" if Path(name).is_dir() else "no such folder, and as a name on the hub: "
        raise InputError(f"{option} = {name!r}: {missing}{_said(error)}") from error


def check_whole(loading: dict[str, Any], name: str, option: str, unused: str = "$^") -> None:
    """Refuse weights that are not all there: transformers would start with random ones, and say so in a warning.

    Args:
        loading: what `from_pretrained` says with `output_loading_info`.
        unused: pattern of the names of tensors that nothing is computed with.

    Raises:
        InputError: naming one of those that are missing or of another shape.
    """
    # Of those of another shape, the name comes first.
    keys = [*loading["missing_keys"], *(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])]
    if lacking := sorted(key for key in keys if not re.search(unused, key)):
        raise InputError(f"{option} = {name!r} lacks {len(lacking)} of the encoder's tensors: {lacking[0]}, …")


def _said(error: Exception) -> str:
    """What an error of transformers says, in a line; of OSErrors and ValueErrors, which it raises itself, the first."""
    if isinstance(error, (OSError, ValueError)):
        return " ".join(str(error).strip().splitlines()[:2])
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
