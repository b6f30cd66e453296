"""A first epoch of a PyTorch DataLoader from distant storage, with hints and without: nothing is cached.

Two workers wait for one file each, so without hints two files are on the way at a time, whatever the line could carry.
With hints the order is known and the line is what limits. Rates are compared with what the line carries at most.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from bench.outcome import Goal, Outcome, Series, WrongBytes, in_turns
from bench.plan import Plan
from bench.processes import Tell, told
from bench.stage import ROOT, Stage, credentials

QUESTION = "Does the loader's order, known in advance, keep two workers fed from distant storage in the first epoch?"

LATENCY = 0.05
BANDWIDTH = 25e6

LEAST_GAIN = 5.0
LEAST_SHARE = 0.95

# Without hints an epoch takes so long that part of it is enough: its rate does not change.
SHARE_WITHOUT = 10

# What hints cost the training process, of the CPU time that it has at this many samples a second.
SAMPLES_PER_SECOND = 5000
MOST_PERCENT = 1.0
COST_SAMPLES = 200_000


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    few = max(min(plan.files, 16), plan.files // SHARE_WITHOUT)
    outcome.conditions.append(
        f"2 workers of a torch DataLoader, batches of 32, by URL; storage {LATENCY * 1000:.0f} ms away on a line of "
        f"{BANDWIDTH / 1e6:.0f} MB/s; {plan.files:,} files with hints, {few:,} without; a fresh cache for each round"
    )
    throttle = stage.throttle(LATENCY)
    throttle.set(total_bandwidth=BANDWIDTH)

    def epoch(do: str, files: int, seed: int) -> float:
        with stage.cache() as home, _training(stage, throttle.port, files) as tell:
            done = tell({"do": do, "seed": seed, "home": str(home)})
        if done["wrong"]:
            raise WrongBytes(f"hints: {do}", f"{done['wrong']} of {done['files']} files")
        outcome.checked += done["files"]
        return float(done["bytes"] / done["seconds"] / 1e6)

    contenders = {
        "without hints": lambda seed: epoch("none", few, seed),
        "with hints": lambda seed: epoch("hints", plan.files, seed),
    }
    without, hinted = in_turns(contenders, plan.hint_rounds, "MB/s", stage.step).values()
    share = Series("with hints / what the line carries", "x", [rate * 1e6 / BANDWIDTH for rate in hinted.values])
    outcome.series += [without, hinted]
    with stage.cache() as home, _training(stage, throttle.port, plan.files) as tell:
        costs = [
            tell({"do": "cost", "count": COST_SAMPLES, "home": str(home)})["seconds"] for _ in range(plan.hint_rounds)
        ]
    outcome.goals += [
        Goal(hinted.over(without, "with hints / without"), LEAST_GAIN, at_least=True),
        Goal(share, LEAST_SHARE, at_least=True),
        Goal(_percent(costs), MOST_PERCENT, at_least=False),
    ]


def _percent(seconds: list[float]) -> Series:
    name = f"CPU that hints take from the training process at {SAMPLES_PER_SECOND:,} samples/s"
    # Too little to be told from nothing is something all the same.
    return Series(name, "%", [max(0.001, each * SAMPLES_PER_SECOND * 100) for each in seconds])


def _training(stage: Stage, port: int, files: int) -> AbstractContextManager[Tell]:
    way = {"files": files, "root": ROOT, "options": credentials(stage.s3(port))}
    return told(stage, "bench.training", stage.way("training", **way))
