r"""Reasoning Gym's tasks as domains: generated without end, judged by their own rules (optional extra `reasoning-gym`).

    problem("rg_gcd", seed, index) -> (question, spec)        a pure function
    verify(response, spec)                                    spec = {"task": "gcd", "entry": the library's own record}

A domain is `rg_` and the name of a task of the library (gcd, countdown, knights_knaves ...). The answer is what stands
in the last <answer> tags, else the last \boxed{}, else the last "Answer:" line; the reward is 1 where the task scores
it 1, else 0: some tasks give a hundredth for any answer, which is no reward.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Mapping
from typing import Any

from m2rl.domains.answers import final_answer
from m2rl.types import InputError, Verdict

PREFIX = "rg_"
ASK = "\n\nThink step by step, and end with a line of the form Answer: <your answer>."
HELD_OUT = 1 << 40  # added to the seed of held-out problems
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ENDLESS = 1 << 60  # the library's data sets have a size; a problem depends on seed + index alone


@functools.lru_cache(maxsize=256)
def _dataset(task: str, seed: int) -> Any:
    try:
        library = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise InputError(f"domain {PREFIX}{task}: {error}; pip install 'm2rl[reasoning-gym]'") from None
    names = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in names:
        near = difflib.get_close_matches(task, names, 1)
        raise InputError(
            f"domain {PREFIX}{task}: Reasoning Gym has no task {task}"
            + (f", did you mean {PREFIX}{near[0]}?" if near else "")
        )
    return library.create_dataset(task, seed=seed, size=_ENDLESS)


def problem(domain: str, seed: int, index: int) -> tuple[str, dict[str, Any]]:
    """(question, spec) of one problem. InputError without the library, or for a task that it does not have."""
    task = domain.removeprefix(PREFIX)
    entry = _dataset(task, seed)[index]
    return str(entry["question"]) + ASK, {"task": task, "entry": entry}


def check_spec(spec: Mapping[str, Any]) -> None:
    entry = spec.get("entry")
    if not isinstance(entry, Mapping) or "answer" not in entry:
        raise ValueError("a Reasoning Gym row needs key entry, the library's record")
    _dataset(str(spec.get("task")), 0)


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    """ok / wrong / unparsed."""
    tagged = _TAGS.findall(response)
    found = tagged[-1].strip() if tagged else final_answer(response)
    if not found:
        return Verdict(0.0, "unparsed", "no <answer>, \\boxed{} or Answer: line")
    try:
        score = float(_dataset(spec["task"], 0).score_answer(found, spec["entry"]))
    except InputError:
        raise
    except Exception as error:  # some tasks raise on answers that they cannot read
        return Verdict(0.0, "wrong", f"{type(error).__name__}: {found[:80]}")
    ok = score > 1 - 1e-6
    return Verdict(float(ok), "ok" if ok else "wrong", f"{found[:80]} (score {score:.2f})")
