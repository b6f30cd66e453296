"""Keep this node in its cluster: tell the fetcher so, and the next one when that dies."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from cachefs.client.launch import connect
from cachefs.client.session import expect
from cachefs.config import CacheConfig
from cachefs.errors import CacheFSError, FetcherError
from cachefs.messages import MAX_PACKET, PROTOCOL, Done, Hello, Join, Reply, Request, Welcome, decode_reply, encode

log = logging.getLogger("cachefs.client")

# A fetcher that dies at once is not started more often than this, and readers start one sooner if they need it.
PAUSE_SECONDS = 1.0


@asynccontextmanager
async def joined(config: CacheConfig, request: Join) -> AsyncIterator[None]:
    """This node is in the cluster as long as the block runs. Raises ConfigError, FetcherError, CacheUnusable."""
    line = await _join(config, request)
    task = asyncio.create_task(_stay(line, config, request))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _stay(line: socket.socket, config: CacheConfig, request: Join) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            with line:
                while await loop.sock_recv(line, MAX_PACKET):
                    pass  # nothing more was asked
        except OSError as error:
            log.info("the fetcher is gone: %s", error)
        while True:
            await asyncio.sleep(PAUSE_SECONDS)
            try:
                line = await _join(config, request)
                log.info("joined again, with another fetcher")
                break
            except (CacheFSError, OSError) as error:
                log.warning("cannot join the cluster again: %s", error)


async def _join(config: CacheConfig, request: Join) -> socket.socket:
    deadline = time.monotonic() + config.deadline
    sock = await asyncio.to_thread(connect, config, deadline)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(config.deadline):
            hello = Hello(id=1, protocol=PROTOCOL, pid=os.getpid(), size=config.size)
            expect(await ask(sock, hello), Welcome)
            expect(await ask(sock, request), Done)
    except BaseException:
        sock.close()
        raise
    return sock


async def ask(sock: socket.socket, request: Request) -> Reply:
    """The next reply. Raises FetcherError, OSError; whoever calls has a deadline."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, encode(request))
    data = await loop.sock_recv(sock, MAX_PACKET)
    if not data:
        raise FetcherError("the fetcher closed the connection; see run/fetcher.log of the cache")
    try:
        reply: Reply = decode_reply(data)
    except msgspec.MsgspecError as error:
        raise FetcherError(f"the fetcher's answer cannot be understood ({error}); is it of another version?") from None
    return reply
