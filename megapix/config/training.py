"""Options of what a run computes: network, objective, data, optimizer, REPA and text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megapix.config import marks
from megapix.config.marks import IMAGENET_IMAGES, Convention, Generator, Images, Padding


@dataclass(frozen=True)
class ModelConfig:
    """The network (paper, section 3)."""

    patch_size: int = marks.identity(16)
    """Pixels on a side of a patch (p); image height and width must be divisible by it."""
    width: int = marks.identity(1152)
    """Width of the patch pathway (D)."""
    depth: int = marks.identity(26)
    """Blocks of the patch pathway (N)."""
    heads: int = marks.identity(16)
    """Attention heads of the patch pathway; width / heads must be divisible by 4 for the 2D RoPE."""
    pixel_width: int = marks.identity(16)
    """Width of a pixel token (d); must be divisible by 4 for the 2D sin-cos positions."""
    pixel_depth: int = marks.identity(4)
    """PiT blocks of the pixel pathway (M)."""
    pixel_attention_width: int = marks.identity(0)
    """Width of attention in the PiT blocks; 0 is that of the patch pathway."""
    pixel_heads: int = marks.identity(0)
    """Attention heads of the PiT blocks; 0 is those of the patch pathway."""
    mlp: Literal["gelu", "swiglu"] = marks.identity("gelu")
    """FFN of the patch blocks: the paper's GELU MLP with ratio 4, or the released weights' SwiGLU."""
    modulation: Literal["pre", "post"] = marks.identity("pre")
    """Pixel-wise AdaLN: 'pre' with gates as in the paper, or 'post', the later variant against loss spikes."""
    num_classes: int = marks.identity(1000)
    """Classes of the data set; the class table has one more row, the null class for guidance. 0 with text.
    Where `megapix train` is not given it, a network with classes takes the number of the shards."""
    text_width: int = marks.identity(0)
    """Width of the text features that condition the network (MM-DiT blocks); 0 with classes."""
    text_tokens: int = marks.identity(300)
    """Rows of the text's position table, with text: the most tokens of a caption."""
    convention: Convention = marks.identity("paper")
    """What the network itself is called with and predicts: 'paper' time 0 (noise) to 1 (image) and image - noise;
    'released', as the authors' text-to-image network and its ports, time 1000 to 0, in training rounded to integers,
    and noise - image. Everything outside the network keeps the paper's."""

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

    t_mean: float = marks.identity(0.0)
    """Mean of the logit-normal distribution of t."""
    t_std: float = marks.identity(1.0)
    """Standard deviation of the logit-normal distribution of t."""
    time_shift: float = marks.identity(1.0)
    """Time shift in training, t / (t + (1 - t) * shift): 1 at 256 pixels, 3 at 512."""
    label_dropout: float = marks.identity(0.1)
    """Probability that a sample's class is replaced by the null class, or its caption by the empty one."""
    generator: Generator = marks.identity("torch")
    """Noise: 'philox' is the same on CPUs and any GPU, 'torch' (what 0.2 had) depends on the device."""


