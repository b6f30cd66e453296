"""Sizes, floors and the places settings come from."""

from pathlib import Path

import pytest

from cachefs.config import CacheConfig, Floor, format_size, parse_size, runtime_dir
from cachefs.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("1K", 1024), ("500MB", 500 << 20), ("1.5TiB", 3 << 39), (" 200 g ", 200 << 30), (7, 7)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["12Q", "", "G", "-1", "1e9", "1 2", "5I", -1, "nan"])
def test_bad_sizes_name_the_value_and_an_example(text):
    with pytest.raises(ConfigError, match=r"size"):
        parse_size(text)


def test_format_size_uses_the_unit_a_reader_expects():
    assert [format_size(n) for n in (0, 1023, 1536, 1 << 30)] == ["0 B", "1023 B", "1.5 KiB", "1.0 GiB"]


def test_floor_is_a_share_or_an_amount():
    assert Floor.parse("20%").of(1000) == 200
    assert Floor.parse("1K").of(10) == 1024
    assert str(Floor.parse("20%")) == "20%"
    for bad in ("100%", "-1%", "x%"):
        with pytest.raises(ConfigError):
            Floor.parse(bad)


def test_settings_come_from_the_caller_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFS_DIR", f"{tmp_path}/a:{tmp_path}/b")
    monkeypatch.setenv("CACHEFS_SIZE", "1M")
    config = CacheConfig.make()
    assert config.dirs == (tmp_path / "a", tmp_path / "b")
    assert (config.home, config.size) == (tmp_path / "a", 1 << 20)
    assert CacheConfig.make(tmp_path / "c", size="2M").size == 2 << 20
    with pytest.raises(ConfigError, match="twice"):
        CacheConfig.make([tmp_path, tmp_path])
    with pytest.raises(ConfigError, match="fetcher"):
        CacheConfig.make(tmp_path, fetcher="maybe")


def test_the_runtime_directory_must_be_ours_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "run"))
    assert runtime_dir() == Path(tmp_path / "run")
    assert runtime_dir().stat().st_mode & 0o777 == 0o700
    runtime_dir().chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else"):
        runtime_dir()
