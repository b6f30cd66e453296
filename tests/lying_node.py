"""A node whose server lies: `python lying_node.py KIND cluster serve ...` is `cachefs cluster serve ...` but for that.

KIND: "wrong" changes a byte of what it sends, "stops" sends half of an object and then nothing, "cuts" hangs up there.
"""

from __future__ import annotations

import sys
import time

from cachefs.cluster.peers.server import framing, sending, serving
from cachefs.cluster.peers.trust import Session
from cachefs.digest import digest
from cachefs_sidecar.cli import main

# What is longer is an object, and not a frame that only says something.
_OBJECT = 1000


def wrong(view: memoryview) -> bytes:
    """The digest of bytes that become others before they are sent."""
    found = digest(view)
    if len(view) > _OBJECT:
        view[_OBJECT // 2] ^= 1
    return found


class Changes(framing.Frame):
    """In memory, where it can be changed; files are sent by the kernel."""

    def __init__(self, session: Session, *, direct: bool = False, resident: bool = False) -> None:
        super().__init__(session, resident=resident)


class Stops(sending.Outbox):
    half = False

    def _push(self) -> int:
        if self.half:
            time.sleep(0.1)
            return 0
        if len(self._head) <= _OBJECT:
            return super()._push()
        self.half = True
        return self._sock.send(self._head[: len(self._head) // 2])


class Cuts(Stops):
    def _push(self) -> int:
        if self.half:
            raise ConnectionAbortedError("enough")
        return super()._push()


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    vars(sending)["Frame"] = Changes
    if kind == "wrong":
        vars(framing)["digest"] = wrong
    else:
        vars(serving)["AT_ONCE_ITEMS"] = 0  # a thread stops in the middle: the loop has others to answer
        vars(serving)["Outbox"] = {"stops": Stops, "cuts": Cuts}[kind]
    sys.exit(main())
