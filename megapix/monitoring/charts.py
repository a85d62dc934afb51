"""Which scalars are drawn together: TensorBoard's page "Custom Scalars" and `megapix report`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

CHARTS = {
    "loss": {
        "loss": ["^loss/train$"],
        "validation loss": ["^validation/loss_(raw|ema)$"],
        "validation loss of the EMA by t": [r"^validation/ema_t_[\d.]+$"],
        "Fréchet distance of a few samples": [r"^evaluation/(fid|fd_\w+)$"],
        "inception score of a few samples": [r"^evaluation/(inception_score|is)(_\w+)?$"],
        "KID of a few samples": [r"^evaluation/kid(_\w+)?$"],
        "precision and recall of a few samples": [r"^evaluation/(precision|recall)(_\w+)?$"],
        "alignment loss (REPA)": ["^loss/repa$"],
        "loss by quarter of t": [r"^loss/t_\d_of_\d$"],
    },
    "health": {
        "gradient norm, before clipping": ["^health/grad_norm$"],
        "skipped steps, spikes, rollbacks": ["^health/(skipped_steps|spikes|rollbacks)$"],
        "replaced samples": ["^health/replaced_samples$"],
        "gradient norm per patch block": [r"^blocks/grad_norm/patch_\d+$"],
        "gradient norm per PiT block": [r"^blocks/grad_norm/pit_\d+$"],
        "gradient norm of embedders and output": [r"^blocks/grad_norm/\w+(embedder|layer)$"],
        "gradient norm of REPA's projector": ["^blocks/grad_norm/projector$"],
        "modulation of the patch blocks, RMS": [r"^blocks/modulation_rms/patch_\d+$"],
        "modulation of the PiT blocks, RMS": [r"^blocks/modulation_rms/pit_\d+/\w+$"],
    },
    "speed": {
        "images/s": ["^speed/images_per_s$"],
        "MFU": ["^speed/mfu$"],
        "TFLOP/s per rank": ["^speed/tflops_per_rank$"],
        "share of time waited for data": ["^speed/data_wait_share$"],
        "save stall, s": ["^speed/save_stall_s$"],
        "reading and decoding, worker ms per image": ["^data/(read|decode)_ms$"],
    },
    "mix": {
        "share of each set": ["^data/share/"],
        "epochs of each set": ["^data/epoch/"],
    },
    "memory": {"peak, GiB": ["^memory/"]},
}
"""Group -> chart -> tags, as regular expressions."""


def of_tags(tags: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """Group -> chart -> its tags among `tags`, in order; charts and groups without a tag are left out."""
    found = {
        group: {title: _matching(patterns, tags) for title, patterns in charts.items()}
        for group, charts in CHARTS.items()
    }
    full = {group: {title: tags for title, tags in charts.items() if tags} for group, charts in found.items()}
    return {group: charts for group, charts in full.items() if charts}


def layout(tags: Collection[str]) -> dict[str, dict[str, list[object]]]:
    """The charts that have a tag among `tags`, as TensorBoard takes them."""
    return {
        group: {title: ["Multiline", CHARTS[group][title]] for title in charts}
        for group, charts in of_tags(tags).items()
    }


def _matching(patterns: list[str], tags: Collection[str]) -> list[str]:
    return sorted(tag for tag in tags if any(re.search(pattern, tag) for pattern in patterns))
