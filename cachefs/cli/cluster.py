"""`cachefs cluster`: be a node of a cluster, and see how the others do."""

from __future__ import annotations

import os
import socket
from typing import Annotated

import typer

from cachefs.cli.exits import FAILURES, Unfinished
from cachefs.cli.options import (
    CacheDirOption,
    JsonOption,
    MinFreeOption,
    OriginOptionOption,
    SizeOption,
    TenantOption,
    cache_config,
)
from cachefs.cli.output import say, say_json
from cachefs.cli.target import target_of
from cachefs.config import CacheConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

PORT = 7070


@app.callback()
def cluster() -> None:
    """Nodes that share their caches: each object is read from the origin once for all of them.

    \b
      cachefs pki secret /etc/cachefs/secret       once; copy it to every node
      cachefs cluster serve s3://bucket/imagenet --members static:node1:7070,node2:7070 --secret /etc/cachefs/secret
      cachefs cluster status
    """


@app.command("serve")
def serve(
    origin: Annotated[
        list[str],
        typer.Argument(
            metavar="ORIGIN...", show_default=False, help="The datasets that nodes share, as they are mounted."
        ),
    ],
    members: Annotated[
        str,
        typer.Option(
            "--members",
            envvar="CACHEFS_CLUSTER",
            metavar="SOURCE",
            show_default=False,
            help="Where the nodes are named: static:a:7070,b:7070, static:/file, dns://service:7070, "
            "k8s://namespace/service, etcd://host:2379/prefix, slurm:",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", show_default=False, help="This node, as the others know it. [default: the host's name]"),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where the other nodes reach this one.")
    ] = f"0.0.0.0:{PORT}",
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise",
            metavar="HOST",
            show_default=False,
            help="The address that the others are told. [default: that of --listen, or the host's name]",
        ),
    ] = None,
    secret: Annotated[
        str,
        typer.Option(
            "--secret", metavar="FILE", show_default=False, help="The cluster's secret (`cachefs pki secret`)."
        ),
    ] = "",
    sign: Annotated[
        str,
        typer.Option(
            "--sign",
            metavar="all|headers",
            help="With --secret, of what this node receives: every byte is signed, or headers with the digests of the "
            "bytes, in a network where nobody changes what passes.",
        ),
    ] = "all",
    ca: Annotated[
        str,
        typer.Option(
            "--ca", metavar="FILE", show_default=False, help="Or: the certificate of the cluster's authority,"
        ),
    ] = "",
    certificate: Annotated[
        str, typer.Option("--certificate", metavar="FILE", show_default=False, help="this node's certificate,")
    ] = "",
    key: Annotated[str, typer.Option("--key", metavar="FILE", show_default=False, help="and its key.")] = "",
    cache_dir: CacheDirOption = None,
    size: SizeOption = None,
    min_free: MinFreeOption = None,
    origin_option: OriginOptionOption = None,
    tenant: TenantOption = None,
) -> None:
    """Share this node's cache with the other nodes, and theirs with this one, until Ctrl-C or SIGTERM.

    Each object has an owner among the nodes, which reads it from the origin once; the others ask the owner. Mounts and
    readers of this cache need no setting: they profit while this command runs, and read the origin when it does not.
    Every node must mount the same ORIGIN. No node is believed without the secret, or a certificate.

    \b
      cachefs pki secret /etc/cachefs/secret       once; copy it to every node
      cachefs cluster serve s3://bucket/imagenet --members static:node1:7070,node2:7070 --secret /etc/cachefs/secret
    """  # fmt: skip
    from cachefs.cluster.addresses import host_port
    from cachefs.messages import Join

    config = cache_config(cache_dir, size, min_free)
    targets = [target_of(each, origin_option, cache_dir, size, min_free, tenant=tenant) for each in origin]
    host, port = host_port(listen, PORT)
    request = Join(
        id=2,
        members=members,
        name=name or socket.gethostname(),
        host=advertise or (socket.gethostname() if host in ("0.0.0.0", "::") else host),  # noqa: S104 - compared
        port=port,
        weight=weight_of(config),
        secret=_absolute(secret),
        ca=_absolute(ca),
        certificate=_absolute(certificate),
        key=_absolute(key),
        sign=sign,
    )
    from cachefs.cli.cluster_node import run

    run(config, targets, request, host)


def weight_of(config: CacheConfig) -> int:
    """Bytes that this node can store, of which its share of the cluster follows: the size of the cache, as it was given
    now or before, and what its disks have at most."""
    from cachefs.fetcher.settings import remembered_size

    size = config.size if config.size is not None else remembered_size(config.home)
    disks = {}
    for directory in config.dirs:
        present = next(level for level in (directory, *directory.parents) if level.exists())
        info = os.statvfs(present)
        whole = info.f_blocks * info.f_frsize
        disks[present.stat().st_dev] = max(0, whole - config.min_free.of(whole))
    total = sum(disks.values())
    return max(1, total if size is None else min(size, total))


def _absolute(file: str) -> str:
    """The fetcher, which opens it, has another working directory."""
    return os.path.abspath(os.path.expanduser(file)) if file else ""


@app.command("status")
def status(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Ask every node: what it owns and stores, what came from where, how fast, who is slow.

    All nodes are asked at once, for two seconds. The exit code is 1 when one does not answer. What the keys of --json
    mean is said in cachefs/cli/cluster_report.py.
    """
    from msgspec import to_builtins

    from cachefs.cli.cluster_status import gathered, lines

    report = gathered(cache_config(cache_dir, require=True))
    if as_json:
        say_json(to_builtins(report))
    else:
        for line in lines(report):
            say(line)
    if not report.well:
        raise Unfinished(FAILURES)
