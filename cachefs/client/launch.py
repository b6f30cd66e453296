"""Find the fetcher of a cache, or start one.

As sccache and gpg-agent do: whoever needs it first starts it, detached, and it exits when idle. The lock file
`run/start.lock` lets one starter in at a time; the fetcher itself holds `run/fetcher.lock` while it lives, so
two starters with different ideas can still not run two fetchers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cachefs.config import CacheConfig, default_cache_dir
from cachefs.errors import CacheUnusable, FetcherElsewhere, FetcherError, FetcherTimeout, from_wire
from cachefs.packets import dial

# A fetcher takes about 0.3 s to start on an idle core; a loaded node at boot may need many times that.
START_SECONDS = 30.0

# How soon a fetcher that somebody else started, and that does not listen yet, is looked for again.
ELSEWHERE_SECONDS = 0.05


def connect(config: CacheConfig, deadline: float, *, local: bool = False) -> socket.socket:
    """A connected socket to the fetcher of `config`, started if need be. deadline: on time.monotonic().

    local: a fetcher of another process will not do. Raises CacheUnusable or ConfigError when the cache cannot be
    used, FetcherError, FetcherTimeout.
    """
    if config.fetcher == "inprocess":
        from cachefs.fetcher.embedded import connect_embedded

        return connect_embedded(config, deadline, local=local)
    run = config.home / "run"
    while True:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError):
            return dial(run, max(0.01, deadline - time.monotonic()))
        if time.monotonic() > deadline:
            raise FetcherTimeout(
                f"{config.home}: its fetcher did not accept a connection in time; see {run}/fetcher.log"
            )
        if config.fetcher == "require":
            raise FetcherError(f"{config.home}: no fetcher runs there and this reader may not start one")
        with _starting(run, deadline):
            try:
                return dial(run, max(0.01, deadline - time.monotonic()))
            except (FileNotFoundError, ConnectionRefusedError):
                # One whose starter was killed may be about to listen, and one that ends listens no more before it
                # gives its lock back.
                with contextlib.suppress(FetcherElsewhere):
                    _start(config, min(deadline, time.monotonic() + START_SECONDS))
                    continue
        time.sleep(ELSEWHERE_SECONDS)


@contextlib.contextmanager
def _starting(run: Path, deadline: float) -> Iterator[None]:
    """Hold run/start.lock. The wait has a deadline, because the holder may be stopped in a debugger."""
    home = run.parent
    if not home.parent.exists() and home != default_cache_dir():
        # Made without being asked only where it is the default; anywhere else it is a mistyped path, or a disk
        # that is not mounted, and the cache would fill the wrong one.
        raise CacheUnusable(f"{home}: its parent directory does not exist; make it, or choose another cache directory")
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(run / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheUnusable(
            f"{run}: cannot be created or written ({error.strerror}); choose another cache directory "
            "(--cache-dir, cache_dir=, CACHEFS_DIR) or make it writable"
        ) from error
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetcherTimeout(f"{run}/start.lock: held by another starter for too long") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def _start(config: CacheConfig, deadline: float) -> None:
    """Start a detached fetcher and wait until it listens. It is no child of ours afterwards: no zombie."""
    settings = {
        "dirs": [str(d) for d in config.dirs],
        "size": config.size,
        "min_free": str(config.min_free),
        "idle": config.idle,
    }
    ready, announce = os.pipe()
    package_root = str(Path(__file__).resolve().parents[2])
    environ = dict(os.environ)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environ.get("PYTHONPATH")]))
    try:
        # -P: the current directory is not a place to import from. Settings go through stdin, not through argv.
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", "cachefs.fetcher", "--announce", str(announce)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(announce,),
            env=environ,
            start_new_session=True,
        )
    except OSError as error:
        os.close(ready)
        raise FetcherError(f"cannot start a fetcher with {sys.executable}: {error.strerror}") from error
    finally:
        os.close(announce)
    try:
        answer = _wait(starter, json.dumps(settings).encode(), ready, deadline)
    finally:
        os.close(ready)
    if answer.startswith(b"{"):
        wire = json.loads(answer)["error"]
        raise from_wire((wire[0], wire[1], wire[2]))


def _wait(starter: subprocess.Popen[bytes], settings: bytes, ready: int, deadline: float) -> bytes:
    """What the fetcher announced: b"ready" or a JSON error. The starter forks and exits, so it is reaped here."""
    assert starter.stdin is not None
    assert starter.stderr is not None
    with starter.stderr:
        with contextlib.suppress(BrokenPipeError):  # it ended at once: its complaint is read below
            starter.stdin.write(settings)
            starter.stdin.close()
        readable, _, _ = select.select([ready], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            starter.kill()
            starter.wait()
            raise FetcherTimeout("the fetcher did not start in time; is the machine overloaded?")
        answer = os.read(ready, 65536)
        if answer:
            starter.wait()
            return answer
        complaint = starter.stderr.read().decode(errors="replace").strip().splitlines()
    starter.wait()
    if complaint:
        raise FetcherError(f"the fetcher ended while it started: {complaint[-1]}")
    return b""  # killed, without a word of its own: whoever needs it tries again, up to the deadline
