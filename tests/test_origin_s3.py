"""s3:// against real servers: rclone with credentials, and moto for the names that rclone refuses to store."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import ThreadedMotoServer

from cachefs.errors import ObjectNotFound, OriginAccessDenied, StaleObject, UnsupportedOrigin
from cachefs.messages import Entry
from cachefs.origin import Origin, OriginSpec, open_origin
from cachefs.origin.contract import etag_condition
from cachefs.origin.objects import addressable
from cachefs.origin.s3 import S3Origin
from cachefs.origin.s3_listing import UnreadablePage, parse_page
from cachefs.origin.sigv4 import Keys, encode_path, encode_query, signed_headers
from tests.conftest import Bucket, ThrottledBucket


@asynccontextmanager
async def opened(options: dict[str, Any], environ: dict[str, str] | None = None) -> AsyncIterator[Origin]:
    origin = open_origin(OriginSpec("s3", options, {"HOME": "/nonexistent", **(environ or {})}))
    try:
        yield origin
    finally:
        await origin.aclose()


async def collect(pages: AsyncIterator[list[Entry]]) -> list[Entry]:
    return [entry async for page in pages for entry in page]


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


# --- reading --------------------------------------------------------------------------------------------------


async def test_an_object_is_the_same_however_it_is_asked_for(bucket: Bucket) -> None:
    data = os.urandom(100_000)
    path = bucket.put("a/b.jpg", data)
    async with opened(bucket.options) as origin:
        entry = await origin.head(path)
        assert (entry.path, entry.size, entry.version, entry.directory) == (path, len(data), md5(data), False)
        assert await origin.get(path, version="", limit=len(data)) == (entry, data)
        assert await origin.get(path, version=entry.version, limit=len(data)) == (entry, data)
        assert await collect(origin.list_all(bucket.name)) == [entry]
        assert await collect(origin.list_level(f"{bucket.name}/a")) == [entry]


async def test_an_object_above_the_limit_is_only_described(throttled: ThrottledBucket) -> None:
    path = throttled.put("big", bytes(20_000_000))
    throttled.throttle.set(bandwidth_per_connection=10e6)
    async with opened(throttled.options) as origin:
        entry, data = await origin.get(path, version="", limit=1_000_000)
    assert (entry.size, data) == (20_000_000, None)
    assert throttled.throttle.traffic().bytes_down < 10_000_000, "the body was not dropped"


async def test_ranges(bucket: Bucket) -> None:
    """rclone answers ranges with status 200, which obstore refuses: the other way must give exactly the bytes."""
    data = os.urandom(3_000_000)
    path = bucket.put("big", data)
    async with opened(bucket.options) as origin:
        version = (await origin.head(path)).version
        for start, stop in ((0, 1), (1_000_000, 2_500_000), (2_999_999, 3_000_000), (5, 5), (0, 3_000_000)):
            assert await origin.get_range(path, start, stop, version=version) == data[start:stop]


async def test_many_ranges_at_once(bucket: Bucket) -> None:
    data = os.urandom(2_000_000)
    path = bucket.put("big", data)
    async with opened(bucket.options) as origin:
        spans = [(at, at + 20_000) for at in range(0, 2_000_000, 20_000)]
        found = await asyncio.gather(*(origin.get_range(path, *span, version=md5(data)) for span in spans))
    assert b"".join(found) == data


async def test_another_version_is_stale_even_where_the_server_ignores_if_match(bucket: Bucket) -> None:
    path = bucket.put("a", b"old bytes")
    async with opened(bucket.options) as origin:
        version = (await origin.head(path)).version
        bucket.put("a", b"new bytes")
        with pytest.raises(StaleObject, match=r"a: .*cachefs refresh"):
            await origin.get(path, version=version, limit=100)
        with pytest.raises(StaleObject):
            await origin.get_range(path, 0, 3, version=version)
        assert (await origin.get(path, version="", limit=100))[1] == b"new bytes"


async def test_a_range_beyond_the_object_is_stale(bucket: Bucket) -> None:
    path = bucket.put("a", b"short")
    async with opened(bucket.options) as origin:
        with pytest.raises(StaleObject):
            await origin.get_range(path, 3, 10, version="")
        with pytest.raises(StaleObject):
            await origin.get_range(path, 30, 40, version="")


async def test_empty_object(bucket: Bucket) -> None:
    path = bucket.put("empty", b"")
    async with opened(bucket.options) as origin:
        entry, data = await origin.get(path, version="", limit=0)
        assert (entry.size, data) == (0, b"")


async def test_what_is_a_directory_and_what_is_nothing(bucket: Bucket) -> None:
    bucket.put("a/b/c", b"1")
    async with opened(bucket.options) as origin:
        assert (await origin.head(f"{bucket.name}/a")).directory
        assert (await origin.head(bucket.name)).directory
        with pytest.raises(ObjectNotFound, match="no such object"):
            await origin.head(f"{bucket.name}/a/b/d")
        with pytest.raises(ObjectNotFound, match="no such object"):
            await origin.get(f"{bucket.name}/a/b", version="", limit=10)


# --- listing --------------------------------------------------------------------------------------------------


async def test_listing_pages_in_key_order_and_goes_on(bucket: Bucket) -> None:
    names = sorted(f"d{i % 7}/{i:05}" for i in range(2500))
    for name in names:
        bucket.put(name, b"")
    paths = [f"{bucket.name}/{name}" for name in names]
    async with opened(bucket.options) as origin:
        pages = [page async for page in origin.list_all(bucket.name)]
        assert len(pages) > 2
        assert [entry.path for page in pages for entry in page] == paths
        rest = await collect(origin.list_all(bucket.name, after=paths[1233]))
        assert [entry.path for entry in rest] == paths[1234:]
        below = await collect(origin.list_all(f"{bucket.name}/d3"))
        assert [entry.path for entry in below] == [path for path in paths if "/d3/" in path]
        level = await collect(origin.list_level(bucket.name))
        assert [(entry.path, entry.directory) for entry in level] == [(f"{bucket.name}/d{i}", True) for i in range(7)]


async def test_a_name_that_begins_alike_is_not_below(bucket: Bucket) -> None:
    bucket.put("train/a", b"1")
    bucket.put("train2/b", b"1")
    async with opened(bucket.options) as origin:
        assert [e.path for e in await collect(origin.list_all(f"{bucket.name}/train"))] == [f"{bucket.name}/train/a"]


async def test_all_buckets(bucket: Bucket) -> None:
    path = bucket.put("a/b", b"1")
    async with opened(bucket.options) as origin:
        assert bucket.name in {entry.path for entry in await collect(origin.list_level(""))}
        assert path in {entry.path for entry in await collect(origin.list_all(""))}


ODD = [
    "sp ace",
    "pl+us",
    "per%41cent",
    "per%2Fcent",
    "é",
    "e\u0301",
    "日本",
    "a*b?c#d",
    'q"<>|',
    "back\\slash",
    "~t",
    "..a",
    "&amp;",
]


async def test_odd_but_legal_names_come_back_byte_for_byte(bucket: Bucket) -> None:
    for name in ODD:
        bucket.put(f"d/{name}", name.encode())
    async with opened(bucket.options) as origin:
        entries = await collect(origin.list_all(bucket.name))
        assert {entry.path for entry in entries} == {f"{bucket.name}/d/{name}" for name in ODD}
        for entry in entries:
            data = (await origin.get(entry.path, version=entry.version, limit=100))[1]
            assert data == entry.path.removeprefix(f"{bucket.name}/d/").encode()
            assert await origin.get_range(entry.path, 1, 2, version=entry.version) == data[1:2]


# --- names that obstore refuses -------------------------------------------------------------------------------

HOSTILE = ["../x", "a//b", "a/./b", "dir/../y", "/lead", "trail/", "ctl\x01", "new\nline", "cr\r", "del\x7f"]


def body(name: str) -> bytes:
    return f"bytes of {name!r}".encode()


NEIGHBOURS = ["a/ok", "lead", "ok/z", "x", "zz"]


@pytest.fixture(scope="module")
def moto() -> Iterator[dict[str, Any]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    options = {"key": "KEYID4711", "secret": "SECRET4711", "endpoint_url": endpoint, "region": "us-east-1"}
    yield options
    server.stop()


@pytest.fixture(scope="module")
def client(moto: dict[str, Any]) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=moto["endpoint_url"],
        aws_access_key_id=moto["key"],
        aws_secret_access_key=moto["secret"],
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def hostile(client: Any) -> tuple[str, list[str]]:
    """(bucket, names that this server took): werkzeug refuses some before moto sees them."""
    client.create_bucket(Bucket="hostile")
    for name in NEIGHBOURS:
        client.put_object(Bucket="hostile", Key=name, Body=body(name))
    taken = []
    for name in HOSTILE:
        try:
            client.put_object(Bucket="hostile", Key=name, Body=body(name))
        except client.exceptions.ClientError:
            continue
        taken.append(name)
    assert len(taken) >= 7, taken
    return "hostile", taken


async def test_hostile_names_are_listed_as_they_are(moto: dict[str, Any], hostile: tuple[str, list[str]]) -> None:
    bucket, names = hostile
    async with opened(moto) as origin:
        entries = await collect(origin.list_all(bucket))
    assert {entry.path for entry in entries} == {f"{bucket}/{name}" for name in names + NEIGHBOURS}


async def test_hostile_names_can_be_read(moto: dict[str, Any], hostile: tuple[str, list[str]]) -> None:
    bucket, names = hostile
    async with opened(moto) as origin:
        for name in names + NEIGHBOURS:
            path, version = f"{bucket}/{name}", md5(body(name))
            assert await origin.get(path, version=version, limit=100) == (await origin.head(path), body(name))
            assert await origin.get_range(path, 6, 12, version=version) == body(name)[6:12]
            with pytest.raises(StaleObject):
                await origin.get(path, version="0" * 32, limit=100)


async def test_levels_with_hostile_names(moto: dict[str, Any], hostile: tuple[str, list[str]]) -> None:
    bucket, _ = hostile
    async with opened(moto) as origin:
        level = {entry.path: entry.directory for entry in await collect(origin.list_level(bucket))}
        assert level[f"{bucket}/.."] is level[f"{bucket}/a"] is level[f"{bucket}/"] is True
        assert level[f"{bucket}/x"] is level[f"{bucket}/lead"] is False
        nameless = await collect(origin.list_all(f"{bucket}/"))
        assert [entry.path for entry in nameless] == [f"{bucket}//lead"]


async def test_directory_markers_keep_their_slash(moto: dict[str, Any], client: Any) -> None:
    client.create_bucket(Bucket="markers")
    for name in ("empty/", "full/", "full/a", "file"):
        client.put_object(Bucket="markers", Key=name, Body=b"")
    async with opened(moto) as origin:
        assert [e.path for e in await collect(origin.list_all("markers"))] == [
            "markers/empty/",
            "markers/file",
            "markers/full/",
            "markers/full/a",
        ]
        assert [e.path for e in await collect(origin.list_all("markers/full"))] == ["markers/full/a"]
        assert (await origin.head("markers/empty")).directory


async def test_if_match_is_sent(moto: dict[str, Any], client: Any) -> None:
    """moto answers 412, and that is stale too."""
    client.create_bucket(Bucket="matching")
    client.put_object(Bucket="matching", Key="a", Body=b"1")
    async with opened(moto) as origin:
        with pytest.raises(StaleObject):
            await origin.get("matching/a", version="0" * 32, limit=10)
        assert await origin.get_range("matching/a", 0, 1, version=md5(b"1")) == b"1"


async def test_without_our_own_requests_the_extra_is_named(
    moto: dict[str, Any], hostile: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that only obstore can take on: its listing meets a hostile name and must not pretend."""
    monkeypatch.setattr("cachefs.origin.s3_keys.KeyRing.ours", False)
    async with opened(moto) as origin:
        with pytest.raises(UnsupportedOrigin, match=r"cachefs-sidecar\[s3\]"):
            await collect(origin.list_all("hostile"))


async def test_obstores_own_listing_gives_markers_their_slash_back(
    moto: dict[str, Any], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_bucket(Bucket="obstore-markers")
    for name in ("empty/", "file", "d/a"):
        client.put_object(Bucket="obstore-markers", Key=name, Body=b"")
    monkeypatch.setattr("cachefs.origin.s3_keys.KeyRing.ours", False)
    async with opened(moto) as origin:
        entries = await collect(origin.list_all("obstore-markers"))
        assert sorted(e.path for e in entries) == [
            "obstore-markers/d/a",
            "obstore-markers/empty/",
            "obstore-markers/file",
        ]
        level = await collect(origin.list_level("obstore-markers"))
        assert ("obstore-markers/d", True) in [(entry.path, entry.directory) for entry in level]
        assert (await origin.head("obstore-markers/d")).directory


def test_addressable_agrees_with_obstore() -> None:
    import obstore
    from obstore.store import MemoryStore

    store = MemoryStore()
    names = [f"a{chr(code)}b" for code in (*range(0x250), 0x2028, 0xFEFF, 0x1F600)]
    names += ["..", ".", "...", "a/..", "a//b", "/a", "a/", "..a", "a..", " a", "a ", "", "a/./b", *ODD, *HOSTILE]
    for name in names:
        try:
            obstore.put(store, name, b"x")
            [[meta]] = list(obstore.list(store))
            exact = meta["path"] == name
            obstore.delete(store, meta["path"])
        except ValueError:
            exact = False
        assert addressable(name) is exact, repr(name)


# --- credentials ----------------------------------------------------------------------------------------------


async def test_credentials_from_the_captured_environment(bucket: Bucket) -> None:
    path = bucket.put("a", b"1")
    environ = {"AWS_ACCESS_KEY_ID": bucket.options["key"], "AWS_SECRET_ACCESS_KEY": bucket.options["secret"]}
    async with opened({"endpoint_url": bucket.endpoint}, environ) as origin:
        assert (await origin.get(path, version="", limit=10))[1] == b"1"
        assert len(await collect(origin.list_all(bucket.name))) == 1


async def test_this_processs_environment_never_helps_nor_hurts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore reads the environment of its process for what it is not told."""
    path = bucket.put("a", b"1")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", "x" * 20)
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_REGION", "mars-1")
        patch.setenv("AWS_SKIP_SIGNATURE", "true")
        async with opened(bucket.options) as origin:
            assert (await origin.get(path, version="", limit=10))[1] == b"1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.options["secret"])
    for options in ({"anon": True}, {}):  # a stranger, whose own environment held nothing
        async with opened({"endpoint_url": bucket.endpoint, "retry_timeout": 0, **options}) as origin:
            with pytest.raises(OriginAccessDenied):
                await origin.get(path, version="", limit=10)
            with pytest.raises(OriginAccessDenied):
                await collect(origin.list_all(bucket.name))


async def test_check_says_whether_it_works(bucket: Bucket) -> None:
    async with opened(bucket.options) as origin:
        await origin.check()
        await origin.check(bucket.name)
        with pytest.raises(ObjectNotFound, match="bucket does not exist"):
            await origin.check("no-such-bucket")
    async with opened({**bucket.options, "secret": "wrong-secret"}) as origin:
        with pytest.raises(OriginAccessDenied):
            await origin.check()


async def test_the_region_of_a_bucket_is_asked_once(monkeypatch: pytest.MonkeyPatch, moto: dict[str, Any]) -> None:
    asked: list[str] = []

    async def ask(self: Any, url: str, headers: Any, *, path: str, method: str = "GET") -> Any:
        from cachefs.origin.wire import Answer

        asked.append(url)
        return Answer(403, {"x-amz-bucket-region": "eu-north-1"}, -1, b"")

    monkeypatch.setattr("cachefs.origin.wire.Wire.ask", ask)
    origin = open_origin(OriginSpec("s3", {"anon": True}, {"HOME": "/nonexistent"}))
    assert isinstance(origin, S3Origin)
    assert [await origin._plain.region("b"), await origin._plain.region("b")] == ["eu-north-1"] * 2
    assert asked == ["https://s3.amazonaws.com/b"]
    assert origin._plain.endpoint("eu-north-1") == "https://s3.eu-north-1.amazonaws.com"
    await origin.aclose()


# --- the protocol ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a/b.jpg", "../x", "a//b", "sp ace+&%25", "日本", "new\nline", "~-._"])
def test_signatures_are_botocores(key: str) -> None:
    url = f"http://h:9000/bucket/{encode_path(key)}?{encode_query({'prefix': key, 'list-type': '2'})}"
    now = datetime.now(UTC).replace(microsecond=0)
    ours = signed_headers("GET", url, {"Range": "bytes=0-1"}, keys=Keys("K", "S", "T"), region="r", now=now)
    request = AWSRequest("GET", url, headers={"Range": "bytes=0-1", "host": "h:9000"})
    auth = S3SigV4Auth(Credentials("K", "S", "T"), "s3", "r")
    request.context["timestamp"] = ours["x-amz-date"]
    request.context["payload_signing_enabled"] = True
    request.headers["X-Amz-Date"] = ours["x-amz-date"]
    request.headers["X-Amz-Security-Token"] = "T"
    request.headers["X-Amz-Content-SHA256"] = ours["x-amz-content-sha256"]
    canonical = auth.canonical_request(request)
    signature = auth.signature(auth.string_to_sign(request, canonical), request)
    assert ours["Authorization"].endswith(f"Signature={signature}")


def test_a_listing_that_forgets_its_token_goes_on() -> None:
    page = parse_page(
        b"<ListBucketResult><IsTruncated>true</IsTruncated><EncodingType>url</EncodingType>"
        b"<Contents><Key>a+b%2Bc%0A</Key><Size>3</Size><ETag>&quot;e&quot;</ETag>"
        b"<LastModified>2026-01-01T00:00:00.999Z</LastModified></Contents></ListBucketResult>",
        "b",
    )
    assert page.files == [Entry("b/a b+c\n", 3, 1767225600000000000, "e")]
    assert page.token
    assert page.last_key == "a b+c\n"


def test_an_answer_that_is_no_listing_is_refused() -> None:
    for body in (b"<html/>", b"not xml", b"", b"<ListBucketResult><Contents>"):
        with pytest.raises(UnreadablePage):
            parse_page(body, "b")


def test_only_etags_are_conditions() -> None:
    assert etag_condition("") is None
    assert etag_condition("1767225600000000000-3") is None
    assert etag_condition(f"{'0' * 32}-3") == f'"{"0" * 32}-3"'
    assert etag_condition("0x8D") == '"0x8D"'
