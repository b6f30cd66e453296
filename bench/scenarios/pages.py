"""Everything is on the SSD and nothing in memory: how long does a read wait, with hints and without?

A reader takes files at a steady rate, as a GPU does, and not as fast as it can: what counts is how long each read holds
it up. Hints have what is next brought into the page cache while the reader does something else.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles

from bench.outcome import Goal, Outcome, Series, WrongBytes, in_turns
from bench.plan import Plan
from bench.processes import told
from bench.stage import ROOT, Stage, forget_pages

QUESTION = "Does a read wait for the SSD when its order was known in advance?"

# A share of what an H100 takes of images (1,786 a second); one reader of several.
RATE = 500

MOST_OF_NATIVE = 1.0


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB at {RATE} files/s, one reader; all cached on the SSD, page cache dropped "
        "before each pass; microseconds from open to close"
    )
    tails: dict[str, list[float]] = {}
    with stage.cache() as home:
        stage.command("warm", f"s3://{ROOT}", "--cache-dir", str(home))
        with stage.mounted(f"s3://{ROOT}", home) as mount, told(stage, "bench.paced", stage.way("paced")) as tell:

            def read(name: str, root: Path, seed: int, *, hints: bool = False) -> float:
                for blob in (home / "blobs").rglob("*"):
                    if blob.is_file():
                        forget_pages(blob)
                done = tell({"root": str(root), "rate": RATE, "seed": seed, "hints": hints})
                if done["wrong"]:
                    raise WrongBytes(name, f"{done['wrong']} of {done['files']} files")
                outcome.checked += done["files"]
                micros = [seconds * 1e6 for seconds in done["spent"]]
                tails.setdefault(name, []).append(quantiles(micros, n=100)[98])
                return float(median(micros))

            contenders = {
                "ext4": lambda seed: read("ext4", stage.storage / ROOT, seed),
                "mount, no hints": lambda seed: read("mount, no hints", mount.point, seed),
                "mount, hints": lambda seed: read("mount, hints", mount.point, seed, hints=True),
            }
            native, without, hinted = in_turns(contenders, plan.hint_rounds, "us", stage.step).values()
    outcome.series += [native, without, hinted]
    outcome.series += [Series(f"{name}, slowest of 100", "us", values) for name, values in tails.items()]
    outcome.goals.append(Goal(hinted.over(native, "mount with hints / ext4, time"), MOST_OF_NATIVE, at_least=False))
