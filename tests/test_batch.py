"""Work on whole datasets by many processes: real ones of Dask, against real storage."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs import datasets
from cachefs.batch.reach import reach_of
from cachefs.batch.tasks import HashObjects, pack
from cachefs.batch.worker import perform_here
from cachefs.catalog import Catalog
from cachefs.cluster.peers import pki as certificates
from cachefs.origin.given import options_given
from cachefs.origin.spec import parse_origin
from cachefs_sidecar.testbed import S3Server
from tests.command_line import CommandLine, credentials, s3, script, script_of
from tests.conftest import Bucket, ThrottledBucket
from tests.dask_cluster import DaskCluster


@pytest.fixture(scope="module")
def dask(s3_server: S3Server) -> Iterator[DaskCluster]:
    """Whose workers have the credentials in their environment; the commands of the tests may not."""
    with DaskCluster(credentials(s3_server.options)) as cluster:
        yield cluster


@pytest.fixture
def photos(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """60 objects in 12 directories, and some with names that need care."""
    for number in range(60):
        bucket.put(f"set/c{number % 12:02d}/{number:02d}.jpg", b"%d" % number * 100)
    bucket.put("set/c00/é ü+%20.jpg", b"odd")
    for name, value in credentials(bucket.options).items():
        monkeypatch.setenv(name, value)
    return bucket


def catalog_of(home: Path) -> Catalog:
    (file,) = home.glob("catalogs/*/*.sqlite")
    return Catalog.open(file)


def test_dask_lists_what_one_machine_lists(cachefs: CommandLine, photos: Bucket, dask: DaskCluster, tmp_path: Path):
    alone = cachefs("index", f"{photos.url}/set", *s3(photos.options), "--json").ok().json
    assert alone["files"] == 61
    home = tmp_path / "other"
    try:
        many = cachefs("index", f"{photos.url}/set", *s3(photos.options), *dask.options, "-d", home, "--json").ok().json
        assert many["snapshot"] == alone["snapshot"]
        with catalog_of(home) as one, catalog_of(tmp_path / "cache") as other:
            assert list(one.files()) == list(other.files())
    finally:
        cachefs("stop", "-d", home)


def test_an_index_that_is_killed_goes_on(
    throttled: ThrottledBucket, dask: DaskCluster, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(60):
        throttled.put(f"set/{number:02d}/a", b"x")
    command = [*script_of("index", f"{throttled.url}/set", *s3(throttled.options)), *dask.options, "-d", str(cache_dir)]
    monkeypatch.setenv("TEST_KEY", throttled.options["key"])
    monkeypatch.setenv("TEST_SECRET", throttled.options["secret"])
    throttled.throttle.set(latency=0.1)  # three workers: 45 requests take 1.5 s, and what is done is kept each second
    with subprocess.Popen(command) as process:
        while throttled.throttle.traffic().total < 45:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    throttled.throttle.set(latency=0)
    time.sleep(0.2)  # what the workers have under way
    throttled.throttle.reset()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["files"] == 60
    assert throttled.throttle.traffic().total < 60


def test_the_credentials_of_the_command_are_not_sent(cachefs: CommandLine, photos: Bucket, dask: DaskCluster):
    options = [text.replace("key=@env:TEST_KEY", "key=abcdef") for text in s3(photos.options)]
    cachefs("index", photos.url, *options, *dask.options).failed(2, "key", "@env:", "scheduler")


def test_what_a_dashboard_shows_of_a_task(photos: Bucket, dask: DaskCluster):
    from distributed import Client

    options, _ = options_given([text for text in s3(photos.options) if "=" in text])
    spec, path = parse_origin(photos.url, options)
    reach = reach_of(spec, [text for text in s3(photos.options) if "=" in text], private=False)
    parcel = pack("seal objects 0 to 1", HashObjects(reach, [(1, f"{path}/secret-name", 3, "v")]))
    assert "secret-name" not in repr(parcel)

    def kept(dask_scheduler: Any) -> list[str]:
        return [repr(task.run_spec) + repr(task) for task in dask_scheduler.tasks.values()]

    with Client(dask.address, set_as_default=False) as client:
        # Nobody has that resource, so the task stays where all who may look at the scheduler can see it.
        future = client.submit(perform_here, parcel, key="cachefs-seal-0", pure=False, resources={"none": 1})
        while not (shown := client.run_on_scheduler(kept)):
            time.sleep(0.02)
        future.cancel()
    secrets = [photos.options["key"], photos.options["secret"]]
    assert all(secret not in text for secret in secrets for text in [*shown, repr(parcel), str(parcel.data)])
    assert any("seal objects 0 to 1" in text for text in shown)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1", "tls://127.0.0.1:1", "tcp://"])
def test_no_scheduler_there(cachefs: CommandLine, photos: Bucket, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cachefs.batch.dask_engine.CONNECT_SECONDS", 0.5)
    cachefs("index", photos.url, *s3(photos.options), "--engine", "dask", "--scheduler", address).failed(2, address)


def test_without_a_scheduler_or_dask(cachefs: CommandLine, photos: Bucket, monkeypatch: pytest.MonkeyPatch):
    cachefs("index", photos.url, *s3(photos.options), "--engine", "dask").failed(2, "--scheduler tcp://host:8786")
    cachefs("index", photos.url, *s3(photos.options), "--engine", "spark").failed(2, "local and dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with_dask = ("--engine", "dask", "--scheduler", "tcp://127.0.0.1:1")
    cachefs("index", photos.url, *s3(photos.options), *with_dask).failed(2, "cachefs-sidecar[dask]")


def test_a_scheduler_file(cachefs: CommandLine, photos: Bucket, dask: DaskCluster, tmp_path: Path):
    file = tmp_path / "scheduler.json"
    with_dask = ("--engine", "dask", "--scheduler", file)
    cachefs("index", photos.url, *s3(photos.options), *with_dask).failed(2, "cannot be read")
    file.write_text("{}")
    cachefs("index", photos.url, *s3(photos.options), *with_dask).failed(2, "not what a Dask scheduler writes")
    file.write_text(json.dumps({"type": "Scheduler", "address": dask.address}))
    assert cachefs("index", photos.url, *s3(photos.options), *with_dask, "--json").ok().json["files"] == 61


def test_over_tls(cache_dir: Path, tmp_path: Path):
    pki = tmp_path / "pki"
    certificates.make_authority(pki)
    certificate, key = certificates.issue(pki, "node")
    tls = "DASK_DISTRIBUTED__COMM__TLS__"
    environ = {f"{tls}CA_FILE": str(pki / "ca.pem")}
    for role in ("CLIENT", "SCHEDULER", "WORKER"):
        environ |= {f"{tls}{role}__CERT": str(certificate), f"{tls}{role}__KEY": str(key)}
    environ["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_bytes(b"x")
    with DaskCluster(environ | {"TEST_DASK_PROTOCOL": "tls://"}, workers=1) as dask:
        assert dask.address.startswith("tls://")
        command = ["seal", str(tmp_path / "set"), *dask.options, "-d", str(cache_dir)]
        script(*command).failed(2, dask.address)
        assert "1 file sealed" in script(*command, environ=environ).ok().out


def test_listing_again_takes_what_is_new(cachefs: CommandLine, photos: Bucket, dask: DaskCluster, cache_dir: Path):
    first = cachefs("index", photos.url, *s3(photos.options), *dask.options, "--json").ok().json
    with newest(cache_dir) as catalog:
        before = {path: row.id for path, row in catalog.files()}
    photos.put("set/c00/new.jpg", b"new")
    assert cachefs("index", photos.url, *s3(photos.options), *dask.options, "--json").ok().json == first | {
        "changed": False
    }
    again = cachefs("index", photos.url, *s3(photos.options), *dask.options, "--refresh", "--json").ok().json
    assert (again["files"], again["changed"]) == (first["files"] + 1, True)
    with newest(cache_dir) as catalog:
        after = {path: row.id for path, row in catalog.files()}
    assert before.items() < after.items()  # a mount goes on with the numbers that it has given away


def newest(home: Path) -> Catalog:
    (record,) = datasets.load_all(home)
    file = datasets.catalog_file(home, record)
    assert file is not None
    return Catalog.open(file)
