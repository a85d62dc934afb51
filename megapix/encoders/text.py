"""The frozen text encoder that a text-to-image network listens to, through transformers, with its tokenizer.

Any model of transformers that gives a hidden state for each token: decoders such as Gemma-2 (their last hidden states),
the encoder half of T5 and its kin, BERT and its kin. It stands beside the trained network: no optimizer, EMA or
checkpoint knows of it.

An instruction before the caption leads such a decoder to better features. Its own are left out, but for the first
token's. Where it ends is seen in the whole text's tokens, by the characters that each of them stands for: a token that
reaches into the caption belongs to the caption. (Many tokenizers join the last blank of "Prompt: " to the next word.)

Where padding is attended to, all is as the released text-to-image network had it: the tokenizer's padding is behind the
text, masked out for the encoder but with hidden states of its own, which see the text; of all tokens the first and the
last max_tokens - 1 are kept; and where the instruction ends is counted in its own tokens, less one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megapix.encoders.hub import check_name, check_whole, library, named
from megapix.errors import InputError
from megapix.shards.text_recipe import Recipe

EXAMPLE = "google/gemma-2-2b-it"
"""The paper's encoder, on the hub."""
FEATURE_EPS = 1e-6
"""Added to a token's mean square."""
UNUSED = r"(^|\.)(pooler|lm_head)\."
"""Tensors that hidden states do not depend on; a folder may lack them."""
POSITIONS = ("position_embeddings", "position_embedding", "wpe")
"""What models call their tables of learned positions, which end somewhere."""

IDENTITY = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("d_kv", "hidden_act", "hidden_activation", "feed_forward_proj", "layer_norm_eps", "layer_norm_epsilon"),
    *("rms_norm_eps", "relative_attention_num_buckets", "relative_attention_max_distance", "rope_parameters"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window", "layer_types", "is_decoder"),
    "use_bidirectional_attention",
)
"""What its configuration says that the shapes of its weights do not."""


class Encoded(NamedTuple):
    """A caption's features."""

    features: Tensor
    """float32 [tokens, width]."""
    cut: bool
    """Whether the caption had more tokens."""


class _Tokens(NamedTuple):
    """What the encoder is shown of a caption."""

    ids: list[int]
    start: int
    """Beside the first, tokens from this one on are kept: 1, or behind the instruction."""
    end: int
    """Up to this one: the text's, or where padding is attended to, as much behind it as makes max_tokens."""
    whole: int
    """Tokens that would be kept if there were no limit."""


