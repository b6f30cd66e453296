"""Lower rooms never import higher ones, and what a reader imports stays light. Read from the sources, not believed.

The table of rooms is ARCHITECTURE.md's own, so that page cannot drift from what is enforced.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"cachefs": ROOT / "cachefs", "cachefs_sidecar": ROOT / "sidecar" / "cachefs_sidecar"}

# In no room: __init__ only hands names on, when they are first used.
LEVEL_FREE = {"cachefs"}

# The packages that readers must not load: not fork-safe (obstore), or slow to import in each loader worker.
HEAVY = {"obstore", "s3fs", "aiobotocore", "botocore", "torch", "numpy", "typer", "rich", "diskcache", "aiohttp"}


def levels() -> dict[str, int]:
    """Module prefix -> level, from the table in ARCHITECTURE.md."""
    found: dict[str, int] = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        row = re.match(r"\| (\d+) \| ([^|]+) \|", line)
        if row is None:
            continue
        folder = ""
        for name in re.findall(r"`([^`]+)`", row[2]):
            file = name if "/" in name else f"{folder}/{name}"  # `cachefs/errors.py`, `digest.py`
            folder = file.rpartition("/")[0] if name.endswith(".py") else folder
            module = file.removeprefix("sidecar/").removesuffix(".py").strip("/").replace("/", ".")
            found[module] = int(row[1])
    return found


LEVELS = levels()


def level_of(module: str) -> int | None:
    for prefix in sorted(LEVELS, key=len, reverse=True):
        if module == prefix or module.startswith(f"{prefix}."):
            return LEVELS[prefix]
    return None


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), file


MODULES = dict(modules())


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether it happens when `file` itself is imported). TYPE_CHECKING blocks happen never."""

    def below(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, at_import
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative imports hide which room they mean"
                assert child.module is not None
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in MODULES else child.module), at_import
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from below(ast.Module(child.orelse, []), at_import)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from below(child, at_import and not function)

    yield from below(ast.parse(file.read_text()), True)


def test_the_table_names_every_room():
    assert {
        "cachefs.errors": 0,
        "cachefs.digest": 0,
        "cachefs.store": 2,
        "cachefs_sidecar": 7,
    }.items() <= LEVELS.items()
    nowhere = [name for name in MODULES if level_of(name) is None and name not in LEVEL_FREE]
    assert not nowhere, f"not in ARCHITECTURE.md's table: {nowhere}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_higher_room(module):
    own = level_of(module)
    if own is None:
        return
    for imported, _ in imports(MODULES[module]):
        level = level_of(imported)
        assert level is None or level <= own, f"{module} (level {own}) imports {imported} (level {level})"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("cachefs.") or name == "cachefs"])
def test_cachefs_never_imports_the_sidecar(module):
    for imported, _ in imports(MODULES[module]):
        assert imported.split(".")[0] not in ("cachefs_sidecar", "sidecar")


@pytest.mark.parametrize("module", [name for name in MODULES if re.match(r"cachefs\.(client|filesystem)\b", name)])
def test_readers_import_no_fetcher_and_no_origin_client(module):
    for imported, at_import in imports(MODULES[module]):
        assert imported.split(".")[0] != "obstore"
        if at_import:
            assert not imported.startswith("cachefs.fetcher"), imported


# What each loads is asked of a fresh interpreter: an import two modules away counts as much.
@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cachefs", HEAVY | {"fsspec", "msgspec", "asyncio"}),
        ("cachefs.store.reader", HEAVY | {"fsspec", "msgspec", "asyncio"}),
        ("cachefs.client", HEAVY | {"fsspec"}),
        ("cachefs.filesystem", HEAVY),
        ("cachefs.cluster.membership", HEAVY | {"lightkube", "httpx2", "etcd3gw", "requests", "dns"}),
    ],
)
def test_importing_a_reader_loads_nothing_heavy(module, forbidden):
    if module not in MODULES:
        pytest.fail(f"{module} does not exist")
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & forbidden


def test_every_module_says_why_it_exists():
    silent = [name for name, file in MODULES.items() if not ast.get_docstring(ast.parse(file.read_text()))]
    assert not silent


def test_nobody_pickles():
    for name, file in MODULES.items():
        for imported, _ in imports(file):
            assert imported not in ("pickle", "cloudpickle", "dill", "shelve", "marshal"), f"{name} imports {imported}"


def test_the_check_itself_can_fail(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    import obstore\nif TYPE_CHECKING:\n    import torch\nfrom cachefs import errors\n")
    assert list(imports(file)) == [("obstore", False), ("cachefs.errors", True)]
    assert level_of("cachefs.store.reader") == 2
    assert level_of("os.path") is None
