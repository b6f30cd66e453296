"""The testbed itself: what the other tests take for granted about their S3 server, throttle and photographs."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

from cachefs.digest import content_key
from cachefs_sidecar.testbed import S3Server, Throttle, fetcher_pid, make_photographs, stop_fetcher
from cachefs_sidecar.testbed.network import Host, network, why_no_network
from cachefs_sidecar.testbed.photographs import LARGEST, SMALLEST


def client(options: dict[str, Any], **config: Any) -> Any:
    """boto3: an S3 client that is neither ours nor used by ours."""
    return boto3.client(
        "s3",
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
        endpoint_url=options["endpoint_url"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, **config),
    )


def read(options: dict[str, Any], path: str, **more: Any) -> bytes:
    name, _, key = path.partition("/")
    body: bytes = client(options).get_object(Bucket=name, Key=key, **more)["Body"].read()
    return body


def soonest(work: Callable[[], object], limit: float, least: float) -> float:
    """The seconds that it takes, the shortest of some when the machine does something else meanwhile."""
    best = limit
    for _ in range(10):
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        assert taken >= least
        best = min(best, taken)
        if best < limit:
            break
    return best


def runs(pid: int) -> bool:
    """Whether the process is more than a zombie that its new parent has not reaped yet."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


# --- S3Server -------------------------------------------------------------------------------------------------


def test_a_file_put_or_replaced_or_deleted_is_so_at_once(bucket):
    path = bucket.put("deep/er/a.bin", b"one")
    assert read(bucket.options, path) == b"one"
    bucket.put("deep/er/a.bin", b"second")
    assert read(bucket.options, path) == b"second"
    bucket.delete("deep/er/a.bin")
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchKey"):
        read(bucket.options, path)


def test_wrong_secret_is_refused(bucket):
    path = bucket.put("a.bin", b"one")
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        read(bucket.options | {"secret": "something-else"}, path)
    with pytest.raises(botocore.exceptions.ClientError, match=r"InvalidAccessKeyId|AccessDenied"):
        read(bucket.options | {"key": "somebody-else"}, path)


def test_the_secret_is_not_in_the_arguments_nor_in_the_repr(s3_server):
    command = Path(f"/proc/{s3_server.pid}/cmdline").read_bytes()
    assert b"rclone" in command
    assert s3_server.options["secret"].encode() not in command
    assert s3_server.options["secret"] not in repr(s3_server)