class TextEncoder:
    """A frozen encoder of captions; `load` makes one.

    Args:
        model: a transformers model that gives `last_hidden_state`, in fp32.
        tokenizer: its tokenizer, backed by the tokenizers library.
        recipe: how features are made; its digest and width are not looked at.
        micro_batch: captions that it sees at once; 0 is all.
    """

    recipe: Recipe
    """How features are made."""
    cut: int
    """Captions so far that had more tokens than are kept."""
    first_cut: str | None
    """The first of them, in a line to print; None if there was none."""

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe, micro_batch: int = 0) -> None:
        self._tokenizer, self._micro_batch, self.recipe = tokenizer, micro_batch, recipe
        bos, eos, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        self._pad: int = next((token for token in (pad, eos) if token is not None), 0)
        self._alone: int = self._pad if bos is None else bos  # for a caption without any token
        self._dtype = torch.bfloat16 if recipe.dtype == "bf16" else torch.float32
        self._instruction = max(1, len(tokenizer(recipe.prefix, verbose=False)["input_ids"]) - 1)
        known = digest(model, tokenizer)
        self._model = model.eval().requires_grad_(False)
        self._model.config.use_cache = False
        for weight in self._model.parameters():  # not the buffers: angles of rotary positions want fp32
            weight.data = weight.data.to(self._dtype)
        self.cut, self.first_cut = 0, None
        empty = self._tokens([""])[0]
        if recipe.max_tokens <= len(empty.ids):
            raise InputError(
                f"max_tokens = {recipe.max_tokens}: the caption '' has {len(empty.ids)} tokens already; expected more"
            )
        self.recipe = replace(recipe, digest=known, width=self._features([empty])[0].shape[-1])

    @property
    def width(self) -> int:
        """Numbers of a token's features."""
        return self.recipe.width

    @property
    def digest(self) -> str:
        """SHA-256 of what it computes with: `digest`."""
        return self.recipe.digest

    def to(self, device: torch.device) -> TextEncoder:
        """Move it to a device; returns itself."""
        self._model.to(device)
        if device.type == "cuda":
            library().AttentionMaskInterface.register("sdpa", unread_mask)
        return self

    def parameters(self) -> list[Tensor]:
        """Its weights, none of which is trained."""
        return list(self._model.parameters())

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Features of captions, float32 [B, T, width], and which of them are tokens, bool [B, T].

        T is the longest caption's; behind the tokens of a shorter one features are 0. Where padding is attended to,
        T is max_tokens, and there is no mask.
        """
        found = [features for features, _ in self.each(captions)]
        if self.recipe.attended:
            return (torch.stack(found) if found else torch.zeros(0, self.recipe.max_tokens, self.width),)
        device = self.parameters()[0].device
        lengths = [len(features) for features in found]
        longest = max(lengths, default=1)
        padded, tokens = torch.zeros(len(found), longest, self.width, device=device), torch.arange(longest)
        for row, features in zip(padded, found, strict=True):
            row[: len(features)] = features
        return padded, _to(tokens < torch.tensor(lengths, dtype=torch.long)[:, None], device)

    def each(self, captions: Sequence[str]) -> list[Encoded]:
        """Features of each caption, without padding unless it is attended to. One that occurs twice is encoded once."""
        if not captions:
            return []
        different = list(dict.fromkeys(captions))
        tokens = self._tokens(different)
        # By length little is padded; and by tokens the order of the captions has no part in what is computed.
        order = sorted(range(len(different)), key=lambda n: (len(tokens[n].ids), tokens[n].ids))
        found, size = dict[str, Encoded](), self._micro_batch or len(order)
        for at in range(0, len(order), size):
            some = order[at : at + size]
            for n, features in zip(some, self._features([tokens[n] for n in some]), strict=True):
                found[different[n]] = Encoded(features, tokens[n].whole > self.recipe.max_tokens)
        self._count(captions, found, dict(zip(different, tokens, strict=True)))
        return [found[caption] for caption in captions]

    def _count(self, captions: Sequence[str], found: dict[str, Encoded], tokens: dict[str, _Tokens]) -> None:
        for caption in captions:
            self.cut += found[caption].cut
            if found[caption].cut and self.first_cut is None:
                shown = caption if len(caption) <= 60 else caption[:59] + "…"
                self.first_cut = (
                    f"a caption of {tokens[caption].whole} tokens was cut to max_tokens = {self.recipe.max_tokens}, as "
                    f"will be others without a word: {shown!r}"
                )

    def _tokens(self, captions: Sequence[str]) -> list[_Tokens]:
        prefix = self.recipe.prefix
        found = self._tokenizer(
            [prefix + caption if caption else "" for caption in captions],
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        keys = ("input_ids", "special_tokens_mask", "offset_mapping")
        rows = zip(captions, *(found[key] for key in keys), strict=True)
        return [self._shown(ids, added, ends, len(prefix) if caption else 0) for caption, ids, added, ends in rows]

    def _shown(self, ids: list[int], added: list[int], spans: list[tuple[int, int]], instruction: int) -> _Tokens:
        """What the encoder is shown, given all tokens of a text, which of them the tokenizer has added, and the
        characters that each stands for; the first `instruction` characters are the instruction."""
        if not ids:
            ids, added, spans = [self._alone], [1], [(0, 0)]
        body = len(ids)  # behind it are the tokens that close a text
        while body > 1 and added[body - 1]:
            body -= 1
        start = 1
        attended = self.recipe.attended
        if instruction and attended:
            start = self._instruction
        elif instruction:
            behind = (n for n in range(body) if not added[n] and spans[n][1] > instruction)
            start = max(1, next(behind, body))
        whole = 1 + len(ids) - start
        if (over := whole - self.recipe.max_tokens) > 0:  # what closes a text stays, as in transformers
            ids = ids[: body - over] + ids[body:]
        return _Tokens(ids, start, start + self.recipe.max_tokens - 1 if attended else len(ids), whole)

    @torch.no_grad()
    def _features(self, tokens: list[_Tokens]) -> list[Tensor]:
        """Features of the tokens that are kept: float32 [tokens, width] each."""
        device, longest = self.parameters()[0].device, max(some.end for some in tokens)
        shown = torch.full((len(tokens), longest), self._pad)
        mask = torch.zeros_like(shown)
        for row, some in enumerate(tokens):
            shown[row, : len(some.ids)] = torch.tensor(some.ids)
            mask[row, : len(some.ids)] = 1
        told = {"input_ids": _to(shown, device), "attention_mask": _to(mask, device)}
        hidden = self._model(**told).last_hidden_state.float()
        if self.recipe.normalize == "rms":
            hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + FEATURE_EPS)
        hidden = hidden * self.recipe.scale
        return [torch.cat([hidden[row, :1], hidden[row, some.start : some.end]]) for row, some in enumerate(tokens)]


def unread_mask(**options: Any) -> Tensor:
    """transformers' mask for SDPA, made without a look at it.

    By itself it reads from the device whether any token is padding, to make no mask where there is none, and so waits.
    """
    from transformers.masking_utils import sdpa_mask

    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(**options | skips)
    return mask


def _to(made: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from page-locked memory, so that nobody waits for the copy to a GPU."""
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def digest(model: Any, tokenizer: Any) -> str:
    """SHA-256 of what an encoder computes with, whatever file it came from: its sizes, its weights in fp32, and its
    tokenizer's rules and vocabulary."""
    sizes = {name: getattr(model.config, name, None) for name in IDENTITY}
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # neither belongs to the text's tokens, and a file may bring them along
    backend.no_padding()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    hashed = hashlib.sha256(json.dumps([sizes, special], sort_keys=True, default=str).encode())
    hashed.update(backend.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not re.search(UNUSED, name):
            hashed.update(f"{name} {list(tensor.shape)}\n".encode())
            hashed.update(tensor.float().cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def load(name: str, recipe: Recipe, micro_batch: int = 0, option: str = "text.encoder") -> TextEncoder:
    """The encoder in a local folder, or of a name on the Hugging Face hub, on the CPU; `option` is where it was named.

    Args:
        recipe: how features are to be made; its digest and width are not looked at, those of the encoder's are its own.
        micro_batch: captions that it sees at once; 0 is all.

    Raises:
        InputError: no such folder or name, not an encoder of text, weights that are not all there, a tokenizer that is
            missing or another model's, or more tokens than it takes.
    """
    check_name(name, option, EXAMPLE)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else each later fork prints a warning; no child tokenises
    transformers = library()
    with named(name, option):
        config = transformers.AutoConfig.from_pretrained(name)
        kind = transformers.AutoModel
        if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:  # of two halves, the encoder alone
            kind, config.is_encoder_decoder = transformers.AutoModelForTextEncoding, False
        model, loading = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        shown = f"{option} = {name!r}"
        if model.main_input_name != "input_ids":
            raise InputError(f"{shown} is of kind {config.model_type!r}: expected an encoder of text")
        check_whole(loading, name, option, UNUSED)
        if config.is_encoder_decoder:
            model = model.get_encoder()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        _check_tokenizer(tokenizer, model, shown)
        _check_positions(tokenizer, model, recipe, shown)
        return TextEncoder(model, tokenizer, recipe, micro_batch)


def _check_tokenizer(tokenizer: Any, model: Any, shown: str) -> None:
    """Refuse what transformers makes up where there is no tokenizer, one that does not say where its tokens lie in a
    text, and one of another model."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:
        raise InputError(f"{shown} has no tokenizer: expected tokenizer.json beside the weights")
    if not tokenizer.is_fast:
        raise InputError(f"{shown} has the tokenizer {type(tokenizer).__name__}: expected one with a tokenizer.json")
    largest, rows = max(vocabulary.values()), len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise InputError(f"{shown} has {rows} tokens, but its tokenizer numbers them up to {largest}: another model's?")


def _check_positions(tokenizer: Any, model: Any, recipe: Recipe, shown: str) -> None:
    """Refuse more tokens than a table of learned positions has rows."""
    prefix = len(tokenizer(recipe.prefix, add_special_tokens=False, verbose=False)["input_ids"])
    for path, table in model.named_modules():
        if path.rpartition(".")[2] in POSITIONS and isinstance(table, nn.Embedding):
            rows = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            if prefix + recipe.max_tokens > rows:
                instruction = f"max_tokens = {recipe.max_tokens} and a prefix of {prefix} tokens"
                raise InputError(f"{shown} takes {rows} tokens at most: {instruction} are more")
