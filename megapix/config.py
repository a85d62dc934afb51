"""Every option of a run, once: frozen dataclasses, presets as functions, and the checks that need several fields.

Each field carries one mark, and resume reads that mark (`compare`):

    identity   what the run is: must match the checkpoint's value
    schedule   may change on resume; old and new value are logged
    machine    free: where and how the run is executed, never what it computes

A span of training (`Images`) is written in images seen, 25600 or '25600', or in epochs, '160ep'. `freeze` turns epochs
into images once, from the index; the result is the resolved configuration, and that is what is stored.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megapix.errors import InputError, one_of

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k (ILSVRC2012)."""

Images = int | str
"""Images seen, epochs such as '160ep', or 'never'."""

Sampler = Literal["euler", "heun", "ab2"]

PixelPolicy = Literal["none", "selective", "selective_modulation", "full", "chunked", "offload"]
"""What the pixel pathway keeps for its backward pass (`recompute.py`)."""

T = TypeVar("T")


def _identity(default: Any) -> Any:
    return field(default=default, metadata={"mark": "identity"})


def _schedule(default: Any) -> Any:
    return field(default=default, metadata={"mark": "schedule"})


def _machine(default: Any) -> Any:
    return field(default=default, metadata={"mark": "machine"})


# ---------------------------------------------------------------------------------------------------------------------
# The options
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The network (paper, section 3)."""

    patch_size: int = _identity(16)
    """Pixels on a side of a patch (p); image height and width must be divisible by it."""
    width: int = _identity(1152)
    """Width of the patch pathway (D)."""
    depth: int = _identity(26)
    """Blocks of the patch pathway (N)."""
    heads: int = _identity(16)
    """Attention heads of the patch pathway; width / heads must be divisible by 4 for the 2D RoPE."""
    pixel_width: int = _identity(16)
    """Width of a pixel token (d); must be divisible by 4 for the 2D sin-cos positions."""
    pixel_depth: int = _identity(4)
    """PiT blocks of the pixel pathway (M)."""
    pixel_attention_width: int = _identity(0)
    """Width of attention in the PiT blocks; 0 is that of the patch pathway."""
    pixel_heads: int = _identity(0)
    """Attention heads of the PiT blocks; 0 is those of the patch pathway."""
    mlp: Literal["gelu", "swiglu"] = _identity("gelu")
    """FFN of the patch blocks: the paper's GELU MLP with ratio 4, or the released weights' SwiGLU."""
    modulation: Literal["pre", "post"] = _identity("pre")
    """Pixel-wise AdaLN: 'pre' with gates as in the paper, or 'post', the later variant against loss spikes."""
    num_classes: int = _identity(1000)
    """Classes of the data set; the class table has one more row, the null class for guidance. 0 with text."""
    text_width: int = _identity(0)
    """Width of the text features that condition the network (MM-DiT blocks); 0 with classes."""
    text_tokens: int = _identity(300)
    """Rows of the text's position table, with text: the most tokens of a caption."""

    @property
    def attention_width(self) -> int:
        """Width of attention in the PiT blocks."""
        return self.pixel_attention_width or self.width

    @property
    def attention_heads(self) -> int:
        """Attention heads of the PiT blocks."""
        return self.pixel_heads or self.heads


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: t = 0 is noise, t = 1 the image."""

    t_mean: float = _identity(0.0)
    """Mean of the logit-normal distribution of t."""
    t_std: float = _identity(1.0)
    """Standard deviation of the logit-normal distribution of t."""
    time_shift: float = _identity(1.0)
    """Time shift in training, t / (t + (1 - t) * shift): 1 at 256 pixels, 3 at 512."""
    label_dropout: float = _identity(0.1)
    """Probability that a sample's class is replaced by the null class, or its caption by the empty one."""


