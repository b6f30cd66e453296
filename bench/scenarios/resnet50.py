"""An accelerator that trains on a dataset twice as large as the cache, with nothing in memory: is it kept busy?

The training loop is that of MLPerf Storage (bench.comparisons.accelerator) for resnet50 on an H100, its pace scaled
down to what two cores can read and compare. Half of the samples come from the SSD, half from storage 20 ms away.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from bench.comparisons.accelerators import READERS, WORKLOADS
from bench.comparisons.ground import LATENCY, Ground, forget_pages
from bench.comparisons.turns import Entrant, Turn
from bench.contenders import load
from bench.outcome import Goal, Outcome, in_turns
from bench.plan import Plan
from bench.stage import Stage

QUESTION = "Is an accelerator kept busy from the mount when the dataset is twice the cache and nothing is in memory?"

WORKLOAD = WORKLOADS[0]

# An H100 wants 1,786 samples a second. Two cores that also are the storage, the line and the loader serve a quarter.
PACE = 4

WORKERS = 2
MOST_ROUNDS = 2

CONTENDERS = {"native": "ext4, all of it", "mount": "mount, hints off", "hinted": "mount, hints on"}


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    seconds, batch = WORKLOAD.seconds * PACE, WORKLOAD.batch
    files = plan.trained_steps * batch
    ground = Ground(stage, plan)
    ground.line.set(bandwidth_per_connection=None)
    dataset = ground.blobs(WORKLOAD.name, files, WORKLOAD.sample)
    outcome.conditions.append(
        f"{files:,} files of {WORKLOAD.sample:,} bytes, batches of {batch}, {seconds:g} s per batch (1/{PACE} of the "
        f"pace of an {WORKLOAD.accelerator}), {plan.trained_steps} steps, {WORKERS} workers of a torch DataLoader; the "
        f"caches hold half of the files, and are full; storage {LATENCY * 1000:.0f} ms away; page cache dropped before "
        "each run"
    )

    with ExitStack() as stack:

        def ready(name: str) -> Callable[[int], float]:
            """The contender runs and its cache is full; what is called for each round."""
            stage.step(f"filling the cache: {CONTENDERS[name]}")
            kind = load(name)
            ground.prepare(kind, dataset)
            place = ground.place(kind, dataset, dataset.bytes // 2)
            turn = Turn(CONTENDERS[name], 0, Entrant(name, kind), place, dataset, ground.environ)
            stack.enter_context(turn.running())
            with turn.crew(READERS) as crew:
                outcome.checked += crew.do("epoch", seed=0).files
            trainer = stack.enter_context(turn.trainer())

            def train(number: int) -> float:
                forget_pages(kind(place))
                how = {"accelerators": 1, "workers": WORKERS, "batch": batch, "seconds": seconds}
                done = trainer.do("train", **how, steps=plan.trained_steps, seed=1 + number)
                outcome.checked += done["samples"]
                return float(100 * done["utilization"])

            return train

        contenders = {CONTENDERS[name]: ready(name) for name in CONTENDERS}
        found = in_turns(contenders, min(MOST_ROUNDS, plan.hint_rounds), "%", stage.step)
    native, off, on = found.values()
    passes = 100 * WORKLOAD.passes
    outcome.series += [native, off, on]
    if native.median < passes:
        outcome.notes.append("The local disk does not keep it busy either: the goal does not count here.")
    outcome.goals.append(Goal(on, passes, at_least=True))
