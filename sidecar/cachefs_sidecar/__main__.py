"""`python -m cachefs_sidecar`: the same as the command `cachefs`."""

from __future__ import annotations

import sys

from cachefs_sidecar.cli import main

if __name__ == "__main__":
    sys.exit(main())
