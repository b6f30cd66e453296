"""What already runs a cluster and knows its nodes, each in a short file, chosen by a URL.

    static:a:7070,b:7070=2T        a list, with or without what each can store
    static:/etc/cachefs/nodes      a file with one such per line, read again when it changes
    dns://svc.ns:7070              addresses of a headless service; dns+srv://_peers._tcp.svc.ns for SRV records
    k8s://namespace/service        EndpointSlices of a service
    etcd://host:2379/prefix        nodes under a prefix, each held by its own lease
    slurm:                         the nodes of the job (slurm:9090 for another port than 7070)

Two have clients of their own, which are extras and loaded when they are asked for.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from cachefs.cluster.membership import Source
from cachefs.cluster.nodes import Node
from cachefs.errors import ConfigError

# Scheme -> (module, class). A source is made from what follows the scheme, and this node.
_SOURCES = {
    "static": ("static", "Static"),
    "dns": ("dns", "Addresses"),
    "dns+srv": ("dns", "Services"),
    "k8s": ("kubernetes", "EndpointSlices"),
    "etcd": ("etcd", "Leases"),
    "slurm": ("slurm", "Job"),
}

# What a module needs that is not installed by default -> the extra that brings it.
_EXTRAS = {"dns": "dns", "lightkube": "kubernetes", "httpx2": "kubernetes", "etcd3gw": "etcd", "requests": "etcd"}


def open_source(url: str, me: Node) -> Source:
    """Raises ConfigError for a URL that names no source, or one that cannot be used as it is written."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in _SOURCES:
        close = difflib.get_close_matches(scheme, _SOURCES, n=1)
        hint = f"did you mean {close[0]}:?" if close else f"one of {', '.join(f'{name}:' for name in _SOURCES)}"
        raise ConfigError(f"cluster {url!r}: no such source of nodes; {hint}")
    module, name = _SOURCES[scheme]
    try:
        made = getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ConfigError(f"cluster {url!r}: needs pip install 'cachefs-sidecar[{extra}]'") from error
    source: Source = made(rest, me)
    return source
