"""What deploy/ delivers starts what exists."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cachefs_sidecar.cli import MOST_WORKERS
from tests.command_line import script

UNIT = Path(__file__).resolve().parents[1] / "deploy" / "systemd" / "cachefs@.service"


def service() -> configparser.SectionProxy:
    # strict=False: systemd has keys that may stand several times.
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return unit["Service"]


@pytest.mark.parametrize("key", ["ExecStart", "ExecReload", "ExecStop"])
def test_the_unit_runs_commands_and_options_that_exist(key):
    words = shlex.split(service()[key])
    if words[0] == "-/bin/sh":  # what it does unless the unit is to be started again
        words = shlex.split(words[2].partition("exec ")[2])
    assert words[:2] == ["/usr/bin/env", "cachefs"]
    helped = script(words[2], "--help").ok().out
    for option in (word for word in words if word.startswith("--")):
        assert option in helped, option


def test_the_store_has_room_for_two_crews_of_the_most_workers():
    """While one keeper follows another both are in it."""
    unit = service()
    assert int(unit["FileDescriptorStoreMax"]) >= 2 * MOST_WORKERS
    assert unit["Environment"] == f"FDSTORE={unit['FileDescriptorStoreMax']}"


@pytest.mark.parametrize(
    ("jobs", "unmounts"),
    [("", True), ("12 cachefs@x.service stop running", True), ("12 cachefs@x.service restart running", False)],
)
def test_the_unit_unmounts_unless_it_is_to_be_started_again(tmp_path, jobs, unmounts):
    for name, says in (("systemctl", f'echo "{jobs}"'), ("cachefs", f'echo "$@" > {tmp_path}/told')):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{says}\n")
        program.chmod(0o755)
    # As systemd reads it: "$$" is a dollar, %n the unit.
    words = shlex.split(service()["ExecStop"].removeprefix("-").replace("$$", "$").replace("%n", "cachefs@x.service"))
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MOUNTPOINT": "/data of x"}
    subprocess.run(words, env=environ, check=True, timeout=20)
    told = tmp_path / "told"
    assert told.exists() == unmounts
    assert not unmounts or told.read_text() == "umount --lazy /data of x\n"


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "cachefs@imagenet.service"
    unit.write_text(UNIT.read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    # Older versions say of what they do not know that they ignore it, as is meant.
    complaints = [
        line for line in done.stderr.splitlines() if unit.name in line and "FileDescriptorStorePreserve" not in line
    ]
    assert not complaints, complaints


# --- dask/ ---

DASK = UNIT.parents[1] / "dask"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DASK / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_recipes_for_dask_can_be_read():
    python, shell = blocks("python"), blocks("sh")
    assert len(python) == 2
    assert len(shell) == 3
    for block in python:
        ast.parse(block)
    for block in shell:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=20)


def test_recipes_for_dask_name_commands_and_options_that_exist():
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    commands = [words for words in lines if words[:1] == ["cachefs"]]
    assert {words[1] for words in commands} == {"warm", "seal"}
    for words in commands:
        helped = script(words[1], "--help").ok().out
        for option in (word for word in words if word.startswith("--")):
            assert option in helped, option


def test_the_manifest_for_dask_kubernetes():
    yaml = pytest.importorskip("yaml")  # with dask
    cluster = yaml.safe_load((DASK / "cluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    spec, name = cluster["spec"], cluster["metadata"]["name"]
    (worker,) = spec["worker"]["spec"]["containers"]
    (scheduler,) = spec["scheduler"]["spec"]["containers"]
    assert worker["args"][0] == "dask-worker"
    assert scheduler["args"][0] == "dask-scheduler"
    mounts, volumes = worker["volumeMounts"], spec["worker"]["spec"]["volumes"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
    assert {"name": "CACHEFS_DIR", "value": mounts[0]["mountPath"]} in worker["env"]
    # The operator's own labels and names, by which its service and our affinity find the pods.
    selector = spec["scheduler"]["service"]["selector"]
    assert selector == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    ports = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert {port["targetPort"]: port["port"] for port in spec["scheduler"]["service"]["ports"]} == ports
    (term,) = spec["worker"]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"] == selector | {"dask.org/component": "worker"}
    assert f"service/{name}-scheduler" in (DASK / "README.md").read_text()
