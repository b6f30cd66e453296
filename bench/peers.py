"""How fast do objects of 110 KB go from one node to another, one core each side? Beside nginx and wrk, on loopback.

    python -m bench.peers [--rounds 8] [--seconds 1]

Needs two cores, and nginx and wrk for the comparison. All take turns; each figure is the median of the rounds: objects
per second, CPU per object of the server and of the client, and the share of what nginx and wrk reached in the same
round. All bytes are checked against their digest by our client; wrk throws them away. `single` asks for one object per
request over four connections, as many as a node keeps to another; `batched` leaves the gathering to the client.

What came out on 2026-11-29 (2 cores of an AMD EPYC, Linux 6.18, Python 3.11; medians of five rounds of a second, with
real-time priority, nothing else running; objects/s, CPU in us per object of server and client, share of nginx and wrk
in the same round):

    nginx and wrk               23431  35  42  1.00
    secret, headers, single      7295 127 134  0.31
    secret, headers, batched    22308  37  41  0.95
    secret, all, single          6968 135 141  0.28
    secret, all, batched        15421  62  50  0.65
    tls, single                  4335 219 228  0.18
    tls, batched                 6436 127 131  0.27

and on 2026-11-30, on another machine (2 cores of an Intel Xeon, without priority), since tags are of objects and kept
(`new`: of objects that were not given before):

    nginx and wrk               18524  53  41  1.00
    secret, headers, single      5237 161 184  0.29
    secret, headers, batched    13521  54  70  0.74
    secret, all, single          4925 170 190  0.26
    secret, all, batched        12459  57  76  0.67
    secret, all, new, single     5119 172 184  0.28
    secret, all, new, batched   11208  87  72  0.61
    tls, single                  3730 231 257  0.20
    tls, batched                 7619 121 125  0.41

Just before, on that machine, with a tag of each frame: 0.69 and 0.64 batched, the server 61 and 86 us.

and the same code that day on the first kind of machine, without priority:

    nginx and wrk               24509  33  40  1.00
    secret, headers, single      7334 127 132  0.31
    secret, headers, batched    23997  35  39  1.00
    secret, all, single          6986 130 141  0.29
    secret, all, batched        21876  38  44  0.90
    secret, all, new, single     7062 131 139  0.29
    secret, all, new, batched   14740  66  47  0.61
    tls, single                  4458 213 217  0.19
    tls, batched                 7595 128 113  0.33

Goal 0.8 of nginx and wrk, which sign nothing, and of which wrk checks nothing: met where processors are fast, for what
was given before; missed on the second machine, and for what is given the first time, when the server reads it for its
tag. On the second machine it is the client that is busier: of its 70 us some 20 are the kernel's to receive, 14% each
the digest and the tag, 5% the collector of garbage, the rest the interpreter's, for tasks, futures and entries. What
would go further: native code that takes a frame apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import uvloop

from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import gathering, pki
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.trust import SecretTrust, TlsTrust, Trust
from cachefs.cluster.peers.wire import Item
from cachefs.config import CacheConfig
from cachefs.digest import version_ref
from cachefs.store import Store

OBJECTS, SIZE = 1000, 110 * 1024
DATASET = "d5" * 16
SERVER_CORE, CLIENT_CORE = 0, 1

# As many as a DataLoader of some workers has under way at a node.
READERS = 256


# What is sealed: the headers of frames, the objects' bytes as well, the same of objects that were not given before, or
# all of the connection.
COVERS = ("headers", "all", "new", "tls")

# A server that keeps no tag of what it gave.
FORGETFUL = """
from functools import partial
from cachefs.cluster.peers import tags, trust
vars(trust)["Tagger"] = partial(tags.Tagger, slots=1)
from cachefs.cluster.peers.server.__main__ import main
main()
"""


class Figure(NamedTuple):
    """objects: per second. server, client: microseconds of CPU per object."""

    objects: float
    server: float
    client: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=1)
    parser.add_argument("--cover", action="append", choices=COVERS, help="only this; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        measured = measure(Path(folder), options.rounds, options.seconds, options.cover or COVERS)
    if options.json:
        print(json.dumps({name: [figure._asdict() for figure in figures] for name, figures in measured.items()}))
        return 0
    theirs = measured.get("nginx and wrk")
    print(f"{'':24} {'objects/s':>10} {'server us':>10} {'client us':>10} {'of nginx':>10}")
    for name, figures in measured.items():
        figure = Figure(*(median(values) for values in zip(*figures, strict=True)))
        share = median(f.objects / t.objects for f, t in zip(figures, theirs, strict=True)) if theirs else float("nan")
        print(f"{name:24} {figure.objects:10.0f} {figure.server:10.1f} {figure.client:10.1f} {share:10.2f}")
    return 0


def measure(folder: Path, rounds: int, seconds: int, covers: Sequence[str]) -> dict[str, list[Figure]]:
    """A figure of each round."""
    make(folder)
    noted: dict[str, list[Figure]] = {}

    def note(name: str, figure: Figure) -> None:
        print(f"{name}: {figure.objects:.0f}/s, {figure.server:.1f} and {figure.client:.1f} us", file=sys.stderr)
        noted.setdefault(name, []).append(figure)

    secret = {"secret": str(folder / "pki/secret")}
    tls = {"ca": "ca.pem", "certificate": "owner.pem", "key": "owner.key"}
    tls = {field: str(folder / "pki" / file) for field, file in tls.items()}
    module = ("-m", "cachefs.cluster.peers.server")
    with (
        serving(folder, secret, *module) as by_secret,
        serving(folder, secret, "-c", FORGETFUL) as forgetful,
        serving(folder, tls, *module) as by_tls,
    ):
        servers = {"tls": (by_tls, "tls"), "new": (forgetful, "secret, all, new")}
        for _ in range(rounds):
            if shutil.which("nginx") and shutil.which("wrk"):
                note("nginx and wrk", nginx(folder, seconds))
            for cover in covers:
                trust = _trust(folder, cover)
                server, title = servers.get(cover, (by_secret, f"secret, {cover}"))
                for name, together in (("single", 1), ("batched", 256)):
                    note(f"{title}, {name}", ours(server, trust, together, seconds))
    return noted


def _trust(folder: Path, cover: str) -> Trust:
    if cover == "tls":
        return TlsTrust("reader", folder / "pki/ca.pem", folder / "pki/reader.pem", folder / "pki/reader.key")
    return SecretTrust.load("reader", folder / "pki/secret", cover="headers" if cover == "headers" else "all")


def make(folder: Path) -> None:
    store = Store.open(CacheConfig.make(folder / "cache", min_free=0))
    (folder / "files").mkdir()
    for number in range(OBJECTS):
        data = os.urandom(SIZE)
        key = store.put(data, links=[(DATASET, version_ref(f"bucket/{number}", "v1"))])
        os.link(store.path(key), folder / "files" / f"{number:04d}")  # nginx sends the very same pages
    pki.make_authority(folder / "pki")
    pki.make_secret(folder / "pki/secret")
    for name in ("owner", "reader"):
        pki.issue(folder / "pki", name)


def cpu(pid: int) -> float:
    """Microseconds of CPU that a process and all its threads have used."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1000


