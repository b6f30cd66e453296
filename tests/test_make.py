"""What make says and does on a machine where something is missing. Programs are stood in for; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "bin").mkdir()
    return folder


def stand_in(clone: Path, name: str, script: str) -> None:
    file = clone.parent / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def make(clone: Path, *arguments: str) -> tuple[int, str]:
    environ = {"PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}", "HOME": str(clone.parent)}
    done = subprocess.run(["make", *arguments], cwd=clone, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("cachefs: ")]


def test_no_python(clone):
    status, said = make(clone, "check", "PYTHON=no-such-python")
    assert status
    assert len(ours(said)) == 1
    assert "Python 3.11 or newer is missing" in said


def python_without_venv(clone: Path) -> None:
    """A Debian python3 without python3-venv, until apt-get has "installed" it."""
    mark = clone.parent / "installed"
    refuse = f'case "$*" in *ensurepip*) test -e {mark} || exit 1;; *"-m venv"*) exit 7;; esac'
    stand_in(clone, "python3", f'{refuse}\nexec {sys.executable} "$@"')


def test_no_venv_module_and_not_root(clone):
    python_without_venv(clone)
    stand_in(clone, "id", "echo 1000")
    status, said = make(clone, "check", "PYTHON=python3")
    assert status
    assert len(ours(said)) == 1
    assert f"sudo apt-get install python3.{sys.version_info.minor}-venv" in said


def test_no_venv_module_as_root(clone):
    python_without_venv(clone)
    stand_in(clone, "id", "echo 0")
    log = clone.parent / "apt.log"
    stand_in(clone, "apt-get", f'echo "$*" >> {log}; touch {clone.parent / "installed"}')
    status, said = make(clone, "check", "PYTHON=python3")
    assert status  # the stand-in makes no environment
    assert not ours(said)
    assert f"install python3.{sys.version_info.minor}-venv" in log.read_text()


@pytest.mark.parametrize("uid", [0, 1000])
def test_missing_debian_packages_stop_nothing(clone, uid):
    stand_in(clone, "id", f"echo {uid}")
    stand_in(clone, "apt-get", "echo E: no network; exit 100")
    for name in ("sh", "bash", "make", "mktemp", "tail", "rm"):  # a machine with these and no others
        found = shutil.which(name)
        assert found is not None
        (clone.parent / "bin" / name).symlink_to(found)
    environ = {"PATH": str(clone.parent / "bin")}
    done = subprocess.run(["make", "system"], cwd=clone, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(ours(done.stderr)) == 1
    assert "sudo apt-get install fuse3 rsync" in done.stderr
    assert ("E: no network" in done.stderr) == (uid == 0)


def test_pip_that_fails_is_reported_and_tried_again(clone):
    copy = f"mkdir -p .venv/bin; cp {clone.parent}/bin/pip .venv/bin/python"
    stand_in(clone, "python3", f'case "$*" in *"-m venv"*) {copy};; *) exec {sys.executable} "$@";; esac')
    stand_in(clone, "pip", "echo 'ERROR: No matching distribution found' >&2; exit 1")
    for _ in range(2):
        status, said = make(clone, "check", "PYTHON=python3")
        assert status
        assert "No matching distribution" in said
        assert "pip could not install" in said
