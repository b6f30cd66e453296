"""Very large datasets whose names are known: the catalog that listing them would have left in a cache."""

from __future__ import annotations

import os
from pathlib import Path

from bench.stage import Stage
from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.config import CacheConfig
from cachefs.datasets import DatasetRecord
from cachefs.origin.spec import parse_origin
from cachefs.store import Store
from cachefs_sidecar.testbed.catalogs import FILES_PER_DIRECTORY, ROOT_PATH, make_catalog

URL = f"s3://{ROOT_PATH}"


def give_catalog(stage: Stage, home: Path, count: int, per_directory: int = FILES_PER_DIRECTORY) -> None:
    """Leave in the cache `home` what listing URL on the stage's server would have, had it `count` files."""
    Store.open(CacheConfig.make(home, min_free=0))
    spec, root = parse_origin(URL, stage.s3())
    folder = home / "catalogs" / DatasetRecord(spec.identity, root).id
    folder.mkdir(parents=True)
    new = folder / "new.sqlite"
    with make_catalog(new, count, root=root, identity=spec.identity, per_directory=per_directory) as catalog:
        snapshot, last_id = catalog.summary.snapshot, catalog.summary.last_id
    new.rename(folder / f"{snapshot}.sqlite")
    datasets.save(home, DatasetRecord(spec.identity, root, snapshot, f"{snapshot}.sqlite", URL, last_id))
    Catalog.open(folder / f"{snapshot}.sqlite").close()
    os.sync()
