"""The command line of a study, and the study that it names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import m2rl.study
from m2rl.command import named
from m2rl.study.definition import Study, read, verify
from m2rl.types import InputError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m m2rl.study",
        description=m2rl.study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", default="study_embedded", metavar="FILE|NAME", help="study_embedded, study_qwen3_4b ...")
    p.add_argument("--out", default="", help="folder of the study, default runs/<its name>; the same one continues it")
    p.add_argument("--seeds", type=int, nargs="+", default=[], help="one study per seed, one report with intervals")
    p.add_argument("--checkpoint", nargs="+", default=[], metavar="RUN=FOLDER", help="models that are there already")
    p.add_argument("--scale", type=float, default=0.0, help="of every number of training steps (0.1 = a tenth)")
    p.add_argument("--problems", type=int, default=0, help="held-out problems per benchmark, at most")
    p.add_argument("--k", type=int, default=0, help="samples per problem: Avg@K")
    p.add_argument("--ranks", type=int, default=0, help="processes (GPUs) per stage, under torchrun")
    p.add_argument("--lanes", type=int, default=0, help="stages at once")
    p.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="do these stages only")
    p.add_argument("--dry-run", action="store_true", help="print stages, devices and estimated hours, and stop")
    return p


def resolve(o: argparse.Namespace) -> tuple[Study, str]:
    """The study's file with the command line's changes, not yet verified."""
    study, where = read(o.config)
    given = named(o.checkpoint, "--checkpoint")
    for name, folder in given.items():
        if name not in {r.name for r in study.run}:
            raise InputError(f"--checkpoint {name}={folder}: RUN must be one of {', '.join(r.name for r in study.run)}")
    runs = tuple(dataclasses.replace(r, checkpoint=given.get(r.name, r.checkpoint)) for r in study.run)
    sampling = dataclasses.replace(
        study.sampling, problems=o.problems or study.sampling.problems, k=o.k or study.sampling.k
    )
    v = study.validation
    if o.problems:
        v = dataclasses.replace(v, problems=min(v.problems, max(2, o.problems)))
    changed: dict[str, Any] = {"run": runs, "sampling": sampling, "validation": v}
    changed |= {key: getattr(o, key) for key in ("scale", "ranks", "lanes") if getattr(o, key)}
    changed |= {"seeds": tuple(o.seeds)} if o.seeds else {}
    return dataclasses.replace(study, **changed), where


def parse(argv: Sequence[str]) -> tuple[Study, Path, argparse.Namespace]:
    """The verified study, its folder, and the options."""
    o = parser().parse_args(argv)
    study = verify(*resolve(o))
    return study, Path(o.out or f"runs/{study.name}"), o