@dataclass(frozen=True)
class DataConfig:
    """The shards and how they are read."""

    path: str = _machine("")
    """Shard folder or index made by data_prep (it holds index.json); a local folder, or an http(s), s3 or gs URL."""
    image_size: int = _identity(256)
    """Height and width of the training images in pixels, of aspect buckets the square root of their area; must be
    the index's own."""
    flip: bool = _identity(True)
    """Mirror an image with probability 1/2, decided by seed and position."""
    shuffle_window: int = _identity(0)
    """Shards whose samples are shuffled together; 0 is all of them, a perfect shuffle."""
    reading_groups: int = _identity(1)
    """Parts of each epoch's shards that nodes read apart, for caches of whole shards: a multiple of the nodes."""
    max_replaced: int = _machine(100)
    """Damaged samples that one rank may replace by others before the run stops; 0 stops at the first."""
    corrupt_shard: Literal["stop", "replace"] = _machine("stop")
    """What a shard does that is missing, cut short or of another hash: end the run, or have its samples replaced."""
    cache: str = _machine("")
    """Local folder for remote data: its index, and whole shards if cache_gib is above 0. Shared by a node's ranks."""
    cache_gib: float = _machine(0.0)
    """GiB of shards that the cache may hold; 0 reads each sample by its byte range instead."""
    timeout: float = _machine(30.0)
    """Seconds without a byte after which a remote request is given up and tried again."""
    retries: int = _machine(5)
    """Further tries after a remote request that failed; then the run stops."""
    workers: int = _machine(4)
    """Processes of each rank that read and decode; 0 decodes in the training process."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate, and the EMA that lives in its state."""

    global_batch: int = _identity(256)
    """Images of one optimizer step, over all ranks and accumulation steps."""
    lr: float = _schedule(1e-4)
    """Learning rate up to the milestone."""
    lr_after: float = _schedule(1e-5)
    """Learning rate from the milestone on."""
    lr_step_at: Images = _schedule(160 * IMAGENET_IMAGES)
    """Milestone in images seen, or epochs ('160ep'); 'never' keeps lr to the end."""
    end_at: Images = _schedule(320 * IMAGENET_IMAGES)
    """End of training in images seen, or epochs ('320ep')."""
    warmup: Images = _schedule(0)
    """Linear warm-up from 0 in images, or epochs; 0 is off."""
    beta1: float = _identity(0.9)
    """AdamW's decay of the first moment."""
    beta2: float = _identity(0.999)
    """AdamW's decay of the second moment."""
    weight_decay: float = _identity(0.0)
    """AdamW's decoupled weight decay."""
    grad_clip: float = _schedule(1.0)
    """Largest norm of the whole gradient; 0 switches clipping off."""
    ema_decay: float = _identity(0.9999)
    """Decay of the EMA of the fp32 weights, at each applied step."""


@dataclass(frozen=True)
class RepaConfig:
    """REPA: patch tokens are aligned with a frozen encoder's features of the clean image (docs/repa.md)."""

    encoder: str = _machine("")
    """Folder or Hugging Face hub name of a DINOv2 (or with registers, or DINOv3 ViT); empty is off."""
    features: str = _machine("")
    """Local folder of the encoder's features, made by `data_prep features`: instead of the encoder."""
    digest: str = _identity("")
    """SHA-256 of the encoder's sizes and weights; a run fills it in, and if it is given the encoder must have it."""
    layer: int = _identity(0)
    """Patch block, counted from 1, whose tokens are aligned; 0 takes the paper's, 8, or 6 with text."""
    weight: float = _schedule(0.5)
    """Weight of 1 - cos beside the flow's loss."""
    stop_at: Images = _schedule("never")
    """Images seen, or epochs, from which on neither the encoder nor its loss is computed."""
    dtype: Literal["bf16", "fp32"] = _identity("bf16")
    """Number format that the encoder computes in, or that its features were computed in."""
    micro_batch: int = _machine(0)
    """Images that the encoder sees at once; 0 is the run's micro batch."""

    @property
    def wanted(self) -> bool:
        """Whether there are features to align with, from an encoder or from a folder."""
        return bool(self.encoder or self.features)


@dataclass(frozen=True)
class TextConfig:
    """Text features, for networks that take text (docs/text.md): of a frozen encoder, or stored with the shards."""

    encoder: str = _machine("")
    """Folder or Hugging Face hub name of the text encoder; empty takes the features that `data_prep embed-text` has
    stored with the shards."""
    digest: str = _identity("")
    """SHA-256 of the encoder's sizes, weights and tokenizer; a run fills it in, and if it is given it must be that."""
    max_tokens: int = _identity(300)
    """Tokens of a caption that are kept; at most model.text_tokens."""
    normalize: Literal["rms", "none"] = _identity("rms")
    """'rms' divides the features of each token by their root mean square."""
    scale: float = _identity(0.01)
    """Factor of the features, after that."""
    prefix: str = _identity("")
    """Instruction before each caption that is not empty; of its tokens the features keep the first alone."""
    dtype: Literal["bf16", "fp32"] = _identity("bf16")
    """Number format that the encoder computes in."""
    micro_batch: int = _machine(0)
    """Captions that the encoder sees at once; 0 is the run's micro batch."""


