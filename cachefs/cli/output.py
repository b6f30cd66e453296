"""What commands write: results to stdout, everything else to stderr, progress only where somebody watches.

Names of objects come from outside. Control characters in them are shown as escapes, else an object could write
to the terminal of whoever lists it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cachefs.config import format_size

if TYPE_CHECKING:
    from cachefs.messages import Progress

OnProgress = Callable[["Progress"], None]

# Failures named on the terminal, of those the fetcher names; --json gives all of the latter.
SHOWN_FAILURES = 10

# Control, format (right-to-left overrides), surrogates and line separators: what changes how the rest is shown.
_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """`text` on one line, whatever is in it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSHOWN else c for c in text)


def say(text: str) -> None:
    """A line of the result. An output that cannot show a character gets its escape."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))  # noqa: T201 - stdout is what a command is for


def complain(text: str) -> None:
    """A line on stderr: an error, a warning, a note."""
    encoding = sys.stderr.encoding or "utf-8"
    line = f"cachefs: {printable(text)}".encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=sys.stderr)  # noqa: T201 - see above


def say_json(value: Any) -> None:
    """The result for a script: one JSON document. Names that are not Unicode come with \\u escapes of surrogates."""
    print(json.dumps(value, indent=2))  # noqa: T201 - see above


def say_failures(failed: Sequence[tuple[str, str]], total: int, what: str) -> None:
    """Name the first failures on stderr and count the rest."""
    for path, reason in failed[:SHOWN_FAILURES]:
        complain(reason if path and reason.startswith(path) else f"{path}: {reason}")
    if total > min(len(failed), SHOWN_FAILURES):
        complain(f"... and {total - min(len(failed), SHOWN_FAILURES):,} more {what}")


def count(number: int, noun: str) -> str:
    """1 -> "1 file", 1281167 -> "1,281,167 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ago(moment: float) -> str:
    """How long ago a time (seconds since the epoch) was, to the precision one cares about."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> Iterator[str]:
    """Lines with the columns aligned; the last one is as long as it is, so that nothing is ever cut."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:-1], widths, strict=True)]
        yield (indent + "  ".join([*cells, row[-1]])).rstrip()


@contextmanager
def progress_bar(title: str) -> Iterator[OnProgress]:
    """A bar on stderr that follows a fetcher's Progress messages; nothing at all when stderr is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    started = time.monotonic()
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),  # all of it fits into 80 columns for an origin of 20 characters
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(printable(title), total=None, figures="")

        def show(progress: Progress) -> None:
            elapsed = max(0.001, time.monotonic() - started)
            of = f" of {progress.total:,}" if progress.total else ""
            rate = f", {format_size(progress.bytes / elapsed)}/s" if progress.bytes else ""
            figures = f"{progress.done:,}{of} {progress.what}, {format_size(progress.bytes)}{rate}"
            bar.update(task, completed=progress.done, total=progress.total or None, figures=figures)

        yield show
