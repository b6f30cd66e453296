"""What `cachefs status` shows of one consumer."""

from __future__ import annotations

from typing import Any

from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.verdict import Figures, verdict
from cachefs.fetcher.prefetch.window import page_window

# Reads that had to wait are judged over so many seconds.
RECENT_SECONDS = 10.0

NOT_READ = "the cache is full, and what it reads is not in the order that it said; when it is, that goes on"


def report(
    course: Course, now: float, origin_rate: float, at_once: int, *, bound_by_origin: bool, slow_disk: bool
) -> dict[str, Any]:
    """origin_rate: bytes per second fetched ahead for all consumers, at_once: in how many requests."""
    while course.recent and course.recent[0][0] < now - RECENT_SECONDS:
        course.recent.popleft()
    ahead = max(0, course.frontier - course.position)
    word, sentence = verdict(
        Figures(
            rate=course.rate.value,
            idle=now - course.rate.moved,
            left=course.announced.end - course.position,
            ahead=ahead,
            window=min(course.window, course.announced.end - course.position),
            late=sum(late for _, late, _ in course.recent),
            waited=sum(waited for _, _, waited in course.recent),
            paged=course.sampling.seconds(now),
            lead=page_window(course.rate.value) / max(1e-3, course.rate.value),
            origin_rate=origin_rate,
            at_once=at_once,
            bound_by_origin=bound_by_origin,
            bound_by_memory=course.bound_by_memory,
            slow_disk=slow_disk,
            follow=course.follow,
            stopped=course.stopped or (NOT_READ if course.streams and course.trust.lost else ""),
        )
    )
    return {
        "label": course.label,
        "pid": course.pid,
        "dataset": course.attachment.dataset,
        "position": course.position,
        "end": course.announced.end,
        "rate": round(course.rate.value, 1),
        "window": course.window,
        "ahead": ahead,
        "prefetched": course.prefetched,
        "prefetched_bytes": course.prefetched_bytes,
        "in_vain": course.in_vain,
        "stored": course.stored,
        "held_bytes": course.held_bytes,
        "late": course.late,
        "waited": round(course.waited, 3),
        "failed": course.failures.total,
        "unknown": course.unknown,
        "left_out": course.left_out,
        "bottleneck": word,
        "says": sentence,
    }
