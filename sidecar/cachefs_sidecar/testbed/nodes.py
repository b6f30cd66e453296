"""Nodes of a cluster: each a real `cachefs cluster serve` with a cache, a fetcher and a port of its own.

On this machine they listen on loopback, or each on a host of its own (testbed/network).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.cluster.peers.pki import issue, make_authority, make_secret
from cachefs.config import CacheConfig
from cachefs.digest import KEY_BYTES
from cachefs_sidecar.testbed.fetchers import stop_fetcher
from cachefs_sidecar.testbed.network import Host
from cachefs_sidecar.testbed.tether import start_tethered

# Until a node serves, and until it knows of the others: eight take 20 s to start on two cores with ten times the work.
STARTING_SECONDS = 120.0

# What a read may take.
SECONDS = 30.0
POLL_SECONDS = 0.02

PORT = 7070


class ClusterNode:
    """One node, over one bucket. host: where it runs, None = this one. environ: None = as here."""

    def __init__(
        self,
        number: int,
        folder: Path,
        bucket: str,
        options: Mapping[str, Any],
        port: int,
        *,
        size: int | None = None,
        host: Host | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """options: of s3fs, with which the origin is reached from where the node runs."""
        self.address = host.address if host is not None else "127.0.0.1"
        self.name = f"{self.address}:{port}"
        self.port = port
        self.host = host
        self.home = folder / f"node-{number}"
        self.log = folder / f"node-{number}.log"
        self.config = CacheConfig.make(self.home, size=size, min_free=0, deadline=SECONDS)
        self.options = dict(options)
        self.session = Session("s3", self.options, {}, root=bucket)
        self.process: subprocess.Popen[bytes] | None = None
        self.program = ["-m", "cachefs_sidecar"]  # of the interpreter
        self._bucket = bucket
        self._environ = environ
        self._connection: Connection | None = None

    def serve(self, members: str, trust: list[str]) -> None:
        """Start it; `wait_until_it_serves` before anything is asked of it."""
        self._serving = members, trust
        options = [f"--origin-option={key}={value}" for key, value in flat(self.options)]
        size = [] if self.config.size is None else ["--size", str(self.config.size)]
        with self.log.open("wb") as log:
            self.process = start_tethered(
                [*(self.host.prefix if self.host else ()),
                 sys.executable, *self.program, "cluster", "serve", f"s3://{self._bucket}",
                 "--members", members, "--listen", self.name, "--cache-dir", str(self.home),
                 *trust, *size, "--min-free", "0", *options],
                environ=self._environ,
                output=log,
            )  # fmt: skip

    def wait_until_it_serves(self) -> None:
        """Raises RuntimeError with its complaint. Asked sooner, it would not be the one to start its fetcher."""
        assert self.process is not None
        deadline = time.monotonic() + STARTING_SECONDS
        while f": shares {self.home} at " not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                ended = self.process.poll()
                how = "does not yet serve" if ended is None else f"ended with status {ended}"
                raise RuntimeError(f"{self.name} {how}: {self._said()}")
            time.sleep(POLL_SECONDS)

    def wait_for(self, nodes: int) -> None:
        """Until it believes in so many nodes. Raises RuntimeError."""
        self.wait_until(lambda part: len(part.get("nodes", ())) == nodes)

    def wait_until(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Of what its status says of the cluster. Raises RuntimeError."""
        deadline = time.monotonic() + STARTING_SECONDS
        while not what(self.status()["cluster"] or {}):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} sees {self.status()['cluster']}: {self._said()}")
            time.sleep(POLL_SECONDS)

    def _said(self) -> str:
        """What it and its fetcher complain of."""
        logs = [self.log, self.home / "run" / "fetcher.log"]
        return "\n".join(log.read_text(errors="replace").strip() for log in logs if log.exists())

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self.config, self.session)
        return self._connection

    def status(self) -> dict[str, Any]:
        return self.connection.status().status

    def counters(self) -> Mapping[str, int]:
        counters: Mapping[str, int] = self.status()["counters"]
        return counters

    def kill(self) -> None:
        """As if the machine had died: everything of it, at once."""
        assert self.process is not None
        pid = self.status()["pid"]
        self.process.send_signal(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def begin_again(self) -> None:
        """After `kill`."""
        self.serve(*self._serving)
        self.wait_until_it_serves()

    def held(self) -> set[str]:
        """Names of the blobs that it has: content keys."""
        return {file.name for file in (self.home / "blobs").glob("*/*") if len(file.name) == 2 * KEY_BYTES}

    def leave(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS) == 0

    def end(self) -> None:
        """Have it leave, and do not wait; `close` does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self.end()
        if self.process is not None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        stop_fetcher(self.home)


@contextlib.contextmanager
def together(nodes: Sequence[ClusterNode], trust: list[str], *, weighed: bool = False) -> Iterator[None]:
    """They serve, and know of each other. weighed: by the sizes of their caches, else all count the same."""
    members = "static:" + ",".join(f"{node.name}={node.config.size}" if weighed else node.name for node in nodes)
    try:
        for node in nodes:
            node.serve(members, trust)
        for node in nodes:
            node.wait_until_it_serves()
        for node in nodes:
            node.wait_for(len(nodes))
        yield
    finally:
        for node in nodes:
            node.end()
        for node in nodes:
            node.close()


def secret(folder: Path) -> list[str]:
    """Options of nodes that trust each other by a new secret."""
    make_secret(folder / "secret")
    return ["--secret", str(folder / "secret")]


def certificates(folder: Path) -> list[str]:
    """Options of nodes on loopback that trust each other by a new authority."""
    authority = make_authority(folder / "pki")
    certificate, key = issue(folder / "pki", "127.0.0.1")
    return ["--ca", str(authority), "--certificate", str(certificate), "--key", str(key), "--name", "127.0.0.1"]


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