@dataclass(frozen=True)
class DataConfig:
    """The shards and how they are read."""

    path: str = marks.machine("")
    """Shard folder or index made by data_prep (it holds index.json); a local folder, or an http(s), s3 or gs URL. Or a
    mix file of several (`data_prep mix`)."""
    image_size: int = marks.identity(256)
    """Height and width of the training images in pixels, with aspect buckets the square root of their area;
    must be the index's own."""
    flip: bool = marks.identity(True)
    """Mirror an image with probability 1/2, decided by seed and position."""
    shuffle_window: int = marks.identity(0)
    """Shards whose samples are shuffled together; 0 is all of them, a perfect shuffle."""
    reading_groups: int = marks.identity(1)
    """Disjoint parts of each epoch's shards that nodes read separately, for shard caches: a multiple of the nodes."""
    max_replaced: int = marks.machine(100)
    """Damaged samples that one rank may replace with others before the run stops; 0 stops at the first."""
    corrupt_shard: Literal["stop", "replace"] = marks.machine("stop")
    """On a shard that is missing, truncated or of another hash: 'stop' the run, or 'replace' its samples."""
    cache: str = marks.machine("")
    """Local folder for remote data: its index, and whole shards if cache_gib is above 0. Shared by a node's ranks."""
    cache_gib: float = marks.machine(0.0)
    """GiB of shards that the cache may hold; 0 reads each sample by its byte range instead."""
    timeout: float = marks.machine(30.0)
    """Seconds without a byte after which a remote request is abandoned and retried."""
    outage_minutes: float = marks.machine(10.0)
    """Minutes for which storage that cannot be read now is waited for, remote or local; then the run ends with 74."""
    repeat_rare_buckets: bool = marks.machine(False)
    """Train on aspect buckets with fewer samples than the global batch, though a step then holds the same images
    several times."""
    workers: int = marks.machine(4)
    """Processes of each rank that read and decode; 0 decodes in the training process."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate, and the EMA that lives in its state."""

    global_batch: int = marks.identity(256)
    """Images of one optimizer step, over all ranks and accumulation steps."""
    lr: float = marks.schedule(1e-4)
    """Learning rate up to the milestone."""
    lr_after: float = marks.schedule(1e-5)
    """Learning rate from the milestone on."""
    lr_step_at: Images = marks.schedule(160 * IMAGENET_IMAGES)
    """Milestone in images seen, or epochs ('160ep'); 'never' keeps lr to the end."""
    end_at: Images = marks.schedule(320 * IMAGENET_IMAGES)
    """End of training in images seen, or epochs ('320ep')."""
    warmup: Images = marks.schedule(0)
    """Linear warm-up from 0 in images, or epochs; 0 is off."""
    beta1: float = marks.identity(0.9)
    """AdamW's decay of the first moment."""
    beta2: float = marks.identity(0.999)
    """AdamW's decay of the second moment."""
    weight_decay: float = marks.identity(0.0)
    """AdamW's decoupled weight decay."""
    grad_clip: float = marks.schedule(1.0)
    """Maximum norm of the whole gradient; 0 switches clipping off."""
    ema_decay: float = marks.identity(0.9999)
    """Decay of the EMA of the fp32 weights, at each applied step."""
    ema_warmup: bool = marks.identity(False)
    """Let the decay rise to ema_decay: at applied step k it is the smaller of ema_decay and (1 + k) / (10 + k).
    Then the EMA soon forgets the initial weights. The paper's recipe has none."""

    def ema_decay_at(self, step: int) -> float:
        """Decay of the EMA at an applied step, counted from 1 (the rising one is TensorFlow's
        `ExponentialMovingAverage` with `num_updates`)."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay

    def ema_share(self, steps: int) -> float:
        """Share of the EMA, 0 to 1, that is still the weights that the run began with, after as many applied steps: the
        product of all decays. AdamW's steps in a checkpoint count through resumes and rollbacks as the EMA does."""
        rising = 0
        if self.ema_warmup:  # steps with (1 + k) / (10 + k) below ema_decay: their product is (s+1)! 10! / (s+10)!
            rising = min(steps, max(0, math.ceil((10 * self.ema_decay - 1) / (1 - self.ema_decay)) - 1))
        risen = math.lgamma(rising + 2) + math.lgamma(11) - math.lgamma(rising + 11)
        return math.exp(risen) * self.ema_decay ** (steps - rising)


def share_in_words(share: float | None) -> str:
    """A clause about what `OptimConfig.ema_share` says; empty up to 1 %, or where it is not known."""
    return f"{share:.0%} of the EMA is still the weights that the run began with" if share and share > 0.01 else ""


@dataclass(frozen=True)
class RepaConfig:
    """REPA: patch tokens are aligned with a frozen encoder's features of the clean image (docs/repa.md)."""

    encoder: str = marks.machine("")
    """Folder or Hugging Face hub name of a DINOv2 (or with registers, or DINOv3 ViT); empty is off."""
    features: str = marks.machine("")
    """Local folder of the encoder's features, made by `data_prep features`: in place of the encoder."""
    digest: str = marks.identity("")
    """SHA-256 of the encoder's sizes and weights; a run fills it in, and checks it where it is given."""
    layer: int = marks.identity(0)
    """Patch block, counted from 1, whose tokens are aligned; 0 takes the paper's, 8, or 6 with text."""
    weight: float = marks.schedule(0.5)
    """Weight of the alignment loss, 1 - cos, in the total loss."""
    stop_at: Images = marks.schedule("never")
    """Images seen, or epochs, at which the encoder and the alignment loss are switched off."""
    dtype: Literal["bf16", "fp32"] = marks.identity("bf16")
    """dtype that the encoder computes in, or that its features were computed in."""
    micro_batch: int = marks.machine(0)
    """Images per forward pass of the encoder; 0 is the run's micro batch."""

    @property
    def wanted(self) -> bool:
        """Whether there are features to align with, from an encoder or from a folder."""
        return bool(self.encoder or self.features)


@dataclass(frozen=True)
class TextConfig:
    """Text features, for networks that take text (docs/text.md): of a frozen encoder, or stored with the shards."""

    encoder: str = marks.machine("")
    """Folder or Hugging Face hub name of the text encoder;
    empty takes the features that `data_prep embed-text` has stored with the shards."""
    digest: str = marks.identity("")
    """SHA-256 of the encoder's sizes, weights and tokenizer; a run fills it in, and checks it where it is given."""
    max_tokens: int = marks.identity(300)
    """Tokens of a caption that are kept; at most model.text_tokens."""
    normalize: Literal["rms", "none"] = marks.identity("rms")
    """'rms' divides the features of each token by their root mean square."""
    scale: float = marks.identity(0.01)
    """Factor that the features are multiplied by, after normalization."""
    prefix: str = marks.identity("")
    """Instruction before each caption that is not empty; the features keep only the first of its tokens."""
    dtype: Literal["bf16", "fp32"] = marks.identity("bf16")
    """dtype that the encoder computes in."""
    padding: Padding = marks.identity("masked")
    """'masked' pads the captions of a batch to the longest and keeps padding out of attention; 'attended', as the
    released text-to-image network, pads each to max_tokens with what the encoder gives there, and attends to it."""
    micro_batch: int = marks.machine(0)
    """Captions per forward pass of the encoder; 0 is the run's micro batch."""
