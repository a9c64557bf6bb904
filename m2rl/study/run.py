"""Runs a plan: every stage as a process, `lanes` at once, each finished one marked."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from m2rl.command import whole_file
from m2rl.config import to_toml
from m2rl.display import Display
from m2rl.study.definition import Study
from m2rl.study.plan import Seed, Stage, digests_of, finished, marker, plan, stage_folder, training_configs
from m2rl.study.preflight import preflight
from m2rl.types import InputError

SIGTERM_WAIT_S = 60.0  # a stage that was asked to stop may finish its step and save


def run(study: Study, out: Path, argv: Sequence[str], only: Sequence[str] = ()) -> None:
    """Do what is not done yet, `lanes` stages at a time. argv: the command line that names this study."""
    stages = plan(study, out)
    names = list(dict.fromkeys(s.name for s in stages))
    for name in only:
        if name not in names:
            raise InputError(f"--only: no stage {name} (there are: {', '.join(names)})")
    digests = digests_of(stages)
    done = {s.key for s in stages if finished(stage_folder(study, out, s), s, digests)}
    todo = [s for s in stages if s.key not in done and (not only or s.name in only)]
    coming = {s.key for s in todo}
    for s in todo:
        for key in s.after:
            if key not in done and key not in coming:
                raise InputError(f"stage {s.key} needs {key}, which is not done: name it as well, or leave out --only")
    display, running = Display(), list[Running]()
    display.say(f"{len(done)} of {len(stages)} stages are done; to do: {', '.join(s.key for s in todo) or 'none'}")
    if not todo:
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115  held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another study is at work in {out}: wait for it, or name another --out") from None
    preflight(study, out)
    total = sum(max(s.hours, 1e-4) for s in todo)
    spent, begun, shown, count = 0.0, time.perf_counter(), -1, len(todo)

    def progress() -> tuple[int, str]:
        part = spent + sum(r.share * max(r.stage.hours, 1e-4) for r in running)
        share, gone = part / total, time.perf_counter() - begun
        left = f", about {clock(gone * (1 - share) / share)} left" if 0.02 < share < 1 else ""
        return int(100 * share), f"{count - len(todo) - len(running)} of {count} stages, {clock(gone)}{left}"

    display.start("study", 100)
    try:
        while todo or running:
            for s in list(todo):
                if len(running) < study.lanes and set(s.after) <= done:
                    todo.remove(s)
                    running.append(start(study, out, s, digests[s.key], argv))
            time.sleep(0.1)
            for r in [r for r in running if r.process.poll() is not None]:
                running.remove(r)
                seconds = end(r, digests[r.stage.key])
                done.add(r.stage.key)
                spent += max(r.stage.hours, 1e-4)
                percent, words = progress()
                display.say(f"{r.stage.key} took {clock(seconds)}; {percent} % of the work, {words}")
            percent, words = progress()
            if percent != shown:
                shown = percent
                now = ", ".join(r.stage.key for r in running)
                display.update(percent, f"{words}; now {now or 'ready'}")
    finally:
        display.stop()
        stop(running)


@dataclass
class Running:
    stage: Stage
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    output: IO[bytes]
    begun: float
    steps: int  # of training; 0 = unknown

    @property
    def share(self) -> float:
        """Of the stage that is done, from the last line of a training run's metrics."""
        path = self.folder / self.stage.name / "metrics.jsonl"
        if not self.steps or not path.is_file():
            return 0.0
        with open(path, "rb") as lines:
            lines.seek(max(0, path.stat().st_size - 8192))
            for line in reversed(lines.read().splitlines()):
                with contextlib.suppress(ValueError, KeyError):
                    return min(1.0, (json.loads(line)["step"] + 1) / self.steps)
        return 0.0


def start(study: Study, out: Path, stage: Stage, wanted: str, argv: Sequence[str]) -> Running:
    """Begin one stage as a process."""
    folder = stage_folder(study, out, stage)
    clear(folder, stage, wanted)
    config = training_configs(Seed(study, stage.seed, folder)).get(stage.name)
    command, steps = launcher(stage.ranks), 0
    if config is not None:
        path = folder / "configs" / f"{config.name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(config))
        command, steps = [*command, "-m", "m2rl.train", "--config", str(path)], config.train.steps
    else:
        command = [*command, "-m", "m2rl.study.stages", stage.key, *argv]
    log = folder / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    output = open(log, "ab")  # noqa: SIM115  closed by end
    # torchrun passes SIGTERM on to its ranks; a killed one would leave them behind
    ask = _end_with_parent(signal.SIGTERM if stage.ranks > 1 else signal.SIGKILL)
    one_thread = {"OMP_NUM_THREADS": "1"} if study.lanes > 1 else {}  # lanes share the cores
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**one_thread, **os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=ask,
    )
    return Running(stage, folder, process, log, output, time.perf_counter(), steps)


def launcher(ranks: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(several if ranks > 1 else [])]


def clear(folder: Path, stage: Stage, wanted: str) -> None:
    """Keep what an interrupted attempt at this very stage left; what was made from other inputs goes."""
    started = marker(folder, stage.name).with_suffix(".started")
    started.parent.mkdir(parents=True, exist_ok=True)
    if started.is_file() and started.read_text() == wanted:
        return
    for pattern in stage.files:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    started.write_text(wanted)


_LIBC = ctypes.CDLL(None)


def _end_with_parent(number: int) -> Callable[[], None]:
    """In the child: a killed study leaves no stage behind (Linux; elsewhere the child runs to its end)."""

    def ask() -> None:
        if sys.platform == "linux":
            _LIBC.prctl(1, number)  # PR_SET_PDEATHSIG

    return ask


def end(r: Running, wanted: str) -> float:
    """Write the marker of a stage whose process has ended; its seconds. InputError with its last words if it failed."""
    r.output.close()
    seconds = time.perf_counter() - r.begun
    trained = not r.steps or (r.folder / r.stage.name / "model" / "config.json").is_file()
    if r.process.returncode != 0 or not trained:
        lines = [line for line in r.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("m2rl: ")] or lines or ["no output"]
        raise InputError(f"stage {r.stage.key} ended with status {r.process.returncode}: {said[-1]} (all: {r.log})")
    with whole_file(marker(r.folder, r.stage.name)) as file:
        file.write(json.dumps({"digest": wanted, "seconds": seconds}))
    return seconds


def stop(running: Sequence[Running]) -> None:
    """Ask the stages that still run to save and end; wait for them."""
    for r in running:
        r.process.terminate()
    for r in running:
        try:
            r.process.wait(SIGTERM_WAIT_S)
        except subprocess.TimeoutExpired:
            r.process.kill()
            r.process.wait()
        r.output.close()


def clock(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.1f} min" if minutes < 90 else f"{hours:.1f} h"