@dataclass(frozen=True)
class MachineConfig:
    """How the run lies on the machine; nothing here changes what is computed, but for rounding."""

    micro_batch: int = _machine(0)
    """Images in one forward pass of one rank; 0 takes global_batch / ranks, without accumulation."""
    pixel_checkpointing: PixelPolicy = _machine("full")
    """What backward finds of the pixel pathway: 'none' keeps all activations, 'selective' results of matrix products,
    'selective_modulation' those but the pixel-wise modulation, 'full' each PiT block's input; the rest is computed
    again. 'chunked' keeps what goes into attention and comes out, and computes the rest again for some patches at a
    time, so backward takes the least of large images. 'offload' keeps all in host memory."""
    patch_checkpointing: Literal["none", "full"] | int = _machine("none")
    """What backward finds of the patch pathway: 'none' keeps all activations, 'full' each block's input, a number k
    that of every k-th block and all of the others; the rest is computed again."""
    compile: bool = _machine(False)
    """Compile the network's blocks with torch.compile; on CPUs this needs a C++ compiler."""
    fused_adamw: bool = _machine(True)
    """Step with torch's fused AdamW, one pass over memory; off takes its foreach implementation, equal but for
    rounding."""
    pixel_kernels: Literal["plain", "triton"] = _machine("plain")
    """Kernels of the pixel pathway: torch's, or 'triton', two fused ones a PiT block (docs/architecture.md)."""
    ds_config: str = _machine("zero2")
    """DeepSpeed-only knobs: a name in ds_configs/, or the path of a JSON file."""
    watchdog: float = _machine(60.0)
    """Seconds after which a silent rank counts as dead and one without progress as hung, and the job ends; 0 is off."""
    unproven: bool = _machine(False)
    """Let overlap_comm in, which docs/parity.md proves on CPU ranks only; `megapix doctor --parity` proves it here."""
    peak_tflops: float = _machine(0.0)
    """Peak of one rank in TFLOP/s, for MFU; 0 takes a known GPU's dense bf16 peak, and logs no MFU without one."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Images = _machine("5ep")
    """Distance between checkpoints in images seen, or epochs; one more is saved at the end."""
    keep: int = _machine(3)
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: Images = _machine("never")
    """Distance between checkpoints that are kept for good, in images seen, or epochs."""
    keep_best: int = _machine(0)
    """Checkpoints of the lowest mean training loss that are kept too."""
    background: bool = _machine(True)
    """Go on training while a checkpoint is written from a copy in host memory (16 bytes a parameter / ranks)."""


@dataclass(frozen=True)
class HealthConfig:
    """What a run does about steps that are skipped, and about spikes of loss and gradient norm."""

    max_skipped: int = _schedule(20)
    """Skipped steps in a row (gradient not finite) that end the run."""
    on_spike: Literal["warn", "rollback", "stop"] = _schedule("warn")
    """'rollback' returns to the last checkpoint before the spike and never draws the data that led to it."""
    window: int = _schedule(100)
    """Steps that a step is compared with."""
    loss_z: float = _schedule(8.0)
    """Robust standard deviations above the window's median at which a step's loss stands out."""
    grad_norm_z: float = _schedule(20.0)
    """The same for the gradient norm before clipping, which varies more."""
    patience: int = _schedule(3)
    """Steps in a row that stand out before they count as a spike."""
    skip: int = _schedule(50)
    """Steps before a spike whose data are skipped with the spike's own, as far back as the checkpoint lies."""
    max_rollbacks: int = _schedule(3)
    """Rollbacks of a run after which the next spike ends it."""


