"""The process behind `Throttle`: listens, counts, delays, breaks things when told.

It is a process of its own so that it takes no time from the event loop and the interpreter lock of the program
that is measured. It is controlled by lines of JSON on an inherited socket, and ends when that socket closes, so
it never outlives the program that started it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from cachefs_sidecar.testbed.exchange import Exchange


@dataclass
class Counts:
    """What passed since the last reset; see throttle.Traffic for what a caller gets."""

    requests: dict[str, int] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def count(self, kind: str, read: str) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1
        if read:
            self.objects[read] = self.objects.get(read, 0) + 1


@dataclass
class Fault:
    """What befalls the next `left` requests (None: all of them) for objects that match `pattern`.

    kind: hang, status, delay, cut or flip. amount: HTTP status, seconds, or an offset in the body.
    """

    kind: str
    pattern: str
    amount: float
    left: int | None


class Proxy:
    """One listening port in front of one server."""

    def __init__(self, upstream_port: int, loop: asyncio.AbstractEventLoop, host: str) -> None:
        self.upstream_port = upstream_port
        self.host = host
        self.loop = loop
        self.latency = 0.0
        self.bandwidth_per_connection: float | None = None
        self.total_bandwidth: float | None = None
        self.mend_ranges = False
        self.free_at = 0.0
        self.traffic = Counts()
        self.faults: list[Fault] = []
        self.exchanges: set[Exchange] = set()
        self.port = 0
        self._listener: asyncio.Server | None = None
        self._placeholder: socket.socket | None = None

    def fault_for(self, path: str) -> Fault | None:
        """The first fault that applies to a request for `path`; that is one less of it."""
        for fault in self.faults:
            if fnmatchcase(path, fault.pattern):
                if fault.left is not None:
                    fault.left -= 1
                    if not fault.left:
                        self.faults.remove(fault)
                return fault
        return None

    async def listen(self) -> None:
        sock, self._placeholder = self._placeholder or self._bound(), None
        self._listener = await self.loop.create_server(lambda: Exchange(self), sock=sock, backlog=1024)

    def refuse(self) -> None:
        """Refuse connections, as a machine does where nothing listens, and drop those there are."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        for exchange in list(self.exchanges):
            exchange.abort()
        # Bound but not listening: connections are refused, and nobody else can be given the port meanwhile.
        self._placeholder = self._bound()

    def _bound(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        self.port = sock.getsockname()[1]
        return sock

    async def obey(self, order: dict[str, Any]) -> Any:
        """Carry out one order; the result goes back as JSON."""
        match order["do"]:
            case "settings":
                self.latency = order["latency"]
                self.bandwidth_per_connection = order["bandwidth_per_connection"]
                self.total_bandwidth = order["total_bandwidth"]
                self.mend_ranges = order["mend_ranges"]
            case "traffic":
                return asdict(self.traffic)
            case "reset":
                counted, self.traffic = self.traffic, Counts()
                return asdict(counted)
            case "fault":
                self.faults.append(Fault(order["kind"], order["pattern"], order["amount"], order["times"]))
            case "let pass":
                waiting = [exchange for exchange in self.exchanges if exchange.latency is not None]
                for exchange in waiting[: order["most"]]:
                    exchange.let_pass()
            case "refuse":
                self.refuse()
            case "heal":
                self.faults.clear()
                if self._listener is None:
                    await self.listen()
            case unknown:
                raise ValueError(f"unknown order {unknown!r}")
        return None


async def serve(upstream_port: int, control: socket.socket, host: str) -> None:
    """Serve until the other end of `control` is closed."""
    proxy = Proxy(upstream_port, asyncio.get_running_loop(), host)
    await proxy.listen()
    reader, writer = await asyncio.open_unix_connection(sock=control)
    writer.write(json.dumps({"port": proxy.port}).encode() + b"\n")
    while line := await reader.readline():
        try:
            answer = {"result": await proxy.obey(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - whoever gave the order gets it
            answer = {"error": f"{type(error).__name__}: {error}"}
        writer.write(json.dumps(answer).encode() + b"\n")


def main() -> None:
    """argv: the server's port, the number of the control socket's descriptor, the address to listen at."""
    import uvloop

    control = socket.socket(fileno=int(sys.argv[2]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), control, sys.argv[3]))


if __name__ == "__main__":
    main()
