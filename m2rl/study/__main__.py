"""`python -m m2rl.study`: runs a study, or with --dry-run shows its plan."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rl.command import exit_with
from m2rl.study.definition import Study, swept
from m2rl.study.options import parse
from m2rl.study.plan import Seed, digests_of, finished, plan, stage_folder, training_configs
from m2rl.study.run import clock, run
from m2rl.types import InputError


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    study, out, o = parse(argv)
    if o.dry_run:
        print_plan(study, out)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(study, out, argv, o.only)
    report = out / "report.html"
    if report.is_file() and not o.only:
        print(f"Report: {report}")
    return 0


def print_plan(study: Study, out: Path) -> None:
    """Stages, devices, estimated hours and what they are assumed from; nothing is loaded or written."""
    from m2rl.data import whereabouts

    stages = plan(study, out)
    digests = digests_of(stages)
    unit = "GPU" if study.ranks > 1 else "core"
    print(f"{study.name} in {out}: {len(stages)} stages, {study.lanes} at a time, up to {study.ranks} {unit}(s) each\n")
    print(f"{'stage':22} {'state':8} {unit + 's':>5} {unit + ' hours':>10} {'wall':>9}  after")
    hours = wall = 0.0
    for r in study.run:
        if r.checkpoint:
            print(f"{r.name:22} {'given':8} {'-':>5} {'-':>10} {'-':>9}  {r.checkpoint}")
    for s in stages:
        state = "done" if finished(stage_folder(study, out, s), s, digests) else "to do"
        if state == "to do":
            hours, wall = hours + s.hours, wall + s.hours / s.ranks
        size = f"{s.hours:.1f}" if s.hours >= 0.1 else f"{s.hours:.3f}"
        print(
            f"{s.key:22} {state:8} {s.ranks:5} {size:>10} {clock(3600 * s.hours / s.ranks):>9}  "
            f"{', '.join(s.after) or '-'}"
        )
    print(f"{'to do':22} {'':8} {'':5} {hours:10.1f} {clock(3600 * wall / study.lanes):>9}")
    print("\nHours are estimates:")
    for note in study.estimate.notes:
        print(f"  {note}")
    command = f"torchrun --standalone --nproc-per-node {study.ranks}" if study.ranks > 1 else "python"
    print(f"Training stages run as: {command} -m m2rl.train --config {out}/configs/STAGE.toml")
    print(f"Merges: {', '.join(study.merge)}")
    if tried := swept(study):
        chosen = ", ".join(f"{n} of {k}" for n, k in tried.items())
        print(f"Coefficients chosen on {study.validation.problems} training problems per domain: {chosen}")
    wanted = [p for c in training_configs(Seed(study, study.seeds[0], out)).values() for p in c.data.train]
    for p in dict.fromkeys(p for p in wanted if not whereabouts(p)):
        print(f"Data {p}: NOT FOUND here; the study needs it")
    for r in study.run:
        if r.checkpoint and not checkpoint_is_here(r.checkpoint):
            print(f"Checkpoint of {r.name}, {r.checkpoint}: NOT FOUND here; the study needs it")
    print("Dry run: nothing was loaded, trained or written.")


def checkpoint_is_here(source: str) -> bool:
    from m2rl.safetensors_io import resolve_folder

    with contextlib.suppress(InputError):
        return resolve_folder(source).is_dir()
    return False


if __name__ == "__main__":
    exit_with(main)