@dataclass(frozen=True)
class LogConfig:
    """What goes to TensorBoard, and how often."""

    every: Images = _machine(25_600)
    """Distance between rows of scalars in images seen, or epochs."""
    blocks_every: Images = _machine(256_000)
    """Distance between gradient and modulation norms of each block, in images seen or epochs; 'never' is off."""
    samples_every: Images = _machine("5ep")
    """Distance between EMA sample grids in images seen, or epochs; 'never' switches them off."""
    grid_classes: int = _machine(8)
    """Rows of the grid: the first classes, or prompts."""
    prompts: str = _machine("")
    """Text file with a prompt a line, or shard folder, for the grids of a network that takes text; empty takes captions
    of the held-out images, or of the training set."""
    grid_columns: int = _machine(4)
    """Columns of the grid: samples of each class."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out images, of raw and EMA weights, at fixed noise and eight fixed times."""

    path: str = _machine("")
    """Shard folder or index of images that are not trained on, like data.path; empty is off."""
    every: Images = _machine("5ep")
    """Distance between measurements in images seen, or epochs of the training set."""
    samples: int = _machine(1024)
    """Images of it that are used, the same ones each time; 0 is all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of a few images from the EMA, as `megapix evaluate` scores many (docs/evaluation.md)."""

    reference: str = _machine("")
    """Reference statistics by `data_prep stats`, or one of ADM's .npz files; empty is off."""
    extractor_weights: str = _machine("")
    """Weights file of the extractor inception, if the reference is of that one."""
    every: Images = _machine("20ep")
    """Distance between evaluations in images seen, or epochs; 'never' switches them off."""
    count: int = _machine(1000)
    """Images that are drawn, the same noise each time; scores of other counts cannot be compared with these."""
    batch: int = _machine(64)
    """Images that a rank draws at once."""


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn in training, and the defaults of `megapix sample` for this run."""

    sampler: Sampler = _machine("ab2")
    """Euler, Heun, or the two-step Adams-Bashforth method that the authors released as FlowDPMSolver."""
    steps: int = _machine(100)
    """Steps of an image. Each evaluates the (guided) velocity once, of heun twice but for the last."""
    guidance: float = _machine(2.75)
    """Scale w of classifier-free guidance, v_u + w (v_c - v_u); 1 is off."""
    guidance_from: float = _machine(0.1)
    """Guidance acts where t is above this."""
    guidance_to: float = _machine(0.9)
    """Guidance acts where t is below this."""
    shift: float = _machine(1.0)
    """Time shift of the sampler's grid."""


