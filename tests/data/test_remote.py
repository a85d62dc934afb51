"""Remote shards: real servers, ranges and the cache, and everything that goes wrong between two machines."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from megapix.config import BatchLayout, DataConfig, replace
from megapix.data import workers
from megapix.data.assemble import AHEAD
from megapix.data.batch import Batch
from megapix.data.cache import CachedShards
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.errors import InputError, StorageError
from megapix.shards.index import ShardEntry, read_index
from megapix.shards.storage import Access, Refused, Remote
from tests.support.launch import start, succeed
from tests.support.programs import needs
from tests.support.servers import Faults, Nginx, faulty, nginx, s3
from tests.support.small_run import arguments, scalars

QUICK = Access(timeout=0.5, outage_minutes=0.02)


@pytest.fixture(scope="module", params=[pytest.param("nginx", marks=needs("nginx"))])
def web(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """nginx over the folder of the `shards` fixture."""
    pytest.importorskip("aiohttp")
    with nginx(shards, tmp_path_factory.mktemp("nginx")) as server:
        yield server


def config(path: str, **rest: object) -> DataConfig:
    c = DataConfig(path=path, image_size=16, workers=0, timeout=QUICK.timeout, outage_minutes=QUICK.outage_minutes)
    for key, value in rest.items():
        c = replace(c, key, value)
    return c


def epoch(c: DataConfig, steps: int = 5) -> list[Batch]:
    """The first steps of 8 positions, 40 in all: one epoch."""
    stream = batches(c, locate(c), 3, BatchLayout(8, 1, 1), 0, 0, ())
    return [next(stream) for _ in range(steps)]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return all(
        np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
        for a, b in zip(some, others, strict=True)
    )


def test_ranges_give_what_local_files_give(web: Nginx, shards: Path, tmp_path: Path) -> None:
    remote = config(web.url, cache=str(tmp_path / "cache"))
    before = len(web.requests())
    assert same(epoch(remote), epoch(config(str(shards))))
    asked = web.requests()[before:]
    assert len(asked) <= 3 * (5 + AHEAD), "of a micro batch, neighbours are one request: these shards are small"
    assert all(ranges.startswith("bytes=") for _, ranges in asked)
    assert same(epoch(replace(remote, "workers", 2)), epoch(config(str(shards))))
    assert [path.name for path in (tmp_path / "cache").glob("*.tar")] == []


def test_the_cache_fetches_each_shard_once(web: Nginx, shards: Path, tmp_path: Path) -> None:
    remote = config(web.url, cache=str(tmp_path / "cache"), cache_gib=1.0)
    before = len(web.requests())
    found = epoch(remote)
    assert same(found, epoch(config(str(shards))))
    assert len(web.requests()) - before == 3
    assert sum(b.times.hits + b.times.misses for b in found) == 40
    assert same(epoch(replace(remote, "workers", 3)), found)
    assert len(web.requests()) - before == 3, "workers and later runs find them there"
    index = read_index(shards)
    assert sorted(path.stem for path in (tmp_path / "cache").glob("*.tar")) == sorted(s.sha256 for s in index.shards)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_cache_is_bounded_and_touches_only_its_own_files(web: Nginx, shards: Path, tmp_path: Path) -> None:
    index = read_index(shards)
    largest = max(shard.bytes for shard in index.shards)
    (tmp_path / "theirs.tar").write_bytes(bytes(10 * largest))
    cache = CachedShards(Remote(web.url, QUICK), tmp_path, 2 * largest)
    order = [0, 1, 0, 2, 0, 1]  # when 2 comes, 1 was used longest ago; then 2 was
    for number in order:
        shard = index.shards[number]
        assert cache.read(shard, 0, shard.bytes) == (shards / shard.name).read_bytes()
        held = [path.stat().st_size for path in tmp_path.glob("*.tar") if path.name != "theirs.tar"]
        assert sum(held) <= 2 * largest
    assert cache.misses == 4
    assert (tmp_path / "theirs.tar").exists()
    small = CachedShards(Remote(web.url, QUICK), tmp_path / "small", largest - 1)
    (number,) = [n for n, shard in enumerate(index.shards) if shard.bytes == largest][:1]
    with pytest.raises(InputError, match=r"data.cache_gib = \S+: shard shard-00000\d.tar alone has"):
        small.read(index.shards[number], 0, 10)


def test_shards_are_fetched_before_they_are_needed(web: Nginx, shards: Path, tmp_path: Path) -> None:
    index = read_index(shards)
    cache = CachedShards(Remote(web.url, QUICK), tmp_path, 1 << 30)
    gone = ShardEntry("gone.tar", 1, 1, "0" * 64)
    cache.prefetch([gone, *index.shards, *index.shards])
    while len(list(tmp_path.glob("*.tar"))) < 3:
        assert all(thread.is_alive() for thread in cache._threads), "a shard that is not there does not end it"
    for shard in index.shards:
        assert cache.read(shard, 0, shard.bytes) == (shards / shard.name).read_bytes()
    assert (cache.hits, cache.misses) == (3, 0)
    with pytest.raises(Refused, match=r"gone.tar: not found"):
        cache.read(gone, 0, 1)


FILL = """
import sys
import time
from pathlib import Path
from megapix.data.cache import CachedShards
from megapix.shards.index import ShardEntry, read_index
from megapix.shards.storage import Access, Remote
url, shards, folder = sys.argv[1:]
cache = CachedShards(Remote(url, Access(30.0, 5)), Path(folder), 1 << 30)
for shard in read_index(shards).shards:
    assert len(cache.read(shard, 0, shard.bytes)) == shard.bytes
