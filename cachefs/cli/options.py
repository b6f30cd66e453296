"""The options that commands share, and what they mean: which cache, which origin, with which credentials.

Credentials do not belong on a command line, where `ps` shows them to every user of the machine. So a value may be
read from a file (@FILE) or an environment variable (@env:NAME), and a secret given literally is remarked upon.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cachefs.cli.output import complain
from cachefs.config import CacheConfig
from cachefs.errors import CacheUnusable, ConfigError

OriginArgument = Annotated[
    str,
    typer.Argument(metavar="ORIGIN", show_default=False, help="Where the data is: s3://bucket/prefix, gs://, az://, "
                   "https://, any other fsspec URL, or a local path."),
]  # fmt: skip
CacheDirOption = Annotated[
    list[str] | None,
    typer.Option("--cache-dir", "-d", metavar="DIR", show_default=False, help="A directory of the cache, best on a "
                 "local SSD; repeat it for several disks, always in the same order. "
                 "[default: $CACHEFS_DIR, else ~/.cache/cachefs, for root /var/cache/cachefs]"),
]  # fmt: skip
SizeOption = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", show_default=False, help="The most that the cache may hold, over all its "
                 "directories: 500M, 200G, 1.5T. [default: $CACHEFS_SIZE, else up to --min-free]"),
]  # fmt: skip
MinFreeOption = Annotated[
    str | None,
    typer.Option("--min-free", metavar="SIZE|PERCENT", show_default=False, help="What the cache leaves free on each "
                 "disk for others: 20%, 50G. [default: $CACHEFS_MIN_FREE, else 20%]"),
]  # fmt: skip
TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", metavar="NAME", show_default=False, help="Whose ORIGIN is, from its first use on: a "
                 "tenant's datasets share a quota (cachefs quota), and no content with others. "
                 "[default: $CACHEFS_TENANT, else nobody's]"),
]  # fmt: skip
OriginOptionOption = Annotated[
    list[str] | None,
    typer.Option("--origin-option", "-o", metavar="KEY=VALUE", show_default=False, help="An option of the storage, "
                 "named as its fsspec file system names it (key, secret, endpoint_url, anon=true); a dot nests "
                 "(client_kwargs.region_name=eu-west-1). @FILE and @env:NAME read the value from a file or the "
                 "environment, KEY:=JSON gives a number or a list."),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document, for scripts.")]


def cache_config(
    dirs: Sequence[str] | None,
    size: str | None = None,
    min_free: str | None = None,
    *,
    require: bool = False,
    tenant: str | None = "",
) -> CacheConfig:
    """The cache that the options and the environment mean. require: never start its fetcher. tenant: whose a dataset
    becomes that is read with it; None = as the environment says, "" = a command that makes it nobody's.

    Raises ConfigError, CacheUnusable.
    """
    for directory in dirs or ():
        if not directory:
            raise ConfigError("--cache-dir: is empty; is a variable of your script unset?")
    mode = "require" if require else "auto"  # a command has no loop of its own to fetch in
    config = CacheConfig.make(list(dirs) if dirs else None, size=size, min_free=min_free, fetcher=mode, tenant=tenant)
    for path in config.dirs:
        _require_directory(path)
    return config


def _require_directory(path: Path) -> None:
    """Raises CacheUnusable for what is there but can be no cache of ours, whatever the command wants of it."""
    choose = "choose another cache directory (--cache-dir, CACHEFS_DIR)"
    present = next(level for level in (path, *path.parents) if level.exists())
    if not present.is_dir():
        raise CacheUnusable(f"{path}: {'is' if present == path else f'{present} is'} not a directory; {choose}")
    if not os.access(present, os.R_OK | os.X_OK):
        raise CacheUnusable(f"{path}: permission denied for uid {os.geteuid()}; use it as its owner, or {choose}")


def origin_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Options of the storage from KEY=VALUE texts. Warns of secrets given literally. Raises ConfigError."""
    from cachefs.origin.given import options_given

    options, visible = options_given(given or ())
    if visible:
        complain(
            f"warning: --origin-option {', '.join(visible)}: other users of this machine can see what stands on a "
            f"command line (ps); safer: {visible[-1]}=@FILE or {visible[-1]}=@env:NAME"
        )
    return options
