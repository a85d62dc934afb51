"""A pipeline: images from a trained network by one call, with the settings that came with its weights.

It is what `megapix.load` returns, and what an exported folder carries as its own `pipeline.py` (`bundle.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megapix.config import Generator, ModelConfig, SamplingConfig, TextConfig, override_sampling, validate_seed
from megapix.diffusion.condition import Condition, classes
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import SAMPLERS, generate_as, not_finite, seeded_noise
from megapix.encoders import text as text_encoder
from megapix.encoders.text import TextEncoder
from megapix.errors import InputError, one_of
from megapix.model.pixeldit import PixelDiT
from megapix.model.pixeldit_t2i import TextPixelDiT
from megapix.shards.text_recipe import recipe_of

KEY = "_megapix"
"""Of an exported folder's model_index.json: its settings. diffusers looks at no key that begins so."""
OVERRIDES = ("sampler", "steps", "guidance", "interval", "shift")
"""What a call may give in place of the stored sampling settings."""


@dataclass(frozen=True)
class Settings:
    """What goes with a network's weights."""

    source: str
    """Where they came from."""
    model: ModelConfig
    image_size: int
    """Height and width in pixels that it was trained at."""
    sampling: SamplingConfig
    generator: Generator
    """Of the noise that images start from."""
    class_names: tuple[str, ...] = ()
    text: TextConfig = field(default_factory=TextConfig)
    """How text features are made, for a network that takes text."""


