"""From what a user writes to an object path, without loading the file system of the protocol.

    cachefs::s3://bucket/a.jpg, cachefs://bucket/a.jpg, s3://bucket/a.jpg, bucket/a.jpg -> bucket/a.jpg

The result is the same as that file system's own `_strip_protocol` (s3fs takes 0.4 s to import and may not be there);
of protocols that we do not serve ourselves it is asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Strip = Callable[[str], str]

PROTOCOL = "cachefs"

_SCHEMES = {
    "s3": ("s3://", "s3a://"),
    "gs": ("gs://", "gcs://"),
    "az": ("az://", "azure://", "abfs://", "abfss://", "adl://"),
}


def without_cachefs(text: str) -> str:
    """What stands behind cachefs:: or cachefs://, which may be nothing."""
    return text.removeprefix(PROTOCOL + "::").removeprefix(PROTOCOL + "://")


def strip_for(protocol: str, fs: Any = None) -> Strip:
    """The function that makes object paths of one protocol (aliases resolved) out of text without cachefs.

    fs: the file system whose rules they are, where the protocol does not say it all.
    """
    if fs is not None:
        return lambda text: str(fs._strip_protocol(text))
    if protocol in _SCHEMES:
        schemes = _SCHEMES[protocol]
        return lambda text: _bucket_path(text, schemes)
    if protocol == "file":
        return _local_path
    if protocol in ("http", "https"):
        return lambda text: text.rstrip("/")
    from cachefs.origin.spec import filesystem_class

    kind = filesystem_class(protocol)
    return lambda text: str(kind._strip_protocol(text))


def unstrip_for(protocol: str, path: str) -> str:
    """The URL that names an object path again, with its cache."""
    if protocol in ("http", "https") or "://" in path:
        return f"{PROTOCOL}::{path}"
    return f"{PROTOCOL}::{protocol}://{path}"


def parent_of(path: str) -> str:
    """The object path of the directory around `path`; "" above the first component, "/" above /a."""
    above, slash, _ = path.rpartition("/")
    return above or slash if path.startswith("/") else above


def _bucket_path(text: str, schemes: tuple[str, ...]) -> str:
    for scheme in schemes:
        if text.startswith(scheme):
            text = text[len(scheme) :]
            container, at, location = text.partition("@")
            if at and "/" not in container and scheme.startswith(("abfs", "adl")):
                text = f"{container}/{location.partition('/')[2]}"
            break
    return text.strip("/")


def _local_path(text: str) -> str:
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    return os.path.abspath(os.path.expanduser(text)) if text else "/"
