"""How well images fit texts: any CLIP or SigLIP of transformers, a folder or a name on the hub.

It gives images and texts vectors of one space, of length 1. What is made of them is in `evaluation/scores.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megapix.encoders.hub import check_name, check_whole, library, named
from megapix.encoders.scoring import exactly
from megapix.errors import InputError

EXAMPLE = "openai/clip-vit-large-patch14"
KINDS = ("clip", "siglip", "siglip2")
BATCH = 64
"""Texts in one forward pass."""
SEEN = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id", "projection_dim", "attention_dropout")
"""What its configuration says that the shapes of its weights do not."""


class ImageText:
    """A frozen pair of encoders, made on the CPU; `load` makes one.

    Args:
        model: a transformers model with `get_image_features` and `get_text_features`, in fp32.
        tokenizer: its tokenizer.
        processor: its image processor, by Pillow.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self._model, self._tokenizer, self._processor = model.eval().requires_grad_(False), tokenizer, processor
        self.name: str = model.config.model_type
        """The kind: first word in the names of scores."""
        self.tokens: int = model.config.text_config.max_position_embeddings
        """Most tokens of a text; it is cut there."""
        self.sha256 = _digest(model, tokenizer, processor)
        """Hash of weights, sizes, tokenizer and what is done to images."""

    def to(self, device: torch.device) -> None:
        """Move it to a device."""
        self._model.to(device)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts have more tokens than it takes."""
        return sum(len(ids) > self.tokens for ids in self._tokenizer(list(texts), verbose=False)["input_ids"])

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> vectors of length 1, float32 [B, D], on the model's device."""
        made = self._processor(images=list(pixels.cpu()), input_data_format="channels_first", return_tensors="pt")
        values = made["pixel_values"].to(self._model.device)
        return _normal(exactly(lambda: self._model.get_image_features(pixel_values=values)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> vectors of length 1, float32 [N, D], on the model's device.

        All are padded to one length, as SigLIP was trained, which reads its padding; CLIP's is masked out.
        """
        found = []
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            tokens = self._tokenizer(
                some, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt", verbose=False
            ).to(self._model.device)
            given = {"input_ids": tokens["input_ids"]}
            if self.name == "clip":
                given["attention_mask"] = tokens["attention_mask"]
            found.append(_normal(exactly(partial(self._model.get_text_features, **given))))
        return torch.cat(found)


def load(name: str, option: str) -> ImageText:
    """The CLIP or SigLIP of that folder or hub name, on the CPU in fp32; torch's random state is left as it was.

    Raises:
        InputError: no such folder, another kind of model, or one that lacks a part.
    """
    check_name(name, option, EXAMPLE)
    with named(name, option), torch.random.fork_rng(devices=[]):
        hub = library()
        kind = hub.AutoConfig.from_pretrained(name).model_type
        if kind not in KINDS:
            raise InputError(f"{option} = {name!r} is of the kind {kind!r}: expected one of {', '.join(KINDS)}")
        model, loading = hub.AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        check_whole(loading, name, option, r"position_ids$")
        tokenizer = hub.AutoTokenizer.from_pretrained(name)
        processor = hub.AutoImageProcessor.from_pretrained(name, backend="pil")
        return ImageText(model, tokenizer, processor)


def _normal(features: Any) -> Tensor:
    vectors = getattr(features, "pooler_output", features)  # transformers gave the vectors alone before 5.0
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _digest(model: Any, tokenizer: Any, processor: Any) -> str:
    parts = {part: getattr(model.config, part).to_dict() for part in ("text_config", "vision_config")}
    seen = {part: {key: values.get(key) for key in SEEN} for part, values in parts.items()}
    done = {key: value for key, value in processor.to_dict().items() if not key.endswith(("_type", "_class"))}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(
        json.dumps([model.config.model_type, seen, done, words], sort_keys=True, default=str).encode()
    )
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.contiguous().float().numpy().tobytes())
    return digest.hexdigest()
