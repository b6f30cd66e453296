"""The comparisons of the bench, tiny: each measures, catches whoever is wrong or fails, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import report
from bench.comparisons import COMPARISONS, accelerator, accelerators, process
from bench.comparisons.findings import Figure, Findings
from bench.comparisons.ground import Ground
from bench.comparisons.markdown import page
from bench.comparisons.turns import pick
from bench.contenders import CONTENDERS, load
from bench.plan import Plan
from bench.scenarios import SCENARIOS
from bench.stage import part, stage

ROOT = Path(__file__).parents[1]

TINY = Plan(
    photographs=12,
    comparison_rounds=1,
    loader_workers=(2,),
    loader_rounds=1,
    overfull_mib=2,
    shard_mib=1,
    ranges=16,
    shard_rounds=1,
    listed_names=30,
    name_rounds=1,
    workloads=("tiny",),
    accelerators=(1, 2),
    accelerator_rounds=1,
)
BROKEN = "tests.broken_contenders"


def compare(folder: Path, name: str, contenders: list[str]) -> Findings:
    comparison = COMPARISONS[name]
    findings = Findings(comparison.question)
    with stage(folder, 0, lambda _: None) as whole, part(whole) as own:
        comparison.measure(Ground(own, TINY), pick(contenders, findings, comparison.unfit), findings)
    return findings


@pytest.mark.needs_fuse
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison(tmp_path, monkeypatch, name):
    tiny = accelerators.Workload("tiny", "none", sample=1000, batch=4, seconds=0.01, passes=0.01, files=16, steps=4)
    monkeypatch.setattr(accelerators, "WORKLOADS", (tiny,))
    findings = compare(tmp_path, name, ["native", "mount"])
    assert not findings.failed
    assert not findings.wrong
    assert findings.checked
    fit = [who for who in ("native", "mount") if not COMPARISONS[name].unfit(load(who))]
    for figure in findings.figures:
        assert figure.values.keys() <= set(fit)
        assert "mount" in figure.values, figure.title
        assert all(value >= 0 for values in figure.values.values() for value in values)
    if name == "accelerators":
        assert findings.figures[0].values == {"native": [2], "mount": [2]}
        assert all(0 < value <= 100 for figure in findings.figures[1:] for [value] in figure.values.values())
    if name == "capacity":
        assert findings.figures[-1].values["mount"][0] < 1.25
    assert list(tmp_path.iterdir()) == []


def test_the_broken_are_caught(tmp_path, monkeypatch, capsys):
    """Wrong bytes, missing files, errors, endless waits, packages that are not there: all are said, none stops it."""
    monkeypatch.setattr(program, "QUICK", TINY)
    monkeypatch.setattr(process, "ORDER_SECONDS", 15.0)
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    kinds = ["Flipped", "Forgetful", "Failing", "Hanging", "Absent"]
    asked = [word for kind in kinds for word in ("--contender", f"{BROKEN}:{kind}")]
    arguments = ["--quick", "--scenario", "epochs", "--contender", "native", *asked]
    assert program.main([*arguments, "--folder", str(work), "--output", str(output)]) == 1
    result = json.loads((output / "results.json").read_bytes())
    assert not result["correct"]
    [epochs] = result["comparisons"].values()
    assert epochs["wrong"] == {
        f"{BROKEN}:Flipped": f"1 reads gave wrong bytes, such as {photograph(3)}",
        f"{BROKEN}:Forgetful": f"1 files never came, such as {photograph(3)}",
    }
    assert "not today" in epochs["failed"].pop(f"{BROKEN}:Failing")
    assert epochs["failed"] == {f"{BROKEN}:Hanging": "no answer within 15 s"}
    assert epochs["skipped"] == {f"{BROKEN}:Absent": "the package cachefs-no-such-package is not installed"}
    assert all(set(figure["contenders"]) <= {"native"} for figure in epochs["figures"])
    shown = capsys.readouterr().out
    written = (output / "REPORT.md").read_text()
    for text in (shown, written):
        assert "WRONG BYTES" in text
        assert "not today" in text
        assert "cachefs-no-such-package" in text
    assert list(work.iterdir()) == []


def photograph(number: int) -> str:
    from cachefs_sidecar.testbed.photographs import SOURCES

    kind = list(SOURCES)[number % len(SOURCES)]
    return f"{kind}/{kind}_{number:05d}.jpg"


@pytest.mark.needs_fuse
def test_interrupted_a_comparison_takes_everything_away(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "--quick", "--scenario", "shards", "--contender", "mount", "--rounds", "9999"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as bench:
        deadline = time.monotonic() + 200
        while f"{tmp_path}/" not in Path("/proc/self/mounts").read_text():
            assert time.monotonic() < deadline
            assert bench.poll() is None
            time.sleep(0.02)
        os.killpg(bench.pid, signal.SIGINT)  # as a terminal does: to everything in the group
        _, said = bench.communicate(timeout=120)
    assert bench.returncode == 130, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_no_two_scenarios_have_the_same_name():
    assert not SCENARIOS.keys() & COMPARISONS.keys()


def test_every_contender_loads_and_says_how_it_is_set_up():
    for name in CONTENDERS:
        kind = load(name)
        assert kind.title
        assert kind.settings
        assert isinstance(kind.missing(), str)
    with pytest.raises(LookupError, match="no contender is called 'nobody'"):
        load("nobody")


def figure(**values: float) -> Figure:
    return Figure("speed", "images/s", more=True, values={name: [value] for name, value in values.items()})


def test_who_is_ahead():
    behind = figure(native=100, mount=20, url=10, rclone=30).standing()
    assert behind is not None
    assert (behind.theirs, behind.ours, behind.ahead, behind.equal) == ("rclone", "mount", False, False)
    assert behind.times == pytest.approx(1.5)
    ahead = figure(native=100, mount=20, rclone=10).standing()
    assert ahead is not None
    assert ahead.ahead
    less = replace(figure(mount=2.0, rclone=1.0), more=False).standing()
    assert less is not None
    assert not less.ahead
    assert figure(mount=0, rclone=0).standing().equal  # type: ignore[union-attr]
    assert figure(native=100, mount=20).standing() is None
    assert figure(native=100, rclone=20).standing() is None


def test_the_page_says_where_we_lose_and_why(monkeypatch, tmp_path):
    remarks = tmp_path / "remarks.toml"
    remarks.write_text('[epochs]\n"speed" = "Because it is so."\n')
    monkeypatch.setattr("bench.comparisons.markdown.REMARKS", remarks)
    findings = Findings("How fast?", figures=[figure(native=100, mount=20, rclone=30)], failed={"url": "it broke"},
                        skipped={"litdata": "it was not there", "rclone": "not here"})  # fmt: skip
    environment = {"date": "today", "kernel": "6", "cores": 2, "processor": "p", "memory_gib": 1, "filesystem": "ext4",
                   "disk": "d", "load": 0, "python": "3", "versions": {}}  # fmt: skip
    text = page(environment, {}, {"epochs": findings}, {"epochs": "report/epochs.svg"})
    assert "**epochs, speed**: rclone mount is ahead by 1.50 x. Because it is so." in text
    assert "![epochs](report/epochs.svg)" in text
    assert "Failed: cachefs URL: it broke" in text
    assert "- Skipped: litdata: it was not there." in text  # whatever is installed where the page is written
    assert "- Skipped: rclone" not in text  # it takes part in something

    report.write(tmp_path, report.as_dict(environment, {}, {"epochs": findings}))
    assert program.main(["--again", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "REPORT.md").read_text() == text
    assert "rclone mount" in (tmp_path / "report" / "epochs.svg").read_text()


def test_utilization_is_that_of_dlio():
    """compute_metrics_train: the sum of computing times without the first, over the whole less the first step."""
    computing, whole, first = [0.2] * 5, 2.0, 0.6
    assert accelerator.utilization(0.2, 5, whole, first) == pytest.approx(sum(computing[1:]) / (whole - first))


def test_accelerators_share_each_epoch():
    names = [f"{number}" for number in range(10)]
    order = {"accelerators": 2, "steps": 3, "batch": 5, "seed": 1}
    shares = [accelerator.samples_of(names, rank, order) for rank in range(2)]
    assert [len(share) for share in shares] == [15, 15]
    for epoch in range(3):
        assert sorted(shares[0][5 * epoch : 5 * epoch + 5] + shares[1][5 * epoch : 5 * epoch + 5]) == names
