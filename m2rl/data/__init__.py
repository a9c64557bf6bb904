"""Rows on disk -> prompts and demonstrations -> the mixture that draws them.

rows.py reads JSONL and parquet, mixture.py turns rows into tokens and draws batch = f(seed, step).
"""

from m2rl.data.mixture import (
    Encoder,
    FileSource,
    Loaded,
    Mixture,
    ProceduralSource,
    Source,
    eval_prompts,
    load_sources,
    quotas,
    whereabouts,
)
from m2rl.data.rows import Row, files, normalise, read_records

__all__ = [
    "Encoder",
    "FileSource",
    "Loaded",
    "Mixture",
    "ProceduralSource",
    "Row",
    "Source",
    "eval_prompts",
    "files",
    "load_sources",
    "normalise",
    "quotas",
    "read_records",
    "whereabouts",
]
