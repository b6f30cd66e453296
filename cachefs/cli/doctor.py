"""`cachefs doctor`: can this machine do it, and if not, what is to be done?"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from cachefs.cli import exits
from cachefs.cli.doctor_cache import CHOOSE, cache
from cachefs.cli.doctor_machine import machine
from cachefs.cli.findings import FAIL, OK, WARN, Finding
from cachefs.cli.options import (
    CacheDirOption,
    JsonOption,
    MinFreeOption,
    OriginOptionOption,
    SizeOption,
    cache_config,
)
from cachefs.cli.output import count, printable, say, say_json
from cachefs.cli.target import Target
from cachefs.config import CacheConfig
from cachefs.errors import (
    CacheFSError,
    CacheUnusable,
    ConfigError,
    OriginAccessDenied,
    OriginUnreachable,
    UnsupportedOrigin,
)

# Origins give up on checks early by themselves (15 s each step); this is for one that trickles.
CHECK_SECONDS = 60.0

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def doctor(
    origin: Annotated[
        str | None,
        typer.Argument(metavar="[ORIGIN]", show_default=False, help="Also try to reach this storage."),
    ] = None,
    cache_dir: CacheDirOption = None,
    size: SizeOption = None,
    min_free: MinFreeOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine, the cache directories and ORIGIN, and say what to do about what is missing.

    Each line is ok, warn (works, but worse than it could) or fail (something cannot work). Exit code 1
    when anything fails. Nothing is changed.

    \b
      cachefs doctor
      cachefs doctor s3://bucket/imagenet --cache-dir /ssd/cachefs --size 200G
    """
    if origin_option and origin is None:
        raise ConfigError("--origin-option: belongs to an ORIGIN; name it too")
    findings: list[Finding] = []
    for finding in _everything(cache_dir, size, min_free, origin, origin_option):
        findings.append(finding)
        if not as_json:
            _show(finding)
    failed = sum(finding.level == FAIL for finding in findings)
    if as_json:
        say_json([finding._asdict() for finding in findings])
    else:
        warned = sum(finding.level == WARN for finding in findings)
        say(f"{count(failed, 'failure')}, {count(warned, 'warning')}" if failed or warned else "All is well.")
    if failed:
        raise exits.Unfinished(exits.FAILURES)


def _everything(
    dirs: Sequence[str] | None,
    size: str | None,
    min_free: str | None,
    origin: str | None,
    options: Sequence[str] | None,
) -> Iterator[Finding]:
    config = None
    try:
        config = cache_config(dirs, size, min_free, require=True)
    except CacheUnusable as error:
        unfit = Finding(FAIL, "cache", error.message, CHOOSE)
    yield from machine()
    yield from (unfit,) if config is None else cache(config)
    if origin is not None:
        yield _origin(config or cache_config(None), origin, options)


def _show(finding: Finding) -> None:
    level = finding.level.ljust(4)
    if sys.stdout.isatty():
        level = typer.style(level, fg=_COLOURS[finding.level])
    say(f"{level}  {printable(finding.subject)}: {printable(finding.fact)}")
    if finding.advice:
        say(f"      -> {printable(finding.advice)}")


def _origin(config: CacheConfig, origin: str, options: Sequence[str] | None) -> Finding:
    """Reach the storage from this very process: nothing of the cache takes part, so nothing of it can be at fault."""
    import asyncio

    try:
        target = Target.parse(origin, options, config)
    except UnsupportedOrigin as error:
        return Finding(FAIL, "origin", error.message, "see the message")
    started = time.monotonic()
    try:
        asyncio.run(_check(target))
    except CacheFSError as error:
        return Finding(FAIL, f"origin {target.url}", error.message, _advice(error))
    took = time.monotonic() - started
    return Finding(OK, f"origin {target.url}", f"answers, the credentials are good ({took * 1000:.0f} ms)")


async def _check(target: Target) -> None:
    import asyncio

    from cachefs.errors import OriginTimeout
    from cachefs.origin import open_origin

    origin = open_origin(target.spec)
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await origin.check(target.path)
    except TimeoutError as error:
        if isinstance(error, CacheFSError):
            raise
        raise OriginTimeout(f"no answer within {CHECK_SECONDS:g} s") from None
    finally:
        await origin.aclose()


def _advice(error: CacheFSError) -> str:
    if isinstance(error, OriginAccessDenied):
        return "give credentials: the environment (AWS_ACCESS_KEY_ID, ...), a profile, or --origin-option key=@FILE"
    if isinstance(error, OriginUnreachable):
        return "check the endpoint (--origin-option endpoint_url=..., AWS_ENDPOINT_URL), the network and proxies"
    return "check the name of the bucket and the path"
