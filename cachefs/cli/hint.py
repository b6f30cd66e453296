"""`cachefs hint`: for programs that cannot give hints themselves. What is named is fetched, in that order."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from cachefs.cli import exits
from cachefs.cli.hint_orders import Kind, Settings
from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption
from cachefs.cli.output import OnProgress, count, progress_bar, say, say_failures, say_json
from cachefs.cli.target import Target, target_at
from cachefs.cli.warm import checked_name, listed, object_path
from cachefs.config import format_size
from cachefs.datasets import DatasetRecord
from cachefs.errors import ConfigError
from cachefs.mountpoints import Mount

if TYPE_CHECKING:
    from cachefs.hints.consumer import Consumer

# Names told and not fetched yet: more are not taken from whoever writes them until some are.
MOST_WAITING = 200_000
MOST_PARTS = 64

# How often new names and the fetcher are looked at.
LOOK_SECONDS = 0.2
READ_BYTES = 1 << 20


def hint(
    origin: Annotated[
        str, typer.Argument(metavar="ORIGIN|MOUNTPOINT", show_default=False, help="A dataset, or where it is mounted.")
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|-",
            show_default=False,
            help="What will be read, in order, one name per line: URLs, object paths, paths in the mount, or names "
            "relative to ORIGIN. - reads standard input, as it comes.",
        ),
    ],
    once: Annotated[bool, typer.Option("--once", help="End when everything named is fetched.")] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Names end with NUL, not newline (as from find -print0).")
    ] = False,
    sampler: Annotated[
        Kind | None,
        typer.Option(
            "--sampler",
            show_default=False,
            help="FILE lists the files of the dataset in its own order, item by item; they are read in the order of "
            "this sampler of PyTorch.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 0,
    epochs: Annotated[str, typer.Option("--epochs", metavar="N|N-M", help="Which of its epochs.")] = "0",
    world: Annotated[int, typer.Option("--world", min=1, help="Ranks of the job.")] = 1,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", min=0, show_default=False, help="A rank of this node; may be repeated. [default: 0]"),
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="As DistributedSampler has it.")] = True,
    drop_last: Annotated[bool, typer.Option("--drop-last", help="As DistributedSampler has it.")] = False,
    whole_batches: Annotated[
        int | None,
        typer.Option(
            "--whole-batches",
            metavar="SIZE",
            min=1,
            show_default=False,
            help="Leave out the incomplete batch at the end, as DataLoader(batch_size=SIZE, drop_last=True) does.",
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what will be read, in order, so that it is fetched before.

    Reads that somebody waits for go first; what is named goes before `cachefs warm`. The dataset counts as in
    use, and nothing of it is evicted, until the command ends: with --once when everything is fetched, else with
    Ctrl-C. What does not fit into the cache is left out. From PyTorch, use cachefs.torch, which knows how far
    the training is.

    \b
      cachefs hint s3://bucket/imagenet order.txt --once
      my-sampler --print-order | cachefs hint /data/imagenet -
      cachefs hint /data/imagenet files.txt --sampler distributed --world 16 --rank 0 --rank 1 --epochs 0-2

    Exit code 1 when some objects could not be fetched; they are named.
    """  # fmt: skip
    from cachefs.hints.consumer import Consumer

    target, mount = target_at(origin, cache_dir, origin_option, tenant=None)
    record = target.containing()
    # Readers by URL look for what is in no catalog in the dataset of everything at the origin.
    session = target.session(record.root if record is not None else "")
    settings = sampler and Settings(sampler, seed, epochs, world, tuple(rank or ()), shuffle, drop_last, whole_batches)
    plans = _Listed(target, record, mount, _names(file, null=null))
    dataset = plans.all() if settings else []
    label = f"cachefs hint {target.url}"
    with closing(Consumer(target.config, session, dataset, label=label, follow=True)) as consumer:
        with progress_bar(f"Fetching from {target.url}") as show:
            if settings:
                for order in settings.orders(len(dataset)):
                    consumer.plan(order)
            else:
                for paths in plans:
                    if paths:
                        consumer.plan_names(paths)
                    _wait(consumer, show, MOST_WAITING)
            while not _wait(consumer, show, 0) or not once:
                time.sleep(LOOK_SECONDS)
        named = consumer.end + len(plans.missing)
        done = consumer.withdraw()
    missing = plans.missing
    failed = done.failed_total + len(missing)
    if as_json:
        failures = [{"path": path, "reason": reason} for path, reason in [*missing, *done.failed]]
        counts = {"named": named, "fetched": done.count, "bytes": done.bytes, "failed": failed}
        say_json({"origin": target.url, **counts, "failures": failures})
    else:
        say(f"{target.url}: {count(named, 'object')} named, {done.count:,} fetched now, {format_size(done.bytes)}")
        say_failures([*missing, *done.failed], failed, "failed")
    if failed:
        raise exits.Unfinished(exits.FAILURES)


class _Listed:
    """The object paths that a list names, as they come. missing: (path, why) of what the dataset does not have."""

    def __init__(
        self, target: Target, record: DatasetRecord | None, mount: Mount | None, names: Iterator[list[str]]
    ) -> None:
        self._target, self._record, self._mount, self._names = target, record, mount, names
        self.missing: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[list[str]]:
        """Directories are taken for all that is below them. [] now and then while nothing comes."""
        for names in self._names:
            found, unknown = listed(self._target, self._record, [_in_mount(name, self._mount) for name in names])
            self.missing += unknown
            yield found

    def all(self) -> list[str]:
        """All of them, item by item: a name that is none keeps its number."""
        return [object_path(_in_mount(name, self._mount), self._target) for names in self._names for name in names]


def _wait(consumer: Consumer, show: OnProgress, most: int) -> bool:
    """Wait until at most so many items are still to be fetched, if that is what keeps us; whether all are."""
    from cachefs.messages import Progress

    while True:
        consumer.look()
        waiting = consumer.end - consumer.frontier
        show(Progress(id=0, done=consumer.frontier, total=consumer.end, bytes=0, what="objects"))
        if not most or (waiting <= most and consumer.parts < MOST_PARTS):
            return waiting <= 0
        time.sleep(LOOK_SECONDS)


def _names(file: str, *, null: bool) -> Iterator[list[str]]:
    """Names as they come, [] now and then while none do. Raises ConfigError."""
    try:
        fd = os.dup(sys.stdin.fileno()) if file == "-" else os.open(os.path.expanduser(file), os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    number, begun = 0, b""
    try:
        more = True
        while more:
            if not select.select([fd], [], [], LOOK_SECONDS)[0]:
                yield []
                continue
            try:
                data = os.read(fd, READ_BYTES)
            except OSError as error:
                raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
            more = bool(data)
            *whole, begun = (begun + data).split(b"\0" if null else b"\n")
            if not more and begun:
                whole.append(begun)
            names = [checked_name(raw.rstrip(b"\r"), number + n, file) for n, raw in enumerate(whole, 1) if raw]
            number += len(whole)
            yield names
    finally:
        os.close(fd)


def _in_mount(name: str, mount: Mount | None) -> str:
    """A path below the mount point as a name relative to the dataset; every other name as it is."""
    below = mount.mountpoint.rstrip("/") + "/" if mount is not None else ""
    return name[len(below) :] if below and name.startswith(below) else name
