"""The micro-benchmarks run, and their comparison flags what became slower."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from bench import compare
from bench.micro import IMAGE, Pair, opening
from cachefs.config import CacheConfig
from cachefs.store import Reader, Store

ROOT = Path(__file__).parents[1]


def test_they_run():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench/micro.py", "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench/micro.py", "--collect-only", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.partition("::")[2] for line in collected.stdout.splitlines() if "::" in line}
    assert names == json.loads(compare.BASELINE.read_bytes())["ratios"].keys()


@pytest.fixture
def hit(tmp_path: Path) -> Callable[[], None]:
    config = CacheConfig.make(tmp_path / "store", min_free=0)
    Store.open(config).put(bytes(IMAGE), links=[("d" * 32, "a" * 32)])
    reader = Reader(config.dirs)

    def hit() -> None:
        found = reader.open("d" * 32, "a" * 32)
        assert found is not None
        os.close(found[0])

    return hit


def test_a_path_that_became_a_fifth_slower_is_flagged(tmp_path: Path, hit: Callable[[], None]):
    file = tmp_path / "reference"
    file.write_bytes(bytes(IMAGE))
    reference, turn = opening(str(file)), itertools.count()

    def slowed() -> None:
        hit()
        if next(turn) % 5 == 0:
            hit()

    def best(operation: Callable[[], None]) -> float:
        return min(Pair(operation, reference).ratio() for _ in range(1 + compare.AGAIN))

    def found() -> tuple[float, float]:
        """How much slower than before the same path seems to be, and the slower one."""
        baseline = {"hit": best(hit)}
        same, slower = (compare.grown(baseline, {"hit": best(each)}).get("hit", 0.0) for each in (hit, slowed))
        return same, slower

    # What else runs may spoil any of the three measurements, the baseline too.
    tries = (found() for _ in range(3))
    assert any(same == 0.0 and 0.15 < slower < 0.5 for same, slower in tries)


def test_growth():
    assert compare.grown({"a": 2.0, "b": 1.0}, {"a": 2.29, "b": 0.5, "new": 9.0}) == {}
    assert compare.grown({"a": 2.0, "b": 1.0}, {"a": 2.4, "b": 1.0}) == {"a": pytest.approx(0.2)}


@pytest.mark.parametrize("passing", [True, False], ids=["noise", "slower"])
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], passing: bool):
    """What looks slower is measured again, it alone; it is flagged when it stays so."""
    baseline: Mapping[str, float] = json.loads(compare.BASELINE.read_bytes())["ratios"]
    victim = "test_wire_read"
    asked: list[tuple[str, ...]] = []

    def measure(names: Sequence[str] = ()) -> dict[str, float]:
        asked.append(tuple(names))
        ratios = {name: baseline[name] for name in names or baseline}
        if not (names and passing):
            ratios[victim] *= 1.2
        return ratios

    monkeypatch.setattr(compare, "measure", measure)
    assert compare.main([]) == (0 if passing else 1)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out if "SLOWER" in line] == ([] if passing else [victim])
    assert asked == [(), (victim,)] if passing else [(), (victim,), (victim,)]
