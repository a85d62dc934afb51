"""A folder in diffusers' layout, which samples by itself and from which diffusers' ports load network and scheduler.

model_index.json                        what is in it, the classes' names, and our settings under "_megapix"
transformer/config.json                 the network's sizes, by the ports' names
transformer/diffusion_pytorch_model*.safetensors     its weights by the released names; above a size in several
                                        files, with an index of them
scheduler/scheduler_config.json         flow matching with the run's time shift
pipeline.py, requirements.txt           samples it without this program
README.md                               the model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megapix import __version__, files
from megapix.checkpoint import vectors
from megapix.errors import InputError
from megapix.files import appearing, write_atomic
from megapix.ports.bundle import bundle
from megapix.ports.card import card
from megapix.ports.pipeline import KEY, settings_to_dict
from megapix.ports.settings import settings_of
from megapix.weights.about import About, Weights

NAME = "diffusion_pytorch_model"
REQUIREMENTS = ("torch>=2.5", "numpy", "einops", "safetensors", "pillow")
"""What pipeline.py imports; for prompts, transformers besides."""
DIFFUSERS = "0.36.0"
"""The release whose files these are like."""
ABOUT = """PixelDiT, a pixel-space diffusion transformer, with its samplers, in one file: made by megapix {version}.

    from pipeline import PixelDiTPipeline

    pipeline = PixelDiTPipeline.from_pretrained("THIS_FOLDER", device="cuda")
    images = pipeline(classes=[0, 1])          # PIL images; prompts=["..."], encoder="..." where it takes text
"""


def write(weights: Weights, out: Path, shard_bytes: int, card_text: str = "") -> About:
    """Write the folder, each tensor in its dtype.

    Args:
        shard_bytes: most bytes of tensors in a file; one tensor may have more.
        card_text: the model card; empty makes one of what is known here.

    Raises:
        InputError: `out` is there and not empty, or cannot be written.
    """
    about, out = weights.about, Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {str(out)!r} exists already; expected a new or empty folder")
    with appearing(out) as temporary:
        for folder in ("transformer", "scheduler"):
            (temporary / folder).mkdir(parents=True)
        _write_weights(weights.tensors, temporary / "transformer", shard_bytes)
        for name, content in (
            ("transformer/config.json", network_config(about)),
            ("scheduler/scheduler_config.json", scheduler_config(about)),
            ("model_index.json", model_index(about)),
        ):
            write_atomic(temporary / name, (json.dumps(content, indent=2) + "\n").encode())
        source = bundle("megapix.ports.pipeline", ABOUT.format(version=__version__))
        write_atomic(temporary / "pipeline.py", source.encode())
        write_atomic(temporary / "requirements.txt", ("\n".join(REQUIREMENTS) + "\n").encode())
        write_atomic(temporary / "README.md", (card_text or card(about)).encode())
        files.sync_folder(temporary)
    return about


def _write_weights(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    parts = list(_parts(tensors, shard_bytes))
    many, places = len(parts) > 1, dict[str, str]()
    for number, names in enumerate(parts, 1):
        file = f"{NAME}-{number:05d}-of-{len(parts):05d}.safetensors" if many else f"{NAME}.safetensors"
        some = {name: tensors[name] for name in names}
        pieces = {name: (tuple(t.shape), vectors.chunks(t.flatten())) for name, t in some.items()}
        vectors.write(folder / file, pieces, {"format": "pt"}, {name: t.dtype for name, t in some.items()})
        places |= dict.fromkeys(names, file)
    if many:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomic(folder / f"{NAME}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def _parts(tensors: dict[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names of each file, in order."""
    names, size = list[str](), 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def network_config(about: About) -> dict[str, Any]:
    """transformer/config.json, by the names of the port PixelDiT-diffusers."""
    m = about.model
    found = {
        "_class_name": "PixelDiTT2ITransformer2DModel" if m.text_width else "PixelDiTTransformer2DModel",
        "_diffusers_version": DIFFUSERS,
        "sample_size": about.image_size,
        "in_channels": 3,
        "patch_size": m.patch_size,
        "num_groups": m.heads,
        "hidden_size": m.width,
        "patch_depth": m.depth,
        "pixel_hidden_size": m.pixel_width,
        "pixel_depth": m.pixel_depth,
        "use_pixel_abs_pos": True,
    }
    if not m.text_width:
        return found | {"num_classes": m.num_classes}
    return found | {
        "pixel_attn_hidden_size": m.attention_width,
        "pixel_num_groups": m.attention_heads,
        "txt_embed_dim": m.text_width,
        "txt_max_length": m.text_tokens,
        "use_text_rope": True,
        "text_rope_theta": 10000.0,
    }


def scheduler_config(about: About) -> dict[str, Any]:
    """scheduler/scheduler_config.json: sigma from 1 (noise) to 0, shifted as our time is."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS,
        "num_train_timesteps": 1000,
        "shift": about.sampling.shift,
        "stochastic_sampling": False,
    }


def model_index(about: About) -> dict[str, Any]:
    """model_index.json."""
    text = bool(about.model.text_width)
    found = {
        "_class_name": ["pipeline", "PixelDiTPipeline"],
        "_diffusers_version": DIFFUSERS,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["pipeline", "TextPixelDiT" if text else "PixelDiT"],
        KEY: settings_to_dict(settings_of(about)) | {"ema": about.ema, "images_seen": about.images_seen},
    }
    if not text:
        found["id2label"] = {str(number): name for number, name in enumerate(about.classes)}
    return found
