"""The process of `cachefs cluster serve`: gives other nodes what this cache has, and keeps the fetcher in the cluster.

Apart from the commands, so that `cachefs --help` loads nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from cachefs.cli.mounted import mounts
from cachefs.cli.output import say
from cachefs.cli.target import Target
from cachefs.client.joined import joined
from cachefs.client.session import Session
from cachefs.cluster.peers.server.asking import Asking
from cachefs.cluster.peers.server.blobs import Blobs
from cachefs.cluster.peers.server.catalogs import Catalogs
from cachefs.cluster.peers.server.serving import Server
from cachefs.cluster.peers.server.telling import Telling
from cachefs.cluster.peers.trust import open_trust
from cachefs.config import CacheConfig
from cachefs.digest import dataset_id
from cachefs.errors import CacheFSError, ConfigError, MountError
from cachefs.messages import Join


def run(config: CacheConfig, targets: list[Target], request: Join, host: str) -> None:
    """Until SIGTERM or Ctrl-C. host: to listen at. Raises ConfigError, FetcherError, CacheUnusable."""
    import uvloop

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    uvloop.run(_serve(config, targets, request, host))


async def _serve(config: CacheConfig, targets: list[Target], request: Join, host: str) -> None:
    trust = open_trust(request.name, request.secret, request.ca, request.certificate, request.key, request.sign)
    trust.capacity = request.weight
    blobs = Blobs(config.dirs)
    asking = Asking(config, [_session(target) for target in targets], blobs)
    shared = frozenset(dataset_id(target.spec.identity, target.path) for target in targets)
    catalogs = Catalogs(config, shared, asking, partial(_go_along, str(config.home)))
    server = Server(blobs, trust, asking=asking, catalogs=catalogs)
    telling = Telling(config, request.name, server)
    server.account = telling.account
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    try:
        try:
            server.listen(host, request.port)
        except OSError as error:
            raise ConfigError(f"{host}:{request.port}: cannot be listened on ({error.strerror})") from error
        async with joined(config, request), telling.running():
            say(f"{request.name}: shares {config.home} at {host}:{request.port}")
            sys.stdout.flush()
            catalogs.follow()
            await over.wait()
    finally:
        await server.close()


def _session(target: Target) -> Session:
    """How the server asks the fetcher for what other nodes miss: from the origin, never from a third node."""
    return replace(target.session(target.path), direct=True)


async def _go_along(home: str, dataset: str, catalog: Path) -> None:
    """Have the mounts of a dataset of this cache serve its catalog. Raises MountError."""
    failed = await asyncio.to_thread(_refresh_mounts, home, dataset, catalog)
    if failed:
        raise MountError("; ".join(failed))


def _refresh_mounts(home: str, dataset: str, catalog: Path) -> list[str]:
    failed = []
    for mount in mounts().all():
        if mount.dataset == dataset and mount.dirs[0] == home and mount.catalog != str(catalog):
            try:
                mounts().refresh(mount, catalog)
            except CacheFSError as error:
                failed.append(f"{mount.mountpoint}: {error.message}")
    return failed