@contextlib.contextmanager
def serving(folder: Path, trust: dict[str, str], *program: str) -> Iterator[tuple[Node, int]]:
    """(the node, its pid). program: what Python runs."""
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, *program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"dirs": [str(folder / "cache")], "name": "owner", **trust}).encode() + b"\n")
        process.stdin.flush()
        yield Node("owner", "127.0.0.1", int(process.stdout.readline().split()[1]), 1), process.pid
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def ours(server: tuple[Node, int], trust: Trust, together: int, seconds: int) -> Figure:
    """In a process of its own, on its core."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {CLIENT_CORE})
        gathering.MOST_TOGETHER = together
        figure = uvloop.run(_transfer(server, trust, seconds))
        os.write(writing, json.dumps(figure).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return Figure(*json.loads(said))


async def _transfer(server: tuple[Node, int], trust: Trust, seconds: int) -> Figure:
    node, pid = server
    peers = Peers(trust)
    count = 0
    end = float("inf")

    async def reader(at: int) -> None:
        nonlocal count
        while time.perf_counter() < end:
            at = (at + 7) % OBJECTS
            piece = await peers.get(node, Item(DATASET, f"bucket/{at}", "v1", SIZE))
            assert len(piece.data) == SIZE
            count += 1

    await peers.get(node, Item(DATASET, "bucket/0", "v1", SIZE))
    before, own, began = cpu(pid), time.process_time(), time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(reader(number) for number in range(READERS)))
    took, used = time.perf_counter() - began, time.process_time() - own
    figure = Figure(count / took, (cpu(pid) - before) / count, used * 1e6 / count)
    await peers.close()
    return figure


def nginx(folder: Path, seconds: int) -> Figure:
    """As many connections as wrk needs to keep it busy."""
    port = 18080
    settings = folder / "nginx.conf"
    settings.write_text(
        f"worker_processes 1; daemon off; master_process off; error_log {folder}/nginx.log; pid {folder}/nginx.pid;\n"
        "events { worker_connections 256; }\n"
        "http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}/files; }} }}\n"
    )
    script = folder / "wrk.lua"
    script.write_text(
        f"local i = 0\nrequest = function() i = (i + 7) % {OBJECTS}\n"
        'return wrk.format("GET", string.format("/%04d", i)) end\n'
        'done = function(summary) io.write("sum_of_all ", summary.requests, " ", summary.duration, "\\n") end\n'
    )
    server = subprocess.Popen(["taskset", "-c", str(SERVER_CORE), "nginx", "-c", str(settings)])
    try:
        time.sleep(0.3)
        before = cpu(server.pid)
        command = ["taskset", "-c", str(CLIENT_CORE), "wrk", "-t1", "-c16", f"-d{seconds}s"]
        wrk = subprocess.Popen([*command, "-s", str(script), f"http://127.0.0.1:{port}/"], stdout=subprocess.PIPE)
        assert wrk.stdout is not None
        said = wrk.stdout.read().decode()
        _, _, usage = os.wait4(wrk.pid, 0)
        wrk.returncode = 0
        wrk.stdout.close()
        _, requests, microseconds = said[said.index("sum_of_all ") :].split()[:3]
        count = int(requests)
        used = (usage.ru_utime + usage.ru_stime) * 1e6
        return Figure(count / int(microseconds) * 1e6, (cpu(server.pid) - before) / count, used / count)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