"""


def fill(url: str, shards: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FILL, url, str(shards), str(folder)])


def test_processes_share_the_cache(web: Nginx, shards: Path, tmp_path: Path) -> None:
    before = len(web.requests())
    processes = [fill(web.url, shards, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(web.requests()) - before == 3


def test_processes_wait_for_room(web: Nginx, shards: Path, tmp_path: Path) -> None:
    """Three processes and a cache with room for one shard: all get what they ask for, and the bound holds."""
    limit = max(shard.bytes for shard in read_index(shards).shards)
    code = FILL.replace("1 << 30", str(limit))
    command = [sys.executable, "-c", code, web.url, str(shards), str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        held = 0
        for path in tmp_path.iterdir():
            with suppress(FileNotFoundError):
                held += path.stat().st_size
        assert held <= 2 * limit  # two looks at a folder that changes may count a shard before and after another
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_what_others_are_fetching_is_waited_for(web: Nginx, shards: Path, tmp_path: Path) -> None:
    """A shard that another process is fetching fills the cache: no room until that process is done, or dead."""
    limit = max(shard.bytes for shard in read_index(shards).shards)
    cache = CachedShards(Remote(web.url, QUICK), tmp_path, limit)
    part = tmp_path / f"{'1' * 64}.part"
    part.write_bytes(bytes(limit))
    with open(part.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not cache._make_room(1)
        assert part.exists()
    assert cache._make_room(1)
    assert not part.exists()


def test_a_remote_shard_that_is_too_short_is_no_reason_to_replace(shards: Path, tmp_path: Path) -> None:
    served = Path(shutil.copytree(shards, tmp_path / "served"))
    for path in served.glob("*.tar"):
        os.truncate(path, path.stat().st_size // 2)
    with (
        faulty(served, Faults()) as url,
        pytest.raises(Refused, match=r"shard-00000\d.tar: it has \d+ bytes, but \d+ from byte \d+ on are asked"),
    ):
        epoch(config(url, cache=str(tmp_path / "cache")))


def test_a_killed_filler_leaves_nothing_that_hinders(web: Nginx, shards: Path, tmp_path: Path) -> None:
    slow = fill(f"{web.url}/slow", shards, tmp_path)
    while not list(tmp_path.glob("*.part")):
        assert slow.poll() is None
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    (left,) = tmp_path.glob("*.part")
    assert not list(tmp_path.glob("*.tar"))
    assert fill(web.url, shards, tmp_path).wait(60) == 0
    assert not left.exists()
    assert len(list(tmp_path.glob("*.tar"))) == 3
    # Another shard's leftover counts, and is removed, when room is made.
    largest = max(shard.bytes for shard in read_index(shards).shards)
    (tmp_path / f"{'0' * 64}.part").write_bytes(bytes(largest))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    cache = CachedShards(Remote(web.url, QUICK), tmp_path, 3 * largest)
    for shard in read_index(shards).shards:
        cache.read(shard, 0, 10)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_copy_is_fetched_again(web: Nginx, shards: Path, tmp_path: Path) -> None:
    remote = config(web.url, cache=str(tmp_path), cache_gib=1.0)
    whole = epoch(remote)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    again = epoch(remote)
    assert same(again, whole)
    assert not any(batch.replaced for batch in again)


@pytest.mark.parametrize("what", ["breaks", pytest.param("stalls", marks=pytest.mark.long)])
def test_connections_that_fail_are_tried_again(what: str, shards: Path, tmp_path: Path) -> None:
    faults = Faults()
    with faulty(shards, faults) as url:
        for remote in (config(url, cache=str(tmp_path / "a")), config(url, cache=str(tmp_path / "b"), cache_gib=1.0)):
            setattr(faults, what, 2)
            assert same(epoch(remote), epoch(config(str(shards))))
            assert getattr(faults, what) == 0
            setattr(faults, what, 1000)
            with pytest.raises(StorageError, match=r"http://\S+: \w+.*; tried again for 0.02 minutes$"):
                epoch(replace(remote, "cache", str(tmp_path / "c")))
            setattr(faults, what, 0)


def test_a_rank_knows_that_its_workers_wait(shards: Path, tmp_path: Path) -> None:
    """So that the watchdog can tell it from a hang."""
    faults, before = Faults(), time.monotonic()
    with faulty(shards, faults) as url:
        remote = config(url, cache=str(tmp_path / "a"), workers=1, timeout=30.0)  # not even on a loaded machine
        located = locate(remote)
        for breaks in (0, 2):
            faults.breaks = breaks
            # Closed in each round: a worker of the first one, which reads ahead, would meet the second one's faults.
            with closing(batches(remote, located, 3, BatchLayout(8, 1, 1), 0, 0, ())) as stream:
                assert same([next(stream) for _ in range(5)], epoch(config(str(shards))))
            assert (before < workers.WAITED.value < time.monotonic()) == bool(breaks)


def test_a_server_without_ranges_is_named(shards: Path, tmp_path: Path) -> None:
    faults = Faults(ignores_ranges=True)
    with (
        faulty(shards, faults) as url,
        pytest.raises(InputError, match=r"shard-00000\d.tar: asked for \d+ bytes, got \d+: the server ignores byte"),
    ):
        epoch(config(url, cache=str(tmp_path)))


def test_a_shard_that_was_changed_stops_the_run_or_is_replaced(shards: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(shards, served)
    data = bytearray((served / "shard-000001.tar").read_bytes())
    data[-5000] ^= 1
    (served / "shard-000001.tar").write_bytes(data)
    clean = epoch(config(str(shards)))
    faults = Faults()
    with faulty(served, faults) as url:
        whole = config(url, cache=str(tmp_path / "cache"), cache_gib=1.0)
        with pytest.raises(InputError, match=r"shard-000001.tar: sha256 is .*data.corrupt_shard = 'replace' replaces"):
            epoch(whole)
        before = faults.seen
        found = epoch(replace(whole, "corrupt_shard", "replace"))
        assert faults.seen - before <= 3 + 2, "a damaged shard is fetched twice, not for each of its samples"
        assert sum(len(batch.replaced) for batch in found) == 16, "every sample of the shard"
        assert not same(found, clean)
        assert same(found, epoch(replace(replace(whole, "corrupt_shard", "replace"), "workers", 2)))
        with pytest.raises(InputError, match="max_replaced allows 3"):
            epoch(replace(replace(whole, "corrupt_shard", "replace"), "max_replaced", 3))
    (served / "shard-000001.tar").unlink()
    local = config(str(served), corrupt_shard="replace")
    assert same(epoch(local), found), "the same replacements wherever the shards lie"
    assert locate(local).faults == (f"{served / 'shard-000001.tar'} is missing, but index.json lists it",)


def test_indexing_over_http(web: Nginx, shards: Path, tmp_path: Path) -> None:
    assert cli.main(["index", str(shards), "--out", str(tmp_path / "local"), "--size", "16", "--workers", "1"]) == 0
    braces = f"{web.url}/shard-{{000000..000002}}.tar"
    for pattern in (web.url, braces):
        out = tmp_path / pattern[-4:]
        assert cli.main(["index", pattern, "--out", str(out), "--size", "16", "--workers", "2"]) == 0
        index, local = read_index(out), read_index(tmp_path / "local")
        assert (index.base, index.shards, index.table_sha256) == (web.url, local.shards, local.table_sha256)
        assert not list(out.glob("**/.copy-*"))
    assert same(epoch(config(str(out))), epoch(config(str(tmp_path / "local"))))
    assert cli.main(["verify", str(out), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("place", "words", "code"),
    [
        ("/gone", "not found (status 404)", 2),
        ("/forbidden", "access refused (status 403)", 2),
        ("/broken", "the server answered with status 500; tried again for 0.01 minutes", 74),
    ],
)
def test_what_the_server_answers_is_one_line(
    place: str, words: str, code: int, web: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megapix.cli import main as megapix_cli

    patient = ["--timeout", "2", "--outage-minutes", "0.01"]
    tar = f"{web.url}{place}/0.tar"
    assert cli.main(["index", tar, "--out", str(tmp_path / "index"), "--size", "16", *patient]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line == f"data_prep: error: {tar}: {words}"
    assert not (tmp_path / "index" / "index.json").exists()
    options = [
        "--data.cache",
        str(tmp_path / "cache"),
        "--data.timeout",
        "2",
        "--data.outage-minutes",
        "0.01",
        "--dry-run",
    ]
    train = arguments(Path("placeholder"), tmp_path / "run", "--data.path", web.url + place, *options)
    assert megapix_cli.main(train) == code
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"megapix: error: {web.url}{place}/index.json: {words}"
    assert not (tmp_path / "run").exists()


def test_a_remote_index_needs_a_local_folder(web: Nginx) -> None:
    with pytest.raises(InputError, match=r"is remote: give a local folder for its index, --data.cache"):
        locate(config(web.url))


@pytest.mark.long
def test_s3(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    with s3() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(shards), "bucket/set", recursive=True)
        for cached in (0.0, 1.0):
            remote = config("s3://bucket/set", cache=str(tmp_path / "cache"), cache_gib=cached, timeout=10.0)
            assert same(epoch(remote), epoch(config(str(shards))))
        out = tmp_path / "index"
        # A process of its own: workers of this one's may have been started without the credentials.
        command = ["index", "s3://bucket/set", "--out", str(out), "--size", "16", "--workers", "1"]
        subprocess.run([sys.executable, "-m", "data_prep", *command], check=True, capture_output=True)
        assert read_index(out).base == "s3://bucket/set"
        assert same(epoch(config(str(out), timeout=10.0)), epoch(config(str(shards))))
        with pytest.raises(InputError, match=r"s3://bucket/none/index.json: not found \(status 404\)"):
            locate(config("s3://bucket/none", cache=str(tmp_path / "cache"), timeout=10.0))


def test_training_from_a_url(web: Nginx, shards: Path, tmp_path: Path) -> None:
    """Two ranks over nginx, through the cache, two reading groups: the losses of the run on local files."""
    groups = ["--data.reading-groups", "2", "--optim.end-at", "32"]
    succeed(2, "megapix", arguments(shards, tmp_path / "local", *groups))
    remote = ["--data.path", web.url, "--data.cache", str(tmp_path / "cache"), "--data.cache-gib", "1"]
    succeed(2, "megapix", arguments(shards, tmp_path / "remote", *groups, *remote))
    assert scalars(tmp_path / "remote", "loss/train") == scalars(tmp_path / "local", "loss/train")
    hits = scalars(tmp_path / "remote", "data/cache_hit_share")
    assert len(hits) == 4
    assert 0 < hits[1] <= hits[4] <= 1
    for name in ("data/read_ms", "data/decode_ms"):
        assert all(value > 0 for value in scalars(tmp_path / "local", name).values())


@needs("mount", "umount")
def test_a_full_disk_ends_the_run_in_one_line(web: Nginx, shards: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    size = sum(shard.bytes for shard in read_index(shards).shards)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(small)], check=True)
    try:
        remote = ["--data.path", web.url, "--data.cache", str(small), "--data.cache-gib", "1"]
        (rank,) = start(1, "megapix", arguments(shards, tmp_path / "run", *remote))
        assert rank.code == 74
        assert rank.err.splitlines()[-1] == (
            f"megapix: error: data.cache = {str(small)!r}: No space left on device (the disk is full)"
        )
        assert "Traceback" not in rank.err
    finally:
        subprocess.run(["umount", str(small)], check=True)
