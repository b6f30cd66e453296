"""Nodes that somebody wrote down: in the URL, or in a file that is read again when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path

from cachefs.cluster.addresses import host_port
from cachefs.cluster.nodes import DEFAULT_WEIGHT, Node
from cachefs.cluster.settling import View
from cachefs.config import parse_size
from cachefs.errors import ConfigError, MembershipError

# The file is looked at so often, in seconds: what a person changes may take a moment.
LOOK = 2.0
DEADLINE = 10.0  # for a look: the file may lie on storage that hangs
LARGEST = 1024 * 1024


def parse(entries: Iterable[str]) -> View:
    """Of "host:port" or "host:port=size". Raises ConfigError."""
    nodes: dict[str, Node] = {}
    sized = set()
    for entry in entries:
        address, equals, size = (part.strip() for part in entry.partition("="))
        host, port = host_port(address)
        weight = parse_size(size) if equals else DEFAULT_WEIGHT
        sized.add(bool(equals))
        node = Node(f"{host}:{port}", host, port, weight)
        if nodes.setdefault(node.name, node) != node:
            raise ConfigError(f"cluster node {address}: is named twice, with two sizes")
    if len(sized) > 1:
        # One without a size would count as one byte, and own nothing.
        raise ConfigError("cluster nodes: give a size to every node, or to none")
    return frozenset(nodes.values())


class Static:
    def __init__(self, rest: str, me: Node) -> None:
        """rest: "a:7070,b:7070", or the path of a file. Raises ConfigError for a list that cannot be understood."""
        self._file = Path(rest) if rest.startswith(("/", "./", "../")) else None
        self._nodes = parse(entry for entry in rest.split(",") if entry.strip()) if self._file is None else frozenset()
        if self._file is None and not self._nodes:
            raise ConfigError("cluster static: names no node; write static:a:7070,b:7070 or static:/path/of/a/file")

    async def watch(self) -> AsyncGenerator[View, None]:
        if self._file is None:
            yield self._nodes
            await asyncio.Event().wait()
            return
        before: tuple[int, ...] = ()
        while True:
            try:
                async with asyncio.timeout(DEADLINE):
                    stamp = await asyncio.to_thread(_stamp, self._file)
                    if stamp != before:
                        nodes = await asyncio.to_thread(_read, self._file)
            except TimeoutError as error:
                raise MembershipError(f"{self._file}: could not be read within {DEADLINE:.0f} s") from error
            except (OSError, ConfigError, UnicodeDecodeError) as error:
                raise MembershipError(f"{self._file}: {error}") from error
            if stamp != before:
                before = stamp
                yield nodes
            await asyncio.sleep(LOOK)


def _stamp(file: Path) -> tuple[int, ...]:
    info = file.stat()
    return info.st_mtime_ns, info.st_size, info.st_ino


def _read(file: Path) -> View:
    with file.open("rb") as opened:
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ConfigError(f"is larger than {LARGEST} bytes")
    lines = (line.partition("#")[0].strip() for line in data.decode().splitlines())
    return parse(line for line in lines if line)
