"""A process of the bench that takes orders as JSON lines and answers each: started, told, listened to, ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# An order that takes longer hangs.
ORDER_SECONDS = 120.0

# A process that was told to end does so within this, or is killed.
END_SECONDS = 5.0


class Failed(Exception):
    """A contender could not do what was asked; the text says what became of it."""


class Process:
    """`python -m MODULE`, first told `told`. Its own words go to `log`. ready: what it answered first."""

    def __init__(self, module: str, told: Mapping[str, Any], environ: Mapping[str, str], log: Path) -> None:
        self._module, self._told, self._environ, self._log = module, told, dict(environ), log
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environ,
                cwd=Path(__file__).resolve().parents[2],
                process_group=0,  # Ctrl-C is for us; we end all of it
            )
        try:
            self.ready = self.tell(self._told)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)  # told by the end of its stdin; libraries take their shared memory away
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def tell(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to an order. Raises Failed."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + ORDER_SECONDS
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Failed(f"no answer within {ORDER_SECONDS:g} s")
            piece = os.read(pipe, 1 << 20)
            if not piece:
                raise self._ended()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> Failed:
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["no word"]
        return Failed(f"its readers ended: {lines[-1][:300]}")
