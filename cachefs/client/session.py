"""What both kinds of connection share: the requests of a reader, apart from how packets travel.

A session names one dataset of one origin (`protocol`, `options`, `environ`, `root`) and says Hello and Attach at
the start of every socket, so a new fetcher knows what its predecessor knew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, from_wire
from cachefs.messages import PROTOCOL, Attach, Failed, Hello, Reply

R = TypeVar("R", bound=Reply)

# A reader that loses its fetcher waits this long before it tries again, twice as long each time: long enough not to
# spin over fetchers that die at once. It need not be long: finding the next one waits until that one listens. (With up
# to 0.5 s, the slowest read while fetchers were killed every 0.15 s took 3 to 7 s instead of 3 to 4.)
RETRY_FIRST = 0.01
RETRY_LAST = 0.1


@dataclass(frozen=True)
class Session:
    """Who asks. `options` and `environ` may hold credentials: repr shows none of them.

    local: only a fetcher in this very process can read this origin. direct, tenant: see messages.Attach.
    """

    protocol: str
    options: Mapping[str, Any]
    environ: Mapping[str, str]
    redacted: bool = False
    root: str = ""
    snapshot: str = ""
    local: bool = False
    direct: bool = False
    tenant: str = ""

    def __repr__(self) -> str:
        return f"Session({self.protocol!r}, root={self.root!r})"

    def hello(self, config: CacheConfig) -> Hello:
        return Hello(id=1, protocol=PROTOCOL, pid=os.getpid(), size=config.size)

    def attach(self) -> Attach:
        return Attach(
            id=2,
            protocol=self.protocol,
            options=dict(self.options),
            environ=dict(self.environ),
            redacted=self.redacted,
            root=self.root,
            snapshot=self.snapshot,
            direct=self.direct,
            tenant=self.tenant,
        )


# Requests after Hello (1) and Attach (2) are numbered from here.
FIRST_ID = 3


class LostFetcher(Exception):
    """The other end of the socket is gone. Never leaves this package: the request is sent again."""


def expect(reply: Reply, expected: type[R]) -> R:
    """The reply, if it is of the expected kind; otherwise raises the error it carries, or FetcherError."""
    if isinstance(reply, Failed):
        raise from_wire(reply.error)
    if not isinstance(reply, expected):
        raise FetcherError(f"the fetcher answered with {type(reply).__name__} instead of {expected.__name__}")
    return reply
