"""`cachefs quota`: how much of the disk a dataset, or all datasets of a tenant, may take."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer

from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption, cache_config
from cachefs.cli.output import count, progress_bar, say, say_json
from cachefs.cli.pin import dataset_of
from cachefs.config import checked_tenant, format_size, parse_size
from cachefs.errors import ConfigError


def quota(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[ORIGIN|MOUNTPOINT] SIZE|none",
            show_default=False,
            help="A dataset the cache knows, or a mount (not with --tenant), and 500M, 200G, 1.5T or none.",
        ),
    ],
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", metavar="NAME", show_default=False, help="Bound all datasets of a tenant together."),
    ] = None,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bound what is cached of ORIGIN, or of a tenant, to SIZE.

    What does not fit streams through, and nothing of others is evicted for it. If more than SIZE is
    cached by now, objects are dropped at once until it fits, but none of what is pinned. A quota holds
    until `none` takes it away, whatever is restarted; `cachefs status` shows it.

    \b
      cachefs quota s3://bucket/imagenet 200G
      cachefs quota /data none
      cachefs quota --tenant vision 1.5T
    """
    if tenant == "":
        raise ConfigError("--tenant: is empty; is a variable of your script unset?")
    if len(what) != (2 if tenant is None else 1):
        raise ConfigError("quota: write a dataset and its SIZE, or --tenant NAME and SIZE (see cachefs quota --help)")
    size = None if what[-1].lower() == "none" else parse_size(what[-1])
    asked: dict[str, Any]
    if tenant is None:
        target, record = dataset_of(what[0], cache_dir, origin_option)
        name, asked, connection = target.url, {"dataset": record.id}, target.connect_to_cache()
    else:
        from cachefs.client import Connection

        name, asked = f"tenant {checked_tenant(tenant)}", {"tenant": tenant}
        connection = Connection(cache_config(cache_dir), None)
    with closing(connection), progress_bar(f"Counting {name}") as show:
        report = connection.quota(size, progress=show, **asked)
    if as_json:
        say_json({"quota": size, "origin" if tenant is None else "tenant": tenant or name, **report})
    else:
        _say(name, size, report)


def _say(name: str, size: int | None, report: dict[str, Any]) -> None:
    if size is None:
        say(f"{name}: has no quota{' any more' if report['changed'] else ''}")
        return
    dropped = f"; {count(report['dropped'], 'object')} dropped" if report["dropped"] else ""
    say(f"{name}: {format_size(report['used'])} of {format_size(size)} used{dropped}")
    if report["pinned"] and report["used"] > size:
        roots = ", ".join(root or "(everything)" for root in report["pinned"])
        say(f"  {roots}: pinned, so nothing of it is dropped, and no more of it is stored (`cachefs unpin`)")
