"""The main job, shown: training images from slow S3 storage into a PyTorch DataLoader, with and without cachefs.

`main` is `cachefs demo`. `stage` makes the storage and takes it away again, `ways` are the ways to read from it,
`training` is the job, `report` says what came out and whether that is what is promised.
"""

from cachefs_sidecar.demo.stage import main

__all__ = ["main"]