class PixelDiTPipeline:
    """Images by one call.

        images = pipeline(classes=[207, "tench"], seed=1)
        images = pipeline(prompts=["a red cat"], guidance=3.5)

    Args:
        network: in eval mode, on the device to sample on.
        encoder: the frozen text encoder, for prompts; where there is none, `settings.text.encoder` is loaded when the
            first prompt comes.
    """

    def __init__(self, network: PixelDiT, settings: Settings, encoder: TextEncoder | None = None) -> None:
        self.network, self.settings, self._encoder = network, settings, encoder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> PixelDiTPipeline:
        """The pipeline of a folder that `megapix export --format diffusers` has written.

        Raises:
            InputError: it is none, or its weights are not those of its network.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "model_index.json").read_text())[KEY]
            settings = Settings(
                str(folder),
                ModelConfig(**about["model"]),
                about["image_size"],
                SamplingConfig(**about["sampling"]),
                about["generator"],
                tuple(about["class_names"]),
                TextConfig(**about["text"]),
            )
            files = sorted((folder / "transformer").glob("*.safetensors"))
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            with torch.device("meta"):
                network = (TextPixelDiT if settings.model.text_width else PixelDiT)(settings.model)
            network.load_state_dict(tensors, assign=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{str(folder)!r} cannot be read as a folder by 'megapix export --format diffusers': {reason}"
            ) from error
        return cls(network.to(device, dtype).eval().requires_grad_(False), settings)

    def to(self, device: str | torch.device) -> PixelDiTPipeline:
        """Move network and text encoder to a device; returns itself."""
        self.network.to(device)
        if self._encoder:
            self._encoder.to(torch.device(device))
        return self

    @property
    def device(self) -> torch.device:
        """Where it samples."""
        return self.network.s_embedder.proj.weight.device

    def __call__(
        self,
        classes: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        size: tuple[int, int] | None = None,
        batch: int = 16,
        encoder: str = "",
        output: Literal["pil", "tensor"] = "pil",
        **overrides: Any,
    ) -> Any:
        """One image for each class or prompt.

        Args:
            classes: numbers or names of classes, for a network that takes classes.
            prompts: for a network that takes text.
            negative_prompt: what guidance leads away from; empty is the empty caption.
            seed: of the noise; an image depends on it and on its own place in the list.
            size: height and width in pixels; by default those of training.
            batch: images sampled at once.
            encoder: folder or hub name of the text encoder, where the weights name none; kept for the next call.
            output: 'pil', or 'tensor' for float32 [B, 3, H, W] in about [-1, 1].
            overrides: sampler, steps, guidance, interval (from, to) or shift, in place of the stored settings.

        Returns:
            PIL images, or a tensor.

        Raises:
            InputError: naming the argument, the value found and what would be right.
        """
        sampling = self._sampling(overrides)
        height, width = self._size(size)
        validate_seed(seed, "seed")
        if batch < 1:
            raise InputError(f"batch = {batch}: expected at least 1")
        if output not in ("pil", "tensor"):
            raise InputError(f"output = {output!r}: expected 'pil' or 'tensor'")
        condition = self._condition(classes, prompts, negative_prompt, encoder)
        made = list[Tensor]()
        for start in range(0, len(condition), batch):
            numbers = list(range(start, min(start + batch, len(condition))))
            noise = seeded_noise(seed, numbers, (height, width), self.device, self.settings.generator)
            made.append(generate_as(self.network, noise, condition.at(numbers), sampling))
        images = torch.cat(made)
        if not images.isfinite().all():
            raise InputError(not_finite(self.settings.source))
        return images if output == "tensor" else [Image.fromarray(image) for image in to_uint8(images)]

    def _sampling(self, overrides: dict[str, Any]) -> SamplingConfig:
        for name in overrides:
            if name not in OVERRIDES:
                raise InputError(f"{name} is no argument of a pipeline{one_of(name, OVERRIDES)}")
        if (sampler := overrides.get("sampler")) not in (None, *SAMPLERS):
            raise InputError(f"sampler = {sampler!r}: expected one of {', '.join(SAMPLERS)}")
        try:
            return override_sampling(self.settings.sampling, **overrides)
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{name} = {value!r}" for name, value in overrides.items())
            raise InputError(f"{given}: expected numbers, and two of them for interval") from error

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        patch = self.settings.model.patch_size
        try:
            height, width = size or (self.settings.image_size, self.settings.image_size)
            right = min(height, width) >= patch and height % patch == 0 and width % patch == 0
        except (TypeError, ValueError):
            right = False
        if not right:
            raise InputError(f"size = {size!r}: expected (height, width), both multiples of the patch size {patch}")
        return height, width

    def _condition(
        self, wanted: Sequence[int | str] | None, prompts: Sequence[str] | None, negative: str, encoder: str
    ) -> Condition:
        takes_text, source = bool(self.settings.model.text_width), self.settings.source
        if takes_text and wanted is not None:
            raise InputError(f"classes = {wanted!r}: {source} takes text (prompts=[...])")
        if not takes_text:
            for name, given in (("prompts", prompts), ("negative_prompt", negative), ("encoder", encoder)):
                if given:
                    raise InputError(f"{name} = {given!r}: {source} takes classes, not text (classes=[...])")
            return self._classes(wanted)
        if prompts is None or isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts = {prompts!r}: expected a list of texts")
        if not prompts:
            raise InputError("prompts = []: expected at least one")
        encode = self._encoding(encoder)
        cond, null = encode(prompts), encode([negative])
        return Condition(tuple(part.to(self.device) for part in cond), tuple(part.to(self.device) for part in null))

    def _classes(self, wanted: Sequence[int | str] | None) -> Condition:
        known, names = self.settings.model.num_classes, self.settings.class_names
        expected = f"expected numbers from 0 to {known - 1}, or names of classes"
        if wanted is None or isinstance(wanted, str | int) or not len(wanted):
            raise InputError(f"classes = {wanted!r}: {expected}, in a list with one for each image")
        numbers = list[int]()
        for one in wanted:
            if isinstance(one, str):
                if one not in names:
                    raise InputError(f"class {one!r} does not exist{one_of(one, names)}")
                numbers.append(names.index(one))
                continue
            try:
                number = int(one)
            except (TypeError, ValueError):
                number = -1
            if number != one or not 0 <= number < known:
                raise InputError(f"class {one!r} does not exist: {expected}")
            numbers.append(number)
        return classes(torch.tensor(numbers, device=self.device), known)

    def _encoding(self, name: str) -> TextEncoder:
        text, width = self.settings.text, self.settings.model.text_width
        if name or not self._encoder:
            if not (name or text.encoder):
                raise InputError(f"{self.settings.source} names no text encoder: give encoder='FOLDER_OR_HUB_NAME'")
            wanted, option = recipe_of(text, width), "encoder" if name else "text.encoder"
            try:
                found = text_encoder.load(name or text.encoder, wanted, text.micro_batch, option)
            except ModuleNotFoundError as error:
                raise InputError(f"prompts need a text encoder: pip install transformers ({error})") from error
            if text.digest not in ("", found.digest) or found.width != width:
                raise InputError(
                    f"{option} = {name or text.encoder!r} has the digest {found.digest[:16]}… and width {found.width}; "
                    f"the network takes {text.digest[:16] or 'any'}… and {width}"
                )
            self._encoder = found.to(self.device)
        return self._encoder


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """As JSON has it under KEY."""
    encoder = settings.text.encoder
    if encoder.count("/") != 1 or Path(encoder).exists():  # a path of this machine, and no name on the hub
        encoder = ""
    plain = replace(settings, text=replace(settings.text, encoder=encoder))
    found = {of.name: getattr(plain, of.name) for of in fields(plain) if of.name != "source"}
    for name in ("model", "sampling", "text"):
        found[name] = {of.name: getattr(found[name], of.name) for of in fields(found[name])}
    return found
