"""What the keeper asks of all its workers at once, and who has not answered yet.

Nobody waits for an answer: it is passed on when the last one has come, or when the time for it is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# number of a worker's place -> what it answered
Answers = dict[int, dict[str, Any]]


@dataclass
class _Question:
    """answer: the op of the packet that answers it. done: called once, with who has not, and the answers."""

    answer: str
    waiting: set[int]
    deadline: float
    done: Callable[[set[int], Answers], None]
    answers: Answers = field(default_factory=dict)


class Questions:
    def __init__(self) -> None:
        self._open: list[_Question] = []

    def ask(self, asked: set[int], answer: str, seconds: float, done: Callable[[set[int], Answers], None]) -> None:
        self._open.append(_Question(answer, asked, time.monotonic() + seconds, done))

    def heard(self, number: int, message: dict[str, Any]) -> None:
        for question in self._open:
            if question.answer == message["op"] and number in question.waiting:
                question.waiting.discard(number)
                question.answers[number] = message
                return

    def ended(self, number: int) -> None:
        """A worker that ended owes no answer: its successor begins with what the others were told."""
        for question in self._open:
            question.waiting.discard(number)

    def deadlines(self) -> list[float]:
        return [question.deadline if question.waiting else 0.0 for question in self._open]

    def look_at_clocks(self, now: float) -> None:
        for question in list(self._open):
            if not question.waiting or question.deadline <= now:
                self._open.remove(question)
                question.done(question.waiting, question.answers)
