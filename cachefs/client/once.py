"""Ask a fetcher that runs one thing, on a loop, and hang up. Starts none, and waits for a stopped one a little only."""

from __future__ import annotations

import asyncio
import os
from typing import TypeVar

from cachefs.client.joined import ask
from cachefs.client.session import expect
from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, FetcherTimeout
from cachefs.messages import PROTOCOL, Hello, Reply, Request, Welcome
from cachefs.packets import dial

R = TypeVar("R", bound=Reply)


async def ask_once(config: CacheConfig, request: Request, expected: type[R], seconds: float) -> R:
    """The reply to `request`, whose id is 2 and which is answered with one packet. Raises CacheFSError."""
    try:
        sock = dial(config.home / "run", 0)  # connecting to a Unix socket never waits, unless its queue is full
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise FetcherError("no fetcher runs") from None
    except OSError as error:
        raise FetcherTimeout(f"the fetcher takes no connections ({error.strerror})") from None
    with sock:
        try:
            async with asyncio.timeout(seconds):
                expect(await ask(sock, Hello(id=1, protocol=PROTOCOL, pid=os.getpid())), Welcome)
                return expect(await ask(sock, request), expected)
        except TimeoutError:
            raise FetcherTimeout(f"the fetcher does not answer in {seconds:g} s") from None
        except ConnectionError:
            raise FetcherError("the fetcher closed the connection") from None
