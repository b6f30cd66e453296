"""A contender's reading processes (bench.comparisons.member), from the side of whoever gives the orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.comparisons.ground import Dataset
from bench.comparisons.process import Failed, Process
from bench.contenders import Place
from bench.machine import pss_bytes
from bench.outcome import WrongBytes

# Kept for what was read, and for what a library needs beside it.
SPARE = 1.25


@dataclass(frozen=True)
class Pass:
    """What all workers together did. seconds: from the first one's begin to the last one's end. first: until the first
    sample. cpu: seconds of the workers. failed: name -> why, of files that could not be read."""

    files: int
    bytes: int
    seconds: float
    first: float
    cpu: float
    failed: Mapping[str, str]

    @property
    def rate(self) -> float:
        return self.files / self.seconds


class Crew(Process):
    """`workers` processes that read `dataset` by the contender of that name, until the end of the block."""

    def __init__(
        self, contender: str, place: Place, dataset: Dataset, workers: int, environ: Mapping[str, str]
    ) -> None:
        self._contender, self._dataset = contender, dataset
        self._memory = int(dataset.bytes * SPARE)
        told = {
            "contender": contender,
            "place": asdict(place),
            "manifest": str(dataset.manifest),
            "files": str(dataset.files),
            "workers": workers,
            "memory": self._memory,
        }
        log = Path(place.folder) / "readers.log"
        super().__init__("bench.comparisons.member", told, {**environ, **place.environ}, log)

    @property
    def prepared(self) -> float:
        """Seconds that the main process took before it forked the workers."""
        return float(self.ready["prepared"])

    def do(self, what: str, *, whole: bool = True, **details: Any) -> Pass:
        """Carry out an order and compare what was read. whole: every name of the dataset must have come.

        Raises WrongBytes, Failed.
        """
        answers = self._answers({"do": what, **details})
        failed = {name: why for answer in answers for name, why in answer["failed"].items()}
        compared = self._answers({"do": "compare"})
        wrong = [name for answer in compared for name in answer["wrong"]]
        if wrong:
            raise WrongBytes(self._contender, f"{len(wrong)} reads gave wrong bytes, such as {wrong[0]}")
        if whole:
            missing = self._dataset.names - {name for answer in compared for name in answer["names"]} - failed.keys()
            if missing:
                raise WrongBytes(self._contender, f"{len(missing)} files never came, such as {min(missing)}")
        begin = min(answer["begin"] for answer in answers)
        return Pass(
            files=sum(answer["files"] for answer in answers),
            bytes=sum(answer["bytes"] for answer in answers),
            seconds=max(answer["end"] for answer in answers) - begin,
            first=min(answer["first"] for answer in answers) - begin,
            cpu=sum(answer["cpu"] for answer in answers),
            failed=failed,
        )

    def memory(self) -> int:
        """Bytes that the processes have now (PSS), less those that only keep what was read."""
        return sum(map(pss_bytes, self.ready["pids"])) - self._memory

    def _answers(self, order: Mapping[str, Any]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.tell(order)["answers"]
        for answer in answers:
            if "error" in answer:
                raise Failed(answer["error"])
        return answers
