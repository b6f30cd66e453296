"""Accelerators kept busy: the training loop of MLPerf Storage, over what a contender has in its cache.

Sizes of samples and batches, and seconds per batch, are the benchmark's (its configurations of DLIO). Everything else
is scaled down to one small machine, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Dataset, Ground, forget_pages
from bench.comparisons.turns import Entrant, Turn, take_turns
from bench.contenders import Contender
from bench.contenders.formats import Format

QUESTION = "How many accelerators does the storage keep busy?"

READERS = 8


@dataclass(frozen=True)
class Workload:
    """sample: bytes. seconds: of computing per batch. passes: utilization that the benchmark asks for. scaled: what is
    not as in the benchmark."""

    name: str
    accelerator: str
    sample: int
    batch: int
    seconds: float
    passes: float
    files: int
    steps: int
    scaled: str = ""


WORKLOADS = (
    Workload("resnet50", "H100", 114_660, 400, 0.224, 0.90, files=2000, steps=6),
    Workload("cosmoflow", "H100", 2_828_486, 1, 0.0035, 0.70, files=60, steps=200),
    Workload("retinanet", "B200", 322_957, 24, 0.04755, 0.85, files=400, steps=28),
    Workload("unet3d", "H100", 9_162_539, 7, 0.0201875, 0.90, files=16, steps=20, scaled="samples and times / 16"),
)


def unfit(kind: type[Contender]) -> str:
    if issubclass(kind, Format):
        return "the workloads are files of given sizes"
    if not kind.cached:
        return "it has no cache"
    return "" if kind.hints or kind.loader == Contender.loader else "the loader is the benchmark's"


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    findings.conditions += [
        "one process and one PyTorch DataLoader per accelerator, a barrier after each step; computing is sleeping; "
        "utilization = computing time / run time, the first step left out, as DLIO has it; more accelerators are tried "
        f"as long as the last number passed: {', '.join(map(str, ground.plan.accelerators))}",
        f"scaled down: {ground.plan.loader_threads} loader workers per accelerator; datasets that fit into memory, so "
        "everything is in the contender's cache on the disk, and the page cache is dropped before each run: what a run "
        "reads twice, it reads from memory the second time; one sample per file",
        "workers take the digest of each sample, as a decoder would touch its bytes; it is compared after the run",
        "hints on: the sampler says its order to the fetcher; otherwise nothing tells what comes next",
    ]
    chosen = [workload for workload in WORKLOADS if workload.name in ground.plan.workloads]
    datasets = [ground.blobs(workload.name, workload.files, workload.sample) for workload in chosen]
    ground.line.set(latency=0.0, bandwidth_per_connection=None)  # filling the caches is not what is measured
    for workload, files in zip(chosen, datasets, strict=True):
        _compare(ground, entrants, findings, workload, files)


def _compare(
    ground: Ground, entrants: Mapping[str, Entrant], findings: Findings, workload: Workload, files: Dataset
) -> None:
    findings.conditions.append(
        f"{workload.name} on {workload.accelerator}: {workload.sample:,} bytes per sample, batches of "
        f"{workload.batch}, {workload.seconds:g} s per batch, passes at {workload.passes:.0%}; {workload.files:,} "
        f"files, {workload.steps} steps{f'; {workload.scaled}' if workload.scaled else ''}"
    )
    most = findings.figure(f"{workload.name}: accelerators that pass", "accelerators", more=True)
    numbers = ground.plan.accelerators
    figures = {
        number: findings.figure(
            f"{workload.name}: utilization, {number} accelerator{'s' if number > 1 else ''}",
            "%",
            more=True,
            headline=number == numbers[0],
            line=workload.name,
            at=number,
        )
        for number in numbers
    }

    def play(turn: Turn) -> None:
        with turn.running():
            with turn.crew(READERS) as crew:
                findings.checked += crew.do("epoch", seed=0).files
            with turn.trainer() as trainer:
                passed = 0
                for number, figure in figures.items():
                    forget_pages(turn.entrant.kind(turn.place))
                    done = trainer.do(
                        "train",
                        accelerators=number,
                        workers=ground.plan.loader_threads,
                        batch=workload.batch,
                        seconds=workload.seconds,
                        steps=workload.steps,
                        seed=turn.round,
                    )
                    findings.checked += done["samples"]
                    figure.add(turn.name, 100 * done["utilization"])
                    if done["utilization"] < workload.passes:
                        break
                    passed = number
                most.add(turn.name, passed)

    take_turns(ground, entrants, findings, files, play, rounds=ground.plan.accelerator_rounds, keep=False)
