"""One large object, from end to end and record by record: through the mount in both its modes, and from the disk.

The local file is the object's own blob in the cache, opened past the mount: the same bytes in the same places of the
disk. A copy elsewhere on it may be read half or twice as fast, and whoever reads it as the second twice as fast as the
first (measured on a virtual disk): so before each turn that reads from the disk it is read once for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.outcome import Goal, Outcome, Series, in_turns
from bench.plan import Plan
from bench.readers import Pass, Team
from bench.stage import RECORD, RECORDS_IN_STRETCH, SHARD, SHARDS, STRETCH, Mounted, Stage

QUESTION = "Is a large object read through the mount as fast as a local file: from end to end, and record by record?"

PASSTHROUGH, OPEN_FREE = "passthrough", "open-free"


@dataclass(frozen=True)
class _Case:
    """way: how it is read, see bench.reader. hot: from the page cache, else from the SSD. least: of native speed."""

    title: str
    io: str
    way: str
    hot: bool
    least: float


CASES = (
    _Case("end to end, hot", PASSTHROUGH, "stretches", True, 0.95),
    _Case("end to end, page cache dropped", PASSTHROUGH, "stretches", False, 0.95),
    _Case("end to end, page cache dropped", OPEN_FREE, "stretches", False, 0.80),
    _Case("records, page cache dropped", PASSTHROUGH, "records", False, 0.85),
)


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    records = plan.shard // STRETCH * RECORDS_IN_STRETCH
    outcome.conditions.append(
        f"an object of {plan.shard >> 20:,} MiB on the SSD; end to end: os.readv of {STRETCH >> 20} MiB; records: "
        f"{records:,} os.preadv of {RECORD:,} bytes, shuffled, one at a time; one reader"
    )
    outcome.notes.append("native is the same blob of the cache, opened past the mount")
    outcome.notes.append(
        "records lie all over the object, as they would in a larger one: of a page cache that was dropped, none profits"
    )
    manifests = dict(zip(("stretches", "records"), stage.make_shard(plan.shard), strict=True))
    with stage.cache() as home:
        for io in (OPEN_FREE, PASSTHROUGH):
            with stage.mounted(f"s3://{SHARDS}", home, io=io) as mount:
                if mount.io != io:
                    outcome.notes.append(f"{io} is not to be had here: `cachefs status` says why")
                    continue
                _read(mount.point / SHARD)  # when it is closed it is a whole object of the cache
                os.sync()
                for case in CASES:
                    if case.io == io:
                        _compare(stage, plan, outcome, case, mount, manifests[case.way])


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        while opened.read(STRETCH):
            pass


def _blob(home: Path) -> Path:
    """The object in the cache: its only large one."""
    return max((home / "blobs").glob("*/*"), key=lambda file: file.stat().st_size)


def _compare(stage: Stage, plan: Plan, outcome: Outcome, case: _Case, mount: Mounted, manifest: Path) -> None:
    size = STRETCH if case.way == "stretches" else RECORD
    local, ours = _blob(mount.home), mount.point / SHARD

    def way(file: Path) -> dict[str, object]:
        return stage.way(case.way, file=str(file), size=size) | {"manifest": str(manifest)}

    with (
        Team("native", way(local), stage.environ) as native,
        Team(f"mount, {case.io}", way(ours), stage.environ) as mounted,
    ):
        if case.hot:
            for team in (native, mounted):
                team.run(0)
        costs: list[float] = []

        def prepare() -> None:
            if not case.hot:
                _read(local)
                stage.rest()
                stage.forget_below(mount.point, mount.home / "blobs")

        def here(seed: int) -> float:
            prepare()
            return _speed(native.run(seed))

        def there(seed: int) -> float:
            prepare()
            before = mount.cpu_seconds
            done = mounted.run(seed)
            costs.append((mount.cpu_seconds - before) * 1e3 / (done.bytes / 1e9))
            return _speed(done)

        title = f"{case.title}, {case.io}"
        contenders: dict[str, Callable[[int], float]] = {f"native, {title}": here, f"mount, {title}": there}
        direct, through = in_turns(contenders, plan.cold_rounds, "MB/s", stage.step).values()
    outcome.series += [direct, through, Series(f"CPU of keeper and workers, {title}", "ms/GB", costs)]
    outcome.goals.append(Goal(through.over(direct, f"mount / native, {title}"), case.least, at_least=True))


def _speed(done: Pass) -> float:
    return done.bytes / done.seconds / 1e6
