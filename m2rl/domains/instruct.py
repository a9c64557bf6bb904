"""Instruction following: does a response satisfy each verifiable constraint of its row?

    spec = {"constraints": [{"id": "punctuation:no_comma", "kwargs": {}}, ...],
            "mode": "strict" | "loose",           # default strict
            "grading": "binary" | "fraction"}     # default binary

The form of the blend and of the benchmarks is read as well: {"instruction_id_list": [...], "kwargs": [{...} | null,
...]}, aligned by index and null-padded, with `grading_mode` for `grading`.

Reward: binary = 1 if every constraint holds, else 0 (IFEval's prompt level); fraction = the share that holds (its
instruction level). Loose: a constraint holds if it holds for the response or for one of seven readings of it, without
its first line, its last line, both, and each of these without asterisks (IFEval, arXiv:2311.07911, section 2.2).

An empty response satisfies nothing. `check_spec` at load time raises ValueError for an unknown id, a wrong kwarg or
language data that is not installed; `lint` names rows that a trivial response satisfies. Checks are linear in the
length of the response.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from m2rl.domains import (  # noqa: F401  they fill the table
    constraints_embedded,
    constraints_ifbench,
    constraints_ifeval,
    constraints_open,
)
from m2rl.domains.constraints import CONSTRAINTS, Constraint
from m2rl.types import Verdict

MODES = ("strict", "loose")
GRADINGS = ("binary", "fraction")
MAX_RESPONSE_CHARS = 400_000
"""About 100k tokens, three times the paper's longest response; a longer one is not judged (status error)."""

TRIVIAL_RESPONSES = ("", "foo")


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    """Judge one response; never raises.

    Status: ok = all constraints hold, wrong = one does not, unparsed = the response is blank, error = the spec is
    bad, the response is longer than MAX_RESPONSE_CHARS, or a check failed; detail names the constraints that do not
    hold.
    """
    try:
        bound = _bind(spec)
        mode, grading = _mode(spec), _grading(spec)
    except ValueError as problem:
        return Verdict(0.0, "error", str(problem))
    if not response.strip():
        return Verdict(0.0, "unparsed", "empty response")
    if len(response) > MAX_RESPONSE_CHARS:
        return Verdict(0.0, "error", f"response of {len(response)} characters, the limit is {MAX_RESPONSE_CHARS}")
    texts = _readings(response) if mode == "loose" else (response,)
    failed = []
    for constraint, kwargs in bound:
        try:
            if not any(constraint.check(text, **kwargs) for text in texts):
                failed.append(constraint.id)
        except Exception as problem:  # a response no rule foresaw: no reward, and a count under `error`
            return Verdict(0.0, "error", f"{constraint.id}: {type(problem).__name__}: {problem}"[:200])
    if not failed:
        return Verdict(1.0, "ok")
    share = 1 - len(failed) / len(bound) if grading == "fraction" else 0.0
    return Verdict(share, "wrong", f"{len(failed)} of {len(bound)} not satisfied: {', '.join(failed)}")


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the id and the kwarg, unless every constraint of the row can be checked here."""
    _mode(spec), _grading(spec)
    for constraint, _ in _bind(spec):
        if package := constraint.missing_package():
            hint = f"package {package} (pip install 'm2rl[ifeval]')"
            raise ValueError(f"{constraint.id} needs language data that is not installed: {hint}")


def lint(spec: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row, one line each: check_spec's error, or the trivial responses that would earn its
    reward."""
    try:
        check_spec(spec)
    except ValueError as problem:
        return [str(problem)]
    strict = {**spec, "mode": "strict", "grading": "binary"}
    return [
        f"the response {response!r} satisfies every constraint: {', '.join(c.id for c, _ in _bind(spec))}"
        for response in TRIVIAL_RESPONSES
        if verify(response, strict).reward > 0
    ]


def _pairs(spec: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(id, kwargs) of each constraint in either form of spec."""
    if "constraints" in spec:
        rows = spec["constraints"]
        if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) and "id" in row for row in rows):
            raise ValueError("constraints must be a list of {'id': ..., 'kwargs': ...}")
        return [(row["id"], row.get("kwargs")) for row in rows]
    ids, kwargs = spec.get("instruction_id_list"), spec.get("kwargs")
    if not isinstance(ids, list | tuple):
        raise ValueError("a row needs constraints or instruction_id_list")
    if kwargs is None:
        kwargs = [None] * len(ids)
    if not isinstance(kwargs, list | tuple) or len(kwargs) != len(ids):
        raise ValueError(f"kwargs must be a list as long as instruction_id_list ({len(ids)})")
    return list(zip(ids, kwargs))


def _bind(spec: Mapping[str, Any]) -> list[tuple[Constraint, dict[str, Any]]]:
    """Each constraint with its typed kwargs; raises ValueError."""
    bound = []
    for id, kwargs in _pairs(spec):
        constraint = CONSTRAINTS.get(id) if isinstance(id, str) else None
        if constraint is None:
            near = difflib.get_close_matches(str(id), CONSTRAINTS, n=1)
            raise ValueError(f"unknown constraint {id!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        bound.append((constraint, constraint.bind(kwargs)))
    if not bound:
        raise ValueError("a row needs at least one constraint")
    return bound


def _mode(spec: Mapping[str, Any]) -> str:
    mode = spec.get("mode") or "strict"
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _grading(spec: Mapping[str, Any]) -> str:
    grading = spec.get("grading") or spec.get("grading_mode") or "binary"
    if grading not in GRADINGS:
        raise ValueError(f"grading must be one of {', '.join(GRADINGS)}, got {grading!r}")
    return grading


def _readings(response: str) -> list[str]:
    """The response and its loose readings, blank ones and repeats left out."""
    lines = response.split("\n")
    kept = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text for text in dict.fromkeys(kept + [text.replace("*", "") for text in kept]) if text.strip()]
