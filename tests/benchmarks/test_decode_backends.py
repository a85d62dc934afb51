"""What the comparison of JPEG decoders says of pixels that are Pillow's, and of some that are not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks import decode_backends
from benchmarks.decode_backends import differences, installed, pillow


def test_pixels_that_are_not_pillows_are_found() -> None:
    reference = pillow(Image)
    assert differences(reference, reference) == "Pillow's"

    def grey_off_by_three(data: bytes) -> np.ndarray:
        found = reference(data).copy()
        if (found[..., 0] == found[..., 2]).all():
            found[0, 0] ^= 3
        return found

    said = differences(grey_off_by_three, reference)
    assert said.startswith("apart by 3 at most, 0.0000 on average")
    assert said.endswith("(grey)")


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_library(_module: object) -> None:
        raise RuntimeError("no libturbojpeg\nhere")

    backends = {"Pillow": ("PIL", pillow), "none": ("no_such_module", pillow), "half": ("PIL", without_library)}
    monkeypatch.setattr(decode_backends, "BACKENDS", backends)
    assert list(installed()) == ["Pillow"]
    assert capsys.readouterr().out == "none: not installed\nhalf: cannot be used: no libturbojpeg\n"
