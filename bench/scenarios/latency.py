"""How long a single read takes at worst: open + read + close of hot images, file by file in turns.

One reader takes each file from the local disk and from the mount, now one first, now the other, so that whatever stops
the reader for a moment stops both alike. All pages are in memory, in the state of files that were on the disk before.
"""

from __future__ import annotations

from bench.outcome import Goal, Outcome, Series
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Stage

QUESTION = "Is the slowest hundredth of hot reads as fast through the mount as on the local disk?"

P99_AT_MOST = 1.2


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB in the page cache, shuffled, 1 reader; os.open, os.readv, os.close"
    )
    with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home) as mount:
        native = stage.native()
        way = native | {"kind": "pair", "roots": [native["root"], str(mount.point)]}
        stage.forget_pages()
        with Team("pair", way, stage.environ) as team:
            for _ in range(2):  # fetched, and in the page cache
                team.run(0)
            series: dict[str, list[float]] = {}
            for number in range(plan.rounds):
                for who, times in zip(("native", "mount"), team.answers(number)[0]["times"], strict=True):
                    for what, value in times.items():
                        series.setdefault(f"{who}, {what}", []).append(value)
                stage.step(f"round {number + 1}")
    outcome.checked += 2 * (plan.rounds + 2) * plan.files
    found = {name: Series(name, "us", values) for name, values in series.items()}
    outcome.series += list(found.values())
    ratio = found["mount, p99"].over(found["native, p99"], "mount / native, p99")
    outcome.goals.append(Goal(ratio, P99_AT_MOST, at_least=False))
