"""Model FLOPs per image, counted by hand, and the share of a machine's peak that a run reaches (MFU).

A multiply-add is two FLOPs; only matmuls count, as everywhere in the field. Backward costs twice the forward
pass, and what activation checkpointing recomputes is work of the machine, not of the model, so it is not counted.

Letters: L patches, T text tokens, P pixels of a patch, D patch width, A attention width of the PiT blocks, d pixel
width, C = 3 colours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megapix.config import Config, ModelConfig, recomputed_blocks

if TYPE_CHECKING:
    import torch  # late: `megapix plan` counts without it

CHANNELS = 3
TIMESTEP_CHANNELS = 256
"""Sinusoids of t; `tests/costs/test_flops.py` compares this and everything below with the network itself."""


class DataSheet(NamedTuple):
    """What a maker says of a GPU."""

    tflops: float
    """Dense bf16 peak with sums in fp32, in TFLOP/s."""
    memory: float
    """GB/s of its memory."""
    link: float
    """GB/s to the others of a node in one direction; PCIe's where there is nothing faster."""
    gigabytes: int
    """10^9 bytes of its memory."""


DATA_SHEETS = {
    "A100": DataSheet(312.0, 2039.0, 300.0, 80),
    "H100 PCIe": DataSheet(756.0, 2000.0, 64.0, 80),
    "H100 NVL": DataSheet(835.0, 3900.0, 300.0, 94),
    "H100": DataSheet(989.0, 3350.0, 450.0, 80),
    "H800 PCIe": DataSheet(756.0, 2000.0, 64.0, 80),
    "H800": DataSheet(989.0, 3350.0, 200.0, 80),
    "H20": DataSheet(148.0, 4000.0, 450.0, 96),
    "H200 NVL": DataSheet(835.0, 4800.0, 450.0, 141),
    "H200": DataSheet(989.0, 4800.0, 450.0, 141),
    "GH200": DataSheet(989.0, 4000.0, 450.0, 96),
    "B200": DataSheet(2250.0, 8000.0, 900.0, 180),
    "RTX 4090": DataSheet(165.2, 1008.0, 32.0, 24),
    "RTX 5090": DataSheet(209.5, 1792.0, 64.0, 32),
    "RTX A6000": DataSheet(154.8, 768.0, 32.0, 48),
    "L40S": DataSheet(362.0, 864.0, 32.0, 48),
    "MI300X": DataSheet(1307.4, 5300.0, 448.0, 192),
}
"""Part of a GPU's name -> its data sheet: NVIDIA's, half of the figures with sparsity, of the A100 80GB SXM, and so on;
of the RTX cards the appendices of the whitepapers of GA102, Ada and RTX Blackwell, at half rate with sums in fp32 for
GeForce; AMD's of the Instinct MI300X, with its seven links to the others. PCIe cards without bridges."""
PARTIAL = ("MIG", "Laptop", "D")
"""Words in the name of a GPU that has less than the one that it is named after: a slice, or another chip."""


def of_run(c: Config) -> int:
    """FLOPs of forward and backward per image of a run.

    An upper bound where captions are shorter than `text.max_tokens`, and of aspect buckets the square of their area.
    """
    return training(c.model, c.data.image_size, c.text.max_tokens)


def training(model: ModelConfig, size: int, tokens: int = 0) -> int:
    """FLOPs of forward and backward per image; arguments as of `forward`."""
    return 3 * forward(model, size, tokens)


def forward(model: ModelConfig, size: int, tokens: int = 0) -> int:
    """FLOPs of one forward pass of one image of size × size pixels.

    Args:
        tokens: text tokens of the image, padding included; ignored with classes.
    """
    P, D, d, L = model.patch_size**2, model.width, model.pixel_width, _patches(model, size)
    # Looking up the class table takes no matmul.
    embedders = _linear(L, CHANNELS * P, D) + _linear(1, TIMESTEP_CHANNELS, D) + _linear(1, D, D)
    embedders += _linear(L * P, CHANNELS, d) + _linear(tokens, model.text_width, D)
    patch = sum(_patch_block(model, L, tokens, number) for number in range(1, model.depth + 1))
    return embedders + patch + model.pixel_depth * _pit_block(model, L) + _linear(L * P, d, CHANNELS)


def attention(
    model: ModelConfig, size: int, tokens: int = 0, pixel: int | None = None, patch: int | None = None
) -> int:
    """FLOPs of attention's two matmuls in one forward pass of one image: a part of `forward`, which runs slower.

    Args:
        pixel: PiT blocks, and
        patch: patch blocks that are counted; None for all.
        tokens: as of `forward`.
    """
    L, T = _patches(model, size), tokens if model.text_width else 0
    in_pixels = _attention(L, model.attention_width) * (model.pixel_depth if pixel is None else pixel)
    return in_pixels + _attention(T + L, model.width) * (model.depth if patch is None else patch)


