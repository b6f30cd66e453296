"""Many different JPEGs made from a few real photographs, the same bytes in every run.

scikit-image ships real photographs under free licences. Each image made here is a crop of one of them, scaled
and encoded anew; which crop, and how large a file, follows from its number alone. So 2,000 images are as
different for a decoder, a digest and a cache as 2,000 photographs, and nothing is downloaded. The bytes are
the same wherever Pillow (and the JPEG library in it) is of the same version.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.digest import content_key

if TYPE_CHECKING:
    from PIL.Image import Image

# Bytes of a file, as ImageNet's are (mean 110 KB).
SMALLEST, LARGEST = 60_000, 160_000

# The photographs of scikit-image that are in its wheel, with enough detail to fill such a file. A class each.
SOURCES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}

# JPEG qualities as cameras use them: a file of 110 KB then has the pixels that ImageNet's have, about 400,000 at most.
QUALITIES = (93, 94, 95, 96)

# The pixels of the first attempt; the second is scaled by what the first attempt's file size tells.
FIRST_PIXELS = 160_000

# Attempts at a file size within the limits. Two do for nearly all; smooth crops take a third.
ATTEMPTS = 8


@dataclass(frozen=True)
class Photograph:
    """One file that was made. name: its path below the root, "class/class_00017.jpg". key: cachefs' content key."""

    name: str
    size: int
    key: bytes


def make_photographs(
    root: Path, count: int, *, seed: int = 1, made: Callable[[int], None] | None = None
) -> list[Photograph]:
    """Write `count` JPEGs below `root`, as class/name.jpg. made: called with how many more are done.

    Raises ModuleNotFoundError that says what to install when the photographs or Pillow are missing.
    """
    sources = _load_sources()
    for kind in SOURCES:
        (root / kind).mkdir(parents=True, exist_ok=True)

    def make(number: int) -> Photograph:
        kind, data = _make(sources, seed, number)
        name = f"{kind}/{kind}_{number:05d}.jpg"
        (root / name).write_bytes(data)
        return Photograph(name, len(data), content_key(data))

    photographs = []
    # Pillow scales and encodes outside the interpreter lock, so threads use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for photograph in pool.map(make, range(count)):
            photographs.append(photograph)
            if made is not None:
                made(1)
    return photographs


def _load_sources() -> dict[str, Image]:
    spec = find_spec("skimage")  # only its files are wanted: importing it would take a second
    if spec is None or find_spec("PIL") is None:
        raise ModuleNotFoundError(
            'photographs and Pillow are missing; install them with: pip install "cachefs-sidecar[demo]"'
        )
    import PIL.Image

    folder = Path((spec.submodule_search_locations or [""])[0]) / "data"
    sources = {}
    for kind, file in SOURCES.items():
        with PIL.Image.open(folder / file) as image:
            sources[kind] = image.convert("RGB")
    return sources


def _make(sources: dict[str, Image], seed: int, number: int) -> tuple[str, bytes]:
    """(class, JPEG) of one number. Seeded by text, which `random` hashes the same way on every machine."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 - variety, not secrecy
    kind = tuple(SOURCES)[number % len(SOURCES)]
    source = sources[kind]
    share = dice.uniform(0.45, 0.95)
    width, height = int(source.width * share), int(source.height * share)
    left, top = dice.randint(0, source.width - width), dice.randint(0, source.height - height)
    box = (left, top, left + width, top + height)
    quality = dice.choice(QUALITIES)
    wanted = dice.uniform(SMALLEST * 1.2, LARGEST * 0.9)
    pixels = float(FIRST_PIXELS)
    for _ in range(ATTEMPTS):
        data = _encode(source, box, math.sqrt(pixels / (width * height)), quality)
        if SMALLEST <= len(data) <= LARGEST and abs(len(data) / wanted - 1) < 0.2:
            return kind, data
        pixels *= wanted / len(data)
    if SMALLEST <= len(data) <= LARGEST:
        return kind, data
    raise AssertionError(f"photograph {number} ({kind}) does not become {wanted:.0f} bytes large")


def _encode(source: Image, box: tuple[int, int, int, int], scale: float, quality: int) -> bytes:
    from PIL.Image import Resampling

    size = (max(8, round((box[2] - box[0]) * scale)), max(8, round((box[3] - box[1]) * scale)))
    out = io.BytesIO()
    source.resize(size, Resampling.BICUBIC, box=box).save(out, "JPEG", quality=quality)
    return out.getvalue()
