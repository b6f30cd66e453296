"""A Dask cluster of several processes, in a process of its own: `with DaskCluster() as dask`.

Not in the process of the tests, whose threads and children are watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WORKERS = 3

# How long a cluster or a worker may take to end.
ENDING_SECONDS = 60

# How long what a dead worker has computed is asked for before it is computed again (30 s otherwise).
PATIENCE = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}

WORKER = (sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "2", "--no-nanny", "--no-dashboard")


@dataclass
class DaskCluster:
    environ: Mapping[str, str] = field(default_factory=dict)
    workers: int = WORKERS

    def __enter__(self) -> DaskCluster:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dask_cluster", str(self.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **PATIENCE, **self.environ},
        )
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.address: str = said["address"]
        self.pids: list[int] = said["pids"]
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """Of commands that are to use it."""
        return "--engine", "dask", "--scheduler", self.address

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(ENDING_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class DaskHosts:
    """A scheduler and a worker at each of these addresses of this machine, which Dask takes for as many machines.

    environ: of each.
    """

    environ: Mapping[str, Mapping[str, str]]

    def __enter__(self) -> DaskHosts:
        with contextlib.ExitStack() as started:
            cluster = started.enter_context(DaskCluster(workers=0))
            self.address, self.options = cluster.address, cluster.options
            self.workers: dict[str, subprocess.Popen[bytes]] = {}
            for host, environ in self.environ.items():
                worker = subprocess.Popen(
                    [*WORKER, self.address, "--host", host, "--name", host],
                    env={**os.environ, **environ},
                    stderr=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
                started.callback(worker.wait, ENDING_SECONDS)
                started.callback(worker.terminate)
                self.workers[host] = worker
            self._started = started.pop_all()
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(len(self.workers), timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()


def main() -> None:
    from distributed import LocalCluster, Security

    with LocalCluster(
        n_workers=int(sys.argv[1]),
        processes=True,
        threads_per_worker=1,
        dashboard_address=None,
        silence_logs=50,
        protocol=os.environ.get("TEST_DASK_PROTOCOL", "tcp://"),
        security=Security(),  # as Dask's configuration has it
    ) as cluster:
        pids = [nanny.pid for nanny in cluster.workers.values()]
        print(json.dumps({"address": cluster.scheduler_address, "pids": pids}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
