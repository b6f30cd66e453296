"""The scenarios, one file each. `question` is what a user would ask; `measure` answers it.

They run in the order of `SCENARIOS`. A scenario starts whatever it needs through the stage, which takes it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from bench.clusters.ground import ON_DISK as SHARED_ON_DISK
from bench.objects import ON_DISK
from bench.outcome import Outcome
from bench.plan import Plan
from bench.scenarios import (
    cluster,
    cold,
    dropped,
    hints,
    hit,
    hot,
    latency,
    million,
    names,
    pages,
    resnet50,
    shard,
    stall,
    steady,
    storm,
)
from bench.stage import LARGEST, Stage


class Scenario(NamedTuple):
    """caches: how many caches of all files it leaves on the disk until the end."""

    question: str
    measure: Callable[[Stage, Plan, Outcome], None]
    caches: Callable[[Plan], int]


def caches_of(objects: int, plan: Plan) -> int:
    """How many caches of all files take the room of these objects and of a cache of them."""
    return math.ceil(2 * objects * ON_DISK / (plan.files * LARGEST))


def trained_caches(plan: Plan) -> int:
    """The same of what an accelerator is trained on, a local copy and two caches of half of it."""
    return math.ceil(3 * plan.trained_steps * 400 * 128 * 1024 / (plan.files * LARGEST))


def shared_caches(plan: Plan) -> int:
    """The same of what all clusters keep until the end, copies too: some twenty times what they read."""
    return math.ceil(20 * plan.shared * SHARED_ON_DISK / (plan.files * LARGEST))


SCENARIOS = {
    "hot": Scenario(hot.QUESTION, hot.measure, lambda _: 1),
    "latency": Scenario(latency.QUESTION, latency.measure, lambda _: 1),
    "dropped": Scenario(dropped.QUESTION, dropped.measure, lambda _: 1),
    "shard": Scenario(shard.QUESTION, shard.measure, lambda _: 0),
    "hit": Scenario(hit.QUESTION, hit.measure, lambda _: 1),
    "cold": Scenario(cold.QUESTION, cold.measure, lambda plan: 2 * plan.cold_rounds),
    "names": Scenario(names.QUESTION, names.measure, lambda _: 0),
    "hints": Scenario(hints.QUESTION, hints.measure, lambda plan: 2 * plan.hint_rounds),
    "pages": Scenario(pages.QUESTION, pages.measure, lambda _: 1),
    "steady": Scenario(steady.QUESTION, steady.measure, lambda plan: caches_of(plan.objects, plan)),
    "stall": Scenario(stall.QUESTION, stall.measure, lambda plan: caches_of(plan.objects, plan)),
    "resnet50": Scenario(resnet50.QUESTION, resnet50.measure, trained_caches),
    "cluster": Scenario(cluster.QUESTION, cluster.measure, shared_caches),
    "million": Scenario(million.QUESTION, million.measure, lambda _: 0),
    "storm": Scenario(storm.QUESTION, storm.measure, lambda _: 1),
}
