"""What goes wrong at an origin: each failure is told as what it is, soon enough, and without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from cachefs.errors import (
    CacheFSError,
    IsADirectory,
    ObjectNotFound,
    OriginAccessDenied,
    OriginError,
    OriginTimeout,
    OriginUnreachable,
    StaleObject,
    UnsupportedOrigin,
)
from cachefs.origin import Origin, OriginSpec, open_origin
from cachefs.origin.failures import OBSTORE_ERRORS, Place, obstore_error, os_error, status_error
from cachefs.origin.patience import Patience, Transient
from tests.conftest import Bucket, ThrottledBucket

PLACE = Place("s3", "http://h:9000")
SECRET = "SECRET4711"

# An origin that does not answer is given up after this in these tests, seconds. One that answers, if slowly, with an
# error: HASTY.
HASTY = {"retry_timeout": 0.3}
QUICK = {**HASTY, "connect_timeout": 0.5, "read_timeout": 0.5}


@contextlib.asynccontextmanager
async def opened(options: dict[str, Any], protocol: str = "s3") -> AsyncIterator[Origin]:
    environ = {"HOME": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    origin = open_origin(OriginSpec(protocol, options, environ))
    try:
        yield origin
    finally:
        await origin.aclose()


async def consume(pages: AsyncIterator[Any]) -> None:
    async for _ in pages:
        pass


def operations(origin: Origin, path: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    bucket = path.partition("/")[0]
    return {
        "head": lambda: origin.head(path),
        "get": lambda: origin.get(path, version="", limit=1000),
        "get_range": lambda: origin.get_range(path, 0, 1, version=""),
        "list_level": lambda: consume(origin.list_level(bucket)),
        "list_all": lambda: consume(origin.list_all(bucket)),
        "check": lambda: origin.check(bucket),
    }


async def failures(origin: Origin, path: str) -> dict[str, CacheFSError]:
    """What each operation raises."""
    found: dict[str, CacheFSError] = {}
    for name, operation in operations(origin, path).items():
        with pytest.raises(CacheFSError) as caught:
            await operation()
        found[name] = caught.value
    return found


def assert_all(found: dict[str, CacheFSError], kind: type[CacheFSError], text: str) -> None:
    for name, error in found.items():
        assert type(error) is kind, f"{name}: {error!r}"
        assert text in str(error), f"{name}: {error}"


# --- the table ------------------------------------------------------------------------------------------------


def test_every_exception_of_obstore_is_in_the_table() -> None:
    """A new version of obstore with a new exception must be looked at."""
    import obstore.exceptions

    classes = {name for name, value in vars(obstore.exceptions).items() if inspect.isclass(value)}
    assert classes == set(OBSTORE_ERRORS)


@pytest.mark.parametrize("name", sorted(OBSTORE_ERRORS))
def test_no_exception_of_obstore_leaks_its_text(name: str) -> None:
    import obstore.exceptions

    noise = f"http://h/b/k?X-Amz-Signature={SECRET} Debug source: token {SECRET}"
    raised = getattr(obstore.exceptions, name)(noise)
    error = obstore_error(raised, PLACE, "b/k", Patience())
    assert isinstance(error, CacheFSError)
    assert SECRET not in str(error)
    assert "b/k" in str(error)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("status code: 403 Forbidden", OriginAccessDenied),
        ("status code: 401 Unauthorized", OriginAccessDenied),
        ("status code: 400 Bad Request: <Error><Code>ExpiredToken</Code>", OriginAccessDenied),
        ("status code: 404 Not Found: <Code>NoSuchBucket</Code>", ObjectNotFound),
        ("status code: 412 Precondition Failed", StaleObject),
        ("status code: 416 Range Not Satisfiable", StaleObject),
        ("status code: 503 Slow Down: <Code>SlowDown</Code>", OriginError),
        ("HTTP error: error sending request\nkind: Connect", OriginUnreachable),
        ("HTTP error\nkind: Timeout", OriginTimeout),
        ("reqwest::Error { kind: Body, source: TimedOut }", OriginTimeout),
        ("invalid peer certificate: UnknownIssuer kind: Connect", OriginUnreachable),
        ("Error performing PUT http://169.254.169.254/latest/api/token", OriginAccessDenied),
        ("something new", OriginError),
    ],
)
def test_generic_errors_are_told_apart_by_their_text(text: str, kind: type[CacheFSError]) -> None:
    from obstore.exceptions import GenericError

    assert type(obstore_error(GenericError(text), PLACE, "b/k", Patience())) is kind


def test_statuses_say_what_to_do() -> None:
    assert "credentials" in str(status_error(403, "AccessDenied", PLACE, "b/k"))
    assert "does not exist" in str(status_error(404, "NoSuchBucket", PLACE, "b/k"))
    assert "another region" in str(status_error(301, "PermanentRedirect", PLACE, "b/k"))
    assert "503 SlowDown" in str(status_error(503, "SlowDown", PLACE, "b/k"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), ObjectNotFound),
        (PermissionError(SECRET), OriginAccessDenied),
        (TimeoutError(SECRET), OriginTimeout),
        (ConnectionResetError(SECRET), OriginUnreachable),
        (socket.gaierror(-2, SECRET), OriginUnreachable),
        (OSError(5, SECRET), OriginError),
        (RuntimeError(SECRET), OriginError),
        (ImportError("Install x"), UnsupportedOrigin),
    ],
)
def test_errors_of_file_systems_of_others(error: Exception, kind: type[CacheFSError]) -> None:
    found = os_error(error, Place("sftp", "sftp://h"), "/a")
    assert type(found) is kind
    assert SECRET not in str(found)


# --- real servers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"key": "WRONGKEYID"}, {"secret": SECRET}, {"token": SECRET}])
async def test_wrong_credentials(bucket: Bucket, wrong: dict[str, str]) -> None:
    path = bucket.put("a", b"1")
    options = {**bucket.options, **wrong}
    if "token" in wrong:
        options["secret"] = "another-secret"
    async with opened(options) as origin:
        found = await failures(origin, path)
    assert_all(found, OriginAccessDenied, "credentials")
    for error in found.values():
        shown = f"{error} {error!r} {error.path}"
        assert not any(value in shown for value in (options["key"], options["secret"], SECRET))
        assert bucket.name in shown


async def test_anonymous_where_that_is_not_allowed(bucket: Bucket) -> None:
    path = bucket.put("a", b"1")
    async with opened({"endpoint_url": bucket.endpoint, "anon": True}) as origin:
        assert_all(await failures(origin, path), OriginAccessDenied, "credentials")


async def test_no_credentials_at_all(bucket: Bucket) -> None:
    path = bucket.put("a", b"1")
    async with opened({"endpoint_url": bucket.endpoint}) as origin:
        assert_all(await failures(origin, path), OriginAccessDenied, "no credentials found")


async def test_no_such_bucket(bucket: Bucket) -> None:
    async with opened(bucket.options) as origin:
        found = await failures(origin, "no-such-bucket/a")
    assert_all(found, ObjectNotFound, "s3://no-such-bucket: this bucket does not exist")


async def test_nothing_listens(bucket: Bucket, free_port: int) -> None:
    async with opened({**bucket.options, **QUICK, "endpoint_url": f"http://127.0.0.1:{free_port}"}) as origin:
        started = time.monotonic()
        found = await failures(origin, "b/a")
        assert time.monotonic() - started < 6 * 9.0
    assert_all(found, OriginUnreachable, f"http://127.0.0.1:{free_port}: nothing answers there")


async def test_no_such_host() -> None:
    async with opened({"anon": True, "endpoint_url": "http://no-such-host.invalid", **QUICK}) as origin:
        assert_all(await failures(origin, "b/a"), OriginUnreachable, "no-such-host.invalid")


async def test_a_server_that_never_answers(throttled: ThrottledBucket) -> None:
    path = throttled.put("a", b"1")
    throttled.throttle.hang()
    async with opened({**throttled.options, **QUICK}) as origin:
        for name, operation in operations(origin, path).items():
            if name == "check":
                continue
            started = time.monotonic()
            with pytest.raises(OriginTimeout, match="no answer in time"):
                await operation()
            assert time.monotonic() - started < 9.0, name
    throttled.throttle.heal()


async def test_a_server_that_fails_for_a_while(throttled: ThrottledBucket) -> None:
    data = os.urandom(3000)
    path = throttled.put("a", data)
    async with opened({**throttled.options, "retry_timeout": 10}) as origin:
        for operation in operations(origin, path).values():
            throttled.throttle.status(503, times=2)
            await operation()
            throttled.throttle.heal()
        throttled.throttle.status(503)
        async with opened({**throttled.options, **HASTY}) as hasty:
            with pytest.raises(OriginError, match="503"):
                await hasty.get(path, version="", limit=10_000)
            with pytest.raises(OriginError, match="503"):
                await consume(hasty.list_all(throttled.name))
    throttled.throttle.heal()


async def test_an_answer_cut_short_is_never_taken_for_the_object(throttled: ThrottledBucket) -> None:
    data = os.urandom(300_000)
    path = throttled.put("a", data)
    async with opened({**throttled.options, "retry_timeout": 10}) as origin:
        version = (await origin.head(path)).version
        for _ in range(3):
            throttled.throttle.cut(after=50_000, times=1)
            with contextlib.suppress(OriginError):  # an error is right, other bytes are not
                assert (await origin.get(path, version=version, limit=10**6))[1] == data
            throttled.throttle.heal()
            throttled.throttle.cut(after=50_000, times=1)
            with contextlib.suppress(OriginError):
                assert await origin.get_range(path, 1000, 250_000, version=version) == data[1000:250_000]
            throttled.throttle.heal()
        assert (await origin.get(path, version=version, limit=10**6))[1] == data


async def test_something_that_is_no_s3_server(web_page: int) -> None:
    async with opened({"anon": True, "endpoint_url": f"http://127.0.0.1:{web_page}", **HASTY}) as origin:
        with pytest.raises(OriginError, match="is it an S3 endpoint"):
            await consume(origin.list_all("b"))


async def test_a_server_with_an_untrusted_certificate(tls_port: int) -> None:
    async with opened({"anon": True, "endpoint_url": f"https://127.0.0.1:{tls_port}", **HASTY}) as origin:
        for operation in (lambda: origin.get("b/a", version="", limit=1), lambda: origin.check("b")):
            with pytest.raises(OriginUnreachable, match="certificate is not trusted"):
                await operation()


# --- the local disk -------------------------------------------------------------------------------------------


async def test_local_failures(tmp_path: Any) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "fifo")
    async with opened({}, "file") as origin:
        with pytest.raises(IsADirectory):
            await origin.get(f"{tmp_path}/d", version="", limit=10)
        for path in (f"{tmp_path}/none", f"{tmp_path}/none/below"):
            with pytest.raises(ObjectNotFound):
                await origin.head(path)
            with pytest.raises(ObjectNotFound):
                await consume(origin.list_all(path))
        with pytest.raises(UnsupportedOrigin):
            await origin.get(f"{tmp_path}/fifo", version="", limit=10)
        with pytest.raises(UnsupportedOrigin):
            await origin.head(f"{tmp_path}/{'x' * 300}")


# --- patience -------------------------------------------------------------------------------------------------


async def test_patience_ends_with_what_it_last_met() -> None:
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        raise Transient(OriginError(f"failure {calls}"))

    started = time.monotonic()
    with pytest.raises(OriginError) as caught:
        await Patience(retry=0.3).persevere(fail)
    assert str(caught.value) == f"failure {calls}"
    assert calls >= 2
    assert 0.25 < time.monotonic() - started < 10


async def test_patience_of_nothing_tries_once() -> None:
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        raise Transient(OriginError("no"))

    with pytest.raises(OriginError):
        await Patience(retry=0).persevere(fail)
    assert calls == 1


# --- fixtures -------------------------------------------------------------------------------------------------


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture
async def web_page() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>no</html>")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def tls_port(tmp_path: Any) -> Iterator[int]:
    import ssl
    import subprocess
    import threading

    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"],
        check=False, capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = listener.accept()
                with contextlib.suppress(OSError):
                    context.wrap_socket(raw, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
