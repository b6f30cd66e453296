"""How many files and connections this process may have open at once."""

from __future__ import annotations

import resource

# Where the administrator allows it: readers are several hundred on the largest nodes, and each may pass some. (The
# usual limit of 1,024 is for programs that use select(2).)
MOST_FILES = 65_536

# What to do about it, for messages.
HINT = "let it open more files (ulimit -Hn, LimitNOFILE= in systemd)"


def allow_files() -> int:
    """Take as many as the hard limit allows: most systems give 1,024 to whoever does not ask. How many there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft == resource.RLIM_INFINITY:
        return MOST_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)
