"""The libraries that training code reads with, each reading through the URL as its own documentation says.

Every test reads twice: from the origin, and from the cache with the origin's objects gone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.machine import Bucket

Options = dict[str, Any]


@pytest.fixture
def options(bucket: Bucket, cache_dir: Path) -> Options:
    """storage_options of a chained URL."""
    return {"s3": bucket.options, "cachefs": {"cache_dir": str(cache_dir)}}


@pytest.fixture
def flat(bucket: Bucket, cache_dir: Path) -> Options:
    """Options of the protocol cachefs by itself."""
    return {"target_protocol": "s3", "target_options": bucket.options, "cache_dir": str(cache_dir)}


def twice(bucket: Bucket, read: Callable[[], Any]) -> tuple[Any, Any]:
    """What `read` gives from the origin, and what it gives when the objects are empty there."""
    cold = read()
    for file in bucket.folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    return cold, read()


@pytest.fixture
def table() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"label": list(range(1000)), "name": [f"image {n}" for n in range(1000)]})


def test_pandas(bucket: Bucket, options: Options, table: Any):
    import pandas as pd

    bucket.put("t.csv", table.to_csv(index=False).encode())
    bucket.put("t.csv.gz", _written(lambda f: table.to_csv(f, index=False, compression="gzip")))
    bucket.put("t.parquet", _written(table.to_parquet))

    def read() -> list[Any]:
        base = f"cachefs::s3://{bucket.name}/t."
        return [
            pd.read_csv(base + "csv", storage_options=options),
            pd.read_csv(base + "csv.gz", storage_options=options, compression="gzip"),
            pd.read_parquet(base + "parquet", storage_options=options),
        ]

    for frames in twice(bucket, read):
        for frame in frames:
            pd.testing.assert_frame_equal(frame.astype(table.dtypes), table)
    with pytest.raises(OSError, match="read-only"):
        table.to_csv(f"cachefs::s3://{bucket.name}/new.csv", storage_options=options)


def test_pyarrow(bucket: Bucket, flat: Options, table: Any):
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    whole = pa.Table.from_pandas(table)
    for part in range(3):
        sink = io.BytesIO()
        pq.write_table(whole.slice(part * 300, 300), sink, row_group_size=100)
        bucket.put(f"parts/{part}.parquet", sink.getvalue())
    fs = fsspec.filesystem("cachefs", **flat)

    def read() -> list[Any]:
        return [
            pq.read_table(f"{bucket.name}/parts/1.parquet", filesystem=fs, columns=["label"]).column("label"),
            ds.dataset(f"{bucket.name}/parts", filesystem=fs).to_table(filter=ds.field("label") < 600).num_rows,
        ]

    for column, rows in twice(bucket, read):
        assert column.to_pylist() == list(range(300, 600))
        assert rows == 600


def test_dask(bucket: Bucket, options: Options, table: Any):
    import dask
    import dask.bag as db
    import dask.dataframe as dd

    for part in range(2):
        bucket.put(f"csv/{part}.csv", table[part * 500 : part * 500 + 500].to_csv(index=False).encode())
        bucket.put(f"parquet/{part}.parquet", _written(table[part * 500 : part * 500 + 500].to_parquet))

    def read() -> list[int]:
        with dask.config.set(scheduler="threads"):
            base = f"cachefs::s3://{bucket.name}"
            return [
                int(dd.read_csv(f"{base}/csv/*.csv", storage_options=options).label.sum().compute()),
                int(dd.read_parquet(f"{base}/parquet/", storage_options=options).label.sum().compute()),
                len(db.read_text(f"{base}/csv/*.csv", storage_options=options).compute()),  # type: ignore[no-untyped-call]
            ]

    total = sum(range(1000))
    for result in twice(bucket, read):
        assert result == [total, total, 1002]


def test_zarr(bucket: Bucket, options: Options, flat: Options):
    zarr = pytest.importorskip("zarr")
    import numpy as np

    values = np.arange(10_000).reshape(100, 100)
    zarr.create_array(str(bucket.folder / "array"), data=values, chunks=(10, 100))

    def read() -> list[Any]:
        store = zarr.storage.FsspecStore.from_url(
            f"cachefs::s3://{bucket.name}/array", storage_options=options, read_only=True
        )
        fs = fsspec.filesystem("cachefs", asynchronous=True, **flat)
        direct = zarr.storage.FsspecStore(fs, path=f"{bucket.name}/array", read_only=True)
        return [zarr.open_array(each, mode="r")[:] for each in (store, direct)]

    for arrays in twice(bucket, read):
        for array in arrays:
            assert (array == values).all()


def test_h5py(bucket: Bucket, options: Options):
    h5py = pytest.importorskip("h5py")
    import numpy as np

    values = np.random.default_rng(0).random((200, 300))

    def write(sink: Any) -> None:
        with h5py.File(sink, "w") as file:
            file.create_dataset("x", data=values, chunks=(10, 300), compression="gzip")

    bucket.put("x.h5", _written(write))

    def read() -> Any:
        with fsspec.open(f"cachefs::s3://{bucket.name}/x.h5", **options) as remote, h5py.File(remote) as file:
            return file["x"][50:60]

    for rows in twice(bucket, read):
        assert (rows == values[50:60]).all()
    local = fsspec.open_local(f"cachefs::s3://{bucket.name}/x.h5", **options)
    with h5py.File(local) as file:  # by path, with the HDF5 library's own reading
        assert (file["x"][:] == values).all()


def test_hugging_face_datasets(
    bucket: Bucket, flat: Options, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    bucket.put("d/train.jsonl", table.to_json(orient="records", lines=True).encode())
    bucket.put("d/train.parquet", _written(table.to_parquet))

    def read() -> list[int]:
        sums = []
        for kind, name in (("json", "train.jsonl"), ("parquet", "train.parquet")):
            stream = datasets.load_dataset(
                kind,
                data_files={"train": f"cachefs://{bucket.name}/d/{name}"},
                storage_options=flat,
                streaming=True,
                split="train",
                cache_dir=str(tmp_path / "hf-cache"),
            )
            sums.append(sum(row["label"] for row in stream))
        return sums

    for sums in twice(bucket, read):
        assert sums == [sum(range(1000))] * 2


def test_universal_pathlib(bucket: Bucket, flat: Options):
    upath = pytest.importorskip("upath")
    bucket.put("d/a.txt", b"text")
    bucket.put("d/deep/b.txt", b"more")

    def read() -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = upath.UPath(f"cachefs://{bucket.name}/d", **flat)
            chained = upath.UPath(f"cachefs::s3://{bucket.name}/d/a.txt", **flat)
        return [
            sorted(each.name for each in path.iterdir()),
            (path / "a.txt").read_text(),
            (path / "deep" / "b.txt").open("rb").read(),
            (path / "a.txt").stat().st_size,
            sorted(each.name for each in path.glob("**/*.txt")),
            (path / "a.txt").is_file() and path.is_dir() and not (path / "none").exists(),
            chained.read_bytes(),
        ]

    expected = [["a.txt", "deep"], "text", b"more", 4, ["a.txt", "b.txt"], True, b"text"]
    for result in twice(bucket, read):
        assert result == expected


def _written(write: Callable[[Any], Any]) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()
