"""The dataset is larger than the cache: how much of each epoch comes from it, with hints, without, and with wrong ones?

Every object is read once per epoch in a fresh order, so no policy and no foresight can have more of them in the cache
than it holds: of N objects C, which is the bound. What was read at the origin is what the fetcher counted there. Wrong
hints are the order of another epoch: names that exist and will all be read, but not when it is said.
"""

from __future__ import annotations

from bench.objects import ON_DISK, make_objects
from bench.outcome import Goal, Outcome, Series, WrongBytes
from bench.plan import Plan
from bench.processes import told
from bench.stage import Stage

QUESTION = "Of a dataset larger than the cache: does as much come from the cache as fits, hinted or not or wrongly?"

SHARES = (0.1, 0.25, 0.5, 0.75)
LEAST_OF_BOUND = 0.99

# Of which a fetcher remembers 16 MiB of what it could not store, the least there is: as much as that is read twice
# around the end of an epoch, which must not pass for hits.
MEMORY = "1G"

# Of what is measured, after an epoch that fills the cache.
EPOCHS = 2

HINTS = {"none": "without hints", "right": "with hints", "wrong": "with wrong hints"}


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"N = {plan.objects:,} objects that take 32 KiB each, in a local folder, read one by one by URL; the cache "
        f"holds C of them, and is filled by an epoch; {EPOCHS} epochs are counted; 1 - requests at the origin / reads, "
        "over C/N; wrong hints: the order of another epoch"
    )
    folder, manifest = make_objects(stage, plan.objects)
    way = {"manifest": str(manifest), "root": str(folder), "options": {"target_protocol": "file"}}
    ratios: dict[str, list[float]] = {how: [] for how in HINTS}
    with stage.cache() as home, told(stage, "bench.epochs", way, CACHEFS_MEMORY=MEMORY) as tell:
        for share in SHARES:
            fits = int(plan.objects * share)
            order = {"home": str(home), "size": fits * ON_DISK}
            tell({**order, "seeds": [0], "hints": "none"})
            for number, how in enumerate(HINTS):
                stage.step(f"{HINTS[how]}, C/N = {share:g}")
                done = tell({**order, "seeds": range_of(number), "hints": how})
                if done["wrong"]:
                    raise WrongBytes(f"steady: {HINTS[how]}", f"{done['wrong']} of {done['files']} files")
                outcome.checked += done["files"]
                ratio = (1 - done["requests"] / done["files"]) / (fits / plan.objects)
                ratios[how].append(ratio)
                name = f"{HINTS[how]}, C/N = {share:g}: hits / bound"
                outcome.goals.append(Goal(Series(name, "x", [ratio]), LEAST_OF_BOUND, at_least=True))


def range_of(number: int) -> list[int]:
    """The seeds of the epochs that are counted for one kind of hints."""
    return [1 + number * EPOCHS + epoch for epoch in range(EPOCHS)]
