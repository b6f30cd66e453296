"""A distributed storage on this machine, for the tests, the benchmarks and the demonstration.

`S3Server` is a real S3 server with credentials; `Throttle` stands in front of it and is slow, faulty and
exact about what was asked: its counters are the ground truth for "this object was read once". `photographs`
makes the images. `network` makes hosts with links of their own, `nodes` the nodes of a cluster on them.
`stop_fetcher` ends what a cache directory left running.
"""

from cachefs_sidecar.testbed.fetchers import fetcher_pid, stop_fetcher
from cachefs_sidecar.testbed.photographs import Photograph, make_photographs
from cachefs_sidecar.testbed.server import S3Server, find_rclone
from cachefs_sidecar.testbed.throttle import Throttle, Traffic

__all__ = [
    "Photograph",
    "S3Server",
    "Throttle",
    "Traffic",
    "fetcher_pid",
    "find_rclone",
    "make_photographs",
    "stop_fetcher",
]
