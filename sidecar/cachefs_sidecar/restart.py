"""`cachefs restart`: other code for a live mount, and another fetcher for its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cachefs.cli import exits
from cachefs.cli.options import JsonOption, cache_config
from cachefs.cli.output import complain, say, say_json
from cachefs.errors import CacheFSError, ConfigError, MountError

if TYPE_CHECKING:
    from cachefs_sidecar.registry import MountInfo


def restart(
    mountpoint: Annotated[
        str | None, typer.Argument(metavar="MOUNTPOINT", show_default=False, help="Where it is mounted.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="All mounts of this user.")] = False,
    keep_fetcher: Annotated[
        bool, typer.Option("--keep-fetcher", help="Leave the process alone that fills the cache.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace all processes of a mount while it is in use, such as after an upgrade.

    The new ones run the cachefs that this command belongs to. Open files and running readers notice
    nothing. When the new ones cannot start, the old ones go on, and the exit code is 1. The fetcher of the
    cache ends too, and readers start the next one. A mount whose keeper was killed gets another.

    \b
      pip install --upgrade cachefs-sidecar && cachefs restart --all
      cachefs restart /data
    """
    if everything == (mountpoint is not None):
        raise ConfigError("name a mount point, or --all")
    failed = False
    done: list[MountInfo] = []
    for info in _all() if everything else [_at(str(mountpoint))]:
        try:
            done.append(_restart(info))
        except MountError as error:
            complain(error.message)
            failed = True
    fetchers: dict[str, int] = {}
    if not keep_fetcher:
        for dirs in {info.dirs: None for info in done}:
            try:
                if (pid := _end_fetcher(dirs)) is not None:
                    fetchers[dirs[0]] = pid
            except CacheFSError as error:
                complain(error.message)
                failed = True
    _say(done, fetchers, as_json)
    if failed:
        raise exits.Unfinished(exits.FAILURES)


def _all() -> list[MountInfo]:
    from cachefs_sidecar.registry import list_mounts

    return list_mounts()


def _at(mountpoint: str) -> MountInfo:
    """Raises MountError when no mount of ours is there."""
    from cachefs.mountinfo import mounted_at
    from cachefs_sidecar import mounts, registry

    path = mounts.resolve(mountpoint)
    info = registry.load(path)
    present = mounted_at(path)
    if present is None or present.fstype != mounts.FSTYPE:
        raise MountError(f"{path}: no mount of cachefs is there (`cachefs status` lists them)")
    if info is None:
        raise MountError(f"{path}: is a mount of another user, or its record is lost; unmount it and mount it again")
    return info


def _restart(info: MountInfo) -> MountInfo:
    from cachefs_sidecar.control import restart_mount

    return restart_mount(info)


def _end_fetcher(dirs: tuple[str, ...]) -> int | None:
    from cachefs.cli.stop import end_fetcher

    return end_fetcher(cache_config(dirs, require=True))


def _say(done: list[MountInfo], fetchers: dict[str, int], as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "mounts": [{"mountpoint": info.mountpoint, "pid": info.pid, "workers": info.workers} for info in done],
                "fetchers": [{"cache": home, "pid": pid} for home, pid in fetchers.items()],
            }
        )
        return
    for info in done:
        say(f"{info.mountpoint}: restarted, process {info.pid} keeps it")
    for home, pid in fetchers.items():
        say(f"{home}: fetcher {pid} has ended; the next read starts another")
