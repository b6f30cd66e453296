"""Reader processes (bench.reader) from the side of whoever gives the orders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.outcome import WrongBytes


@dataclass(frozen=True)
class Pass:
    """One pass of all readers of a team. rate: files per second of all together. cpu: seconds, where it is known."""

    files: int
    bytes: int
    seconds: float
    rate: float
    cpu: float


class Team:
    """`count` processes that read the same way, each its share of the files.

    way: see bench.reader. Ended by leaving the block; a process also ends when this one does.
    """

    def __init__(self, title: str, way: Mapping[str, Any], environ: Mapping[str, str], count: int = 1) -> None:
        self.title = title
        self._way = dict(way)
        self._environ = dict(environ)
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "bench.reader"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        env=self._environ,
                        cwd=Path(__file__).resolve().parents[1],
                        process_group=0,  # Ctrl-C is for us; we end them
                    )
                )
                self._tell(self._processes[-1], self._way)
            for process in self._processes:
                self._hear(process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()  # it has nothing to save
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes.clear()

    def answers(self, seed: int) -> list[dict[str, Any]]:
        """All files once, in the order of `seed`: what each reader says. Raises WrongBytes."""
        for part, process in enumerate(self._processes):
            self._tell(process, {"seed": seed, "part": part, "of": self._count})
        answers = [self._hear(process) for process in self._processes]
        wrong = [name for answer in answers for name in answer["wrong"]]
        files = sum(answer["files"] for answer in answers)
        if wrong:
            raise WrongBytes(self.title, f"{len(wrong)} of {files} files, such as {wrong[0]}")
        return answers

    def run(self, seed: int) -> Pass:
        """The same, summed up."""
        answers = self.answers(seed)
        return Pass(
            files=sum(answer["files"] for answer in answers),
            bytes=sum(answer["bytes"] for answer in answers),
            seconds=max(answer["seconds"] for answer in answers),
            rate=sum(answer["files"] / answer["seconds"] for answer in answers),
            cpu=sum(answer.get("cpu", 0.0) for answer in answers),
        )

    def _tell(self, process: subprocess.Popen[bytes], order: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.title}: its reader ended with status {process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer
