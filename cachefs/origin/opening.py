"""Which client serves which protocol."""

from __future__ import annotations

from cachefs.origin.contract import Origin
from cachefs.origin.spec import OriginSpec


def open_origin(spec: OriginSpec) -> Origin:
    """A client for the origin, for the running event loop. Connects to nothing yet.

    Raises ConfigError for options that cannot be used, UnsupportedOrigin when a package is missing.
    """
    if spec.protocol == "s3":
        from cachefs.origin.s3 import S3Origin

        return S3Origin(spec)
    if spec.protocol == "gs":
        from cachefs.origin.clouds import GcsOrigin

        return GcsOrigin(spec)
    if spec.protocol == "az":
        from cachefs.origin.clouds import AzureOrigin

        return AzureOrigin(spec)
    if spec.protocol in ("http", "https"):
        from cachefs.origin.web import WebOrigin

        return WebOrigin(spec)
    if spec.protocol == "file":
        from cachefs.origin.local import LocalOrigin

        return LocalOrigin(spec)
    from cachefs.origin.generic import FsspecOrigin

    return FsspecOrigin(spec)
