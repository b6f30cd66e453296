"""The command `cachefs`: its commands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cachefs.cli import exits
from cachefs.cli.output import complain, say

app = typer.Typer(
    name="cachefs",
    add_completion=True,
    rich_markup_mode=None,  # examples in help texts stay as they are written; and help needs no rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=exits.EXIT_CODES,
)


def _version(wanted: bool) -> None:
    if wanted:
        import cachefs

        say(f"cachefs {cachefs.__version__}")
        raise typer.Exit


@app.callback()
def cachefs(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Training data from distributed storage at local-disk speed.

    cachefs keeps what is read from S3, GCS, Azure, HTTP, ... on local SSDs. Read it through a mounted
    path, or from Python: fsspec.open("cachefs::s3://bucket/a.jpg").

    \b
      cachefs doctor s3://bucket/imagenet         can this machine do it?
      cachefs mount s3://bucket/imagenet /data    names now, bytes when they are read
      cachefs warm s3://bucket/imagenet           fetch everything ahead
      cachefs hint s3://bucket/imagenet list      fetch what will be read next, in order
      cachefs status                              what is cached, what is mounted
      cachefs umount /data

    Every command explains itself: cachefs mount --help.
    """


def _add_commands() -> None:
    from cachefs.cli import (
        cluster,
        doctor,
        evict,
        hint,
        index,
        pin,
        pki,
        quota,
        refresh,
        seal,
        status,
        stop,
        verify,
        warm,
    )

    app.command("warm")(warm.warm)
    app.command("index")(index.index)
    app.command("seal")(seal.seal)
    app.command("hint")(hint.hint)
    app.command("status")(status.status)
    app.command("verify")(verify.verify)
    app.command("evict")(evict.evict)
    app.command("pin")(pin.pin)
    app.command("unpin")(pin.unpin)
    app.command("quota")(quota.quota)
    app.command("refresh")(refresh.refresh)
    app.command("doctor")(doctor.doctor)
    app.command("stop")(stop.stop)
    app.add_typer(cluster.app, name="cluster")
    app.add_typer(pki.app, name="pki")


_add_commands()


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); the exit code. Never raises but for defects of Python itself."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=given or ["--help"], prog_name="cachefs", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        return exits.OK
    except (KeyboardInterrupt, typer.Abort):
        code = exits.INTERRUPTED
    except exits.Unfinished as left:
        return left.code
    except typer.Exit as left:
        return int(left.exit_code)
    except Exception as error:  # noqa: BLE001 - the last place where a traceback can become a line
        return _usage(error) if hasattr(error, "format_message") else exits.report(error)
    if code == exits.INTERRUPTED:
        complain("interrupted; what was done until now stays done")
    if not given:
        return exits.USAGE  # a script whose variable is empty should notice
    return code if isinstance(code, int) else exits.OK


def _usage(error: Exception) -> int:
    """A command line that typer could not read. (Its exceptions have moved between versions: known by their face.)"""
    message = str(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if message:
        complain(message)
    if context is not None:
        complain(f"see: {context.command_path} --help")
    return int(getattr(error, "exit_code", exits.USAGE))
