"""The demonstration, small: its numbers are its own test of the product's promises, so they are looked at here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cachefs_sidecar.demo.report import Outcome, Row
from cachefs_sidecar.demo.ways import NoMount, UrlReader, mounted
from cachefs_sidecar.testbed import Traffic
from cachefs_sidecar.testbed.server import s3_options
from tests.machine import why_no_fuse

DEMO = [sys.executable, "-m", "cachefs_sidecar.demo"]
IMAGES = 60


def environ_in(folder: Path) -> dict[str, str]:
    """Its temporary files go into `folder`, so that a test sees what it leaves."""
    return os.environ | {"TMPDIR": str(folder)}


@pytest.mark.slow
def test_each_object_once_and_then_nothing(tmp_path):
    done = subprocess.run(
        [*DEMO, "--images", str(IMAGES), "--json"],
        env=environ_in(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["broken"] == []
    reads = {(row["way"], row["epoch"]): (row["objects"], row["hit_ratio"]) for row in result["rows"]}
    ways = ["cachefs URL"] if why_no_fuse() else ["cachefs URL", "cachefs mount"]
    for epoch in (1, 2, 3):
        assert reads["s3fs", epoch] == (IMAGES, 0.0)
        for way in ways:
            assert reads[way, epoch] == ((IMAGES, 0.0) if epoch == 1 else (0, 1.0))
    for row in result["rows"]:
        if row["way"] in ways and row["epoch"] > 1:
            assert row["other"] == row["bytes"] == 0
    assert result["checked"] == IMAGES * (3 * (1 + len(ways)) + 1)
    assert list(result["left_out"]) == (["cachefs mount"] if why_no_fuse() else [])
    assert "20 ms" in " ".join(result["conditions"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_takes_everything_away(tmp_path, sign):
    with subprocess.Popen(
        [*DEMO, "--images", "2000"],
        env=environ_in(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as demo:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("cachefs-demo-*/storage/photographs/train/*/*.jpg")):
            assert time.monotonic() < deadline
            assert demo.poll() is None
            time.sleep(0.02)
        os.killpg(demo.pid, sign)  # as a terminal does: to everything in the group
        _, said = demo.communicate(timeout=120)
    assert demo.returncode == 130, said
    assert "taken away" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_without_room_it_says_so(tmp_path):
    done = subprocess.run(
        [*DEMO, "--images", str(10**9)], env=environ_in(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TMPDIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mount_that_fails_is_left_out_with_its_reason(tmp_path):
    options = s3_options("http://127.0.0.1:9", "testbed-key", "testbed-secret")
    (tmp_path / "cache").write_text("a file where a directory should be")
    with (
        pytest.raises(NoMount) as caught,
        mounted("s3://bucket", tmp_path / "mount", tmp_path / "cache", options),
    ):
        pass
    assert str(caught.value)
    assert "testbed-secret" not in str(caught.value)


def test_broken_promises_are_reported(capsys):
    outcome = Outcome(["conditions"])
    once = {"a": 1, "b": 1}
    outcome.judge("way", 1, 2, Traffic({"GET object": 2, "LIST": 1}, once, 10, 10))
    outcome.judge("way", 2, 2, Traffic({}, {}, 0, 0))
    assert not outcome.broken
    outcome.judge("way", 1, 2, Traffic({"GET object": 3}, {"a": 2, "b": 1}, 10, 10))
    outcome.judge("way", 1, 3, Traffic({"GET object": 2}, once, 10, 10))
    outcome.judge("way", 2, 2, Traffic({"HEAD object": 1}, {}, 0, 0))
    assert len(outcome.broken) == 3
    outcome.rows.append(Row("way", 1, 2, 0.5, 3, 0, 10))
    outcome.print(Console(width=100))
    printed = capsys.readouterr().out
    assert printed.count("BROKEN PROMISE") == 3
    assert "was read once" not in printed
    assert json.loads(outcome.json())["ok"] is False


def test_a_reader_shows_no_credentials():
    reader = UrlReader("s3fs", False, "bucket", "s3", {"key": "testbed-key", "secret": "testbed-secret"})
    assert "testbed-secret" not in repr(reader)
