"""Running the command `cachefs`: in this process (fast), or as users do (the installed script, in a process)."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cachefs_sidecar.cli import main

# A command that takes longer hangs.
SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def said(self) -> str:
        """All it said, after checking that it is fit for people: no traceback, every line of stderr by its name."""
        assert "Traceback" not in self.err, self.err
        assert all(line.startswith("cachefs: ") for line in self.err.splitlines()), self.err
        return self.out + self.err

    def ok(self) -> Outcome:
        assert self.code == 0, self
        return self

    def failed(self, code: int, *words: str) -> Outcome:
        """It failed with this code, in one or two lines that have these words."""
        assert self.code == code, self
        lines = [line for line in self.err.splitlines() if not line.startswith("cachefs: warning: ")]
        assert 1 <= len(lines) <= 2, self.err
        for word in words:
            assert word in self.said, f"{word!r} is not in {self.said!r}"
        return self


class CommandLine:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Outcome:
        self._capture.readouterr()
        code = main([str(a) for a in arguments])
        out, err = self._capture.readouterr()
        return Outcome(code, out, err)


def script(
    *arguments: str | Path, stdin: bytes = b"", environ: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
) -> Outcome:
    """Run the installed console script."""
    command = [*wrapper, *script_of(*arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=SECONDS, check=False, env={**os.environ, **(environ or {})}
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def script_of(*arguments: str | Path) -> list[str]:
    """The command line that `script` runs."""
    return [str(Path(sysconfig.get_path("scripts")) / "cachefs"), *map(str, arguments)]


def s3(options: Mapping[str, Any]) -> list[str]:
    """--origin-option arguments for a test bucket; credentials by environment variables, see `credentials`."""
    return [
        "--origin-option",
        f"endpoint_url={options['endpoint_url']}",
        "--origin-option",
        f"client_kwargs.region_name={options['client_kwargs']['region_name']}",
        "--origin-option",
        "key=@env:TEST_KEY",
        "--origin-option",
        "secret=@env:TEST_SECRET",
    ]


def credentials(options: Mapping[str, Any]) -> dict[str, str]:
    return {"TEST_KEY": options["key"], "TEST_SECRET": options["secret"]}
