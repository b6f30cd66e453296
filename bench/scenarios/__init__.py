"""The scenarios, one file each. `question` is what a user would ask; `measure` answers it.

They run in the order of `SCENARIOS`. A scenario starts whatever it needs through the stage, which takes it away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.outcome import Outcome
from bench.plan import Plan
from bench.scenarios import cold, hit, hot, million
from bench.stage import Stage


class Scenario(NamedTuple):
    question: str
    measure: Callable[[Stage, Plan, Outcome], None]


SCENARIOS = {
    "hot": Scenario(hot.QUESTION, hot.measure),
    "hit": Scenario(hit.QUESTION, hit.measure),
    "cold": Scenario(cold.QUESTION, cold.measure),
    "million": Scenario(million.QUESTION, million.measure),
}
