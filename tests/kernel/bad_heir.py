"""An installation to restart to that is not as it should be: something happens at one point of the hand-over.

`installation(folder, what, when)` makes one. what: "die" (the heir is killed), "hang" (it is stopped), "orphan" (the
keeper is killed), "future" (it wants another format), "babble" (it says what is no word). when: the word before which
it happens, or "start".
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from cachefs_sidecar.launching import Installation, this_installation


def installation(folder: Path, what: str, when: str) -> Installation:
    ours = this_installation()
    script = folder / f"python-{what}-{when}"
    script.write_text(f'#!/bin/sh\nexec {ours.python} {__file__} {what} {when} "$@"\n')
    script.chmod(0o755)
    return Installation(str(script), ours.path)


def main() -> None:
    what, when, link = sys.argv[1], sys.argv[2], int(sys.argv[-1])
    from cachefs_sidecar import handover, heir

    def happen() -> None:
        if what == "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
        elif what == "future":
            handover.FORMAT += 1
        elif what == "babble":
            os.write(link, b"[1")
        else:
            os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)

    def say(sock: Any, op: str, **more: Any) -> None:
        if op == when:
            happen()
        before(sock, op, **more)

    before, handover.say = handover.say, say
    if when == "start":
        happen()
    sys.exit(heir.succeed(link))


if __name__ == "__main__":
    main()
