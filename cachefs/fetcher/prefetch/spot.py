"""Which of many things are worth a look: all, until so many in a row were as they should be; then one in some.

For what costs far more to look at than it gains where nothing is wrong, and must all be looked at where something is.
"""

from __future__ import annotations


class SpotCheck:
    """in_a_row: as many make it sure. every: of those that follow, one in so many is looked at."""

    def __init__(self, in_a_row: int, every: int) -> None:
        self._in_a_row = in_a_row
        self._every = every
        self._right = 0
        self._skipped = 0

    @property
    def sure(self) -> bool:
        return self._right >= self._in_a_row

    def worth(self) -> bool:
        """Whether the next one is worth it."""
        if not self.sure:
            return True
        self._skipped = (self._skipped + 1) % self._every
        return not self._skipped

    def found(self, right: bool) -> None:
        """What the look came to."""
        self._right = self._right + 1 if right else 0
