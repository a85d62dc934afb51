"""How a caption's features are made: what an encoder is asked for, and what stored features are compared by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megapix.config import INSTRUCTION as INSTRUCTION  # data_prep, which knows no options of runs, has it from here
from megapix.config import TextConfig
from megapix.shards.index import as_count, as_sha256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How features are made; equal recipes make equal features, but for rounding.

    A wanted recipe may leave `digest` and `width` out: any encoder is right.
    """

    digest: str = ""
    """The encoder's (`megapix.encoders.text.digest`)."""
    width: int = 0
    """Numbers of a token's features."""
    max_tokens: int
    """Tokens of a caption that are kept."""
    normalize: str
    """'rms' (of each token) or 'none'."""
    scale: float
    """Factor of the features, after that."""
    prefix: str
    """Instruction before each caption that is not empty."""
    dtype: str
    """What the encoder computes in, 'bf16' or 'fp32'; stored is always bf16."""
    padding: str = "masked"
    """'masked': a caption is its own tokens. 'attended': it is max_tokens of them, those behind it what the encoder
    gives at tokens of padding, and the network attends to all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))  # 1 and 1.0 are one recipe, and the same bytes

    @property
    def attended(self) -> bool:
        """Whether captions are padded to max_tokens, and padding is attended to."""
        return self.padding == "attended"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as files say it; without padding it is, byte by byte, that of files from before there was any."""
        data = asdict(self)
        if not self.attended:
            del data["padding"]
        return data

    @staticmethod
    def from_dict(data: Any) -> Recipe:
        """The recipe that a file says; KeyError, TypeError or ValueError if it is none."""
        data = {"padding": "masked", **data}
        types = {"max_tokens": int, "width": int, "scale": float}
        for field in dataclasses.fields(Recipe):
            if not isinstance(data[field.name], types.get(field.name, str)):
                raise ValueError(f"{field.name} is {data[field.name]!r}")
        recipe = Recipe(**data)
        if recipe.normalize not in ("rms", "none") or recipe.dtype not in ("bf16", "fp32"):
            raise ValueError(f"normalize and dtype are {recipe.normalize!r} and {recipe.dtype!r}")
        if recipe.padding not in ("masked", "attended"):
            raise ValueError(f"padding is {recipe.padding!r}")
        if not 0 < recipe.scale < math.inf:
            raise ValueError(f"scale is {recipe.scale!r}")
        as_sha256(recipe.digest), as_count(recipe.width, 1), as_count(recipe.max_tokens, 1)
        return recipe

    def difference(self, wanted: Recipe, folder: str, options: Mapping[str, str]) -> str:
        """The first difference between these stored features and what is wanted, as half a sentence; empty if none.

        Args:
            folder: where they are stored.
            options: what the user calls each field.
        """
        for field in dataclasses.fields(self):
            stored, asked = getattr(self, field.name), getattr(wanted, field.name)
            if stored == asked or (field.name in ("digest", "width") and not asked):
                continue
            if field.name == "digest":
                stored, asked = f"{stored[:16]}…", f"{asked[:16]}…"
            return (
                f"{options[field.name]} = {asked!r}, but the features stored with {folder!r} were made with {stored!r}"
            )
        return ""


def recipe_of(text: TextConfig, width: int = 0) -> Recipe:
    """How a run's text features are computed; 0 stands for any width."""
    return Recipe(
        digest=text.digest,
        width=width,
        max_tokens=text.max_tokens,
        normalize=text.normalize,
        scale=text.scale,
        prefix=text.prefix,
        dtype=text.dtype,
        padding=text.padding,
    )


OPTIONS = {field.name: f"text.{field.name}" for field in dataclasses.fields(Recipe)} | {"width": "model.text_width"}
"""What a run calls the fields of a recipe."""
