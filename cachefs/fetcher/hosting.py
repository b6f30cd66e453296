"""Run a fetcher in this process: take the lock of the cache, open its store, listen, serve, leave no trace."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from cachefs.config import CacheConfig
from cachefs.descriptors import allow_files
from cachefs.errors import CacheUnusable, FetcherElsewhere
from cachefs.fetcher.index import Index
from cachefs.fetcher.room import Room
from cachefs.fetcher.service import Service
from cachefs.fetcher.settings import remember_size, remembered_size
from cachefs.packets import SOCKET_NAME, listen
from cachefs.store import Store

log = logging.getLogger("cachefs.fetcher")

# The log is started afresh above this size: it is for the last hours, not an archive.
LOG_BYTES = 8 * 1024 * 1024


def host(config: CacheConfig, ready: Callable[[], None], *, log_file: Path) -> None:
    """Serve `config` until idle or told to stop. Raises CacheUnusable, FetcherElsewhere."""
    store = Store.open(config)
    run = config.home / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    lock = take_lock(run)
    try:
        _log_to(log_file)
        index = Index(config.home / "index")
        listener = listen(run)
        ready()
        _stand_alone()
        allow_files()
        # What lives now lives on. Requests make no cycles to speak of, so looking for them 30 times less often is
        # 4% of a fetcher's work that is not done.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        import uvloop

        uvloop.run(_run(config, store, index, listener))
    finally:
        (run / SOCKET_NAME).unlink(missing_ok=True)
        os.close(lock)


def take_lock(run: Path) -> int:
    """Hold run/fetcher.lock with our pid in it. Raises FetcherElsewhere when another fetcher does."""
    try:
        lock = os.open(run / "fetcher.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheUnusable(f"{run}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FetcherElsewhere(f"{run.parent}: another fetcher serves this cache") from None
    os.truncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _log_to(file: Path) -> None:
    if file.exists() and file.stat().st_size > LOG_BYTES:
        os.replace(file, file.with_suffix(".log.1"))
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logging.basicConfig(level=os.environ.get("CACHEFS_LOG", "INFO").upper(), handlers=[handler], force=True)


def _stand_alone() -> None:
    """Let go of what the starter gave us: its directory and its standard streams."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


async def _run(config: CacheConfig, store: Store, index: Index, listener: socket.socket) -> None:
    room = Room(config, store, index)
    if config.size is None:
        room.capacity.limit = remembered_size(config.home)
    else:
        remember_size(config.home, config.size)
    service = Service(room)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, service.over.set)
    log.info("serving %s", config.home)
    with listener:
        await service.run(listener)
    log.info("ended")