@dataclass(frozen=True)
class Config:
    """A whole run. The same command starts it and, after an interruption, goes on from its last checkpoint."""

    out: str = _machine("")
    """Run folder: configuration, checkpoints and TensorBoard events."""
    seed: int = _identity(0)
    """Seed of the initial weights, sample order, flips, noise, timesteps and label dropout."""
    init: str = _identity("")
    """Start from the weights of this run or checkpoint, or of an exported file or imported folder, as another stage;
    optimizer, position and EMA start fresh."""
    init_weights: Literal["ema", "raw"] = _identity("ema")
    """Which weights of it; an exported file or imported folder holds one kind."""
    resume: Literal["auto", "require"] = _machine("auto")
    """'auto' goes on from the newest whole checkpoint, or starts; 'require' from the newest one or not at all."""
    precision: Literal["bf16", "fp32"] = _identity("bf16")
    """DeepSpeed's bf16 mode (bf16 weights and activations, fp32 masters, moments and EMA), or fp32 throughout."""
    profile: int = _machine(0)
    """Steps that each rank traces with torch.profiler into OUT/profile, after the first three; 0 is off."""
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    text: TextConfig = field(default_factory=TextConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Presets (paper: model sizes, and the training recipe on ImageNet-1k)
# ---------------------------------------------------------------------------------------------------------------------


def imagenet_256(model: ModelConfig) -> Config:
    """256 pixels: learning rate 1e-4 for 160 epochs, then 1e-5 up to 320."""
    return Config(model=model)


def imagenet_512(model: ModelConfig) -> Config:
    """512 pixels: constant learning rate 1e-4, gradient clip 0.5, time shift 3, 850 epochs; sampled with shift 2."""
    return Config(
        model=model,
        flow=FlowConfig(time_shift=3.0),
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
        flow=FlowConfig(time_shift=shift),
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
    """PixelDiT-T2I: 14 + 2 blocks, width 1536, text of Gemma-2-2B, 1,302.5 M parameters."""
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
    """A network of 1.6 million parameters for the embedded image set: every part of the stack, small.

    Tuned for five minutes on two CPU cores. No flip, since flags have a left side; fp32, since small matrices gain
    nothing from bf16 on a CPU.
    """
    return Config(
        precision="fp32",
        model=ModelConfig(patch_size=4, width=128, depth=3, heads=4, pixel_width=16, pixel_depth=2, num_classes=5),
        data=DataConfig(image_size=32, flip=False, workers=1),
        optim=OptimConfig(
            global_batch=32, lr=3e-3, lr_after=3e-4, lr_step_at=24_000, end_at=33_600, beta2=0.99, ema_decay=0.995
        ),
        machine=MachineConfig(pixel_checkpointing="none"),
        checkpoint=CheckpointConfig(every=8_000),
        log=LogConfig(every=640, blocks_every=6_400, samples_every=16_000),
        sampling=SamplingConfig(steps=50, guidance=2.5, guidance_from=0.0, guidance_to=1.0),
    )


def t2i_tiny() -> Config:
    """A text network of a few million parameters for the embedded image set with its Unicode names, 64 pixels.

    Tuned for a quarter of an hour on two CPU cores. From as many images, smaller batches learn more, by the held-out
    loss; below 16 images the reduction of each step's gradients takes too much of the time.
    """
    return Config(
        precision="fp32",
        model=ModelConfig(
            patch_size=8,
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
        ),
        text=TextConfig(max_tokens=32, dtype="fp32", scale=1.0),
        data=DataConfig(image_size=64, flip=False, workers=1),
        optim=OptimConfig(
            global_batch=16, lr=2.5e-3, lr_after=2.5e-4, lr_step_at=19_200, end_at=24_000, beta2=0.99, ema_decay=0.99
        ),
        machine=MachineConfig(pixel_checkpointing="none"),
        checkpoint=CheckpointConfig(every=8_000),
        log=LogConfig(every=640, blocks_every=6_400, samples_every=16_000),
        sampling=SamplingConfig(steps=50, guidance=2.5, guidance_from=0.0, guidance_to=1.0),
    )


PRESETS = {
    "tiny": (tiny, "the quickstart: 32 pixels, 1.6 M parameters, minutes on two CPU cores"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Spans, batch layout, recomputed blocks, checks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchLayout:
    """global batch = micro batch × accumulation × ranks, computed here and nowhere else."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def total(self) -> int:
        """Images of one optimizer step."""
        return self.micro * self.accumulation * self.ranks

    def __str__(self) -> str:
        return f"{self.total} = micro batch {self.micro} x accumulation {self.accumulation} x ranks {self.ranks}"


def batch_layout(config: Config, ranks: int) -> BatchLayout:
    """Split the global batch over ranks and accumulation steps.

    Raises:
        InputError: it does not divide; the message holds the arithmetic.
    """
    total, micro = config.optim.global_batch, config.machine.micro_batch
    if micro == 0:
        micro = max(1, total // ranks)
    accumulation = total // (micro * ranks)
    if accumulation < 1 or micro * accumulation * ranks != total:
        raise InputError(
            f"optim.global_batch = {total} is not micro batch x accumulation x ranks: "
            f"{micro} x {total / (micro * ranks):g} x {ranks}; "
            f"choose machine.micro_batch so that {total} is divisible by {ranks} x machine.micro_batch"
        )
    return BatchLayout(micro, accumulation, ranks)


CHUNK = 512
"""Patches that the policy 'chunked' computes at a time."""


def recomputed_blocks(patch_checkpointing: str | int, depth: int) -> range:
    """Numbers of the patch blocks, counted from 1, that `machine.patch_checkpointing` computes again in backward."""
    if patch_checkpointing == "none":
        return range(0)
    every = 1 if patch_checkpointing == "full" else int(patch_checkpointing)
    return range(every, depth + 1, every)


def images(span: Images, epoch: int, key: str) -> int | None:
    """Images seen that `span` means, with `epoch` images an epoch; None for 'never'.

    Raises:
        InputError: neither a count nor epochs such as '160ep' nor 'never'.
    """
    text = str(span)
    if text == "never":
        return None
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)ep", text)
    if not match:
        raise InputError(f"{key} = {text!r}: expected images seen such as 25600, epochs such as '160ep', or 'never'")
    return int(match[1]) if match[1] else round(float(match[2]) * epoch)


SPANS = (
    "optim.lr_step_at",
    "optim.end_at",
    "optim.warmup",
    "repa.stop_at",
    "checkpoint.every",
    "checkpoint.keep_every",
    "log.every",
    "log.blocks_every",
    "log.samples_every",
    "validation.every",
    "evaluation.every",
)
MAY_BE_NEVER = (
    "optim.lr_step_at",
    "repa.stop_at",
    "checkpoint.keep_every",
    "log.blocks_every",
    "log.samples_every",
    "validation.every",
    "evaluation.every",
)


def freeze(config: Config, epoch: int) -> Config:
    """Turn every span into images (or 'never'), with `epoch` images an epoch: the resolved configuration.

    Raises:
        InputError: a span that cannot be read, is zero where it may not be, or 'never' where an end is needed.
    """
    for key in SPANS:
        value = images(get(config, key), epoch, key)
        if value is None and key not in MAY_BE_NEVER:
            raise InputError(f"{key} = 'never': expected images seen or epochs")
        if value == 0 and key not in ("optim.warmup", "repa.stop_at"):
            raise InputError(f"{key} = {get(config, key)!r} is no image at all; expected at least 1")
        config = replace(config, key, "never" if value is None else value)
    return replace(config, "repa.layer", aligned_layer(config))


def validate(config: Config) -> None:
    """Check what can be checked without data or other ranks.

    Raises:
        InputError: naming key, value and what would be right.
    """
    m, d, o = config.model, config.data, config.optim

    def need(holds: bool, key: str, right: str) -> None:
        if not holds:
            raise InputError(f"{key} = {get(config, key)!r}: expected {right}")

    for key, value, _ in leaves(config):
        need(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    validate_model(m)
    need(d.image_size >= 1, "data.image_size", "at least 1")
    if d.image_size % m.patch_size:
        raise InputError(
            f"data.image_size = {d.image_size} is not divisible by model.patch_size = {m.patch_size} "
            f"({d.image_size} = {d.image_size // m.patch_size} x {m.patch_size} + {d.image_size % m.patch_size})"
        )
    need(d.shuffle_window >= 0, "data.shuffle_window", "0 (all shards) or more")
    need(d.reading_groups >= 1, "data.reading_groups", "at least 1")
    need(d.cache_gib >= 0, "data.cache_gib", "0 (no whole shards) or more")
    need(d.cache_gib == 0 or d.cache != "", "data.cache_gib", "0, or a folder in data.cache")
    need(d.timeout > 0, "data.timeout", "above 0 seconds")
    need(d.retries >= 0, "data.retries", "0 or more")
    need(d.max_replaced >= 0, "data.max_replaced", "0 (stop at the first) or more")
    need(d.workers >= 0, "data.workers", "0 or more")
    need(config.flow.t_std > 0, "flow.t_std", "above 0")
    need(config.flow.time_shift > 0, "flow.time_shift", "above 0")
    need(0 <= config.flow.label_dropout <= 1, "flow.label_dropout", "a probability, 0 to 1")
    _validate_repa(config.repa, m)
    _validate_text(config.text, m)
    need(o.global_batch >= 1, "optim.global_batch", "at least 1")
    need(o.lr > 0, "optim.lr", "above 0")
    need(o.lr_after > 0, "optim.lr_after", "above 0")
    need(0 <= o.beta1 < 1, "optim.beta1", "0 <= beta1 < 1")
    need(0 <= o.beta2 < 1, "optim.beta2", "0 <= beta2 < 1")
    need(o.weight_decay >= 0, "optim.weight_decay", "0 or more")
    need(o.grad_clip >= 0, "optim.grad_clip", "0 (off) or more")
    need(0 <= o.ema_decay < 1, "optim.ema_decay", "0 <= decay < 1")
    need(config.machine.micro_batch >= 0, "machine.micro_batch", "0 (global batch / ranks) or more")
    every = config.machine.patch_checkpointing
    need(isinstance(every, str) or every >= 1, "machine.patch_checkpointing", "'none', 'full', or at least 1")
    need(
        config.machine.watchdog == 0 or config.machine.watchdog >= 2,
        "machine.watchdog",
        "0 (off) or at least 2 seconds, twice the time between heartbeats",
    )
    need(config.machine.peak_tflops >= 0, "machine.peak_tflops", "0 (by the GPU's name) or more")
    if config.machine.pixel_kernels == "triton" and (m.pixel_width < 16 or m.pixel_width & (m.pixel_width - 1)):
        raise InputError(
            f"machine.pixel_kernels = 'triton' with model.pixel_width = {m.pixel_width}: expected 'plain', or a width "
            "that is a power of two and at least 16"
        )
    if config.machine.pixel_kernels == "triton" and config.machine.pixel_checkpointing == "chunked":
        raise InputError(
            "machine.pixel_checkpointing = 'chunked' with machine.pixel_kernels = 'triton': the fused kernels take all "
            "patches at once; expected machine.pixel_kernels = 'plain', or another policy, such as 'full'"
        )
    need(config.checkpoint.keep >= 0, "checkpoint.keep", "0 (all) or more")
    need(config.checkpoint.keep_best >= 0, "checkpoint.keep_best", "0 (none) or more")
    h = config.health
    need(h.max_skipped >= 1, "health.max_skipped", "at least 1")
    need(h.window >= 4, "health.window", "at least 4 steps")
    need(h.loss_z > 0, "health.loss_z", "above 0")
    need(h.grad_norm_z > 0, "health.grad_norm_z", "above 0")
    need(h.patience >= 1, "health.patience", "at least 1")
    need(h.skip >= 0, "health.skip", "0 (the spike's own steps) or more")
    need(h.max_rollbacks >= 0, "health.max_rollbacks", "0 or more")
    need(config.validation.samples >= 0, "validation.samples", "0 (all) or more")
    need(config.evaluation.count >= 2, "evaluation.count", "at least 2")
    need(config.evaluation.batch >= 1, "evaluation.batch", "at least 1")
    need(config.log.grid_classes >= 1, "log.grid_classes", "at least 1")
    need(config.log.grid_columns >= 1, "log.grid_columns", "at least 1")
    need(m.text_width > 0 or not config.log.prompts, "log.prompts", "none: the network takes classes")
    need(config.profile >= 0, "profile", "0 (off) or more")
    validate_sampling(config.sampling)
    validate_seed(config.seed, "seed")
    need(config.out != "", "out", "a run folder (--out RUN)")
    need(d.path != "", "data.path", "a shard folder (--data.path SHARDS)")


def validate_seed(seed: int, name: str = "--seed") -> None:
    """Check a seed; `name` is what the user calls it.

    Raises:
        InputError: naming option, value and what would be right.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"{name} = {seed}: expected 0 to 2^63 - 1")


def validate_model(m: ModelConfig) -> None:
    """Check the sizes of a network.

    Raises:
        InputError: naming key, value and what would be right.
    """

    def need(holds: bool, key: str, right: str) -> None:
        if not holds:
            raise InputError(f"model.{key} = {getattr(m, key)!r}: expected {right}")

    for key in ("patch_size", "width", "depth", "heads", "pixel_width", "pixel_depth", "text_tokens"):
        need(getattr(m, key) >= 1, key, "at least 1")
    for key in ("pixel_attention_width", "pixel_heads"):
        need(getattr(m, key) >= 0, key, "0 (that of the patch pathway) or more")
    need(m.text_width >= 0, "text_width", "0 (classes) or more")
    need(m.num_classes >= 0, "num_classes", "0 (text) or more")
    if (m.num_classes == 0) == (m.text_width == 0):
        raise InputError(
            f"model.num_classes = {m.num_classes} and model.text_width = {m.text_width}: expected one of them above 0, "
            "the network's condition"
        )
    need(m.width % m.heads == 0, "heads", f"a divisor of model.width = {m.width}")
    need(m.width // m.heads % 4 == 0, "heads", f"model.width / heads divisible by 4, not {m.width // m.heads}")
    width, heads = m.attention_width, m.attention_heads
    if width % heads or width // heads % 4:
        raise InputError(
            f"model.pixel_heads = {m.pixel_heads} and model.pixel_attention_width = {m.pixel_attention_width}: "
            f"the PiT blocks would have {heads} heads in a width of {width}; expected heads of a multiple of 4 channels"
        )
    need(m.pixel_width % 4 == 0, "pixel_width", "a multiple of 4")


def aligned_layer(config: Config) -> int:
    """Patch block, counted from 1, that REPA aligns: repa.layer, or the paper's."""
    return config.repa.layer or paper_layer(config.model)


def paper_layer(model: ModelConfig) -> int:
    """Patch block, counted from 1, that the paper aligns."""
    return 6 if model.text_width else 8


def _validate_text(t: TextConfig, m: ModelConfig) -> None:
    if not m.text_width:
        for (key, value, _), (_, default, _) in zip(leaves(t), leaves(TextConfig()), strict=True):
            if value != default:
                raise InputError(
                    f"text.{key} = {value!r} has no effect: the network takes classes (model.text_width = 0)"
                )
        return
    if not 1 <= t.max_tokens <= m.text_tokens:
        raise InputError(f"text.max_tokens = {t.max_tokens}: expected 1 to model.text_tokens = {m.text_tokens}")
    if t.scale <= 0:
        raise InputError(f"text.scale = {t.scale}: expected above 0")
    if t.micro_batch < 0:
        raise InputError(f"text.micro_batch = {t.micro_batch}: expected 0 (the run's micro batch) or more")


def _validate_repa(r: RepaConfig, m: ModelConfig) -> None:
    layer, depth = r.layer or paper_layer(m), m.depth
    if r.encoder and r.features:
        raise InputError(f"repa.encoder = {r.encoder!r} and repa.features = {r.features!r}: expected one of them")
    if not r.wanted:
        for (key, value, _), (_, default, _) in zip(leaves(r), leaves(RepaConfig()), strict=True):
            if value != default and (key, value) != ("layer", paper_layer(m)):
                raise InputError(
                    f"repa.{key} = {value!r} has no effect without repa.encoder or repa.features; give one of them, too"
                )
        return
    if not 1 <= layer <= depth:
        raise InputError(f"repa.layer = {layer}: expected 1 to model.depth = {depth}")
    if r.weight <= 0:
        raise InputError(f"repa.weight = {r.weight}: expected above 0; repa.stop_at = 0 switches REPA off in a run")
    if r.features and r.micro_batch:
        raise InputError(f"repa.micro_batch = {r.micro_batch} has no effect with repa.features: no encoder computes")
    if r.micro_batch < 0:
        raise InputError(f"repa.micro_batch = {r.micro_batch}: expected 0 (the run's micro batch) or more")


SAMPLING_OPTIONS = {
    "steps": "--steps",
    "guidance": "--guidance",
    "guidance_from": "--interval's first value",
    "guidance_to": "--interval's second value",
    "shift": "--shift",
}
"""What the commands that draw images call the options of `SamplingConfig`."""


def validate_sampling(s: SamplingConfig, names: dict[str, str] | None = None) -> None:
    """Check sampling options; `names` are what the user calls them, if they are not a run's.

    Raises:
        InputError: naming option, value and what would be right.
    """

    def shown(name: str) -> str:
        return f"{(names or {}).get(name, f'sampling.{name}')} = {getattr(s, name)}"

    if s.steps < 1:
        raise InputError(f"{shown('steps')}: expected at least 1")
    for name in ("guidance", "guidance_from", "guidance_to", "shift"):
        if not math.isfinite(getattr(s, name)):
            raise InputError(f"{shown(name)}: expected a finite number")
    if s.shift <= 0:
        raise InputError(f"{shown('shift')}: expected above 0")
    if s.guidance_from > s.guidance_to:
        raise InputError(f"{shown('guidance_from')} is above {shown('guidance_to')}")


def asked_sampling(own: SamplingConfig, interval: tuple[float, float] | None = None, **asked: Any) -> SamplingConfig:
    """`own` with what a command's options --interval, --guidance and so on ask for; None keeps its own.

    Raises:
        InputError: naming option, value and what would be right.
    """
    low, high = interval or (own.guidance_from, own.guidance_to)
    given = {name: value for name, value in asked.items() if value is not None}
    sampling = dataclasses.replace(own, guidance_from=low, guidance_to=high, **given)
    validate_sampling(sampling, SAMPLING_OPTIONS)
    return sampling


# ---------------------------------------------------------------------------------------------------------------------
# Configurations as data: dotted keys, JSON, and what resume compares
# ---------------------------------------------------------------------------------------------------------------------


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every option as (dotted key, value, mark)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata["mark"]


def get(config: Any, key: str) -> Any:
    """Value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def replace(config: T, key: str, value: Any) -> T:
    """A copy with one dotted key changed."""
    name, _, rest = key.partition(".")
    inner = replace(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Build `kind` from a nested dictionary; missing keys take their defaults.

    Raises:
        InputError: an unknown key (with the nearest right one) or a value of the wrong type; `where` names the file.
    """
    import pydantic  # late: only files need it

    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{one_of(key, sorted(known))}")
        default = getattr(kind(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} = {value!r}: expected a table of options")
            values[key] = from_dict(type(default), value, f"{where}: {key}")
            continue
        try:
            pydantic.TypeAdapter(typing.get_type_hints(kind)[key]).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            why = " or ".join(dict.fromkeys(e["msg"].lower() for e in error.errors()))
            raise InputError(f"{where}: {key} = {value!r}: {why}") from error
        values[key] = value
    return kind(**values)


def compare(saved: Config, now: Config, where: str) -> list[str]:
    """Compare a checkpoint's resolved configuration with this run's; return the schedule changes, one line each.

    Raises:
        InputError: identity options differ; each is named with both values.
    """
    old = {key: value for key, value, _ in leaves(saved)}
    different = [(key, old[key], value, mark) for key, value, mark in leaves(now) if old[key] != value]
    clashes = [
        f"{key} is {before!r} there and {after!r} here" for key, before, after, mark in different if mark == "identity"
    ]
    if clashes:
        raise InputError(f"{where} belongs to another run: {'; '.join(clashes)}. Use another --out, or the old values")
    return [f"{key}: {before!r} -> {after!r}" for key, before, after, mark in different if mark == "schedule"]
