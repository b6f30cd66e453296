"""A process of the bench that takes orders, from the side of whoever gives them: JSON lines there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.stage import Stage

Tell = Callable[[Mapping[str, Any]], dict[str, Any]]


@contextmanager
def told(stage: Stage, module: str, way: Mapping[str, Any], **settings: str) -> Iterator[Tell]:
    """Run `python -m module`, whose first order is `way`; yields what gives it an order and returns its answer.

    settings: in its environment, and in that of the fetcher that it starts.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**stage.environ, **settings},
        cwd=Path(__file__).resolve().parents[1],
        process_group=0,  # Ctrl-C is for us; it ends with its stdin
    ) as process:

        def tell(order: Mapping[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"{module} ended with status {process.wait()}; see above")
            found: dict[str, Any] = json.loads(answer)
            return found

        try:
            tell(way)
            yield tell
        finally:
            process.kill()  # it has nothing to save