def test_stop_and_start_on_the_same_port(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a").write_bytes(b"kept")
    with S3Server(tmp_path) as server:
        port = server.port
        assert read(server.options, "bucket/a") == b"kept"
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.1", port).connect()
        server.start()
        assert server.port == port
        assert read(server.options, "bucket/a") == b"kept"


def test_a_server_that_cannot_start_says_why(tmp_path):
    with S3Server(tmp_path) as first:
        second = S3Server(tmp_path)
        second.port = first.port
        with pytest.raises(RuntimeError, match="Address already in use"):
            second.start()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_server_and_throttle_die_with_the_program_that_started_them(tmp_path, sign):
    program = (
        "import sys, time; from pathlib import Path; from cachefs_sidecar.testbed import S3Server, Throttle\n"
        "server = S3Server(Path(sys.argv[1])); server.start()\n"
        "throttle = Throttle(server.port); throttle.start()\n"
        "print(server.pid, throttle.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(sign)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.01)


# --- Throttle --------------------------------------------------------------------------------------------------


def test_every_request_is_counted_once_by_kind_and_object(throttled):
    odd = "füß+%41 b?.bin"
    for key in ("a.bin", odd):
        throttled.put(key, b"x" * 1000)
    s3 = client(throttled.options)
    for _ in range(3):
        s3.get_object(Bucket=throttled.name, Key="a.bin")["Body"].read()
    assert s3.get_object(Bucket=throttled.name, Key=odd, Range="bytes=10-19")["Body"].read() == b"x" * 10
    s3.head_object(Bucket=throttled.name, Key="a.bin")
    s3.list_objects_v2(Bucket=throttled.name)
    s3.put_object(Bucket=throttled.name, Key="new.bin", Body=b"y" * 200_000)
    traffic = throttled.throttle.reset()
    assert traffic.requests == {"GET object": 4, "HEAD object": 1, "LIST": 1, "PUT object": 1}
    assert traffic.objects == {f"{throttled.name}/a.bin": 3, f"{throttled.name}/{odd}": 1}
    assert traffic.total == 7
    assert 3010 < traffic.bytes_down < 10_000
    assert 200_000 < traffic.bytes_up < 210_000
    assert read(throttled.options, f"{throttled.name}/new.bin") == b"y" * 200_000
    assert throttled.reads == {"new.bin": 1}


def test_presigned_urls_pass_and_count(throttled):
    path = throttled.put("a.bin", b"presigned")
    url = client(throttled.options, signature_version="s3v4").generate_presigned_url(
        "get_object", Params={"Bucket": throttled.name, "Key": "a.bin"}
    )
    connection = http.client.HTTPConnection("127.0.0.1", throttled.throttle.port)
    for _ in range(2):  # on one connection
        connection.request("GET", url.removeprefix(throttled.endpoint))
        assert connection.getresponse().read() == b"presigned"
    connection.close()
    assert throttled.throttle.traffic().objects == {path: 2}


def test_latency_is_per_request(throttled):
    path = throttled.put("a.bin", b"x")
    s3 = client(throttled.options)
    s3.head_bucket(Bucket=throttled.name)  # the connection and boto3's machinery are warm
    throttled.throttle.set(latency=0.1)

    def three() -> None:
        for _ in range(3):
            s3.get_object(Bucket=throttled.name, Key=path.partition("/")[2])["Body"].read()

    assert soonest(three, limit=0.9, least=0.3) < 0.9


def test_what_waits_for_its_latency_may_be_let_pass(throttled):
    names = ("a.bin", "b.bin", "c.bin")
    for name in names:
        throttled.put(name, b"x")
    s3 = client(throttled.options)
    throttled.throttle.set(latency=60.0)
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(s3.get_object, Bucket=throttled.name, Key=name) for name in names]
        while len(throttled.reads) < 3:
            time.sleep(0.01)
        throttled.throttle.let_pass(1)
        done, others = wait(waits, 30, FIRST_COMPLETED)
        assert (len(done), len(others)) == (1, 2)
        throttled.throttle.let_pass()
        assert [waiting.result(30)["Body"].read() for waiting in waits] == [b"x"] * 3


def test_bandwidth_per_connection_and_in_total(throttled):
    throttled.put("a.bin", os.urandom(1_000_000))
    path = f"{throttled.name}/a.bin"

    async def gather() -> None:
        await asyncio.gather(*(asyncio.to_thread(read, throttled.options, path) for _ in range(3)))

    def three_at_once() -> None:
        asyncio.run(gather())

    throttled.throttle.set(bandwidth_per_connection=2_500_000)
    assert soonest(three_at_once, limit=1.1, least=0.4) < 1.1
    throttled.throttle.set(bandwidth_per_connection=None, total_bandwidth=2_500_000)
    assert soonest(three_at_once, limit=2.2, least=1.2) < 2.2


def test_ranges_are_answered_as_s3_answers_them_when_asked_to(throttled):
    path = throttled.put("a.bin", bytes(range(100)))
    name, _, key = path.partition("/")
    for mend, status in ((False, 200), (True, 206)):  # 200 is what rclone says
        throttled.throttle.set(mend_ranges=mend)
        answer = client(throttled.options).get_object(Bucket=name, Key=key, Range="bytes=10-19")
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == status
        assert answer["Body"].read() == bytes(range(10, 20))
        whole = client(throttled.options).get_object(Bucket=name, Key=key)
        assert whole["ResponseMetadata"]["HTTPStatusCode"] == 200
        assert whole["Body"].read() == bytes(range(100))


def test_a_client_that_reads_slowly_holds_the_server_back(throttled):
    throttled.put("big.bin", bytes(32 << 20))
    body = client(throttled.options).get_object(Bucket=throttled.name, Key="big.bin")["Body"]
    assert body.read(1000) == bytes(1000)
    deadline = time.monotonic() + 0.5  # long enough for all of it, were it not held back
    while time.monotonic() < deadline:
        assert throttled.throttle.traffic().bytes_down < 20 << 20
        time.sleep(0.05)
    assert len(body.read()) == (32 << 20) - 1000


def test_faults_strike_what_they_name_as_often_as_said(throttled):
    bad, good = throttled.put("bad.bin", b"b" * 5000), throttled.put("good.bin", b"g" * 5000)
    throttle = throttled.throttle
    throttle.status(503, f"{throttled.name}/bad*", times=2)
    for _ in range(2):
        with pytest.raises(botocore.exceptions.ClientError, match="SlowDown"):
            read(throttled.options, bad)
        assert read(throttled.options, good) == b"g" * 5000
    assert read(throttled.options, bad) == b"b" * 5000

    throttle.flip("*/bad.bin", at=4000, times=1)
    wrong = read(throttled.options, bad)
    assert [i for i in range(5000) if wrong[i] != ord("b")] == [4000]
    assert read(throttled.options, bad) == b"b" * 5000

    throttle.cut("*/bad.bin", after=2000)
    with pytest.raises(botocore.exceptions.BotoCoreError, match=r"2000 bytes read|IncompleteRead|2000"):
        read(throttled.options, bad)
    throttle.heal()
    assert read(throttled.options, bad) == b"b" * 5000

    throttle.delay(0.2, "*/bad.bin", times=1)
    began = time.perf_counter()
    assert read(throttled.options, bad) == b"b" * 5000
    assert time.perf_counter() - began >= 0.2


def test_hanging_requests_hang_and_others_do_not(throttled):
    bad, good = throttled.put("bad.bin", b"b"), throttled.put("good.bin", b"g")
    throttled.throttle.hang(bad)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        client(throttled.options, read_timeout=0.3).get_object(Bucket=throttled.name, Key="bad.bin")
    assert read(throttled.options, good) == b"g"
    throttled.throttle.heal()
    assert read(throttled.options, bad) == b"b"
    assert throttled.reads == {"bad.bin": 2, "good.bin": 1}


def test_refused_connections(throttled):
    path = throttled.put("a.bin", b"a")
    assert read(throttled.options, path) == b"a"
    throttled.throttle.refuse()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        read(throttled.options, path)
    throttled.throttle.heal()
    assert read(throttled.options, path) == b"a"


def test_a_stopped_server_looks_stopped_through_the_throttle(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a").write_bytes(b"a")
    with S3Server(tmp_path) as server, Throttle(server.port, latency=0) as throttle:
        options = server.options | {"endpoint_url": throttle.endpoint}
        assert read(options, "bucket/a") == b"a"
        server.stop()
        with pytest.raises(botocore.exceptions.HTTPClientError):
            read(options, "bucket/a")
        server.start()
        assert read(options, "bucket/a") == b"a"


# --- hosts of their own -------------------------------------------------------------------------------------------


def reaches(host: Host, address: str, port: int, seconds: float = 20.0) -> bool:
    program = f"import socket; socket.create_connection(({address!r}, {port}), timeout={seconds}).close()"
    return (
        subprocess.run([*host.prefix, sys.executable, "-S", "-c", program], stderr=subprocess.DEVNULL).returncode == 0
    )


@pytest.mark.needs_root
@pytest.mark.skipif(bool(why_no_network()), reason=why_no_network())
def test_two_networks_do_not_meet_and_nothing_of_them_is_left():
    with network(1) as (here, (host,)), network(1) as (there, (other,)), socket.create_server((here, 0)) as listener:
        assert here.rpartition(".")[0] != there.rpartition(".")[0]
        port = listener.getsockname()[1]
        assert reaches(host, here, port)
        assert not reaches(other, here, port, 1.0)
        host.cut()
        assert not reaches(host, here, port, 1.0)
        host.mend()
        host.slow("10mbit")
        assert reaches(host, here, port)
        # By number: whoever needs a network next gets the same names and addresses.
        address = subprocess.run(["ip", "-o", "address", "show", "to", here], stdout=subprocess.PIPE, text=True)
        made = {socket.if_nametoindex(host.link), int(address.stdout.partition(":")[0])}
    assert not made & {number for number, _ in socket.if_nameindex()}


# --- photographs ------------------------------------------------------------------------------------------------


def test_photographs_are_the_same_in_every_run_and_all_different(tmp_path):
    from PIL import Image

    counted: list[int] = []
    first = make_photographs(tmp_path / "1", 48, made=counted.append)
    assert sum(counted) == 48
    assert make_photographs(tmp_path / "2", 48) == first
    assert len({photograph.key for photograph in first}) == 48
    assert len({photograph.name.partition("/")[0] for photograph in first}) == 12
    for photograph in first:
        data = (tmp_path / "2" / photograph.name).read_bytes()
        assert content_key(data) == photograph.key
        assert SMALLEST <= len(data) == photograph.size <= LARGEST
    with Image.open(tmp_path / "1" / first[0].name) as image:
        assert image.format == "JPEG"
        assert image.convert("RGB").getbbox() is not None
    assert make_photographs(tmp_path / "3", 12, seed=2) != first[:12]


# --- fetchers ------------------------------------------------------------------------------------------------------


def test_stop_fetcher_ends_the_fetcher_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert not stop_fetcher(tmp_path)
    program = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, "cachefs.fetcher"]) as fetcher:
        (run / "fetcher.lock").write_text(f"{fetcher.pid}\n")
        deadline = time.monotonic() + 60
        while fetcher_pid(tmp_path) is None:  # until it has become the program
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert fetcher_pid(tmp_path) == fetcher.pid
        assert stop_fetcher(tmp_path)
    (run / "fetcher.lock").write_text(f"{os.getpid()}\n")  # a pid that now belongs to somebody else
    assert fetcher_pid(tmp_path) is None
    assert not stop_fetcher(tmp_path)


# --- the watch over what tests leave ------------------------------------------------------------------------------

LEAKY = """
import os, subprocess, sys
from tests.conftest import nothing_left_behind

def test_detached():
    # Detached as a fetcher is: its parent has ended, and it has a session of its own.
    script = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(60)"
    subprocess.run([sys.executable, "-c", script], check=True)

def test_zombie():
    if os.fork() == 0:
        os._exit(0)

def test_clean():
    subprocess.run([sys.executable, "-c", ""], check=True)
"""


def test_a_test_that_leaves_processes_fails(tmp_path):
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    (tmp_path / "conftest.py").write_text(
        "import tests.conftest; from tests.conftest import pytest_configure; tests.conftest.LEAVING_SECONDS = 0.2\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [*command, "-o", f"pythonpath={root}", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "3 passed, 2 errors" in done.stdout, done.stdout
    for name, left in (("detached", r"time\.sleep"), ("zombie", "a zombie")):
        assert re.search(rf"the test left behind process \d+: .*{left}", done.stdout)
        assert f"ERROR test_leaky.py::test_{name}" in done.stdout
