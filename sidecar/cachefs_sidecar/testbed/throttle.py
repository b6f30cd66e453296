"""Distance and misfortune between a client and an S3 server on the same machine, and an exact account of both.

    with S3Server(root) as server, Throttle(server.port, latency=0.02, bandwidth_per_connection=10e6) as far:
        ...                              # use far.endpoint instead of server.endpoint
        assert far.traffic().object_reads == 1000

Each request is counted when its head has arrived, whatever becomes of it afterwards: a retry counts, a request
that a cache answered does not exist. Faults name the objects they strike with a shell pattern over
"bucket/key"; requests about a bucket (listings) have the path "".
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cachefs_sidecar.testbed.server import STOP_SECONDS

# An order is carried out between two events of the proxy's loop; under load that is milliseconds.
ANSWER_SECONDS = 30.0

# A round trip to storage in the next region.
DISTANT = 0.02


@dataclass(frozen=True)
class Traffic:
    """What passed the proxy since it started or was reset.

    requests: by kind, such as "GET object", "HEAD object", "LIST". objects: GETs by object path (ranged ones
    too). bytes_down: to clients, HTTP heads included; bytes_up: from them.
    """

    requests: Mapping[str, int]
    objects: Mapping[str, int]
    bytes_down: int
    bytes_up: int

    @property
    def object_reads(self) -> int:
        return self.requests.get("GET object", 0)

    @property
    def total(self) -> int:
        """Requests of any kind."""
        return sum(self.requests.values())


class Throttle:
    """A slow line to the S3 server on `upstream_port`: a reverse proxy in a process of its own.

    latency: seconds added to each request. Bandwidths: bytes per second towards the client, None = unlimited.
    mend_ranges: answers to ranged requests get the status that S3 gives them, 206; rclone says 200, at which some
    clients give up. host: the address of this machine that it listens at. Methods may be called from several threads.
    """

    def __init__(
        self,
        upstream_port: int,
        *,
        latency: float = DISTANT,
        bandwidth_per_connection: float | None = None,
        total_bandwidth: float | None = None,
        mend_ranges: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.upstream_port = upstream_port
        self.host = host
        self.port = 0
        self._settings: dict[str, float | None] = {
            "latency": latency,
            "bandwidth_per_connection": bandwidth_per_connection,
            "total_bandwidth": total_bandwidth,
            "mend_ranges": mend_ranges,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._unread = b""

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the proxy; its port is chosen by the kernel. Raises RuntimeError when it does not start."""
        ours, theirs = socket.socketpair()
        ours.settimeout(ANSWER_SECONDS)
        with theirs:
            command = [sys.executable, "-m", "cachefs_sidecar.testbed.proxy", str(self.upstream_port)]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), self.host],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the program that owns it
            )
        self._control = ours
        try:
            self.port = json.loads(self._line())["port"]
            self.set()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the proxy and reap it; open connections are cut."""
        if self._control is not None:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- the account ---------------------------------------------------------------------------------------

    def traffic(self) -> Traffic:
        return Traffic(**self._order("traffic"))

    def reset(self) -> Traffic:
        """Count from zero; returns what was counted until now, with nothing lost in between."""
        return Traffic(**self._order("reset"))

    # --- the line ---------------------------------------------------------------------------------------------

    def set(self, **changes: float | None) -> None:
        """Change latency, bandwidth_per_connection or total_bandwidth from now on."""
        if unknown := changes.keys() - self._settings.keys():
            raise TypeError(f"unknown setting {unknown.pop()!r}")
        self._settings.update(changes)
        self._order("settings", **self._settings)

    def let_pass(self, most: int | None = None) -> None:
        """Send on at once what waits for its latency, or for a delay, to pass. most: so many requests, whichever."""
        self._order("let pass", most=most)

    def hang(self, pattern: str = "*", *, times: int | None = None) -> None:
        """Accept requests for matching objects and never answer them."""
        self._fault("hang", pattern, 0, times)

    def status(self, code: int, pattern: str = "*", *, times: int | None = None) -> None:
        """Answer with an HTTP error (500, 503, 403, ...) without asking the server."""
        self._fault("status", pattern, code, times)

    def delay(self, seconds: float, pattern: str = "*", *, times: int | None = None) -> None:
        """Answer that much later than the latency."""
        self._fault("delay", pattern, seconds, times)

    def cut(self, pattern: str = "*", *, after: int = 1024, times: int | None = None) -> None:
        """Close the connection once `after` bytes of the body have passed."""
        self._fault("cut", pattern, after, times)

    def flip(self, pattern: str = "*", *, at: int = 100, times: int | None = None) -> None:
        """Invert the byte at offset `at` of the body: bytes that no length check notices."""
        self._fault("flip", pattern, at, times)

    def refuse(self) -> None:
        """Refuse connections and drop those there are, until `heal`."""
        self._order("refuse")

    def heal(self) -> None:
        """End all faults. A request that hangs already goes on hanging."""
        self._order("heal")

    def _fault(self, kind: str, pattern: str, amount: float, times: int | None) -> None:
        self._order("fault", kind=kind, pattern=pattern, amount=amount, times=times)

    # --- how orders travel ---------------------------------------------------------------------------------------

    def _order(self, what: str, **details: Any) -> Any:
        with self._lock:
            if self._control is None:
                raise RuntimeError("the throttle is not running")
            self._control.sendall(json.dumps({"do": what, **details}).encode() + b"\n")
            answer = json.loads(self._line())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _line(self) -> bytes:
        assert self._control is not None
        pieces = [self._unread]
        while b"\n" not in pieces[-1]:
            piece = self._control.recv(1 << 20)
            if not piece:
                raise RuntimeError(f"the throttle's process {self._process and self._process.pid} has ended")
            pieces.append(piece)
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        return line

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Throttle({self.endpoint} -> {self.upstream_port})"
