"""The repository as its users meet it: what is at the top, what the README says to type, what the files weigh."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {"cachefs", "sidecar", "bench", "deploy", "tests"}
FILES = {"ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}

LARGEST_FILE = 1 << 20


def tracked() -> list[str]:
    """Files that git has or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout (a source archive): what git tracks cannot be asked")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def code_of(page: str) -> list[str]:
    """The lines to type in a page's code blocks, continuation lines joined, prompts and comments removed."""
    lines: list[str] = []
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL):
        if language in ("", "sh", "bash", "console", "shell"):
            joined = block.replace("\\\n", " ")
            lines += [line.strip().removeprefix("$ ").partition(" #")[0] for line in joined.splitlines()]
    return lines


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_nothing_else_is_at_the_top():
    files = tracked()
    folders = {name.split("/")[0] for name in files if "/" in name and not name.startswith(".")}
    assert folders <= FOLDERS
    assert {name for name in files if "/" not in name and not name.startswith(".")} <= FILES
    assert {name.split("/")[0] for name in files if name.startswith(".")} <= {".ci", ".gitignore"}
    assert set(FILES) <= set(files)


def test_no_file_is_large():
    assert not [name for name in tracked() if (ROOT / name).stat().st_size > LARGEST_FILE]


def test_the_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_make_targets_that_pages_name_exist():
    targets = make_targets()
    assert {"help", "demo", "test", "check", "bench", "clean"} <= targets
    for page in ("README.md", "ARCHITECTURE.md"):
        text = (ROOT / page).read_text()
        named = {line.split()[1] for line in code_of(text) if line.startswith("make ")}
        named |= set(re.findall(r"`make ([a-z]+)`", text))
        assert named <= targets, page


def test_commands_and_options_that_the_readme_names_exist():
    helps: dict[str, str] = {}
    for line in code_of((ROOT / "README.md").read_text()):
        words = line.split()
        if len(words) < 2 or words[0] != "cachefs" or words[1].startswith("-"):
            continue
        command = words[1]
        if command not in helps:
            done = subprocess.run(
                [sys.executable, "-m", "cachefs_sidecar", command, "--help"],
                env={"COLUMNS": "200", "TERM": "dumb", "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"README: {line}\n{done.stderr}"
            helps[command] = done.stdout
        for option in [word.partition("=")[0] for word in words[2:] if word.startswith("--")]:
            assert option in helps[command], f"README: {line}"


def test_links_between_pages_lead_somewhere():
    for page in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert (ROOT / link).exists(), f"{page}: {link}"


def test_version_is_said_once():
    import cachefs

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project.get("dynamic", []) or project["version"] == cachefs.__version__


def test_ci_runs_the_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert script.startswith("#!/usr/bin/env bash")
