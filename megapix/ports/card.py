"""The model card of weights: README.md of a folder that others load, with what is known of them."""

from __future__ import annotations

from collections.abc import Mapping

from megapix import __version__
from megapix.config import unlike_released
from megapix.weights.about import About

SHOWN = 20
"""Classes that are named."""


def card(about: About, licence: str = "", sections: Mapping[str, str] | None = None) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        licence: of the weights, as the hub names it; empty leaves the field out.
        sections: more of them, title -> text.
    """
    m, s, text = about.model, about.sampling, bool(about.model.text_width)
    task = "text-to-image" if text else "unconditional-image-generation"
    header = [f"license: {licence}"] if licence else []
    header += [f"pipeline_tag: {task}", "tags: [pixeldit, megapix, diffusers]"]
    call = 'prompts=["..."], encoder="FOLDER_OR_HUB_NAME"' if text else "classes=[0, 1]"
    rows = {
        "weights": f"{about.kind}, {about.images_seen:,} images seen",
        "image size": f"{about.image_size} pixels",
        "network": f"{m.depth} + {m.pixel_depth} blocks, width {m.width}, {m.heads} heads, patch {m.patch_size}",
        "patch FFN, modulation": f"{m.mlp}, {m.modulation}",
        "sampling": f"{s.sampler}, {s.steps} steps, guidance {s.guidance:g} for t in ({s.guidance_from:g}, "
        f"{s.guidance_to:g}), shift {s.shift:g}",
    }
    if text:
        rows["text"] = f"{m.text_width} wide, at most {about.text.max_tokens} tokens, padding {about.text.padding}"
        rows["convention"] = m.convention
    else:
        named = ", ".join(about.classes[:SHOWN])
        more = len(about.classes) - SHOWN
        rows["classes"] = f"{m.num_classes}: {named}{f' and {more} more' if more > 0 else ''}"
    parts = [
        "\n".join(["---", *header, "---"]),
        "# PixelDiT",
        f"A pixel-space diffusion transformer, trained with megapix {__version__}.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        "## Use",
        "```sh\npip install -r requirements.txt" + (" transformers" if text else "") + "\n```",
        f'```python\nfrom pipeline import PixelDiTPipeline\n\npipeline = PixelDiTPipeline.from_pretrained(".")\n'
        f"images = pipeline({call}, seed=0)\n```",
    ]
    if different := unlike_released(m, about.text):
        parts.append(f"The released code and its ports do not run this network as it is: {'; '.join(different)}.")
    if about.stages:
        before = (f"{stage.images_seen:,} images (the {stage.kind} went on)" for stage in about.stages)
        parts.append(f"Stages before: {', then '.join(before)}.")
    for title, section in (sections or {}).items():
        parts += [f"## {title}", section]
    return "\n\n".join(parts) + "\n"
