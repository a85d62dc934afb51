"""Every option of a run, once: frozen dataclasses with the defaults of the paper's recipe.

Each field carries one mark, and resume reads that mark (`fields.compare`):

    identity   what the run is: must match the checkpoint's value
    schedule   may change on resume; old and new value are logged
    machine    free: where and how the run is executed, never what it computes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k (ILSVRC2012)."""

Images = int | str
"""Images seen, epochs such as '160ep', or 'never'."""

Sampler = Literal["euler", "heun", "ab2"]

PixelPolicy = Literal["none", "selective", "selective_modulation", "full", "chunked", "offload"]
"""What the pixel pathway keeps for its backward pass (`engine/checkpointing.py`)."""

Auto = Literal["auto"]
"""Left to a run's start, which knows its GPUs (`costs/automatic.py`)."""

Attention = Literal["auto", "flash", "cudnn", "efficient", "math"]
"""Kernels of scaled dot product attention that torch has for GPUs."""

Generator = Literal["torch", "philox"]
"""Where noise comes from (`diffusion/noise.py`)."""

T = TypeVar("T")


def _identity(default: Any) -> Any:
    return field(default=default, metadata={"mark": "identity"})


def _schedule(default: Any) -> Any:
    return field(default=default, metadata={"mark": "schedule"})


def _machine(default: Any) -> Any:
    return field(default=default, metadata={"mark": "machine"})


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
    """Classes of the data set; the class table has one more row, the null class for guidance. 0 with text.
    Where `megapix train` is not given it, a network with classes takes the number of the shards."""
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
    generator: Generator = _identity("torch")
    """Noise: 'philox' is the same on CPUs and any GPU, 'torch' (what 0.2 had) depends on the device."""


@dataclass(frozen=True)
class DataConfig:
    """The shards and how they are read."""

    path: str = _machine("")
    """Shard folder or index made by data_prep (it holds index.json); a local folder, or an http(s), s3 or gs URL."""
    image_size: int = _identity(256)
    """Height and width of the training images in pixels, with aspect buckets the square root of their area;
    must be the index's own."""
    flip: bool = _identity(True)
    """Mirror an image with probability 1/2, decided by seed and position."""
    shuffle_window: int = _identity(0)
    """Shards whose samples are shuffled together; 0 is all of them, a perfect shuffle."""
    reading_groups: int = _identity(1)
    """Disjoint parts of each epoch's shards that nodes read separately, for shard caches: a multiple of the nodes."""
    max_replaced: int = _machine(100)
    """Damaged samples that one rank may replace with others before the run stops; 0 stops at the first."""
    corrupt_shard: Literal["stop", "replace"] = _machine("stop")
    """On a shard that is missing, truncated or of another hash: 'stop' the run, or 'replace' its samples."""
    cache: str = _machine("")
    """Local folder for remote data: its index, and whole shards if cache_gib is above 0. Shared by a node's ranks."""
    cache_gib: float = _machine(0.0)
    """GiB of shards that the cache may hold; 0 reads each sample by its byte range instead."""
    timeout: float = _machine(30.0)
    """Seconds without a byte after which a remote request is abandoned and retried."""
    outage_minutes: float = _machine(10.0)
    """Minutes for which storage that cannot be read now is waited for, remote or local; then the run ends with 74."""
    repeat_rare_buckets: bool = _machine(False)
    """Train on aspect buckets with fewer samples than the global batch, though a step then holds the same images
    several times."""
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
    """Maximum norm of the whole gradient; 0 switches clipping off."""
    ema_decay: float = _identity(0.9999)
    """Decay of the EMA of the fp32 weights, at each applied step."""


@dataclass(frozen=True)
class RepaConfig:
    """REPA: patch tokens are aligned with a frozen encoder's features of the clean image (docs/repa.md)."""

    encoder: str = _machine("")
    """Folder or Hugging Face hub name of a DINOv2 (or with registers, or DINOv3 ViT); empty is off."""
    features: str = _machine("")
    """Local folder of the encoder's features, made by `data_prep features`: in place of the encoder."""
    digest: str = _identity("")
    """SHA-256 of the encoder's sizes and weights; a run fills it in, and checks it where it is given."""
    layer: int = _identity(0)
    """Patch block, counted from 1, whose tokens are aligned; 0 takes the paper's, 8, or 6 with text."""
    weight: float = _schedule(0.5)
    """Weight of the alignment loss, 1 - cos, in the total loss."""
    stop_at: Images = _schedule("never")
    """Images seen, or epochs, at which the encoder and the alignment loss are switched off."""
    dtype: Literal["bf16", "fp32"] = _identity("bf16")
    """dtype that the encoder computes in, or that its features were computed in."""
    micro_batch: int = _machine(0)
    """Images per forward pass of the encoder; 0 is the run's micro batch."""

    @property
    def wanted(self) -> bool:
        """Whether there are features to align with, from an encoder or from a folder."""
        return bool(self.encoder or self.features)


