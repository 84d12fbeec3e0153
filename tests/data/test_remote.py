"""Remote shards, against a real HTTP server that misbehaves on request, and against memory://."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config import UserError
from llmtrain.data import remote, remote_cache
from llmtrain.data.readers import urls
from llmtrain.data.readers.urls import retrying
from llmtrain.data.remote import RemoteShards, open_remote
from llmtrain.data.shards import Header, ShardedSource, ShardWriter, shard_path, write_index
from llmtrain.tokenizer.raw_bytes import BytesTokenizer
from tests.ranks import RECORD, Job, RankServer

SHARDS = 6
ROOM = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote_cache, "GRACE", 0.3)
    monkeypatch.setattr(remote, "POLL", 0.02)


HEADER = Header("t" * 64, 1000, "eos")


def _prepare(
    directory: Path,
    documents: int = 40,
    length: int = 500,
    seed: int = 0,
    shards: int = SHARDS,
    header: Header = HEADER,
) -> Path:
    """Shards of about 45 kB; the last but one is empty."""
    random = np.random.default_rng(seed)
    for number in range(shards):
        writer = ShardWriter(shard_path(directory, number), header)
        writer.begin(f"file-{number}.txt", "row")
        for row in range(0 if number == shards - 2 else documents):
            writer.add(random.integers(0, header.vocab_size, length, np.int32), length, row)
        writer.finish()
    write_index(directory, header, shards)
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prepare(tmp_path_factory.mktemp("prepared") / "train")


Fault = Callable[[str, int], str | None]
"""(path, how often it was asked for, from 1) -> what goes wrong"""


class Server:
    """Serves a directory over HTTP; `fault` says what goes wrong, `hits` counts."""

    def __init__(self, root: Path) -> None:
        self.root, self.hits = root, Counter[str]()
        self.fault: Fault = lambda path, time: None
        self.go_on = threading.Event()
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.hits[self.path] += 1
                fault = server.fault(self.path, server.hits[self.path])
                file = server.root / self.path.lstrip("/")
                if not file.is_file() or (fault or "").isdigit():
                    return self.send_error(int(fault or 404))
                data = bytearray(file.read_bytes())
                if fault == "flip" and data:
                    data[len(data) // 2] ^= 1
                if fault == "endless":
                    data = bytearray(200 * 2**20)
                if fault == "long":
                    data += bytes(3 * len(data))
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "endless":
                    with contextlib.suppress(OSError):
                        for _ in range(200):
                            self.wfile.write(bytes(2**20))
                            server.sent += 2**20
                    return None
                if fault in ("short", "stall"):
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        server.go_on.wait(300)
                    return None
                self.wfile.write(data)
                return None

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(prepared: Path) -> Iterator[Server]:
    server = Server(prepared)
    yield server
    server.close()


def _same(shards: RemoteShards, prepared: Path, order: list[int] | None = None) -> None:
    """Every token, offset and origin is that of the directory on the other side."""
    there, here = ShardedSource(shards), ShardedSource.open(prepared)
    assert there.manifest_hash == here.manifest_hash and there.fingerprint == here.fingerprint
    for shard in range(here.shards) if order is None else order:
        stop = int(here.lengths(np.array([shard]))[0])
        np.testing.assert_array_equal(there.read(shard, 0, stop), here.read(shard, 0, stop))
        np.testing.assert_array_equal(there.offsets(shard), here.offsets(shard))
        np.testing.assert_array_equal(there.text_bytes(shard), here.text_bytes(shard))
        if stop:
            assert there.origin(shard, 3) == here.origin(shard, 3)


def _bytes(directory: Path) -> int:
    """Bytes of all files below, those in removal included; files may vanish meanwhile."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def _files(prepared: Path, shard: int) -> int:
    return _bytes(shard_path(prepared, shard))


