"""The option that was meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

ELSEWHERE = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "min_lr": "optim.lr_after",
    "batch_size": "optim.global_batch",
    "train_batch_size": "optim.global_batch",
    "global_batch_size": "optim.global_batch",
    "micro_batch_size": "machine.micro_batch",
    "per_device_train_batch_size": "machine.micro_batch",
    "gradient_accumulation_steps": "machine.micro_batch",
    "grad_accum": "machine.micro_batch",
    "epochs": "optim.end_at",
    "num_epochs": "optim.end_at",
    "num_train_epochs": "optim.end_at",
    "max_steps": "optim.end_at",
    "max_train_steps": "optim.end_at",
    "warmup_steps": "optim.warmup",
    "lr_warmup_steps": "optim.warmup",
    "wd": "optim.weight_decay",
    "max_grad_norm": "optim.grad_clip",
    "gradient_clipping": "optim.grad_clip",
    "clip_grad": "optim.grad_clip",
    "ema": "optim.ema_decay",
    "ema_rate": "optim.ema_decay",
    "betas": "optim.beta1",
    "mixed_precision": "precision",
    "dtype": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "resolution": "data.image_size",
    "img_size": "data.image_size",
    "size": "data.image_size",
    "dataset": "data.path",
    "data_dir": "data.path",
    "data_path": "data.path",
    "train_data_dir": "data.path",
    "shards": "data.path",
    "num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "output_dir": "out",
    "results_dir": "out",
    "outdir": "out",
    "run_dir": "out",
    "global_seed": "seed",
    "resume_from_checkpoint": "resume",
    "pretrained": "init",
    "ckpt": "init",
    "cfg": "sampling.guidance",
    "cfg_scale": "sampling.guidance",
    "guidance_scale": "sampling.guidance",
    "cfg_dropout": "flow.label_dropout",
    "class_dropout_prob": "flow.label_dropout",
    "hidden_size": "model.width",
    "num_heads": "model.heads",
    "gradient_checkpointing": "machine.pixel_checkpointing",
    "activation_checkpointing": "machine.pixel_checkpointing",
    "torch_compile": "machine.compile",
    "ckpt_every": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "checkpointing_steps": "checkpoint.every",
    "log_every": "log.every",
    "logging_steps": "log.every",
    "eval_every": "evaluation.every",
}
"""What other trainers call an option of a run (DiT, SiT, EDM2, diffusers, transformers) -> ours."""


def nearest(name: str, known: Sequence[str]) -> str:
    """ " (did you mean 'optim.lr'?)" for the nearest of the dotted keys `known`; empty if none is near."""
    name = name.replace("-", "_")
    last = name.rpartition(".")[2]
    plain = {key.replace(".", "_"): key for key in known}
    same = [key for key in known if key.rpartition(".")[2] == last]
    near = plain.get(name.replace(".", "_")) or (same[0] if len(same) == 1 else None) or ELSEWHERE.get(last)
    if near is None:
        section = name.rpartition(".")[0]
        of_section = [key for key in known if section and key.startswith(f"{section}.")]
        found = get_close_matches(name, of_section, 1) or get_close_matches(name.replace(".", "_"), plain, 1)
        by_last = {key.rpartition(".")[2]: key for key in known}
        found = found or [by_last[word] for word in get_close_matches(last, by_last, 1, 0.75)]
        near = plain.get(found[0], found[0]) if found else None
    return f" (did you mean {near!r}?)" if near in known else ""
