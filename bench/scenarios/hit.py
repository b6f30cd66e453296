"""Cached open + read + close through fsspec: the cachefs URL, and fsspec's own local file system."""

from __future__ import annotations

from bench.outcome import Goal, Outcome, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Stage, credentials

QUESTION = "Once files are cached, is opening them by the fsspec URL as fast as fsspec opens local files?"

MOST_TIMES = 1.5


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB in the page cache, shuffled; `with fs.open(path, 'rb') as f: f.read()`; "
        "one reader"
    )
    with stage.cache() as home:
        options = credentials(stage.s3()) | {"cache_dir": str(home)}
        ours = stage.way("fsspec", protocol="cachefs", options=options, root=ROOT)
        theirs = stage.way("fsspec", protocol="file", options={}, root=str(stage.storage / ROOT))
        with (
            Team("LocalFileSystem", theirs, stage.environ) as local,
            Team("cachefs URL", ours, stage.environ) as cached,
        ):
            for team in (local, cached, local, cached):  # fetched, and in the page cache
                outcome.checked += team.run(0).files
            contenders = {
                "LocalFileSystem": lambda seed: 1e6 / local.run(seed).rate,
                "cachefs URL": lambda seed: 1e6 / cached.run(seed).rate,
            }
            there, here = in_turns(contenders, plan.rounds, "us/file", stage.step).values()
        outcome.checked += 2 * plan.rounds * plan.files
        outcome.series += [there, here]
        outcome.goals.append(Goal(here.over(there, "cachefs URL / LocalFileSystem"), MOST_TIMES, at_least=False))
