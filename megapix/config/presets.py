"""Presets: the paper's model sizes and training recipes, and the two quickstarts."""

from __future__ import annotations

from dataclasses import replace

from megapix.config.marks import IMAGENET_IMAGES
from megapix.config.operation import CheckpointConfig, LogConfig, MachineConfig, SamplingConfig
from megapix.config.options import Config
from megapix.config.training import DataConfig, FlowConfig, ModelConfig, OptimConfig, TextConfig
from megapix.errors import InputError, one_of

PHILOX = FlowConfig(generator="philox")
"""Noise that is the same on CPUs and on any GPU. (Without the key a configuration means torch's, as old ones do.)"""


INSTRUCTION = "\n".join(
    (
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for '
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
"""What the released text-to-image network's encoder reads before each prompt, letter by letter (it is SANA's, from its
Apache-licensed configuration): ports put it there by themselves."""


def released_text(max_tokens: int = 300) -> TextConfig:
    """Text as the released text-to-image network takes it: hidden states as they are, with all padding attended to."""
    return TextConfig(max_tokens=max_tokens, normalize="none", scale=1.0, prefix=INSTRUCTION, padding="attended")


def imagenet_256(model: ModelConfig) -> Config:
    """256 pixels: learning rate 1e-4 for 160 epochs, then 1e-5 up to 320."""
    return Config(model=model, flow=PHILOX)


def imagenet_512(model: ModelConfig) -> Config:
    """512 pixels: constant learning rate 1e-4, gradient clip 0.5, time shift 3, 850 epochs; sampled with shift 2."""
    return Config(
        model=model,
        flow=replace(PHILOX, time_shift=3.0),
        data=DataConfig(image_size=512),
        optim=OptimConfig(lr_step_at="never", end_at=850 * IMAGENET_IMAGES, grad_clip=0.5),
        sampling=SamplingConfig(guidance=3.5, guidance_to=1.0, shift=2.0),
    )


def text_to_image(size: int, shift: float, lr: float, grad_clip: float) -> Config:
    """PixelDiT-T2I at one of its stages: constant learning rate after 2,000 steps of warm-up.

    The published recipe says neither batch nor length: 256 images and 100,000 steps are ours, and so is AdamW.
    """
    batch = 256
    return Config(
        model=pixeldit_t2i(),
        text=released_text(),
        flow=replace(PHILOX, time_shift=shift),
        data=DataConfig(image_size=size),
        optim=OptimConfig(
            global_batch=batch,
            lr=lr,
            lr_step_at="never",
            end_at=100_000 * batch,
            warmup=2_000 * batch,
            grad_clip=grad_clip,
        ),
        sampling=SamplingConfig(steps=50, guidance_from=0.0, guidance_to=1.0, shift=shift),
    )


def pixeldit_t2i() -> ModelConfig:
    """PixelDiT-T2I: 14 + 2 blocks, width 1536, text of Gemma-2-2B, 1,302.5 M parameters; in the
    convention of the released network, which nothing can give it afterwards."""
    return ModelConfig(
        width=1536,
        depth=14,
        heads=24,
        pixel_depth=2,
        pixel_attention_width=1152,
        pixel_heads=16,
        mlp="swiglu",
        num_classes=0,
        text_width=2304,
        convention="released",
    )


def pixeldit_b() -> ModelConfig:
    """PixelDiT-B: 12 + 2 blocks, width 768, 184.8 M parameters."""
    return ModelConfig(width=768, depth=12, heads=12, pixel_depth=2)


def pixeldit_l() -> ModelConfig:
    """PixelDiT-L: 22 + 4 blocks, width 1024, 569.8 M parameters."""
    return ModelConfig(width=1024, depth=22, heads=16, pixel_depth=4)


def pixeldit_xl() -> ModelConfig:
    """PixelDiT-XL: 26 + 4 blocks, width 1152, 797.5 M parameters."""
    return ModelConfig(width=1152, depth=26, heads=16, pixel_depth=4)


def tiny() -> Config:
    """A network of 3.2 million parameters for the embedded image set: every part of the stack, small.

    Tuned for five minutes on two CPU cores: from as many images, 16 per step give better samples than 32, and in as
    much time patches of 8 pixels better ones than patches of 4. No flip, since flags have a left side; fp32, since
    small matrices gain nothing from bf16 on a CPU.
    """
    return Config(
        precision="fp32",
        model=ModelConfig(patch_size=8, width=128, depth=3, heads=4, pixel_width=16, pixel_depth=2, num_classes=5),
        flow=PHILOX,
        data=DataConfig(image_size=32, flip=False, workers=1),
        optim=OptimConfig(
            global_batch=16, lr=3e-3, lr_after=3e-4, lr_step_at=28_800, end_at=40_000, beta2=0.99, ema_decay=0.995
        ),
        machine=MachineConfig(pixel_checkpointing="none"),
        checkpoint=CheckpointConfig(every=8_000),
        log=LogConfig(every=640, blocks_every=6_400, samples_every=16_000),
        sampling=SamplingConfig(steps=50, guidance=2.5, guidance_from=0.0, guidance_to=1.0),
    )


def t2i_tiny() -> Config:
    """A text network of a few million parameters for the embedded image set with its Unicode names, 64 pixels.

    Tuned for a quarter of an hour on two CPU cores. From as many images, smaller batches reach a lower
    validation loss; below 16 images the gradient reduction takes too much of a step. A time shift of 2 spends more of
    the few steps on noisy images, where shapes are decided.
    """
    return Config(
        precision="fp32",
        model=ModelConfig(
            patch_size=16,
            width=128,
            depth=4,
            heads=4,
            pixel_width=16,
            pixel_depth=2,
            pixel_attention_width=96,
            pixel_heads=3,
            mlp="swiglu",
            num_classes=0,
            text_width=384,
            text_tokens=32,
            convention="released",
        ),
        text=replace(released_text(32), prefix="", dtype="fp32"),
        flow=replace(PHILOX, time_shift=2.0),
        data=DataConfig(image_size=64, flip=False, workers=1),
        optim=OptimConfig(
            global_batch=16, lr=2.5e-3, lr_after=2.5e-4, lr_step_at=30_400, end_at=40_000, beta2=0.99, ema_decay=0.99
        ),
        machine=MachineConfig(pixel_checkpointing="none"),
        checkpoint=CheckpointConfig(every=8_000),
        log=LogConfig(every=640, blocks_every=6_400, samples_every=16_000),
        sampling=SamplingConfig(steps=50, guidance=2.5, guidance_from=0.0, guidance_to=1.0),
    )


PRESETS = {
    "tiny": (tiny, "the quickstart: 32 pixels, 3.2 M parameters, minutes on two CPU cores"),
    "b-256": (lambda: imagenet_256(pixeldit_b()), "PixelDiT-B on ImageNet at 256 pixels"),
    "l-256": (lambda: imagenet_256(pixeldit_l()), "PixelDiT-L on ImageNet at 256 pixels"),
    "xl-256": (lambda: imagenet_256(pixeldit_xl()), "PixelDiT-XL on ImageNet at 256 pixels"),
    "b-512": (lambda: imagenet_512(pixeldit_b()), "PixelDiT-B on ImageNet at 512 pixels"),
    "l-512": (lambda: imagenet_512(pixeldit_l()), "PixelDiT-L on ImageNet at 512 pixels"),
    "xl-512": (lambda: imagenet_512(pixeldit_xl()), "PixelDiT-XL on ImageNet at 512 pixels"),
    "t2i-tiny": (t2i_tiny, "the text-to-image quickstart: 64 pixels, minutes on two CPU cores"),
    "t2i-512": (lambda: text_to_image(512, 3.0, 1e-4, 0.2), "PixelDiT-T2I, stage 1: 512 x 512 pixels"),
    "t2i-512-ms": (lambda: text_to_image(512, 3.0, 1e-4, 0.2), "PixelDiT-T2I, stage 2: aspect buckets of 512 pixels"),
    "t2i-1024-ms": (lambda: text_to_image(1024, 4.0, 2e-5, 0.1), "PixelDiT-T2I, stage 3: aspect buckets of 1024"),
}
"""Name -> (function that makes the configuration, one line for --help)."""


def preset(name: str) -> Config:
    """The configuration of that name.

    Raises:
        InputError: unknown name; the nearest one is in the message.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} does not exist{one_of(name, list(PRESETS))}")
    return PRESETS[name][0]()
