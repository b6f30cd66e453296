"""The readers of a cluster (bench.clusters.rank) from the side of whoever gives them orders: one on each node."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from bench.outcome import WrongBytes
from cachefs_sidecar.testbed.nodes import ClusterNode

# No order takes as long: whoever does not answer in that time hangs.
ANSWER_SECONDS = 120.0


class Reading(NamedTuple):
    """What all ranks did together. seconds: from the first that began to the last that ended; slowest, p99, p50: of one
    read, of the rank for which it was longest. errors: some of those of reads that failed."""

    files: int
    seconds: float
    failed: int
    errors: tuple[str, ...]
    slowest: float
    p99: float
    p50: float

    @property
    def rate(self) -> float:
        """Objects that reached readers, per second."""
        return self.files / self.seconds


class Rank:
    """One process, on the host of its node."""

    def __init__(self, node: ClusterNode, way: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.node = node
        self._process = subprocess.Popen(
            [*(node.host.prefix if node.host else ()), sys.executable, "-m", "bench.clusters.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that select(2) sees all that was not read
            env=dict(environ),
            cwd=Path(__file__).resolve().parents[2],
            process_group=0,  # Ctrl-C is for us; it ends with its stdin
        )
        self.tell({**way, "home": str(node.home)})

    def tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Raises RuntimeError when it has ended, or hangs."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise RuntimeError(f"the reader on {self.node.name} says nothing for {ANSWER_SECONDS:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reader on {self.node.name} ended with status {self._process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()  # it has nothing to save
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Ranks:
    """One on each of some nodes. Ended by leaving the block."""

    def __init__(self, nodes: Sequence[ClusterNode], way: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._nodes = nodes
        self._way = way
        self._environ = environ
        self._ranks: list[Rank] = []

    def __enter__(self) -> Self:
        try:
            for node in self._nodes:
                self._ranks.append(Rank(node, self._way, self._environ))
            for rank in self._ranks:
                rank.hear()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._ranks:
            self._ranks.pop().close()

    def read(
        self,
        orders: Sequence[list[list[int]]],
        at_once: int,
        *,
        meanwhile: tuple[int, Callable[[], None]] | None = None,
    ) -> Reading:
        """Each rank reads what its order says, of each job so many at once; a rank without an order rests.

        meanwhile: what is done when each has read so many, while they go on. Raises WrongBytes, RuntimeError.
        """
        tell_at, act = meanwhile or (None, None)
        busy = list(zip(self._ranks, orders, strict=False))
        for rank, jobs in busy:
            rank.tell({"jobs": jobs, "at_once": at_once, "tell_at": tell_at})
        if act is not None:
            for rank, _ in busy:
                rank.hear()
            act()
        answers = [rank.hear() for rank, _ in busy]
        files = sum(answer["files"] for answer in answers)
        if wrong := [name for answer in answers for name in answer["wrong"]]:
            raise WrongBytes("cluster", f"{len(wrong)} or more of {files} objects, such as {wrong[0]}")
        return Reading(
            files=files,
            seconds=max(answer["end"] for answer in answers) - min(answer["begin"] for answer in answers),
            failed=sum(answer["failed"] for answer in answers),
            errors=tuple(text for answer in answers for text in answer["errors"]),
            slowest=max(answer["slowest"] for answer in answers),
            p99=max(answer["p99"] for answer in answers),
            p50=max(answer["p50"] for answer in answers),
        )
