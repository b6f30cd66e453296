"""Fetch what readers have announced that they will read, before they do.

`announced` is what a consumer said; `window` how far ahead of it to be; `pace` how many requests at once; `course` how
far one consumer is and what comes next; `prefetcher` does it; `pages` brings it into memory; `listening` hears what a
connection's consumers say; `spot` which items are worth a look where all is well; `verdict` says what holds one up;
`foresight` when an object is read next, by plans that `timetable` turns round. `window`, `pace`, `spot` and `verdict`
are arithmetic without clocks or files, driven by simulations in the tests.
"""

from cachefs.fetcher.prefetch.listening import Listening
from cachefs.fetcher.prefetch.prefetcher import Prefetcher

__all__ = ["Listening", "Prefetcher"]