def recomputed(model: ModelConfig, size: int, pixel_policy: str, patch_policy: str | int, tokens: int = 0) -> int:
    """FLOPs that activation checkpointing recomputes per image: work of the machine that MFU does not count.

    Args:
        pixel_policy: 'full' repeats the PiT blocks, 'chunked' their modulation, MLP and output layer,
            'selective_modulation' their modulation; the others no matmul.
        patch_policy: 'full' repeats the patch blocks, a number k every k-th of them.
        tokens: as of `forward`.
    """
    L = _patches(model, size)
    modulation, mlp = _linear(L, model.width, modulation_width(model)), _pixel_mlp(model, L)
    colours = _linear(L * model.patch_size**2, model.pixel_width, CHANNELS)
    pixel = {
        "selective_modulation": model.pixel_depth * modulation,
        "chunked": model.pixel_depth * (modulation + mlp) + colours,
        "full": model.pixel_depth * _pit_block(model, L),
    }.get(pixel_policy, 0)
    numbers = recomputed_blocks(patch_policy, model.depth)
    return pixel + sum(_patch_block(model, L, tokens, number) for number in numbers)


def ffn_width(model: ModelConfig) -> int:
    """Hidden width of the patch blocks' FFN."""
    return 4 * model.width if model.mlp == "gelu" else int(2 / 3 * 4 * model.width)


def modulation_width(model: ModelConfig) -> int:
    """Numbers that a PiT block's modulation makes of a patch token."""
    return model.patch_size**2 * (6 if model.modulation == "pre" else 4) * model.pixel_width


def _patch_block(model: ModelConfig, L: int, T: int, number: int) -> int:
    if not model.text_width:
        return _stream(model, L) + _attention(L, model.width)
    text = _stream(model, T, read=number < model.depth)
    return _stream(model, L) + text + _attention(T + L, model.width)


def _stream(model: ModelConfig, rows: int, read: bool = True) -> int:
    """A stream's tokens in a patch block, without attention; `read` is whether anything reads its result."""
    D, matrices = model.width, 2 if model.mlp == "gelu" else 3
    result = _linear(rows, D, D) + matrices * _linear(rows, D, ffn_width(model))  # projection, FFN
    return _linear(1, D, 6 * D) + _linear(rows, D, 3 * D) + (result if read else 0)  # modulation, qkv


def _pit_block(model: ModelConfig, L: int) -> int:
    P, A, d = model.patch_size**2, model.attention_width, model.pixel_width
    compaction = 2 * _linear(L, P * d, A)  # from the pixels of a patch to one token, and back
    attention = _linear(L, A, 3 * A) + _attention(L, A) + _linear(L, A, A)  # qkv, proj
    modulation = _linear(L, model.width, modulation_width(model))
    return modulation + compaction + attention + _pixel_mlp(model, L)


def _pixel_mlp(model: ModelConfig, L: int) -> int:
    return 2 * _linear(L * model.patch_size**2, model.pixel_width, 4 * model.pixel_width)


def _attention(rows: int, width: int) -> int:
    return 2 * _linear(rows, width, rows)  # q·kᵀ, and its matmul with v


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _patches(model: ModelConfig, size: int) -> int:
    return (size // model.patch_size) ** 2


def peak_of(config: Config, device: torch.device) -> float | None:
    """Peak of one rank in TFLOP/s: `machine.peak_tflops` if it is set, else what is known of its GPU.

    None where it is not known: another device, or fp32, whose peak is not the table's. A guess would make every MFU
    silently wrong.
    """
    if config.machine.peak_tflops:
        return config.machine.peak_tflops
    if config.precision != "bf16" or device.type != "cuda":
        return None
    import torch

    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of a GPU of that name, as its driver gives it; None if the table lacks it."""
    known = known_gpu(device_name)
    return DATA_SHEETS[known].tflops if known else None


def known_gpu(device_name: str) -> str | None:
    """Name in DATA_SHEETS of a GPU of that name, as its driver gives it; None if the table lacks it."""
    words = device_name.replace("-", " ").split()
    known = [name for name in DATA_SHEETS if set(name.split()) <= set(words)]
    if not known or set(PARTIAL) & set(words):
        return None
    return max(known, key=len)


def speed(images_per_s: float, flops: int, ranks: int, peak: float | None) -> dict[str, float]:
    """Scalars: TFLOP/s of the model on each rank, and the share of the peak [TFLOP/s] if that is known.

    Args:
        images_per_s: of all ranks together.
        flops: `of_run`, of one image.
    """
    achieved = images_per_s * flops / ranks / 1e12
    return {"speed/tflops_per_rank": achieved} | ({"speed/mfu": achieved / peak} if peak else {})
