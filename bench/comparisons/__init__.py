"""Comparisons of contenders, one file each: a question that a user would ask, who cannot take part, how it is measured.

They run in the order of `COMPARISONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import NamedTuple

from bench.comparisons import accelerators, capacity, epochs, hiccups, listing, shards, workers
from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground
from bench.comparisons.turns import Entrant
from bench.contenders import CONTENDERS, Contender
from bench.plan import Plan
from bench.stage import LARGEST


class Comparison(NamedTuple):
    """unfit: why a contender cannot take part, "" when it can."""

    question: str
    unfit: Callable[[type[Contender]], str]
    measure: Callable[[Ground, Mapping[str, Entrant], Findings], None]


def _of(module: ModuleType) -> Comparison:
    return Comparison(module.QUESTION, module.unfit, module.measure)


COMPARISONS = {
    "epochs": _of(epochs),
    "workers": _of(workers),
    "capacity": _of(capacity),
    "shards": _of(shards),
    "listing": _of(listing),
    "hiccups": _of(hiccups),
    "accelerators": _of(accelerators),
}


def room(plan: Plan, asked: Collection[str]) -> int:
    """Bytes of disk that these need at their worst: datasets in all forms, and caches until they are cleared."""
    turns = {"epochs": plan.comparison_rounds, "workers": plan.loader_rounds, "hiccups": 1}
    photographs = (
        plan.photographs * LARGEST * (4 + len(CONTENDERS) * sum(turns[name] for name in turns if name in asked))
    )
    large = (plan.shard_mib << 20) * shards.SHARDS * (1 + shards.RANGE_READERS)
    overfull = (plan.overfull_mib << 20) * 5
    trained = 2 * sum(work.sample * work.files for work in accelerators.WORKLOADS if work.name in plan.workloads)
    return photographs + large + overfull + trained
