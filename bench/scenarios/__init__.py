"""The scenarios, one file each. `question` is what a user would ask; `measure` answers it.

They run in the order of `SCENARIOS`. A scenario starts whatever it needs through the stage, which takes it away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.outcome import Outcome
from bench.plan import Plan
from bench.scenarios import cold, dropped, hints, hit, hot, latency, million, names, pages, shard, storm
from bench.stage import Stage


class Scenario(NamedTuple):
    """caches: how many caches of all files it leaves on the disk until the end."""

    question: str
    measure: Callable[[Stage, Plan, Outcome], None]
    caches: Callable[[Plan], int]


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
    "million": Scenario(million.QUESTION, million.measure, lambda _: 0),
    "storm": Scenario(storm.QUESTION, storm.measure, lambda _: 1),
}
