"""The contenders, by the name that --contender takes. One of your own: `--contender module:Class`.

They run in this order, and the report lists them in it.
"""

from __future__ import annotations

from importlib import import_module

from bench.contenders.contender import Contender, Folder, Place

CONTENDERS = {
    "native": "bench.contenders.native:Native",
    "mount": "bench.contenders.cachefs_mount:Mount",
    "passthrough": "bench.contenders.cachefs_mount:Passthrough",
    "hinted": "bench.contenders.hinted_mount:HintedMount",
    "url": "bench.contenders.through_fsspec:Url",
    "simplecache": "bench.contenders.through_fsspec:Simplecache",
    "filecache": "bench.contenders.through_fsspec:Filecache",
    "blockcache": "bench.contenders.through_fsspec:Blockcache",
    "rclone": "bench.contenders.rclone_mount:RcloneMount",
    "s3fs-fuse": "bench.contenders.s3fs_fuse:S3fsFuse",
    "s3fs": "bench.contenders.through_fsspec:S3fs",
    "obstore": "bench.contenders.obstore_direct:Obstore",
    "s3torchconnector": "bench.contenders.s3_connector:S3Connector",
    "mosaicml-streaming": "bench.contenders.mosaic_streaming:MosaicStreaming",
    "webdataset": "bench.contenders.web_dataset:WebDataset",
    "litdata": "bench.contenders.lit_data:LitData",
    "torchdata": "bench.contenders.torchdata_loader:TorchdataOverMount",
}

# Which of them are this project, and which is the limit rather than a rival.
OURS = ("mount", "passthrough", "hinted", "url", "torchdata")
LIMIT = "native"


def load(name: str) -> type[Contender]:
    """The class behind a name, or behind "module:Class". Raises LookupError, ImportError."""
    module, _, member = CONTENDERS.get(name, name).partition(":")
    if not member:
        raise LookupError(f"no contender is called {name!r}; there are {', '.join(CONTENDERS)}, and module:Class")
    found: type[Contender] = getattr(import_module(module), member)
    return found


__all__ = ["CONTENDERS", "LIMIT", "OURS", "Contender", "Folder", "Place", "load"]
