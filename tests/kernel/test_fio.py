"""fio over the mount: every way to read a file that it knows, with verification, in both modes, cold and cached."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import start_mount, stop_mount
from tests.kernel.mounting import Dataset

pytestmark = [
    pytest.mark.needs_fuse,
    pytest.mark.skipif(shutil.which("fio") is None, reason="no fio (Debian package fio)"),
]

# Blocks of fio, each with a checksum of its own in it. More than one block of the cache.
BLOCK, SIZE = 64 * 1024, 10 << 20

WAYS = (
    ["--ioengine=psync", "--rw=read", "--numjobs=3"],
    ["--ioengine=mmap", "--rw=randread"],
    ["--ioengine=libaio", "--rw=randread", "--iodepth=16"],
    ["--ioengine=libaio", "--rw=randread", "--iodepth=16", "--direct=1"],
)


def fio(file: Path, folder: Path, *options: str) -> int:
    """Its exit status. It leaves what it finds wrong in `folder`."""
    common = ["--name=job", f"--filename={file}", f"--bs={BLOCK}", f"--size={SIZE}", "--verify=crc32c", "--thread"]
    command = ["fio", *common, "--verify_fatal=1", "--minimal", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False).returncode


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fio")
    assert fio(folder / "file", folder, "--rw=write", "--do_verify=0", "--ioengine=psync") == 0
    return (folder / "file").read_bytes()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


@pytest.mark.parametrize("mode", ["open-free", "passthrough"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "cold"])
def test_fio_verifies_what_it_wrote(data: Dataset, written: bytes, mode: str, cached: bool) -> None:
    if mode == "passthrough" and os.geteuid() != 0:
        pytest.skip("needs to be root")
    files = {f"{number}.bin": written for number in range(len(WAYS))}
    spoiled = bytearray(written)
    spoiled[SIZE // 2 + 5000] ^= 1
    data.write(files | {"spoiled.bin": bytes(spoiled)}, cached=cached)
    data.snapshot()
    info = start_mount(data.settings(io=mode))
    if info.io != mode:
        pytest.skip(info.io_why)
    for name, way in zip(files, WAYS, strict=True):  # a file for each: what is cold is cold for each
        assert fio(data.mountpoint / name, data.folder, "--readonly", *way) == 0, way
    assert fio(data.mountpoint / "spoiled.bin", data.folder, "--readonly", *WAYS[0]) != 0
