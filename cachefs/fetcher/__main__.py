"""`python -m cachefs.fetcher`: become a detached fetcher. Started by cachefs.client.launch, not by hand.

Settings come on stdin as JSON. One line goes to the descriptor --announce: "ready", or the error as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from cachefs.errors import CacheFSError, FetcherError, to_wire


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cachefs.fetcher")
    parser.add_argument("--announce", type=int, required=True, help="descriptor that learns when we listen")
    announce = parser.parse_args().announce
    settings = json.loads(sys.stdin.buffer.read())
    # The starter waits for this process; the fetcher is its orphaned child, so nobody is left to reap it but init.
    if os.fork():
        return 0
    try:
        _serve(settings, announce)
    except CacheFSError as error:
        _say(announce, json.dumps({"error": to_wire(error)}))
        return 1
    except Exception as error:
        wire = to_wire(FetcherError(f"the fetcher could not start: {type(error).__name__}: {error}"))
        _say(announce, json.dumps({"error": wire}))
        raise
    return 0


def _say(announce: int, text: str) -> None:
    try:
        os.write(announce, text.encode())
    except OSError as error:  # already told (EBADF), or the starter is gone (EPIPE): then nobody needs to know
        print(f"nobody heard {text!r}: {error}", file=sys.stderr)  # noqa: T201 - stderr is the log


def _serve(settings: dict[str, object], announce: int) -> None:
    from cachefs.config import CacheConfig
    from cachefs.fetcher.hosting import host
    from cachefs.origin import forget_environment

    forget_environment()  # each reader brings its own credentials; those of whoever started us are not for all

    dirs = settings["dirs"]
    assert isinstance(dirs, list)
    config = CacheConfig.make(
        [str(d) for d in dirs],
        size=settings.get("size"),  # type: ignore[arg-type]
        min_free=str(settings["min_free"]),
        idle=float(str(settings["idle"])),
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal of whoever started us is not for us

    def ready() -> None:
        _say(announce, "ready")
        os.close(announce)

    host(config, ready, log_file=Path(config.home) / "run" / "fetcher.log")


if __name__ == "__main__":
    sys.exit(main())
