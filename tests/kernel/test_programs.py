"""Libraries that map files, and programs that read them as they please: from the mount they see what a plain copy has.

In both modes, from a cache that has everything and from one that has nothing yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cachefs.digest import BLOCK_SIZE
from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import start_mount, stop_mount
from tests.kernel.mounting import Dataset

pytestmark = pytest.mark.needs_fuse

# More than one block of the cache each, so that a cold one comes in pieces.
VALUES = np.random.default_rng(7).integers(0, 2**62, size=1_300_000)
assert VALUES.nbytes > BLOCK_SIZE


def make_files(folder: Path) -> None:
    with h5py.File(folder / "values.h5", "w") as file:
        file["values"] = VALUES
    np.save(folder / "values.npy", VALUES)
    table = pa.table({"values": VALUES})
    with pa.OSFile(str(folder / "values.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100_000)
    pq.write_table(table, folder / "values.parquet", compression="none", use_dictionary=False)
    with lmdb.open(str(folder / "values.lmdb"), map_size=1 << 28) as env, env.begin(write=True) as transaction:
        for number, value in enumerate(VALUES[:150_000].tolist()):
            transaction.put(b"%08d" % number, b"%d" % value)
    make_images(folder / "images")
    make_repository(folder / "repository")


def make_images(folder: Path) -> None:
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, size=(64 + number, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.jpg", quality=90)
    with wave.open(str(folder / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes((np.sin(np.arange(16_000)) * 20_000).astype("<i2").tobytes())


def make_repository(folder: Path) -> None:
    folder.mkdir()
    for number in range(40):
        (folder / f"module{number}.py").write_text(f"def answer():\n    return {number}\n")
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-m", "all"],
        ["repack", "-a", "-d", "-q"],  # not gc: it leaves directories empty, and an object store has no such thing
    ):
        subprocess.run(["git", *command], cwd=folder, check=True, timeout=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["open-free", "passthrough"])
def mode(request: pytest.FixtureRequest) -> str:
    if request.param == "passthrough" and os.geteuid() != 0:
        pytest.skip("needs to be root")
    return str(request.param)


@pytest.fixture(params=["cached", "cold"])
def data(
    made: dict[str, bytes], mode: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.write(made, cached=request.param == "cached")
    dataset.snapshot()
    info = start_mount(dataset.settings(io=mode))
    if info.io != mode:
        stop_mount(dataset.mountpoint)
        pytest.skip(info.io_why)
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def read_lmdb(folder: Path) -> object:
    with (
        lmdb.open(str(folder / "values.lmdb"), readonly=True, lock=False, readahead=False) as env,
        env.begin(buffers=True) as transaction,
    ):
        some = [bytes(transaction.get(b"%08d" % number) or b"") for number in range(0, 150_000, 1009)]
        return some, hashlib.md5(b"".join(bytes(value) for _, value in transaction.cursor())).hexdigest()


def read_hdf5(folder: Path) -> object:
    with h5py.File(folder / "values.h5", "r") as file:
        return file["values"][-1000:].tobytes(), file["values"][::1009].tobytes()


def read_arrow(folder: Path) -> object:
    with pa.memory_map(str(folder / "values.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        found = table["values"].to_numpy().tobytes()
        del table
    return found


def read_parquet(folder: Path) -> object:
    return pq.read_table(folder / "values.parquet", memory_map=True)["values"].to_numpy().tobytes()


def read_numpy(folder: Path) -> object:
    values = np.load(folder / "values.npy", mmap_mode="r")
    found = values[::-997].tobytes(), values[1_200_000:].tobytes()
    with contextlib.closing(values._mmap):
        del values
    return found


def read_images(folder: Path) -> object:
    found = []
    for file in sorted((folder / "images").glob("*.jpg")):
        with Image.open(file) as image:
            found.append((image.size, hashlib.md5(image.convert("RGB").tobytes()).hexdigest()))
    return found


LIBRARIES = [read_lmdb, read_hdf5, read_arrow, read_parquet, read_numpy, read_images]


def test_libraries_read_what_they_wrote(data: Dataset) -> None:
    # Those that map files first: what is cold is cold for them.
    for read in LIBRARIES:
        once: Callable[[Path], object] = read
        assert once(data.mountpoint) == once(data.plain), read
        assert once(data.mountpoint) == once(data.plain), (read, "again")


def run(*command: str | Path, **environ: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, env=os.environ | environ, check=False
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.mark.parametrize("data", ["cold"], indirect=True)
def test_programs_see_what_a_plain_copy_has(data: Dataset, tmp_path: Path) -> None:
    clone_a_repository(data, tmp_path)
    compile_and_import_modules(data, tmp_path)
    if shutil.which("ffprobe") is not None:  # Debian package ffmpeg
        probe_media_files(data)


def clone_a_repository(data: Dataset, tmp_path: Path) -> None:
    head = run("git", "-C", data.plain / "repository", "rev-parse", "HEAD^{tree}")
    git = ["git", "-c", "safe.directory=*"]
    for number, how in enumerate(([], ["--no-local"])):
        clone = tmp_path / f"clone{number}"
        run(*git, "clone", "-q", *how, data.mountpoint / "repository", clone)
        assert run("git", "-C", clone, "rev-parse", "HEAD^{tree}") == head
        run("git", "-C", clone, "fsck", "--strict")
    assert run(*git, "-C", data.mountpoint / "repository", "log", "--oneline").endswith(" all\n")


def compile_and_import_modules(data: Dataset, tmp_path: Path) -> None:
    prefix = {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    run(sys.executable, "-m", "compileall", "-q", data.mountpoint / "repository", **prefix)
    assert len(list((tmp_path / "compiled").rglob("*.pyc"))) == 40
    program = "import module7, module39; print(module7.answer(), module39.answer())"
    path = {"PYTHONPATH": str(data.mountpoint / "repository")}
    assert run(sys.executable, "-c", program, **path) == "7 39\n"


def probe_media_files(data: Dataset) -> None:
    probe = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name,width,height,duration", "-of", "csv"]
    for name, is_like in (("images/3.jpg", "mjpeg,640,480"), ("images/tone.wav", "pcm_s16le,2.000000")):
        found = run(*probe, data.mountpoint / name)
        assert is_like in found
        assert found == run(*probe, data.plain / name)
