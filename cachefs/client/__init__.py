"""How a reader finds, starts and talks to the fetcher of its cache.

`Connection` blocks and may be shared by threads and carried over a fork; `AsyncConnection` belongs to one event
loop. Both find the fetcher's socket in the cache's home, start a fetcher when there is none, and send a request
again when the fetcher dies, so that a killed fetcher costs time, never an error.
"""

from cachefs.client.aio import AsyncConnection
from cachefs.client.blocking import Connection
from cachefs.client.located import Located

__all__ = ["AsyncConnection", "Connection", "Located"]
