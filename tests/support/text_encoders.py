"""Small random text encoders with small tokenizers, as local folders that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH = 24
WORDS = [
    *("a", "photo", "of", "the", "cat", "dog", "mat", "on"),
    *("red", "blue", "user", "prompt", "with", "and", "two", "small"),
]
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyz.,:'"))
CAPTIONS = (
    "a photo of the cat",
    "two small dog on the red mat",
    "blue",
    "a photo of the cat and the dog with the user, on a mat: red and blue",
    "zebra",
)
"""Of several lengths, with words that the tokenizers know and others that they spell."""
SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "t5": {"d_model": WIDTH, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "gemma2": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "intermediate_size": 48,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
    },
}
HEADS = {"bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration", "gemma2": "Gemma2ForCausalLM"}
"""The whole models that encoders are often published within."""


def make(folder: Path, kind: str, seed: int = 0, whole: bool = False, bos: bool = True, **sizes: Any) -> Path:
    """Save an encoder of random weights with its tokenizer: 'bert', 't5' or 'gemma2'; `whole` is with its head, and T5
    with its decoder; `bos` is whether Gemma's tokenizer begins a text with a token of its own."""
    import transformers

    words = tokenizer(kind, bos)
    config = {"bert": transformers.BertConfig, "t5": transformers.T5Config, "gemma2": transformers.Gemma2Config}[kind]
    name = HEADS[kind] if whole else {"bert": "BertModel", "t5": "T5EncoderModel", "gemma2": "Gemma2Model"}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config(**SIZES[kind] | {"vocab_size": len(words)} | sizes))
        with torch.no_grad():  # features of two tokens are to differ, and what starts at zero or one to count
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.2)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tokenizer(kind: str, bos: bool = True) -> Any:
    """A tokenizer of that kind of model, with words of its own, and letters for the others."""
    import transformers

    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokens = dict.fromkeys([*special, *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)])
        return transformers.BertTokenizer(vocab={token: n for n, token in enumerate(tokens)})
    if kind == "t5":
        scored = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}
        scored |= {"▁" + word: -3.0 for word in WORDS} | dict.fromkeys(LETTERS, -6.0)
        return transformers.T5Tokenizer(vocab=list(scored.items()), extra_ids=0)
    # Byte pairs: each word grows letter by letter behind the sign for a blank; all else is spelled in letters or bytes.
    merges = list(dict.fromkeys(("▁" + word[:n], word[n]) for word in WORDS for n in range(len(word))))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = [one + other for one, other in merges]
    tokens = dict.fromkeys([*special, "▁", *LETTERS, *made, *(f"<0x{n:02X}>" for n in range(256))])
    vocabulary = {token: n for n, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=bos)
