"""How `tests/data/v0_1` and `tests/data/golden` were made: by this script, run once with version 0.1.0.

    OMP_NUM_THREADS=1 python -m tests.data.make

It stays as the record, and is not run again: the files are what that version wrote, and every later one must read them.
All paths in them are relative to WORK or below it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from tests.support import image_encoders, text_encoders

ROOT = Path(__file__).resolve().parents[2]
WORK = Path("/tmp/megapix-0.1.0")
KEPT = (
    *("classes", "text", "tars", "untouched", "index-crop", "index-buckets", "features-fp32", "features-bf16"),
    *("classes-run", "text-run", "classes.safetensors", "text.safetensors", "stats.npz"),
    *("classes.png", "text.png"),
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

SHARED = "--seed 1 --data.image-size 16 --data.flip --data.workers 0 --optim.global-batch 8 --optim.lr 0.002 "
SHARED += "--optim.lr-after 0.0005 --optim.lr-step-at 96 --optim.end-at 160 --optim.beta2 0.999 --optim.grad-clip 0.5 "
SHARED += "--optim.ema-decay 0.9 --checkpoint.every 80 --log.every 8 --log.blocks-every 256000 "
SHARED += "--log.samples-every never --sampling.steps 3 --sampling.guidance 2.75 --sampling.guidance-from 0.1 "
SHARED += "--sampling.guidance-to 0.9 --model.depth 2"
CLASSES = f"train tiny --data.path classes {SHARED} --model.num-classes 3"
TEXT = f"train tiny --data.path text {SHARED} --model.num-classes 0 --model.mlp swiglu --model.text-width 24 "
TEXT += "--model.text-tokens 12 --text.max-tokens 12 --text.scale 1.0 --text.dtype fp32"
WHOLE = "--model.width 32 --model.heads 2 --model.pixel-width 8"
SMALL = "--model.width 12 --model.heads 1 --model.pixel-width 4"
REPA = f"{CLASSES} {SMALL} --optim.end-at 24 --repa.layer 1"
RUNS = {
    "classes": (2, f"{CLASSES} {WHOLE}"),
    "text": (2, f"{TEXT} {WHOLE} --model.pixel-attention-width 24 --model.pixel-heads 3"),
    "classes-run": (2, f"{CLASSES} {SMALL}"),
    "text-run": (2, f"{TEXT} {SMALL} --model.pixel-attention-width 12 --model.pixel-heads 3"),
    "repa-fp32": (1, f"{REPA} --repa.dtype fp32 --repa.features features-fp32"),
    "repa-bf16": (
        1,
        f"{REPA} --repa.dtype bf16 --repa.features features-bf16 --data.no-flip --data.image-size 32 "
        "--data.path index-buckets",
    ),
}
"""Name of a trace -> ranks, command. Those of the runs that are kept are of ones that were never interrupted."""


def run(command: str, ranks: int = 1) -> None:
    """A command of `megapix` or `data_prep` in WORK."""
    module = "data_prep" if command.split()[0] in ("write", "index", "stats", "features", "embed-text") else "megapix"
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    python = [sys.executable, *(start if command.startswith("train") else ["-m", module])]
    subprocess.run([*python, *command.split()], cwd=WORK, env=ENVIRONMENT, check=True)


def ask(*arguments: str) -> dict[str, Any]:
    """The probe, or a run's trace, of `tests.golden`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden", *arguments],
        cwd=WORK,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(done.stdout))


