"""`python -m cachefs_sidecar.demo`: the same as `cachefs demo`."""

from __future__ import annotations

import argparse
import sys

from cachefs_sidecar.demo import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="cachefs demo", description=main.__doc__)
    parser.add_argument("--images", type=int, default=2000, help="how many photographs to make and read (default 2000)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
    parser.add_argument("--keep", action="store_true", help="leave images and caches on disk and say where")
    arguments = parser.parse_args()
    sys.exit(main(arguments.images, as_json=arguments.json, keep=arguments.keep))
