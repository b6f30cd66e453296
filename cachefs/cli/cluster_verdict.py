"""Who does not answer, who is slow, and how that is known: one sentence out of what all nodes say.

A node is judged by what the others see of it, not by what it says of itself, and by the median of what they see: one
that sees all others slow sits behind a slow line itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median_low

import msgspec

from cachefs.cli.cluster_report import ClusterReport, NodeRow

# Slow is who takes so many times as long as the others, and so much longer that a reader notices.
SLOW_TIMES = 3.0
SLOW_SECONDS = 0.02

# Overtaken so often within a minute, by the origin, is no accident.
OFTEN = 8


# Where a switch is down, the first few say what the others would.
MOST_NAMED = 5


def judged(report: ClusterReport) -> ClusterReport:
    """The report with its verdict."""
    absent = list(_absent(report.nodes))
    if len(absent) > MOST_NAMED:
        absent[MOST_NAMED:] = [f"{len(absent) - MOST_NAMED:,} more do not answer"]
    said = [*absent, *(words for node in report.nodes if (words := _slow(node, report.nodes)))]
    answering = sum(not node.why for node in report.nodes)
    if not said:
        count = len(report.nodes)
        said = [f"all {count} nodes answer" if count > 1 else "this node is alone in its cluster, and answers"]
    elif answering == len(report.nodes):
        said.append(f"all {answering} nodes answer")
    well = all(not node.why and not node.fetcher for node in report.nodes)
    return msgspec.structs.replace(report, well=well, verdict="; ".join(said))


def _absent(nodes: Sequence[NodeRow]) -> Iterator[str]:
    for node in nodes:
        if node.why:
            alone = node.answers.left_alone_by
            known = f", and {_names(alone)} {_leave(alone)} it alone" if alone else ""
            yield f"node {node.name} does not answer: {node.why}{known}"
        elif node.fetcher:
            yield f"node {node.name} answers, but not its fetcher: {node.fetcher}"


def _slow(node: NodeRow, nodes: Sequence[NodeRow]) -> str:
    """What the others see of a node that answers; "" = nothing worth saying."""
    if node.why:
        return ""
    answers = node.answers
    said = []
    if answers.left_alone_by:
        alone = answers.left_alone_by
        said.append(f"{_names(alone)} {_leave(alone)} it alone for a while ({answers.last_failure or 'it failed'})")
    others = [n.answers.p50 for n in nodes if n.name != node.name and n.answers.p50 is not None]
    if answers.p50 is not None and others:
        usual = median_low(others)
        if answers.p50 >= SLOW_TIMES * usual and answers.p50 - usual >= SLOW_SECONDS:
            said.append(f"answers take {_seconds(answers.p50)}, those of the others {_seconds(usual)}")
    if answers.overtaken >= OFTEN:
        said.append(f"the origin was faster {answers.overtaken:,} times in the last minute")
    if said:
        said.append(f"it gave {answers.objects:,} objects in all")
    return f"node {node.name}: {', '.join(said)}" if said else ""


def _leave(names: Sequence[str]) -> str:
    return "leaves" if len(names) == 1 else "leave"


def _names(names: Sequence[str], most: int = 3) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"
