"""What an installation of ours puts on a machine, shown on a wheel that is built, installed and used.

PyPI's `sidecar` is somebody else's package, and `bench` and `tests` are everybody's: none may come from us.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USER = """\
import cachefs
from cachefs_sidecar.testbed import S3Server
reveal_type(cachefs.CacheConfig.make("/x").size)
reveal_type(S3Server.start)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment in which the wheel is installed, with this environment's other packages."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    target = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", f"--python={python}"]
    subprocess.run([*command, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # A directory named in a .pth file is searched, but the .pth files in it are not read: our own editable
    # installation stays outside.
    (Path(target) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_our_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = importlib.metadata.version("cachefs-sidecar")
    assert {name.split("/")[0] for name in names} == {
        "cachefs",
        "cachefs_sidecar",
        f"cachefs_sidecar-{version}.dist-info",
    }
    assert {"cachefs/py.typed", "cachefs_sidecar/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 1 << 20
    # Every module of the sources is in it, and no byte code or test.
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cachefs").rglob("*.py")}
    sources |= {p.relative_to(ROOT / "sidecar").as_posix() for p in (ROOT / "sidecar").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_installed_wheel_imports_and_runs(installed, tmp_path):
    where = run(
        installed, "-c", "import cachefs, cachefs_sidecar as s; print(cachefs.__file__, s.__file__)", cwd=tmp_path
    )
    assert where.count(str(installed.parents[1])) == 2
    assert "Usage" in run(installed, "-m", "cachefs_sidecar", "--help", cwd=tmp_path)
    assert "Usage" in run(installed.parent / "cachefs", "--help", cwd=tmp_path)
    assert "--images" in run(installed, "-m", "cachefs_sidecar.demo", "--help", cwd=tmp_path)


def test_fsspec_finds_the_installed_file_system(installed, tmp_path):
    program = "import fsspec; print(fsspec.get_filesystem_class('cachefs'))"
    assert "cachefs.filesystem" in run(installed, "-c", program, cwd=tmp_path)


@pytest.mark.parametrize("name", ["sidecar", "bench", "tests", "conftest"])
def test_the_installed_wheel_leaves_common_names_alone(installed, tmp_path, name):
    program = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert run(installed, "-c", program, cwd=tmp_path) == "None\n"


@pytest.mark.parametrize("name", ["sidecar", "bench", "tests"])
def test_the_editable_installation_has_no_package_of_a_common_name(tmp_path, name):
    # Its search path includes the repository, so the folder can be found as a namespace; a regular package of that
    # name, such as PyPI's sidecar, is always preferred to a namespace, wherever on the path it is.
    program = f"import importlib.util as u; s = u.find_spec({name!r}); print(s is None or s.origin is None)"
    assert run(Path(sys.executable), "-c", program, cwd=tmp_path) == "True\n"
    other = tmp_path / name
    other.mkdir()
    (other / "__init__.py").write_text("theirs = True\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import {name}; print({name}.theirs)"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert run(Path(sys.executable), "-c", program, cwd=folder) == "True\n"


def test_a_type_checker_sees_the_installed_types(installed, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    command = ["-m", "mypy", "--strict", "--python-executable", str(installed), "--cache-dir", str(tmp_path), "user.py"]
    told = run(Path(sys.executable), *command, cwd=tmp_path)
    assert 'Revealed type is "int | None"' in told.replace("builtins.", "").replace("Union[int, None]", "int | None")
    assert "S3Server)" in told
    assert "Any" not in told
    assert "Success" in told