def test_http_gives_what_a_local_directory_gives(server: Server, prepared: Path, tmp_path: Path) -> None:
    shards = open_remote(server.url + "/", tmp_path, ROOM, "web")
    assert (shards.count, shards.complete) == (SHARDS, True)
    assert set(server.hits) == {"/index.json", "/index.npy"}  # nothing of a shard before it is needed
    _same(shards, prepared)
    hits = Counter(server.hits)
    assert set(hits.values()) == {1}
    _same(open_remote(server.url, tmp_path, ROOM, "web"), prepared)  # the cache outlives the process
    assert server.hits - hits == {"/index.json": 1}


def test_memory_and_file_urls(prepared: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(prepared), "/bucket/train", recursive=True)
    _same(open_remote("memory://bucket/train", tmp_path / "a", ROOM, "web"), prepared)
    _same(open_remote(f"file://{prepared}", tmp_path / "b", ROOM, "web"), prepared)


def test_wanted_shards_are_fetched_ahead_in_their_order(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "THREADS", 1)
    shards = open_remote(server.url, tmp_path, ROOM, "web")
    shards.want([3, 0, 5])
    _eventually(lambda: all(shard_path(shards.directory, number).is_dir() for number in (3, 0, 5)))
    asked = [path for path in server.hits if path.endswith("manifest.json")]  # in the order of first requests
    assert asked == [f"/shard-0000{number}/manifest.json" for number in (3, 0, 5)]
    hits = Counter(server.hits)
    shards.path(0)
    assert server.hits == hits and not shard_path(shards.directory, 1).exists()


def test_the_newest_want_goes_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "THREADS", 1)
    shards = open_remote(server.url, tmp_path, ROOM, "web")
    started = threading.Event()

    def hold(path: str, _: int) -> str | None:
        if path == "/shard-00000/manifest.json":
            started.set()
            server.go_on.wait(300)
        return None

    server.fault = hold
    shards.want([0, 1, 2])
    assert started.wait(60)
    shards.want([5, 3])
    server.go_on.set()
    _eventually(lambda: shard_path(shards.directory, 3).is_dir())
    time.sleep(0.1)
    assert {path.name for path in shards.directory.glob("shard-*")} == {f"shard-0000{n}" for n in (0, 5, 3)}


