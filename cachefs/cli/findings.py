"""What doctor finds: a fact, whether it is good enough, and what to do about it when it is not."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """level: OK, WARN (works, but worse) or FAIL (something cannot work). advice: what to do, "" when ok."""

    level: str
    subject: str
    fact: str
    advice: str = ""
