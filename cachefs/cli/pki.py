"""`cachefs pki`: certificates, or a secret, for the nodes of a small cluster that has no authority of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cachefs.cli.output import say
from cachefs.cluster.peers import pki as certificates
from cachefs.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="Where its files are kept.")]


@app.callback()
def pki() -> None:
    """Certificates, or a secret, for nodes that give each other what they cache.

    Nodes give each other nothing until each knows that the other belongs to the cluster: by certificates of one
    authority (TLS 1.3, both sides), or by a secret that all know. Where there is an authority already, use that: a
    node's certificate needs the node's name as subjectAltName, and must be for client and server.

    \b
      cachefs pki init pki              the authority: pki/ca.pem goes to every node, pki/ca.key to none
      cachefs pki issue pki node-1      pki/node-1.pem and pki/node-1.key go to node-1
      cachefs pki secret secret         instead: one file for every node; nothing is encrypted then
    """


@app.command("init")
def init(folder: FolderArgument) -> None:
    """Make an authority in DIR."""
    with _made():
        certificate = certificates.make_authority(folder)
    say(f"{certificate}: goes to every node; {folder}/ca.key makes certificates and stays where it is")


@app.command("issue")
def issue(
    folder: FolderArgument,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", show_default=False, help="Names of nodes.")],
) -> None:
    """Make a certificate of DIR's authority for each NODE. It replaces an older one, and is valid for 825 days."""
    for node in nodes:
        with _made():
            certificate, key = certificates.issue(folder, node)
        say(f"{certificate}, {key}: go to {node}")


@app.command("secret")
def secret(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A file that is not there yet.")],
) -> None:
    """Make a secret in FILE, for nodes on a network where nobody listens: what they say is signed, not encrypted."""
    with _made():
        certificates.make_secret(file)
    say(f"{file}: goes to every node, readable for its owner only")


@contextmanager
def _made() -> Iterator[None]:
    """Errors of the file system, and a missing package, as what a user can do about them."""
    try:
        yield
    except ModuleNotFoundError:
        raise ConfigError("needs the package cryptography: pip install 'cachefs-sidecar[cluster]'") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from None
