"""What one keeper leaves to the next, and the words that pass between them, over one Unix socket.

The estate (one packet, msgpack): a version, the settings with their secrets, the record of the mount, and in the
same packet every descriptor of the connection. Then words (JSON), in this order:

    heir -> keeper      ready    its workers, which wait; or "failed", and why
    keeper -> heir      go       the workers that serve now. From here on the heir never gives up: if the keeper
                                 dies, it ends these and takes over
    heir -> keeper      serving  its workers have begun
    keeper -> heir      yours    the other workers have ended
    heir -> keeper      done     the kernel delivers again what they left, the record is the heir's

The keeper may call it off until it hears "done": it kills the heir and its workers and goes on. Nothing is lost
either way, because both hold every descriptor: what somebody read and did not answer is delivered again.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from cachefs.errors import MountError, from_wire, to_wire
from cachefs_sidecar import registry
from cachefs_sidecar.registry import MountInfo, MountSettings

# Raised with every change that a keeper of the version before would misunderstand.
FORMAT = 1

# An estate is some KB (a service account's key is 2.5 KB), a word less.
MAX_PACKET = 128 * 1024

# 64 workers at most, twice, and a few (the kernel passes 253 at once).
MAX_DESCRIPTORS = 250


@dataclass(frozen=True)
class Estate:
    """counts: what the keepers before have counted. shared: the heir's devices have one queue.

    device: the connection's first descriptor. devices: one for each of the heir's workers. held: those of the workers
    that are to end: whoever holds them keeps what was read from them and not answered from being lost.
    lifeline: where the process in the foreground hears who keeps the mount (see standin), -1 = there is none.
    manager: the service manager's socket.
    """

    settings: MountSettings
    info: MountInfo
    device: int
    devices: Sequence[int]
    held: Sequence[int]
    shared: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    lifeline: int = -1
    manager: str = ""

    @property
    def descriptors(self) -> list[int]:
        return [self.device, *self.devices, *self.held, *([self.lifeline] if self.lifeline >= 0 else [])]

    def send(self, sock: socket.socket) -> None:
        """Raises OSError."""
        plain = {
            "format": FORMAT,
            "settings": registry.encode_settings(self.settings),
            "info": asdict(self.info),
            "devices": len(self.devices),
            "held": len(self.held),
            "shared": self.shared,
            "counts": dict(self.counts),
            "lifeline": self.lifeline >= 0,
            "manager": self.manager,
        }
        socket.send_fds(sock, [msgspec.msgpack.encode(plain)], self.descriptors, socket.MSG_DONTWAIT)


def receive(sock: socket.socket) -> Estate:
    """Raises MountError when it did not arrive whole, or is of another format."""
    data, descriptors, flags, _ = socket.recv_fds(sock, MAX_PACKET, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    for fd in descriptors:
        os.set_inheritable(fd, False)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MountError("the mount did not arrive whole from its keeper")
        plain = msgspec.msgpack.decode(data)
        if plain["format"] != FORMAT:
            raise MountError(
                f"its keeper hands over in format {plain['format']}, and this version of cachefs takes {FORMAT}: "
                "unmount it and mount it again"
            )
        settings = registry.decode_settings(plain["settings"])
        info = registry.as_info(plain["info"])
        left = iter(descriptors)
        return Estate(
            settings=settings,
            info=info,
            device=next(left),
            devices=[next(left) for _ in range(plain["devices"])],
            held=[next(left) for _ in range(plain["held"])],
            shared=plain["shared"],
            counts=plain["counts"],
            lifeline=next(left) if plain["lifeline"] else -1,
            manager=plain["manager"],
        )
    except (msgspec.DecodeError, KeyError, TypeError, StopIteration, RuntimeError) as error:
        raise MountError("the mount did not arrive whole from its keeper") from error


# --- words -----------------------------------------------------------------------------------------------------


def say(sock: socket.socket, op: str, **more: Any) -> None:
    """Raises OSError when nobody hears."""
    sock.send(json.dumps({"op": op, **more}).encode())


def say_failed(sock: socket.socket, error: BaseException) -> None:
    say(sock, "failed", error=to_wire(error))


def hear(sock: socket.socket) -> dict[str, Any]:
    """{} when the other end is gone; {"op": ""} for what is no word."""
    try:
        packet = sock.recv(MAX_PACKET)
    except ConnectionError:
        packet = b""
    if not packet:
        return {}
    try:
        word = json.loads(packet)
    except ValueError:
        word = None
    return word if isinstance(word, dict) and "op" in word else {"op": ""}


def error_in(word: Mapping[str, Any]) -> str:
    try:
        name, message, path = word["error"]
        return from_wire((name, message, path)).message
    except (KeyError, TypeError, ValueError):
        return "it failed"
