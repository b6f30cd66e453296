"""What the rows of the table about clusters play on: hosts with links, an origin that all of them reach, clusters."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.clusters.ranks import Ranks, Reading
from bench.objects import make_objects
from bench.outcome import Outcome
from bench.plan import Plan
from bench.stage import Stage
from cachefs_sidecar.testbed import Throttle
from cachefs_sidecar.testbed.network import Host, network
from cachefs_sidecar.testbed.nodes import PORT, ClusterNode, secret, together
from cachefs_sidecar.testbed.server import s3_options

# 110 KB on average, and all take the same room on the disk.
BUCKET = "shared"
SMALLEST, LARGEST, ON_DISK = 110_593, 114_688, 114_688
MEAN = (SMALLEST + LARGEST) / 2

# To the origin.
LATENCY = 0.02

# Of which a fetcher remembers 16 MiB of what it could not store, the least there is.
MEMORY = "1G"
REMEMBERED = 16 << 20

# Objects that a rank has under way, of each job.
AT_ONCE = 2

Orders = list[list[list[int]]]


@dataclass(frozen=True)
class Cluster:
    nodes: list[ClusterNode]
    ranks: Ranks
    outcome: Outcome

    def read(
        self,
        orders: Orders,
        at_once: int = AT_ONCE,
        *,
        meanwhile: tuple[int, Callable[[], None]] | None = None,
    ) -> Reading:
        """As Ranks.read; reads that fail are told in the notes."""
        reading = self.ranks.read(orders, at_once, meanwhile=meanwhile)
        self.outcome.checked += reading.files - reading.failed
        self.outcome.notes += [f"Failed: {text}" for text in reading.errors]
        return reading


@dataclass(frozen=True)
class Ground:
    """hosts: two clusters' worth. origin: the line to it, as all hosts reach it."""

    stage: Stage
    plan: Plan
    outcome: Outcome
    hosts: list[Host]
    origin: Throttle
    manifest: Path
    sizes: dict[str, int]

    @property
    def part(self) -> int:
        """Objects that rows read which count, or take, no more than that."""
        return max(2, self.plan.shared // 5)

    @contextmanager
    def cluster(self, hosts: Sequence[Host], sizes: Sequence[int] = ()) -> Iterator[Cluster]:
        """A node with an empty cache on each host, each with the catalog, and a rank on each. sizes: of their caches,
        in objects; none = as much as is read."""
        folder = Path(tempfile.mkdtemp(prefix="cluster-", dir=self.stage.folder))
        environ = {**self.stage.environ, "CACHEFS_MEMORY": MEMORY}
        server = self.stage.server.options
        options = s3_options(self.origin.endpoint, server["key"], server["secret"])
        nodes = [
            ClusterNode(
                number, folder, BUCKET, options, PORT, host=host, environ=environ,
                size=sizes[number] * ON_DISK if sizes else None,
            )
            for number, host in enumerate(hosts)
        ]  # fmt: skip
        way = {
            "manifest": str(self.manifest),
            "root": BUCKET,
            "options": {"target_protocol": "s3", "target_options": options},
        }
        with together(nodes, secret(folder), weighed=bool(sizes)):
            with ThreadPoolExecutor(len(nodes)) as pool:
                list(pool.map(lambda node: node.connection.make_catalog(), nodes))
            with Ranks(nodes, way, environ) as ranks:
                yield Cluster(nodes, ranks, self.outcome)

    def asked(self) -> tuple[int, int]:
        """(requests for objects at the origin, bytes of these objects) since the last call."""
        objects = self.origin.reset().objects
        return sum(objects.values()), sum(self.sizes[path] * times for path, times in objects.items())


@contextmanager
def ground(stage: Stage, plan: Plan, outcome: Outcome) -> Iterator[Ground]:
    """Needs the right to make networks (testbed.network.why_no_network)."""
    folder, manifest = make_objects(stage, plan.shared, BUCKET, SMALLEST, LARGEST)
    sizes = {f"{BUCKET}/{name}": (folder / name).stat().st_size for name in json.loads(manifest.read_bytes())}
    with (
        network(2 * plan.shared_nodes) as (here, hosts),
        Throttle(stage.server.port, latency=LATENCY, host=here) as origin,
    ):
        yield Ground(stage, plan, outcome, hosts, origin, manifest, sizes)


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    return random.Random(seed).sample(numbers, len(numbers))


def shares(order: list[int], nodes: int, turn: int = 0) -> list[list[int]]:
    """What each of so many ranks reads of a job. turn: others do each time."""
    return [order[(rank + turn) % nodes :: nodes] for rank in range(nodes)]
