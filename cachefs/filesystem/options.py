"""What the caller of the constructor means: which cache, which origin, with whose credentials.

An origin is given as in every chained fsspec file system, by `target_protocol` and `target_options`, or by `fs`, an
instance. The fetcher is another process, so what it gets must be plain data: an instance made of plain options is
taken apart into protocol and options; one that is not (or `memory://`, whose bytes live in this process) can only be
fetched in this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachefs.errors import ConfigError
from cachefs.filesystem.paths import Strip, strip_for
from cachefs.origin.spec import OriginSpec

# Bytes of these live in the memory of one process: another process would find nothing there.
PROCESS_LOCAL = frozenset({"memory"})

# What fsspec takes for itself, of every file system, and what says nothing about the origin.
_OF_THE_INSTANCE = frozenset(
    {
        "asynchronous",
        "loop",
        "batch_size",
        "skip_instance_cache",
        "use_listings_cache",
        "listings_expiry_time",
        "max_paths",
    }
)


@dataclass(frozen=True)
class Target:
    """The origin behind a file system. local: only this process can read it.

    protocol and options: how to name it again, None where only an instance can.
    """

    spec: OriginSpec
    strip: Strip
    local: bool
    protocol: str | None
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Target({self.spec!r})"


def read_target(target_protocol: str | None, target_options: Mapping[str, Any] | None, fs: Any) -> Target:
    """Raises ConfigError, UnsupportedOrigin."""
    if (fs is None) == (target_protocol is None):
        raise ConfigError(
            "cachefs: give target_protocol (and target_options), or fs, and not both; or a chained URL such as "
            "cachefs::s3://bucket/key"
        )
    if fs is not None:
        if target_options:
            raise ConfigError("cachefs: target_options go with target_protocol; fs has its options already")
        taken_apart = _taken_apart(fs)
        if taken_apart is None:
            return _of_instance(fs)
        target_protocol, target_options = taken_apart
    assert target_protocol is not None
    options = {name: value for name, value in (target_options or {}).items() if name not in _OF_THE_INSTANCE}
    if not is_plain(options):
        import fsspec

        return _of_instance(fsspec.filesystem(target_protocol, **options))
    spec = OriginSpec.capture(target_protocol, options)
    local = spec.protocol in PROCESS_LOCAL
    return Target(spec, strip_for(spec.protocol), local, target_protocol, options)


def is_plain(value: Any) -> bool:
    """Whether it means the same in another process: text, numbers, and what is made of them."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_plain(item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (str, bytes, int, float, bool))


def _taken_apart(fs: Any) -> tuple[str, dict[str, Any]] | None:
    """Protocol and options that make the same file system in another process; None when nothing does."""
    from fsspec import get_filesystem_class

    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    options = {name: value for name, value in fs.storage_options.items() if name not in _OF_THE_INSTANCE}
    try:
        registered = get_filesystem_class(protocol)
    except (ValueError, ImportError):
        return None
    if registered is not type(fs) or fs.storage_args or not is_plain(options):
        return None
    return protocol, options


def _of_instance(fs: Any) -> Target:
    from cachefs.fetcher.embedded import lend

    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return Target(lend(fs), strip_for(protocol, fs), True, None, {})
