"""The process: `python -m cachefs.cluster.peers.server`, its settings on stdin.

On stdin and not as arguments, because `ps` shows those to everybody: one line of JSON. It says "listening PORT" on
stdout and serves until SIGTERM, SIGINT or the end of stdin: a server that outlived whoever started it would answer for
a cache that nobody keeps.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from cachefs.client.session import Session
from cachefs.cluster.peers.server.asking import Asking
from cachefs.cluster.peers.server.blobs import Blobs
from cachefs.cluster.peers.server.catalogs import Catalogs
from cachefs.cluster.peers.server.limits import Limits
from cachefs.cluster.peers.server.serving import Server
from cachefs.cluster.peers.server.telling import Telling
from cachefs.cluster.peers.trust import SecretTrust, TlsTrust, Trust
from cachefs.config import CacheConfig
from cachefs.digest import dataset_id
from cachefs.errors import CacheFSError, ConfigError
from cachefs.origin import OriginSpec

log = logging.getLogger("cachefs.peers")


class Dataset(msgspec.Struct, frozen=True):
    """What peers may have fetched: the origin, as a reader attaches to it, and the root of the dataset."""

    protocol: str
    root: str = ""
    options: dict[str, Any] = {}
    environ: dict[str, str] = {}
    redacted: bool = True


class Settings(msgspec.Struct, frozen=True):
    """name: of this node. Either secret (a file), or ca, certificate and key."""

    dirs: list[str]
    name: str
    host: str = "127.0.0.1"
    port: int = 0
    secret: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    datasets: list[Dataset] = []
    limits: Limits = Limits()

    def trust(self) -> Trust:
        if self.secret:
            return SecretTrust.load(self.name, self.secret)
        if self.ca and self.certificate and self.key:
            return TlsTrust(self.name, self.ca, self.certificate, self.key)
        raise ConfigError("peers are served with certificates (ca, certificate, key) or a secret, never without")


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
        uvloop.run(_serve(settings))
    except (CacheFSError, msgspec.MsgspecError, OSError) as error:
        log.error("cannot serve peers: %s", error)
        return 1
    return 0


async def _serve(settings: Settings) -> None:
    dirs = tuple(Path(d) for d in settings.dirs)
    blobs = Blobs(dirs)
    sessions = [Session(d.protocol, d.options, d.environ, redacted=d.redacted, root=d.root) for d in settings.datasets]
    asking = Asking(CacheConfig.make(dirs), sessions, blobs) if sessions else None
    catalogs = None
    if asking is not None:
        shared = frozenset(
            dataset_id(OriginSpec(d.protocol, d.options, d.environ).identity, d.root) for d in settings.datasets
        )
        catalogs = Catalogs(CacheConfig.make(dirs), shared, asking)
    server = Server(blobs, settings.trust(), asking=asking, catalogs=catalogs, limits=settings.limits)
    telling = Telling(CacheConfig.make(dirs), settings.name, server)
    server.account = telling.account
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    loop.add_reader(sys.stdin.fileno(), over.set)
    try:
        port = server.listen(settings.host, settings.port)
        sys.stdout.write(f"listening {port}\n")
        sys.stdout.flush()
        async with telling.running():
            await over.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
        await server.close()


if __name__ == "__main__":
    sys.exit(main())
