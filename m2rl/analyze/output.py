"""What every analysis hands over: numbers with their definition and source, as JSON, CSV and figures.

analysis.write("out")  ->  out/skills.json  out/skills-flows.csv ...  out/skills-flips.svg ...
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2rl.analyze.figures import Figure

PAPER = "To Mix or To Merge: Toward Multi-Domain Reinforcement Learning for Large Language Models (arXiv 2602.12566)"


@dataclass(frozen=True)
class Analysis:
    """One finished analysis."""

    name: str
    definitions: Mapping[str, str]  # quantity -> what exactly was computed, unit included
    source: str  # where the definition comes from, and what of it is ours
    inputs: Mapping[str, Any]  # what it was computed from, and with which settings
    results: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # name -> rows, one CSV each
    figures: Sequence[Figure] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values only: NaN and infinity become null, arrays lists; figures are descriptions a page can draw."""
        return {
            "analysis": self.name,
            "definitions": dict(self.definitions),
            "source": self.source,
            "inputs": plain(self.inputs),
            "results": plain(self.results),
            "tables": {name: plain(rows) for name, rows in self.tables.items()},
            "figures": [plain(f.as_dict()) for f in self.figures],
        }

    def write(self, folder: str | Path) -> Path:
        """Write the JSON (returned), one CSV per table and one SVG per figure."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, rows in self.tables.items():
            (folder / f"{self.name}-{name}.csv").write_text(to_csv(rows), encoding="utf-8")
        for figure in self.figures:
            (folder / f"{self.name}-{figure.name}.svg").write_text(figure.svg(), encoding="utf-8")
        return path


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a header of every key that occurs, in order of appearance."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in plain(row).items()} for row in rows)
    return out.getvalue()


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return str(value) if isinstance(value, Path) else value
