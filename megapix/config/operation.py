"""Options of how a run is executed, saved, watched and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megapix.config import marks
from megapix.config.marks import Attention, Auto, Images, PixelPolicy, Sampler


@dataclass(frozen=True)
class MachineConfig:
    """How the run is executed on its machines; nothing here changes what is computed, but for rounding."""

    micro_batch: int = marks.machine(0)
    """Images in one forward pass of one rank; 0 takes the fastest that fits a GPU, and on CPUs global_batch / ranks."""
    pixel_checkpointing: PixelPolicy | Auto = marks.machine("auto")
    """Activation checkpointing of the pixel pathway: 'auto' takes the fastest of the first four that fits a GPU, and
    'full' on CPUs. 'none' keeps all activations,
    'selective' the results of matmuls, 'selective_modulation' these without the pixel-wise modulation,
    'full' each PiT block's input; the rest is recomputed.
    'chunked' keeps inputs and outputs of attention and recomputes the rest some patches at a time, for large images;
    'offload' keeps all activations in host memory."""
    patch_checkpointing: Literal["none", "full"] | int = marks.machine("none")
    """Activation checkpointing of the patch pathway: 'none' keeps all activations,
    'full' each block's input, a number k recomputes every k-th block."""
    compile: bool | Auto = marks.machine("auto")
    """Compile the network with torch.compile, block by block; 'auto' does on GPUs and not on CPUs. It needs a C
    compiler and Python's headers on GPUs, and a C++ compiler on CPUs."""
    deterministic: bool = marks.machine(False)
    """Take deterministic kernels only, on GPUs slower ones of attention (docs/long-runs.md)."""
    attention: Attention = marks.machine("auto")
    """Kernel of attention on GPUs; 'auto' takes the fastest that can take shapes and mask (docs/performance.md)."""
    fused_adamw: bool = marks.machine(True)
    """Use torch's fused AdamW, one pass over memory; off takes its foreach implementation, equal but for rounding."""
    pixel_kernels: Literal["plain", "triton"] = marks.machine("plain")
    """Kernels of the pixel pathway: torch's, or 'triton', two fused ones per PiT block (docs/architecture.md)."""
    ds_config: str = marks.machine("zero2")
    """DeepSpeed-only knobs: a name in ds_configs/, or the path of a JSON file."""
    watchdog: float = marks.machine(60.0)
    """Seconds after which a silent rank counts as dead and one without progress as hung, and the job ends; 0 is off."""
    unproven: bool = marks.machine(False)
    """Allow overlap_comm, which docs/parity.md tests on CPU ranks only; `megapix doctor --parity` tests it here."""
    peak_tflops: float = marks.machine(0.0)
    """Peak of one rank in TFLOP/s, for MFU; 0 takes a known GPU's dense bf16 peak, and logs no MFU without one."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Images = marks.machine("5ep")
    """Images seen, or epochs, between checkpoints; one more is saved at the end."""
    keep: int = marks.machine(3)
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Images = marks.machine("never")
    """Images seen, or epochs, between checkpoints that are never removed."""
    keep_best: int = marks.machine(0)
    """Checkpoints of the lowest mean training loss to keep as well."""
    background: bool = marks.machine(True)
    """Write checkpoints in the background, from a copy in host memory (16 bytes per parameter / ranks)."""
    max_failed: int = marks.machine(3)
    """Failed saves in a row that end the run; until then each is tried again when the next one is due."""


@dataclass(frozen=True)
class HealthConfig:
    """What a run does about skipped steps, and about spikes of loss and gradient norm."""

    max_skipped: int = marks.schedule(20)
    """Skipped steps in a row (gradient not finite) that end the run."""
    on_spike: Literal["warn", "rollback", "stop"] = marks.schedule("warn")
    """'rollback' returns to the last checkpoint before the spike and skips the data that led to it."""
    window: int = marks.schedule(100)
    """Steps that a step is compared with."""
    loss_z: float = marks.schedule(8.0)
    """Robust standard deviations above the window's median at which a step's loss is an outlier."""
    grad_norm_z: float = marks.schedule(20.0)
    """The same for the gradient norm before clipping, which varies more."""
    patience: int = marks.schedule(3)
    """Outliers in a row that count as a spike."""
    skip: int = marks.schedule(50)
    """Steps before a spike whose data are skipped too, no further back than the checkpoint."""
    max_rollbacks: int = marks.schedule(3)
    """Rollbacks after which the next spike ends the run."""


TRACKERS = ("wandb", "trackio", "mlflow")
"""What `log.tracker` may name (`trackers/`)."""


@dataclass(frozen=True)
class LogConfig:
    """What goes to TensorBoard, and how often."""

    every: Images = marks.machine(25_600)
    """Images seen, or epochs, between rows of scalars."""
    blocks_every: Images = marks.machine(256_000)
    """Images seen, or epochs, between gradient and modulation norms per block; 'never' switches them off."""
    samples_every: Images = marks.machine("5ep")
    """Images seen, or epochs, between EMA sample grids; 'never' switches them off."""
    grid_classes: int = marks.machine(8)
    """Rows of the grid: the first classes, or prompts."""
    prompts: str = marks.machine("")
    """Text file with one prompt per line, or shard folder, for the grids of a network that takes text;
    empty takes captions of the validation set, or of the training set without one."""
    grid_columns: int = marks.machine(4)
    """Columns of the grid: samples per class or prompt."""
    tracker: str = marks.machine("")
    """Where all this goes beside TensorBoard: 'wandb', 'trackio' or 'mlflow', or several of them with commas between;
    empty is nowhere (docs/monitoring.md)."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `tracker`."""
        return tuple(name.strip() for name in self.tracker.split(",") if name.strip())


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss of raw and EMA weights, at fixed noise and eight fixed times."""

    path: str = marks.machine("")
    """Shard folder or index of images that are not trained on, like data.path; empty is off."""
    every: Images = marks.machine("5ep")
    """Images seen, or epochs of the training set, between validations; 'never' switches them off."""
    samples: int = marks.machine(1024)
    """Validation images that are used, the same ones each time; 0 is all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of a few samples from the EMA during training, as `megapix evaluate` scores many (docs/evaluation.md)."""

    reference: str = marks.machine("")
    """Reference statistics by `data_prep stats`, or one of ADM's .npz files; empty is off."""
    extractor_weights: str = marks.machine("")
    """Weights file of the extractor inception, if the reference was made with it."""
    every: Images = marks.machine("20ep")
    """Images seen, or epochs, between evaluations; 'never' switches them off."""
    count: int = marks.machine(1000)
    """Images to sample, the same noise each time; scores at other counts cannot be compared with these."""
    batch: int = marks.machine(64)
    """Images that a rank samples at once."""


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling during training, and the defaults of `megapix sample` for this run."""

    sampler: Sampler = marks.machine("ab2")
    """Euler, Heun, or the two-step Adams-Bashforth method that the authors released as FlowDPMSolver."""
    steps: int = marks.machine(100)
    """Sampler steps. Each evaluates the (guided) velocity once, of heun twice but for the last."""
    guidance: float = marks.machine(2.75)
    """Scale w of classifier-free guidance, v_u + w (v_c - v_u); 1 is off."""
    guidance_from: float = marks.machine(0.1)
    """Guidance acts where t is above this."""
    guidance_to: float = marks.machine(0.9)
    """Guidance acts where t is below this."""
    shift: float = marks.machine(1.0)
    """Time shift of the sampler's grid."""
