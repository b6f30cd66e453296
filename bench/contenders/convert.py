"""`python -m bench.contenders.convert CONTENDER FILES TARGET`: a dataset in the form that a contender reads.

A process of its own, because the libraries that convert leave threads, settings and memory behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.contenders import load
from bench.contenders.formats import Format


def main() -> None:
    name, files, target = sys.argv[1:]
    kind = load(name)
    assert issubclass(kind, Format)
    kind.convert(Path(files), Path(target))


if __name__ == "__main__":
    main()
