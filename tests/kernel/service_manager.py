"""A service manager for tests: as much of systemd as a unit with Type=notify and a store of descriptors meets.

It follows sd_notify(3) and systemd.service(5) (FileDescriptorStoreMax=, FileDescriptorStorePreserve=yes): messages
count only from the main process, what is in the store survives every process, and is passed from descriptor 3 on.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachefs_sidecar import registry
from tests.kernel.mounting import until

# Becomes the program, with the descriptors where they belong. They are moved away first: they may lie in the way.
_BECOME = """
import fcntl, json, os, sys
fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in json.loads(sys.argv[1])]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.closerange(3 + len(fds), 1000)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServiceManager:
    """One unit. store: name -> descriptors. told: all lines that the unit sent. main: pid of its main process."""

    def __init__(self, folder: Path, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._address = str(folder / "notify.sock")
        self._command = list(command)
        self._environ = dict(environ)
        self.store: dict[str, list[int]] = {}
        self.told: list[str] = []
        self.ready = False
        self.main = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self._address)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Returns when the unit is ready."""
        if self._process is not None:
            self._process.wait(60)  # also where another process had become the unit
        self.ready = False
        named = [(name, fd) for name, fds in self.store.items() for fd in fds]
        environ = {**self._environ, "NOTIFY_SOCKET": self._address, "FDSTORE": "160"}
        if named:
            environ |= {"LISTEN_FDS": str(len(named)), "LISTEN_FDNAMES": ":".join(name for name, _ in named)}
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, json.dumps([fd for _, fd in named]), *self._command],
            env=environ,
            pass_fds=[fd for _, fd in named],
            stdout=subprocess.DEVNULL,
        )
        self.main = process.pid
        until(lambda: self.ready or process.poll() is not None)
        assert self.ready, "the unit ended before it was ready"

    def terminate(self) -> None:
        """What `systemctl restart` does behind ExecStop= (KillMode=process): SIGTERM to the main process."""
        os.kill(self.main, signal.SIGTERM)
        self.reap()

    def reap(self) -> None:
        """Wait until the main process has ended."""
        assert self._process is not None
        if self.main == self._process.pid:
            self._process.wait(60)
        until(lambda: not registry.start_ticks(self.main))

    def _listen(self) -> None:
        size = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12)
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, size)
            if data == b"close":
                return
            fds = array.array("i")
            sender = 0
            for _, kind, raw in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(raw)
                elif kind == socket.SCM_CREDENTIALS:
                    sender = struct.unpack("3i", raw)[0]
            self._take(dict(line.split("=", 1) for line in data.decode().splitlines()), list(fds), sender)

    def _take(self, message: dict[str, str], fds: list[int], sender: int) -> None:
        if sender != self.main:  # NotifyAccess=main
            message = {}
        self.told += [f"{name}={value}" for name, value in message.items()]
        if message.get("FDSTORE") == "1":
            self.store.setdefault(message["FDNAME"], []).extend(fds)
            return
        if message.get("FDSTOREREMOVE") == "1":
            fds = self.store.pop(message["FDNAME"], [])
        if "MAINPID" in message:
            self.main = int(message["MAINPID"])
        for fd in fds:  # a barrier is let through by closing what came with it
            os.close(fd)
        self.ready = self.ready or message.get("READY") == "1"

    def close(self) -> None:
        """Empty the store and end what runs."""
        if self._process is not None:
            if registry.start_ticks(self.main):
                os.kill(self.main, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"close", self._address)
        self._thread.join(10)
        self._socket.close()
        for fds in self.store.values():
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
