"""What `open_async` returns: a file whose methods are coroutines and whose work is done in threads (aiofiles)."""

from __future__ import annotations

import asyncio
import io
from types import TracebackType
from typing import Self

from aiofiles.threadpool.binary import AsyncBufferedReader


class AsyncFile(AsyncBufferedReader):
    """read, readline, seek, tell, close, ...; `async with` closes it, as fsspec's own asynchronous files do."""

    def __init__(self, file: io.BufferedReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(file, loop, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