def pictures() -> None:
    """Images in class folders, images of three shapes with captions, and tar files as strangers make them."""
    generator = np.random.default_rng(0)
    for number in range(21):
        label, folder = number % 3, WORK / "images" / ("blue", "green", "red")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 60, (16, 16, 3))
        pixels[..., 2 - label] += np.linspace(0, 190, 16).astype(int)[None, :]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    (WORK / "pairs").mkdir()
    for number in range(23):
        height, width = ((16, 16), (12, 20), (20, 12))[number % 3]
        colour, pixels = ("red", "blue")[number % 2], generator.integers(0, 60, (height, width, 3))
        pixels[..., 2 * (number % 2)] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(WORK / "pairs" / f"{number:02d}.png")
        captions = [{"text": f"a {colour} mat"}, {"text": f"a photo of the {colour} dog", "weight": 0.5}]
        about: dict[str, Any] = {"captions": captions} if number % 4 else {"caption": captions[0]["text"]}
        (WORK / "pairs" / f"{number:02d}.json").write_text(json.dumps(about))
    (WORK / "tars").mkdir()
    for tar_number in range(3):
        with (
            open(WORK / "tars" / f"{tar_number:05d}.tar", "wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for number in range(tar_number, 23, 3):
                shape = ((40, 60), (60, 40), (32, 32), (33, 50), (50, 33))[number % 5]
                ending, kind = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[number % 7 % 3]
                pixels = np.linspace(0, 250, shape[0])[:, None, None] * generator.random((1, 1, 3))
                pixels = pixels + np.linspace(0, 40, shape[1])[None, :, None]
                data, caption = io.BytesIO(), f"picture {number} – ü"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, kind, quality=90)
                sample: dict[str, Any] = {"__key__": f"deep/part.{tar_number}/s{number}", ending: data.getvalue()}
                sample["cls"] = str(number % 3).encode()
                if number % 2:
                    sample["txt"] = caption.encode()
                else:
                    sample["json"] = json.dumps({"caption": caption, "url": "https://example.org"}).encode()
                tar.write(sample)


def prepare() -> None:
    """Shards, indexes, features and statistics."""
    run("write images classes --size 16 --samples-per-shard 9 --workers 1")
    run("write pairs text --size 16 --policy buckets --bucket-step 4 --samples-per-shard 9 --workers 1")
    run("write tars untouched --policy untouched --format original --samples-per-shard 9 --workers 1")
    run("index tars --out index-crop --size 16 --workers 1")
    run("index tars --out index-buckets --size 32 --policy buckets --bucket-step 8 --workers 1")
    image_encoders.make(WORK / "dinov2")
    text_encoders.make(WORK / "bert", "bert")
    run("embed-text text --encoder bert --max-tokens 12 --scale 1 --dtype fp32")
    run("features classes --encoder dinov2 --out features-fp32 --dtype fp32 --workers 1")
    run("features index-buckets --encoder dinov2 --out features-bf16 --no-flip --workers 1")
    run("stats classes --out whole.npz --workers 1")
    with np.load(WORK / "whole.npz") as whole:  # of 1280 features it has 13 MB: the first 17 are kept
        cut = {"mu": np.s_[:17], "sigma": np.s_[:17, :17], "features": np.s_[:, :17]}
        np.savez(WORK / "stats.npz", **{name: whole[name][cut.get(name, ())] for name in whole.files})


def train() -> None:
    """The runs: two of ten steps, which are kept, and all traces."""
    for name, (ranks, command) in RUNS.items():
        whole = f"{name}-whole"
        run(f"{command} --out {whole}", ranks)
        if name.endswith("-run"):
            run(f"{command} --out {name} --optim.end-at 80", ranks)
        about = {"version": "0.1.0", "command": command, "ranks": ranks, "machine": ask()}
        golden = ROOT / "tests" / "data" / "golden" / f"{name}.json"
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(about | {"trace": ask(whole)}, indent=1) + "\n")


def weights() -> None:
    """Exports, and a picture of each network."""
    for name, rows in (("classes", "--classes 2 0 1"), ("text", "--prompts text --count 3")):
        run(f"export {name}-run --out {name}.safetensors")
        run(f"sample {name}-run --out {name}.png {rows} --per-class 3 --seed 5")


def keep() -> None:
    """Move what is kept; what names a machine or a process goes."""
    out = ROOT / "tests" / "data" / "v0_1"
    shutil.rmtree(out, ignore_errors=True)
    for name in KEPT:
        (shutil.copytree if (WORK / name).is_dir() else shutil.copy)(WORK / name, out / name)
    for lock in out.rglob("*lock"):
        lock.unlink()
    for events in out.rglob("events.out.tfevents.*"):
        events.rename(events.with_name("events.out.tfevents.0000000000.host.0.0"))


if __name__ == "__main__":
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    pictures()
    prepare()
    train()
    weights()
    keep()
