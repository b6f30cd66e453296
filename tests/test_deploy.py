"""What deploy/ delivers starts what exists."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

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
    _, found, command = service()[key].partition("/usr/bin/env cachefs ")
    assert found
    words = shlex.split(command.rstrip("'"))
    helped = script(words[0], "--help").ok().out
    for option in (word for word in words if word.startswith("--")):
        assert option in helped, option


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "cachefs@imagenet.service"
    unit.write_text(UNIT.read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    # Which systemd versions before 254 do not know, and say so; the unit works there too.
    known = (line for line in done.stderr.splitlines() if "FileDescriptorStorePreserve" not in line)
    complaints = [line for line in known if unit.name in line]
    assert not complaints, complaints
