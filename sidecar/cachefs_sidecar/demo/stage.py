"""The stage of the demonstration: slow S3 storage with photographs in it, set up, played on, taken away again.

Everything lives in one temporary directory and in processes that die with this one, so that nothing is left
behind after the end, after Ctrl-C and after a failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cachefs.config import format_size
from cachefs.errors import CacheFSError
from cachefs_sidecar.demo.report import Outcome, Row
from cachefs_sidecar.demo.ways import FileReader, NoMount, Reader, UrlReader, WrongBytes, mounted
from cachefs_sidecar.testbed import Photograph, S3Server, Throttle, make_photographs, stop_fetcher
from cachefs_sidecar.testbed.photographs import LARGEST
from cachefs_sidecar.testbed.server import s3_options

if TYPE_CHECKING:
    from cachefs_sidecar.demo.training import Photographs

EPOCHS = 3

# Storage in another region: a round trip of 20 ms, and what one TCP connection over it gives.
LATENCY = 0.02
BANDWIDTH = 20 * 1024 * 1024

BUCKET = "photographs"
ROOT = f"{BUCKET}/train"

DIRECT, URL, MOUNT, DISK = "s3fs", "cachefs URL", "cachefs mount", "local files"


@dataclass
class Stage:
    """Where the demonstration plays: its directory, its storage, what it prints on and what it found."""

    folder: Path
    throttle: Throttle
    options: dict[str, object]
    keys: dict[str, bytes]
    outcome: Outcome
    progress: Progress


def main(images: int = 2000, *, as_json: bool = False, keep: bool = False) -> int:
    """Read photographs from a slow S3 server into a PyTorch DataLoader, directly and through cachefs, and compare.

    Returns 0 when every promise held, 1 when not, 2 when it could not run. --keep leaves the directory behind.
    """
    terminal = Console(stderr=True)
    began = time.monotonic()
    previous = signal.signal(signal.SIGTERM, _end)  # as Ctrl-C: everything is taken away again
    try:
        _require(images)
        with ExitStack() as stack:
            folder = stack.enter_context(_folder(keep, terminal))
            progress = stack.enter_context(_progress(terminal))
            outcome = _play(stack, folder, images, progress)
    except KeyboardInterrupt:
        terminal.print("Interrupted; everything was taken away again.")
        return 130
    except WrongBytes as error:
        terminal.print(f"[bold red]BROKEN PROMISE[/] {error}", highlight=False)
        return 1
    except (CacheFSError, ModuleNotFoundError, FileNotFoundError, RuntimeError) as error:
        terminal.print(f"[bold red]cachefs demo:[/] {error}", highlight=False)
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    outcome.seconds = time.monotonic() - began
    if as_json:
        sys.stdout.write(outcome.json() + "\n")
    else:
        outcome.print(Console())
    return 1 if outcome.broken else 0


def _require(images: int) -> None:
    if images < 1:
        raise RuntimeError("--images: at least 1")
    needed = images * LARGEST * 3  # the source and two caches
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise RuntimeError(
            f"{tempfile.gettempdir()}: {format_size(needed)} are needed and {format_size(free)} free; set TMPDIR"
        )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('PyTorch is missing; install it with: pip install "cachefs-sidecar[demo]"') from error


def _play(stack: ExitStack, folder: Path, images: int, progress: Progress) -> Outcome:
    photographs = _make(folder, images, progress)
    server = stack.enter_context(S3Server(folder / "storage", dir_cache=3600))
    throttle = stack.enter_context(Throttle(server.port, latency=LATENCY, bandwidth_per_connection=BANDWIDTH))
    options = s3_options(throttle.endpoint, server.options["key"], server.options["secret"])
    keys = {photograph.name: photograph.key for photograph in photographs}
    stage = Stage(folder, throttle, options, keys, Outcome(_conditions(photographs)), progress)

    # One connection for each object spares s3fs a request for the size first: the best it can do with small files.
    _run(stage, UrlReader(DIRECT, False, ROOT, "s3", {**options, "max_concurrency": 1}), EPOCHS)
    with _cache(folder / "cache-url") as cache:
        through = {"target_protocol": "s3", "target_options": options, "cache_dir": str(cache)}
        _run(stage, UrlReader(URL, True, ROOT, "cachefs", through), EPOCHS)
    mountpoint = folder / "mount"
    with _cache(folder / "cache-mount") as cache:
        try:
            throttle.reset()  # mounting lists the dataset: that is counted with the first epoch
            with mounted(f"s3://{ROOT}", mountpoint, cache, options):
                _run(stage, FileReader(MOUNT, True, str(mountpoint)), EPOCHS, counted=True)
        except NoMount as reason:
            stage.outcome.left_out[MOUNT] = f"{reason}; `cachefs doctor` says what to do about it"
    _run(stage, FileReader(DISK, False, str(folder / "storage" / ROOT)), 1)
    return stage.outcome


def _make(folder: Path, images: int, progress: Progress) -> list[Photograph]:
    with _bar(progress, "making photographs", images) as advance:
        return make_photographs(folder / "storage" / ROOT, images, made=advance)


def _conditions(photographs: list[Photograph]) -> list[str]:
    sizes = [photograph.size for photograph in photographs]
    from cachefs_sidecar.demo.training import WORKERS

    return [
        f"{len(sizes):,} JPEGs of {min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} KB "
        f"({format_size(sum(sizes))}), made from real photographs, on an S3 server (rclone) on this machine",
        f"slowed as distant storage is: {LATENCY * 1000:.0f} ms per request, "
        f"{BANDWIDTH / 2**20:.0f} MiB/s per connection",
        f"{EPOCHS} epochs, shuffled, {WORKERS} workers, every image decoded, on {os.cpu_count()} cores; "
        f"{DISK}: the same loader on the same files on the local disk",
    ]  # fmt: skip


def _run(stage: Stage, reader: Reader, epochs: int, *, counted: bool = False) -> None:
    """All epochs over one way. counted: traffic before the first epoch is already being counted for it."""
    from cachefs_sidecar.demo.training import Photographs, loader, run_epoch

    if not counted:
        stage.throttle.reset()
    dataset: Photographs = Photographs(reader, stage.keys)
    with loader(dataset) as batches:
        for epoch in range(1, epochs + 1):
            with _bar(stage.progress, f"{reader.title}, epoch {epoch}", len(dataset)) as advance:
                began = time.monotonic()
                images = run_epoch(batches, advance)
                seconds = time.monotonic() - began
            traffic = stage.throttle.reset()
            reads = traffic.object_reads
            row = Row(reader.title, epoch, images, seconds, reads, traffic.total - reads, traffic.bytes_down)
            stage.outcome.rows.append(replace(row, reference=reader.title == DISK))
            stage.outcome.checked += images
            if reader.caches:
                stage.outcome.judge(reader.title, epoch, images, traffic)


# --- what is taken away again ----------------------------------------------------------------------------------


@contextmanager
def _folder(keep: bool, terminal: Console) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cachefs-demo-"))
    try:
        yield folder
    finally:
        if keep:
            terminal.print(f"Kept: {folder}", highlight=False)
        elif os.path.ismount(folder / "mount"):  # else we would remove through the mount
            terminal.print(f"[bold red]{folder}/mount is still mounted and was left behind[/]", highlight=False)
        else:
            shutil.rmtree(folder)


@contextmanager
def _cache(home: Path) -> Iterator[Path]:
    """A cache directory with settings that do not depend on who runs this; its fetcher ends with the block."""
    settings = {
        "CACHEFS_MIN_FREE": "0",  # room was looked for at the start
        "CACHEFS_RUNTIME_DIR": str(home.parent / "runtime"),
        "CACHEFS_DIR": None,
        "CACHEFS_SIZE": None,
        "CACHEFS_FETCHER": None,
    }
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield home
    finally:
        _set(before)
        stop_fetcher(home)


def _set(settings: dict[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# --- what is seen meanwhile ---------------------------------------------------------------------------------------


def _progress(terminal: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=terminal, transient=True)


@contextmanager
def _bar(progress: Progress, title: str, total: int) -> Iterator[Callable[[int], None]]:
    task = progress.add_task(title, total=total)
    try:
        yield lambda count: progress.advance(task, count)
    finally:
        progress.remove_task(task)
