"""Rows of the table about clusters for which no hosts are needed: how owners are spread, and how fast two nodes are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.outcome import Goal, Outcome, Series
from bench.plan import Plan
from bench.stage import Stage
from cachefs.cluster.nodes import Node
from cachefs.cluster.placement import Placement, object_key

NODES = 64
MOST_UNBALANCED = 1.1
MOST_MOVED = 100 * (1 / NODES + 0.01)  # percent

LEAST_GAIN = 2.0
LEAST_OF_NGINX = 0.8

# Longer than a round of it takes on a busy machine, each.
TRANSFER_SECONDS = 60.0


def balance(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    """Simulated: who owns what of very many objects, and what moves when a node leaves."""
    nodes = [Node(f"node-{number}", "host", 7070, 1) for number in range(NODES)]
    keys = [object_key("s3", f"bucket/{number}", "v") for number in range(plan.names)]
    owners = list(Placement(nodes).owners(keys))
    owned = Counter(owners)
    stage.step("balance: a node leaves")
    leaver = max(owned, key=lambda node: owned[node])
    after = Placement(node for node in nodes if node != leaver)
    # All of the leaver's, and every eighth of the others, of which none may move.
    asked = [at for at, owner in enumerate(owners) if owner == leaver or at % 8 == 0]
    moved = Counter(owners[at] for at in asked if after.owner(keys[at]) != owners[at])
    total = moved[leaver] + 8 * (moved.total() - moved[leaver])
    title = f"{NODES} nodes, {len(keys):,} objects, simulated"
    fullest = Series(f"{title}: the fullest / the mean", "x", [max(owned.values()) * NODES / len(keys)])
    leave = Series(f"{title}: moved when the fullest leaves", "%", [100 * total / len(keys)])
    outcome.goals += [
        Goal(fullest, MOST_UNBALANCED, at_least=False),
        Goal(leave, round(MOST_MOVED, 4), at_least=False),
    ]


def transfer(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    """bench.peers: one core each side, on loopback, with both of what `cluster serve --sign` can say."""
    if (os.cpu_count() or 1) < 2:
        outcome.notes.append("Left out: transfer needs two cores, one for each side.")
        return
    rounds = 1 + 2 * plan.shared_rounds  # of three or four seconds each
    # In a process of its own: it forks, and is pinned to cores.
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bench.peers",
            "--json",
            "--rounds",
            str(rounds),
            "--cover",
            "all",
            "--cover",
            "headers",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**stage.environ, "TMPDIR": str(stage.folder)},
        cwd=Path(__file__).resolve().parents[2],
        process_group=0,
    ) as process:
        try:
            printed, said = process.communicate(timeout=TRANSFER_SECONDS * (1 + rounds))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # what it started, too
            raise
    if process.returncode:
        raise RuntimeError(f"bench.peers: {said.decode(errors='replace').strip()}")
    series = {
        name: Series(f"110 KB from node to node, {name}", "objects/s", [figure["objects"] for figure in figures])
        for name, figures in json.loads(printed).items()
    }
    outcome.series += series.values()
    single, batched = series["secret, all, single"], series["secret, all, batched"]
    outcome.goals.append(Goal(batched.over(single, "110 KB from node to node: batched / single"), LEAST_GAIN, True))
    if "nginx and wrk" in series:
        for cover, signed in (("headers", "headers"), ("all", "every byte")):
            name = f"110 KB from node to node, {signed} signed: batched / nginx and wrk"
            ratio = series[f"secret, {cover}, batched"].over(series["nginx and wrk"], name)
            outcome.goals.append(Goal(ratio, LEAST_OF_NGINX, at_least=True))
    else:
        missing = " and ".join(name for name in ("nginx", "wrk") if shutil.which(name) is None)
        outcome.notes.append(f"Left out: nothing to compare batched with, without {missing} (Debian packages).")
