"""A contender's training process (bench.comparisons.loading), from the side of whoever gives the orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.comparisons.ground import Dataset
from bench.comparisons.process import Process
from bench.contenders import Place
from bench.outcome import WrongBytes

# Of the loader.
BATCH = 16

# The edge of the square, in pixels, that image classifiers are trained on.
EDGE = 224


class Trainer(Process):
    def __init__(self, contender: str, place: Place, dataset: Dataset, environ: Mapping[str, str]) -> None:
        self._contender = contender
        told = {"contender": contender, "place": asdict(place), "manifest": str(dataset.manifest)}
        log = Path(place.folder) / "trainer.log"
        super().__init__("bench.comparisons.loading", told, {**environ, **place.environ}, log)

    def do(self, what: str, **details: Any) -> dict[str, Any]:
        """Carry out an order. Raises WrongBytes, Failed."""
        done = self.tell({"do": what, **details})
        wrong, missing = done["wrong"], done["missing"]
        if wrong:
            raise WrongBytes(self._contender, f"{len(wrong)} samples were wrong, such as {wrong[0]}")
        if missing:
            raise WrongBytes(self._contender, f"{len(missing)} samples never came, such as {missing[0]}")
        return done
