"""The benchmarks, tiny: that each scenario measures what it says, notices wrong bytes and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest

from bench import machine
from bench.__main__ import main
from bench.clusters.ground import shares
from bench.clusters.rank import Order
from bench.outcome import Goal, Outcome, Series, WrongBytes, in_turns
from bench.readers import Team
from bench.scenarios import SCENARIOS
from bench.stage import ROOT, Stage, Unusable, stage
from cachefs.digest import content_key
from cachefs_sidecar.testbed.network import why_no_network

ROOT_OF_REPOSITORY = Path(__file__).parents[1]
TINY = ["--files", "16", "--names", "2000", "--found", "2000", "--shard", "9", "--rounds", "1", "--kills", "10"]
TINY += ["--objects", "64", "--trained-steps", "2", "--shared", "60", "--shared-nodes", "2"]
TINY += ["--row", "balance", "--row", "kill"]  # of a dozen rows, most of which start clusters by the half dozen


def environ_in(folder: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(folder)}


@pytest.fixture
def small(tmp_path):
    """A stage of a few files."""
    made = Stage(tmp_path, ExitStack())
    with made.stack:
        made.make_files(8)
        yield made


@pytest.mark.needs_fuse
@pytest.mark.timeout(900)  # some take 30 s where nothing else runs
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario(tmp_path, name):
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "bench", *TINY, "--scenario", name, "--json", "--output", str(output)],
        cwd=ROOT_OF_REPOSITORY,
        env=environ_in(work),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((output / "results.json").read_bytes())
    assert result["correct"]
    assert list(result["scenarios"]) == [name]
    assert {"kernel", "cores", "filesystem", "date", "versions"} <= result["environment"].keys()
    scenario = result["scenarios"][name]
    assert scenario["goals"]
    for series in [*scenario["series"], *(goal["figure"] for goal in scenario["goals"])]:
        assert series["min"] > 0 or "CPU" in series["name"] or series["name"].endswith(("failed reads", "bytes lost"))
        assert series["min"] <= series["median"] <= series["max"]
    rootless = name == "cluster" and why_no_network()
    assert name in ("million", "shard") or rootless or scenario["checked"] >= 2 * 16
    assert list(work.iterdir()) == []


@pytest.mark.needs_fuse
def test_a_wrong_byte_is_noticed(tmp_path, monkeypatch, capsys):
    make = Stage.make_files

    def make_and_spoil(self: Stage, count: int) -> None:
        make(self, count)
        keys = json.loads(self.manifest.read_bytes())
        with (self.storage / ROOT / min(keys)).open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))

    monkeypatch.setattr(Stage, "make_files", make_and_spoil)
    work = tmp_path / "work"
    work.mkdir()
    assert main([*TINY, "--scenario", "hot", "--folder", str(work), "--output", str(tmp_path / "out")]) == 1
    assert "WRONG BYTES native: 1 of 16 files" in capsys.readouterr().out
    assert list(work.iterdir()) == []
    assert not json.loads((tmp_path / "out" / "results.json").read_bytes())["correct"]


@pytest.mark.parametrize("readers", [1, 4])
def test_a_reader_compares_what_it_read(small, readers):
    way = small.way("files", root=str(small.storage / ROOT), readers=readers)
    with Team("files", way, small.environ, 2) as team:
        done = team.run(1)
        assert done.files == 8
        assert done.bytes == sum(file.stat().st_size for file in small._files())
        cut = max(small._files())
        os.truncate(cut, cut.stat().st_size - 1)
        with pytest.raises(WrongBytes, match=f"1 of 8 files, such as 0000/{cut.name}"):
            team.run(2)


def test_written_again_the_files_are_the_same(small):
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in small._files()}
    small.write_again()
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in small._files()}


@pytest.mark.needs_fuse
def test_interrupted_it_takes_everything_away(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "--files", "16", "--rounds", "100000", "--scenario", "hot"],
        cwd=ROOT_OF_REPOSITORY,
        env=environ_in(tmp_path),
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


@pytest.mark.needs_fuse
@pytest.mark.needs_root
@pytest.mark.skipif(bool(why_no_network()), reason=why_no_network())
def test_interrupted_it_takes_nodes_and_networks_away(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *TINY, "--scenario", "cluster", "--row", "once"],
        cwd=ROOT_OF_REPOSITORY,
        env=environ_in(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as bench:
        while not (addresses := nodes_below(tmp_path)):
            assert bench.poll() is None
            time.sleep(0.02)
        here = f"{addresses.pop().rpartition('.')[0]}.254/24"
        bridge = devices_with(here)
        os.killpg(bench.pid, signal.SIGINT)
        _, said = bench.communicate(timeout=120)
    assert bench.returncode == 130, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert not nodes_below(tmp_path)
    assert bridge
    assert not bridge & devices_with(here)


def devices_with(address: str) -> set[str]:
    """Their numbers. A test beside this one may be the next with the same address, on a device of another number."""
    said = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    return {line.partition(":")[0] for line in said.splitlines() if f" {address} " in line}


def nodes_below(folder: Path) -> set[str]:
    """Addresses of the nodes that run with caches there."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "--listen" in words and any(word.startswith(f"{folder}/") for word in words):
                found.add(words[words.index("--listen") + 1].partition(":")[0])
    return found


class Faulty:
    """A file system that has one object right, one wrong, and one not."""

    def cat_file(self, name: str) -> bytes:
        if name == "absent":
            raise FileNotFoundError(name)
        return name.encode()


def test_a_rank_tells_what_was_wrong_and_what_failed():
    keys = [content_key(name) for name in (b"right", b"another", b"absent")]
    done = Order(Faulty(), ["right", "wrong", "absent"], keys, None).read([[0, 1, 2], [0, 0]], 2)
    assert (done["files"], done["failed"], done["wrong"]) == (5, 1, ["wrong"])
    assert done["errors"] == ["FileNotFoundError: absent"]
    assert done["slowest"] >= done["p99"] >= done["p50"] > 0


def test_each_object_is_one_ranks_and_another_ones_next_time():
    first, second = shares(list(range(10)), 3), shares(list(range(10)), 3, turn=1)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert all(not set(mine) & set(then) for mine, then in zip(first, second, strict=True))


def test_in_memory_it_does_not_measure():
    memory = Path("/dev/shm")
    if machine.file_system(memory) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with pytest.raises(Unusable), stage(memory, 0, print):
        pass


def test_contenders_take_turns():
    order: list[str] = []

    def contender(name: str, value: float):
        def run(number: int) -> float:
            order.append(f"{name}{number}")
            return value + number

        return run

    found = in_turns({"a": contender("a", 1.0), "b": contender("b", 2.0)}, 3, "s", lambda _: None)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert found["b"].over(found["a"], "b / a").values == [2 / 1, 3 / 2, 4 / 3]


def test_a_goal_says_by_how_much_it_is_missed():
    series = Series("x", "x", [0.7, 0.76, 0.9])
    assert Goal(series, 0.95, at_least=True).verdict == "MISSED by 20%"
    assert Goal(series, 0.75, at_least=True).verdict == "PASS"
    assert Goal(series, 0.75, at_least=False).verdict == "MISSED by 1%"
    assert not Outcome("?").wrong


def test_what_a_process_costs():
    before = machine.cpu_seconds(os.getpid())
    while time.process_time() < before + 0.05:
        pass
    assert machine.cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.05)
    assert machine.pss_bytes(os.getpid()) > 1e6
