"""The picture of TensorBoard in docs/monitoring.md: a real server on a run, a real browser without a screen.

    python -m benchmarks.screenshot RUN [OUT]

Needs Chromium (Debian: apt install chromium). OUT is docs/tensorboard.png by default.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

from megapix.dist import free_port

SIZE = (1500, 2420)
"""Pixels of the page."""
COLOURS = 32
"""Of the picture, so that it stays small."""
DEADLINE = 120.0
"""Seconds for the server to read the run."""
DRAWING_MS = 30_000
"""Time that the page gets to load and draw its charts, on the browser's own clock."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshot", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/tensorboard.png"), help="PNG file")
    options = parser.parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("no chromium on the PATH (Debian: apt install chromium)")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(options.run), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_layout(f"http://127.0.0.1:{port}/data/plugin/custom_scalars/layout")
        shoot(browser, f"http://127.0.0.1:{port}/?darkMode=false#custom_scalars", options.out)
    finally:
        server.terminate()
        server.wait()


def wait_for_layout(url: str) -> None:
    """Wait until the server has read the run's groups of charts."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                if b"category" in answer.read():
                    return
        except (urllib.error.URLError, ConnectionError):
            pass  # not listening yet
        time.sleep(0.5)
    raise SystemExit(f"TensorBoard shows no custom scalars at {url}")


def shoot(browser: str, url: str, out: Path) -> None:
    """Draw the page and save it with few colours."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "page.png")
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}"]
        command += [f"--virtual-time-budget={DRAWING_MS}", f"--screenshot={raw}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(raw) as page:
            page.convert("RGB").quantize(COLOURS).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