@dataclass(frozen=True)
class TextConfig:
    """Text features, for networks that take text (docs/text.md): of a frozen encoder, or stored with the shards."""

    encoder: str = _machine("")
    """Folder or Hugging Face hub name of the text encoder;
    empty takes the features that `data_prep embed-text` has stored with the shards."""
    digest: str = _identity("")
    """SHA-256 of the encoder's sizes, weights and tokenizer; a run fills it in, and checks it where it is given."""
    max_tokens: int = _identity(300)
    """Tokens of a caption that are kept; at most model.text_tokens."""
    normalize: Literal["rms", "none"] = _identity("rms")
    """'rms' divides the features of each token by their root mean square."""
    scale: float = _identity(0.01)
    """Factor that the features are multiplied by, after normalization."""
    prefix: str = _identity("")
    """Instruction before each caption that is not empty; the features keep only the first of its tokens."""
    dtype: Literal["bf16", "fp32"] = _identity("bf16")
    """dtype that the encoder computes in."""
    micro_batch: int = _machine(0)
    """Captions per forward pass of the encoder; 0 is the run's micro batch."""


@dataclass(frozen=True)
class MachineConfig:
    """How the run is executed on its machines; nothing here changes what is computed, but for rounding."""

    micro_batch: int = _machine(0)
    """Images in one forward pass of one rank; 0 takes the fastest that fits a GPU, and on CPUs global_batch / ranks."""
    pixel_checkpointing: PixelPolicy | Auto = _machine("auto")
    """Activation checkpointing of the pixel pathway: 'auto' takes the fastest of the first four that fits a GPU, and
    'full' on CPUs. 'none' keeps all activations,
    'selective' the results of matmuls, 'selective_modulation' these without the pixel-wise modulation,
    'full' each PiT block's input; the rest is recomputed.
    'chunked' keeps inputs and outputs of attention and recomputes the rest some patches at a time, for large images;
    'offload' keeps all activations in host memory."""
    patch_checkpointing: Literal["none", "full"] | int = _machine("none")
    """Activation checkpointing of the patch pathway: 'none' keeps all activations,
    'full' each block's input, a number k recomputes every k-th block."""
    compile: bool | Auto = _machine("auto")
    """Compile the network with torch.compile, block by block; 'auto' does on GPUs and not on CPUs. It needs a C
    compiler and Python's headers on GPUs, and a C++ compiler on CPUs."""
    deterministic: bool = _machine(False)
    """Take deterministic kernels only, on GPUs slower ones of attention (docs/long-runs.md)."""
    attention: Attention = _machine("auto")
    """Kernel of attention on GPUs; 'auto' takes the fastest that can take shapes and mask (docs/performance.md)."""
    fused_adamw: bool = _machine(True)
    """Use torch's fused AdamW, one pass over memory; off takes its foreach implementation, equal but for rounding."""
    pixel_kernels: Literal["plain", "triton"] = _machine("plain")
    """Kernels of the pixel pathway: torch's, or 'triton', two fused ones per PiT block (docs/architecture.md)."""
    ds_config: str = _machine("zero2")
    """DeepSpeed-only knobs: a name in ds_configs/, or the path of a JSON file."""
    watchdog: float = _machine(60.0)
    """Seconds after which a silent rank counts as dead and one without progress as hung, and the job ends; 0 is off."""
    unproven: bool = _machine(False)
    """Allow overlap_comm, which docs/parity.md tests on CPU ranks only; `megapix doctor --parity` tests it here."""
    peak_tflops: float = _machine(0.0)
    """Peak of one rank in TFLOP/s, for MFU; 0 takes a known GPU's dense bf16 peak, and logs no MFU without one."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Images = _machine("5ep")
    """Images seen, or epochs, between checkpoints; one more is saved at the end."""
    keep: int = _machine(3)
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Images = _machine("never")
    """Images seen, or epochs, between checkpoints that are never removed."""
    keep_best: int = _machine(0)
    """Checkpoints of the lowest mean training loss to keep as well."""
    background: bool = _machine(True)
    """Write checkpoints in the background, from a copy in host memory (16 bytes per parameter / ranks)."""
    max_failed: int = _machine(3)
    """Failed saves in a row that end the run; until then each is tried again when the next one is due."""


@dataclass(frozen=True)
class HealthConfig:
    """What a run does about skipped steps, and about spikes of loss and gradient norm."""

    max_skipped: int = _schedule(20)
    """Skipped steps in a row (gradient not finite) that end the run."""
    on_spike: Literal["warn", "rollback", "stop"] = _schedule("warn")
    """'rollback' returns to the last checkpoint before the spike and skips the data that led to it."""
    window: int = _schedule(100)
    """Steps that a step is compared with."""
    loss_z: float = _schedule(8.0)
    """Robust standard deviations above the window's median at which a step's loss is an outlier."""
    grad_norm_z: float = _schedule(20.0)
    """The same for the gradient norm before clipping, which varies more."""
    patience: int = _schedule(3)
    """Outliers in a row that count as a spike."""
    skip: int = _schedule(50)
    """Steps before a spike whose data are skipped too, no further back than the checkpoint."""
    max_rollbacks: int = _schedule(3)
    """Rollbacks after which the next spike ends the run."""


@dataclass(frozen=True)
class LogConfig:
    """What goes to TensorBoard, and how often."""

    every: Images = _machine(25_600)
    """Images seen, or epochs, between rows of scalars."""
    blocks_every: Images = _machine(256_000)
    """Images seen, or epochs, between gradient and modulation norms per block; 'never' switches them off."""
    samples_every: Images = _machine("5ep")
    """Images seen, or epochs, between EMA sample grids; 'never' switches them off."""
    grid_classes: int = _machine(8)
    """Rows of the grid: the first classes, or prompts."""
    prompts: str = _machine("")
    """Text file with one prompt per line, or shard folder, for the grids of a network that takes text;
    empty takes captions of the validation set, or of the training set without one."""
    grid_columns: int = _machine(4)
    """Columns of the grid: samples per class or prompt."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss of raw and EMA weights, at fixed noise and eight fixed times."""

    path: str = _machine("")
    """Shard folder or index of images that are not trained on, like data.path; empty is off."""
    every: Images = _machine("5ep")
    """Images seen, or epochs of the training set, between validations; 'never' switches them off."""
    samples: int = _machine(1024)
    """Validation images that are used, the same ones each time; 0 is all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of a few samples from the EMA during training, as `megapix evaluate` scores many (docs/evaluation.md)."""

    reference: str = _machine("")
    """Reference statistics by `data_prep stats`, or one of ADM's .npz files; empty is off."""
    extractor_weights: str = _machine("")
    """Weights file of the extractor inception, if the reference was made with it."""
    every: Images = _machine("20ep")
    """Images seen, or epochs, between evaluations; 'never' switches them off."""
    count: int = _machine(1000)
    """Images to sample, the same noise each time; scores at other counts cannot be compared with these."""
    batch: int = _machine(64)
    """Images that a rank samples at once."""


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling during training, and the defaults of `megapix sample` for this run."""

    sampler: Sampler = _machine("ab2")
    """Euler, Heun, or the two-step Adams-Bashforth method that the authors released as FlowDPMSolver."""
    steps: int = _machine(100)
    """Sampler steps. Each evaluates the (guided) velocity once, of heun twice but for the last."""
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
    """A whole run. The same command starts it and, after an interruption, resumes from its last checkpoint."""

    out: str = _machine("")
    """Run folder: configuration, checkpoints and TensorBoard events."""
    seed: int = _identity(0)
    """Seed of the initial weights, sample order, flips, noise, timesteps and label dropout."""
    init: str = _identity("")
    """Initialize from the weights of this run, checkpoint, exported file or imported folder, as the next stage;
    optimizer, position and EMA start fresh."""
    init_weights: Literal["ema", "raw"] = _identity("ema")
    """Which of its weights; an exported file or imported folder holds one kind."""
    resume: Literal["auto", "require"] = _machine("auto")
    """'auto' resumes from the newest whole checkpoint, or starts; 'require' resumes from the newest, or fails."""
    precision: Literal["bf16", "fp32"] = _identity("bf16")
    """DeepSpeed's bf16 mode (bf16 weights and activations, fp32 masters, moments and EMA), or fp32 throughout."""
    profile: int = _machine(0)
    """Steps that each rank profiles with torch.profiler into OUT/profile, after the first three; 0 is off."""
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
