"""The settings of a pipeline from what goes with weights."""

from __future__ import annotations

from megapix.ports.pipeline import Settings
from megapix.weights.about import About


def settings_of(about: About) -> Settings:
    """What a pipeline needs of what goes with weights."""
    return Settings(
        about.source, about.model, about.image_size, about.sampling, about.generator, about.classes, about.text
    )
