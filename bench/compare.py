"""`python -m bench.compare`: the micro-benchmarks against their baseline; exit status 1 when one became slower.

What looks slower is measured again, twice at most, and its best counts: noise passes, a slower path does not.
`--update` writes the baseline (bench/micro.json) anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import machine

FOLDER = Path(__file__).parent
BASELINE = FOLDER / "micro.json"

# A ratio to the reference that grew by more than this is a slower path.
MOST_GROWTH = 0.15
AGAIN = 2


def grown(baseline: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """name -> growth (0.2 = a fifth slower) of what grew by more than MOST_GROWTH. What is new has no growth."""
    growth = {name: ratio / baseline[name] - 1 for name, ratio in now.items() if name in baseline}
    return {name: by for name, by in growth.items() if by > MOST_GROWTH}


def measure(names: Sequence[str] = ()) -> dict[str, float]:
    """name -> ratio, of all micro-benchmarks or of these. Raises RuntimeError when they do not run."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", f"--benchmark-json={file.name}"]
        command += ["-p", "no:cacheprovider"]
        command += [f"{FOLDER / 'micro.py'}::{name}" for name in names] or [str(FOLDER / "micro.py")]
        done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the micro-benchmarks do not run:\n{done.stdout}{done.stderr}")
        benchmarks = json.loads(Path(file.name).read_bytes())["benchmarks"]
    return {each["name"]: round(each["extra_info"]["ratio"], 4) for each in benchmarks}


def best_of(baseline: Mapping[str, float], now: dict[str, float]) -> dict[str, float]:
    """`now`, with what grew measured again."""
    for _ in range(AGAIN):
        suspects = grown(baseline, now)
        if not suspects:
            break
        for name, ratio in measure(list(suspects)).items():
            now[name] = min(now[name], ratio)
    return now


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    options = parser.parse_args(arguments)
    now = measure()
    if options.update:
        runs = [now, *(measure() for _ in range(AGAIN))]
        now = {name: statistics.median(run[name] for run in runs) for name in now}
        where = machine.line(machine.environment(FOLDER))
        BASELINE.write_text(json.dumps({"measured": where, "ratios": now}, indent=2) + "\n")
        print(f"Written: {BASELINE}")
        return 0
    baseline: dict[str, float] = json.loads(BASELINE.read_bytes())["ratios"]
    now = best_of(baseline, now)
    slower = grown(baseline, now)
    for name, ratio in now.items():
        before = f"{baseline[name]:8.2f} before" if name in baseline else "     new"
        print(f"{name:32} {ratio:8.2f} {before}{'  SLOWER' if name in slower else ''}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
