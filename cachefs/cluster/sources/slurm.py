"""The nodes of a Slurm job: its node list, which does not change while the job runs.

`scontrol show hostnames` knows the notation best and is asked where it is; inside a container it mostly is not, so the
notation is also understood here: "gpu[001-003,07],login,rack[1-2]n[0-3]".
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import shutil
from collections.abc import AsyncGenerator

from cachefs.cluster.addresses import DEFAULT_PORT, host_port
from cachefs.cluster.nodes import Node
from cachefs.cluster.settling import View
from cachefs.errors import ConfigError, MembershipError

DEADLINE = 10.0

# Slurm's own limit (MAX_SLURM_NODES); a list is data, and "n[0-999999999]" is 14 letters.
MOST = 65_536

# A name is text and brackets in turn; a bracket holds numbers and ranges of numbers.
_NAME = re.compile(r"(?:[^,\[\]\s]+|\[[0-9,\-]+\])+")
_PIECE = re.compile(r"[^\[\]]+|\[[^\]]*\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def expand(text: str) -> list[str]:
    """Host names of a node list, in its order. Raises ConfigError for what is not one."""
    hosts: list[str] = []
    at, text = 0, text.strip()
    while at < len(text):
        name = _NAME.match(text, at)
        if name is None:
            raise ConfigError(f"Slurm node list {text[:200]!r}: not understood from {text[at : at + 20]!r} on")
        pieces = [_alternatives(piece) for piece in _PIECE.findall(name[0])]
        if len(hosts) + math.prod(map(len, pieces)) > MOST:
            raise ConfigError(f"Slurm node list {text[:200]!r}: names more than {MOST} nodes")
        hosts += map("".join, itertools.product(*pieces))
        at = name.end()
        if at < len(text):
            if text[at] != "," or at + 1 == len(text):
                raise ConfigError(f"Slurm node list {text[:200]!r}: not understood from {text[at : at + 20]!r} on")
            at += 1
    return list(dict.fromkeys(hosts))


def _alternatives(piece: str) -> list[str]:
    """["a"] of "a"; ["08", "09", "10", "3"] of "[08-10,3]": the first number says how many digits all have."""
    if not piece.startswith("["):
        return [piece]
    numbers: list[str] = []
    for part in piece[1:-1].split(","):
        found = _RANGE.fullmatch(part)
        if found is None or len(part) > 40:
            raise ConfigError(f"Slurm node list: {part[:40]!r} is not a number or a range of numbers")
        first, last = found[1], found[2] or found[1]
        if not 0 <= int(last) - int(first) < MOST or len(numbers) > MOST:
            raise ConfigError(f"Slurm node list: {part!r} is no range, or of more than {MOST} nodes")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


class Job:
    def __init__(self, rest: str, me: Node) -> None:
        """rest: a port or nothing. Raises ConfigError outside a job."""
        self._port = host_port(f"any:{rest.strip('/')}")[1] if rest.strip("/") else DEFAULT_PORT
        self._list = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST") or ""
        if not self._list:
            raise ConfigError("cluster slurm: not inside a job; SLURM_JOB_NODELIST is not set")

    async def watch(self) -> AsyncGenerator[View, None]:
        try:
            hosts = await _ask_scontrol(self._list) or expand(self._list)
        except ConfigError as error:
            raise MembershipError(error.message) from error
        yield frozenset(Node(host, host, self._port) for host in hosts)
        await asyncio.Event().wait()


async def _ask_scontrol(text: str) -> list[str]:
    """As Slurm expands it; nothing where it cannot be asked."""
    program = shutil.which("scontrol")
    if program is None:
        return []
    try:
        process = await asyncio.create_subprocess_exec(
            program, "show", "hostnames", text, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return []
    try:
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    except TimeoutError:
        return []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace").split() if process.returncode == 0 else []
