"""Ask nodes what they say of themselves, all at once: over connections of their own, so that what readers wait for
neither delays it nor is delayed, and a node that is reached here is one that its peers could reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.account import INQUIRY, MOST_ACCOUNT, Account, decode_account
from cachefs.cluster.peers.link import dial
from cachefs.cluster.peers.trust import Trust
from cachefs.errors import PeerError, PeerTimeout

# A node that is well answers within milliseconds. One that does not is named, and nobody waits longer for the others.
SURVEY_SECONDS = 2.0

# Connections at once: of the fetcher's descriptors readers need most.
AT_ONCE = 128


async def ask(node: Node, trust: Trust, seconds: float = SURVEY_SECONDS) -> Account:
    """What `node` says. Raises PeerError, which says why it does not."""
    step = "no connection"
    try:
        async with asyncio.timeout(seconds):
            channel = await dial(node)
            try:
                step = "it takes connections but does not say who it is"
                session = await trust.call(channel, node.certified)
                step = "no answer"
                await session.send(channel, INQUIRY)
                return decode_account(await session.receive(channel, MOST_ACCOUNT))
            finally:
                channel.close()
    except TimeoutError:
        raise PeerTimeout(f"{step} in {seconds:g} s") from None
    except PeerError:
        raise
    except OSError as error:
        raise PeerError(_why(error, step)) from None


async def survey(
    nodes: Iterable[Node], trust: Trust, seconds: float = SURVEY_SECONDS
) -> AsyncGenerator[tuple[Node, Account | PeerError], None]:
    """Each node with what it says, or why it says nothing, as they come."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(node: Node) -> tuple[Node, Account | PeerError]:
        async with turns:
            try:
                return node, await ask(node, trust, seconds)
            except PeerError as error:
                return node, error

    tasks = [asyncio.create_task(one(node)) for node in nodes]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _why(error: OSError, step: str) -> str:
    if isinstance(error, ConnectionResetError | BrokenPipeError) and step != "no connection":
        return "it closed the connection: it ends, or is of another version of cachefs"
    return error.strerror or str(error) or type(error).__name__