def _eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["503", "429", "short", "flip", "long", "stall"])
def test_faults_that_pass_are_survived(
    server: Server,
    prepared: Path,
    tmp_path: Path,
    fault: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every file, the index too, arrives badly at first: nothing of it is seen."""
    if fault == "stall":  # a healthy server may be slow, too
        monkeypatch.setattr(urls, "SILENCE", 1.0)
    stalled = {"/shard-00001/tokens.bin"}  # a stall costs a second: one is enough
    server.fault = lambda path, time: fault if time == 1 and (fault != "stall" or path in stalled) else None
    _same(open_remote(server.url, tmp_path, ROOM, "web"), prepared)
    again = {path: hits for path, hits in server.hits.items() if path.startswith("/shard-")}
    assert set(again.values()) <= {2, 1} and again["/shard-00001/tokens.bin"] == 2
    assert f"{server.url}/shard-00001/tokens.bin" in caplog.text
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    "file", ["index.json", "index.npy", "shard-00002/manifest.json", "shard-00002/offsets.npy"]
)
def test_a_file_that_stays_wrong_is_named(server: Server, tmp_path: Path, file: str) -> None:
    server.fault = lambda path, _: "flip" if path == f"/{file}" else None
    with pytest.raises(UserError, match=rf"{server.url}/.*3 attempts") as caught:
        open_remote(server.url, tmp_path, ROOM, "web").path(2)
    assert file in str(caught.value) or file == "index.npy"
    assert server.hits[f"/{file}"] == remote.HASH_TRIES
    assert not list(tmp_path.rglob("shard-00002")) and not list(tmp_path.rglob(".tmp-*"))


def test_a_file_that_does_not_end_is_not_fetched_to_its_end(server: Server, tmp_path: Path) -> None:
    server.fault = lambda path, _: "endless" if path.endswith("0/tokens.bin") else None
    with pytest.raises(UserError, match=r"shard-00000/tokens.bin: has more than 40000 bytes"):
        open_remote(server.url, tmp_path, ROOM, "web").path(0)
    assert 0 < server.sent < 3 * 100 * 2**20


def test_a_shard_of_another_preparation_is_refused(server: Server, prepared: Path, tmp_path: Path) -> None:
    """Half of an upload: the index is new, a shard is old, and each is sound in itself."""
    other = _prepare(tmp_path / "other", seed=1)
    mixed = Server(tmp_path / "mixed")
    (tmp_path / "mixed").mkdir()
    for name in ("index.json", "index.npy", "shard-00000"):
        (tmp_path / "mixed" / name).symlink_to(prepared / name)
    (tmp_path / "mixed/shard-00001").symlink_to(other / "shard-00001")
    shards = open_remote(mixed.url, tmp_path / "cache", ROOM, "web")
    shards.path(0)
    with pytest.raises(UserError, match=r"shard-00001/manifest.json: does not belong to index.json"):
        shards.path(1)
    mixed.close()


def test_what_does_not_exist_ends_at_once(server: Server, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{server.url}/nowhere/index.json does not exist"):
        open_remote(f"{server.url}/nowhere", tmp_path, ROOM, "web")
    server.fault = lambda path, _: "404" if path == "/shard-00001/offsets.npy" else None
    shards = open_remote(server.url, tmp_path, ROOM, "web")
    with pytest.raises(UserError, match=r"shard-00001/offsets.npy does not exist"):
        shards.path(1)
    assert server.hits["/shard-00001/offsets.npy"] == server.hits["/nowhere/index.json"] == 1
    server.fault = lambda path, _: "403"
    with pytest.raises(UserError, match="cannot be read"):
        shards.path(2)
    assert server.hits["/shard-00002/manifest.json"] == 1


def test_a_server_that_stays_away_ends_the_attempts(server: Server, tmp_path: Path) -> None:
    server.fault = lambda path, _: "503"
    with pytest.raises(UserError, match=rf"index.json cannot be read: .*{urls.TRIES} attempts failed.*503"):
        open_remote(server.url, tmp_path, ROOM, "web")
    assert server.hits["/index.json"] == urls.TRIES


def test_a_failure_ahead_is_tried_again_when_the_shard_is_needed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "TRIES", 2)
    shards = open_remote(server.url, tmp_path, ROOM, "web")
    server.fault = lambda path, _: "503"
    shards.want([1])
    _eventually(lambda: 1 in shards._failed)
    server.fault = lambda path, _: None
    assert shards.path(1).is_dir()


def test_retrying_doubles_its_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(urls, "FIRST_DELAY", 0.5)
    monkeypatch.setattr(time, "sleep", slept.append)
    failures = iter([OSError("a"), TimeoutError(), ConnectionResetError()])

    def action() -> str:
        for error in failures:
            raise error
        return "done"

    assert retrying(action, "s3://x") == "done" and slept == [0.5, 1, 2]
    slept.clear()
    with pytest.raises(OSError, match="8 attempts failed; the last: OSError: no"):
        retrying(lambda: exec("raise OSError('no')"), "s3://x")
    assert slept == [0.5, 1, 2, 4, 8, 16, 30]
    slept.clear()
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not tried again
        retrying(lambda: 1 // 0, "s3://x")
    assert not slept


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/x: this kind of URL needs another package: .*s3fs"):
        open_remote("s3://bucket/x", tmp_path, ROOM, "web")
    with pytest.raises(UserError, match="nonsense"):
        open_remote("nonsense://x", tmp_path, ROOM, "web")


def test_a_wait_says_what_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(urls, "SILENCE", 1.0)
    monkeypatch.setattr(remote, "SPEAK_AFTER", 0.1)
    monkeypatch.setattr(remote, "SPEAK_EVERY", 0.2)
    caplog.set_level(logging.INFO)
    server.fault = lambda path, time: "stall" if path.endswith("0/tokens.bin") and time == 1 else None
    open_remote(server.url, tmp_path, ROOM, "my-source").path(0)
    said = [text for text in caplog.messages if text.startswith("waiting for my-source: fetching")]
    assert 2 <= len(said) <= 7
    assert f"{server.url}/shard-00000 (0.0 MB of " in said[0]


def test_the_cache_keeps_within_its_limit_at_all_times(
    server: Server, prepared: Path, tmp_path: Path
) -> None:
    index = _bytes(prepared / "index.json") + sum(
        (prepared / n).stat().st_size for n in ("index.json", "index.npy")
    )
    limit = index + int(2.5 * _files(prepared, 0))
    shards = open_remote(server.url, tmp_path, limit, "web")
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, _bytes(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        order = [*range(SHARDS), *reversed(range(SHARDS))]
        shards.want(order[:4])  # more than there is room for
        source = ShardedSource(shards)
        held = source.read(0, 0, 100)
        before = held.copy()
        _same(shards, prepared, order)
        np.testing.assert_array_equal(held, before)  # its shard was removed meanwhile: the map is not
    finally:
        over.set()
        watcher.join()
    assert 2 * _files(prepared, 0) < most <= limit
    assert _bytes(tmp_path) <= limit


def test_the_least_recently_used_goes_and_what_is_wanted_stays(
    server: Server, prepared: Path, tmp_path: Path
) -> None:
    shards = open_remote(server.url, tmp_path, 10_000 + 3 * _files(prepared, 0), "web")
    for number in (0, 1, 2, 0):
        shards.path(number)
        time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    shards.want([1])
    time.sleep(remote_cache.GRACE + 0.1)
    shards.path(3)
    assert {path.name for path in shards.directory.glob("shard-*")} == {
        "shard-00000",
        "shard-00001",
        "shard-00003",
    }
    time.sleep(remote_cache.GRACE + 0.1)
    shards.path(5)  # 0 was used before 3
    assert {path.name for path in shards.directory.glob("shard-*")} == {
        "shard-00001",
        "shard-00003",
        "shard-00005",
    }


def test_two_sources_share_the_limit(server: Server, prepared: Path, tmp_path: Path) -> None:
    limit = 20_000 + int(2.2 * _files(prepared, 0))
    one = open_remote(server.url, tmp_path, limit, "one")
    two = open_remote(f"file://{prepared}", tmp_path, limit, "two")
    one.path(0), one.path(1), two.path(2), two.path(3)
    assert _bytes(tmp_path) <= limit and len(list(tmp_path.rglob("shard-0000?"))) == 2


def test_a_limit_below_one_shard_is_refused(server: Server, prepared: Path, tmp_path: Path) -> None:
    size = _files(prepared, 0)
    shards = open_remote(server.url, tmp_path, size - 1, "web")
    with pytest.raises(UserError, match=rf"data.remote_cache_gb=.*shard-00000.*\({size} bytes\)"):
        shards.path(0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(
    code: int, server: Server, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads of a process still keep out of each other's way."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    limit = 20_000 + 2 * _files(prepared, 0)
    shards = open_remote(server.url, tmp_path, limit, "web")
    shards.want(range(SHARDS))
    _same(shards, prepared)
    assert _bytes(tmp_path) <= limit
    lock = tmp_path / ".lock"
    with remote_cache.locked(lock) as held, remote_cache.locked(lock, wait=False) as again:
        assert (held, again) == (True, False)
    with remote_cache.locked(lock, wait=False) as free:
        assert free


def test_an_error_that_is_about_no_locks_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="broken"), remote_cache.locked(tmp_path / ".lock"):
        pass


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from llmtrain.data import remote, remote_cache
from llmtrain.data.readers import urls
from llmtrain.data.shards import ShardedSource
urls.FIRST_DELAY, remote_cache.GRACE = 0.01, 1.0
url, cache, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
shards = remote.open_remote(url, cache, limit, "web")
source = ShardedSource(shards)
shards.want(range(source.shards))
for shard, length in enumerate(source.lengths(np.arange(source.shards))):
    print(shard, int(source.read(shard, 0, int(length)).astype(np.int64).sum()), flush=True)
"""


def _process(server: Server, cache: Path, limit: int = ROOM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, server.url, str(cache), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": "0"})


def _sums(prepared: Path) -> str:
    source = ShardedSource.open(prepared)
    lengths = source.lengths(np.arange(SHARDS)).tolist()
    return "".join(
        f"{n} {int(source.read(n, 0, length).astype(np.int64).sum())}\n" for n, length in enumerate(lengths)
    )


def test_two_processes_fetch_each_shard_once(server: Server, prepared: Path, tmp_path: Path) -> None:
    processes = [_process(server, tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in processes] == [_sums(prepared)] * 2
    assert {n for path, n in server.hits.items() if path.startswith("/shard-")} == {1}
    assert len(server.hits) == 2 + 5 * SHARDS


def test_two_processes_in_a_small_cache_come_to_their_end(
    server: Server, prepared: Path, tmp_path: Path
) -> None:
    limit = 10_000 + int(1.5 * _files(prepared, 0))
    processes = [_process(server, tmp_path, limit) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in processes] == [_sums(prepared)] * 2
    assert _bytes(tmp_path) <= limit


def test_a_process_killed_while_it_fetches_leaves_nothing(
    server: Server, prepared: Path, tmp_path: Path
) -> None:
    server.fault = lambda path, time: "stall" if path == "/shard-00002/tokens.bin" and time == 1 else None
    process = _process(server, tmp_path)
    _eventually(
        lambda: (
            server.hits["/shard-00002/tokens.bin"] == 1
            and bool(list(tmp_path.glob("remote/*/.tmp-shard-00002*")))
        )
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.rglob(".tmp-shard-00002*")) and not list(tmp_path.rglob("shard-00002"))
    # The bytes that the dead process reserved are free again: there is room for no more than two shards.
    shards = open_remote(server.url, tmp_path, 10_000 + int(2.2 * _files(prepared, 0)), "web")
    _same(shards, prepared)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_process_ends_while_shards_are_fetched_ahead(server: Server, tmp_path: Path) -> None:
    server.fault = lambda path, _: "stall" if path.endswith("tokens.bin") else None
    script = SCRIPT.partition("for shard")[0] + "import time; time.sleep(0.5); print('end')"
    command = [sys.executable, "-c", script, server.url, str(tmp_path), str(ROOM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n")


def test_a_damaged_index_in_the_cache_is_fetched_again(
    server: Server, prepared: Path, tmp_path: Path
) -> None:
    table = open_remote(server.url, tmp_path, ROOM, "web").directory / "index.npy"
    table.write_bytes(table.read_bytes()[:-1])
    _same(open_remote(server.url, tmp_path, ROOM, "web"), prepared)


def test_a_manifest_comes_without_its_shard(server: Server, prepared: Path, tmp_path: Path) -> None:
    shards = open_remote(server.url, tmp_path, ROOM, "web")
    there, here = ShardedSource(shards), ShardedSource.open(prepared)
    shards.path(3)
    hits = Counter(server.hits)
    assert [there.inputs(shard) for shard in range(SHARDS)] == [here.inputs(shard) for shard in range(SHARDS)]
    assert server.hits - hits == {f"/shard-0000{n}/manifest.json": 1 for n in range(SHARDS) if n != 3}


def test_shards_that_were_removed_keep_their_disk_only_while_they_are_wanted(
    server: Server, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "THREADS", 0)  # nothing is fetched ahead, and nothing removed for it

    def removed() -> set[str]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        gone = [line.split()[-2] for line in maps if str(tmp_path) in line and line.endswith("(deleted)")]
        return {Path(name).parent.name[-1] for name in gone}

    limit = 10_000 + 2 * _files(prepared, 0)
    source = ShardedSource(open_remote(server.url, tmp_path, limit, "web"))
    for shard in (0, 1, 2, 3):
        source.read(shard, 0, 10), source.offsets(shard)
        time.sleep(remote_cache.GRACE + 0.1)
    assert removed() == {"0", "1"}
    source.want([1, 5])
    assert removed() == {"1"}
    open_remote(server.url, tmp_path, limit, "web").path(1)  # as another rank does: 2 goes for it
    assert removed() == {"1", "2"}
    source.want([5])
    assert removed() == set()


# Training


def _age(cache: Path, over: threading.Event) -> None:
    """Let a shard's time of grace be over after a second, in processes that take it for ten."""
    while not over.wait(0.1):
        for shard in cache.glob("remote/*/shard-*"):
            with contextlib.suppress(FileNotFoundError):
                used = shard.stat().st_mtime
                if 1 < time.time() - used < 10:
                    os.utime(shard, (used - 10, used - 10))


def test_training_survives_a_server_that_stumbles(ranks: RankServer, tiny: list[str], tmp_path: Path) -> None:
    """503, a cut, a flipped bit and a stall, with room for few shards: the batches of local shards."""
    tokenizer, cache, over = BytesTokenizer(), tmp_path / "cache", threading.Event()
    header = Header(tokenizer.fingerprint, tokenizer.vocab_size, "bos_eos")
    prepared = _prepare(tmp_path / "prepared/train", documents=8, length=64, shards=16, header=header)
    server = Server(tmp_path / "prepared")
    faults = {0: "503", 1: "short", 2: "flip", 5: "stall"}

    def fault(path: str, time: int) -> str | None:
        asked = [other for other in server.hits if other.endswith("tokens.bin")]
        return faults.get(asked.index(path)) if path in asked and time == 1 else None

    server.fault = fault
    limit = _files(prepared, 0) * 9 // 2 + sum(file.stat().st_size for file in prepared.glob("index.*")) + 500
    common = [word for word in tiny if "data.sources." not in word or word.startswith("~")]
    common += ["+data.sources.web.weight=1", "+data.sources.web.format=shards", "data.shuffle_span=16"]
    common += [f"cache_dir={cache}", f"data.remote_cache_gb={limit / 1e9}"]

    def start(name: str, where: Path | str) -> tuple[Job, Path]:
        here = tmp_path / name
        here.mkdir()
        options = [f"+data.sources.web.path={where}", f"output_dir={here}/run"]
        return ranks.start([*common, *options], 1, here, {RECORD: str(here)}), here / "rank0.npy"

    threading.Thread(target=_age, args=[cache, over], daemon=True).start()
    local, expected = start("local", prepared)
    remotely, found = start("remote", f"{server.url}/train")
    try:
        while "waiting for web: fetching" not in remotely.output():
            assert ranks.poll(remotely.pids) == [None], remotely.output()
            time.sleep(0.1)
        server.go_on.set()
        assert (local.wait(), remotely.wait()) == ([0], [0]), remotely.output()
    finally:
        local.kill(), remotely.kill()
        over.set()
        server.close()
    assert found.read_bytes() == expected.read_bytes()
    for said in ("503", "attempt 2 of 8", "has a wrong digest; fetching it again"):
        assert said in remotely.output()
    fetched = {path for path in server.hits if path.endswith("tokens.bin")}
    assert len(list(cache.glob("remote/*/shard-*"))) < 8 < len(fetched)
    assert _bytes(cache / "remote") <= limit
