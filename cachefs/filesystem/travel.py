"""How a file system gets into another process: with its secrets only where nobody else can see them.

A pickle may end up in a file, a queue or a log, so it and `to_json` carry the options without secrets; the copy made
from them says so to the fetcher, which may know the origin already, or uses the credentials of that process's
environment. The exception is a child that multiprocessing is starting just now: those bytes go through a pipe to our
own child, and its AuthenticationString follows the same rule.
"""

from __future__ import annotations

import multiprocessing.context
import uuid
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cachefs.errors import ConfigError

if TYPE_CHECKING:
    from cachefs.filesystem.core import CacheFileSystem
    from cachefs.filesystem.options import Target

# Instances by a name that says nothing about their options, so that a pickle read where it was written gives the
# very instance, as fsspec users expect of `==`.
_HERE: weakref.WeakValueDictionary[str, CacheFileSystem] = weakref.WeakValueDictionary()


def handle_of(filesystem: CacheFileSystem) -> str:
    """A name for the instance within this process."""
    handle = uuid.uuid4().hex
    _HERE[handle] = filesystem
    return handle


def spawning() -> bool:
    """Whether multiprocessing is pickling for a child that it starts (spawn, forkserver)."""
    return multiprocessing.context.get_spawning_popen() is not None


def travelling_options(storage_options: Mapping[str, Any], target: Target, *, with_secrets: bool) -> dict[str, Any]:
    """Arguments that make the same file system in another process.

    Raises ConfigError for one around an instance that cannot be named by protocol and options.
    """
    if target.protocol is None:
        raise ConfigError(
            "this cachefs file system wraps an instance that exists in this process only, so it cannot be sent to "
            "another; give target_protocol and plain target_options instead of fs"
        )
    options = {name: value for name, value in storage_options.items() if name not in ("fs", "loop")}
    options["target_protocol"] = target.protocol
    options["target_options"] = dict(target.options)
    if with_secrets:
        return options
    # Only the options: the other process has an environment of its own.
    options["target_options"] = dict(target.spec.redacted().options)
    if options["target_options"] != dict(target.spec.options):
        options["redacted"] = True
    return options


def revive(handle: str, cls: type[CacheFileSystem], options: dict[str, Any]) -> CacheFileSystem:
    """The other side of a pickle."""
    here = _HERE.get(handle)
    return here if here is not None else cls(**options)
