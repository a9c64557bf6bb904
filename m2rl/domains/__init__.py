"""Domains: text in, reward out. `verify(domain, response, spec) -> Verdict`, `check_spec(domain, spec)` at load time.

A domain is one module with `verify(response, spec)` and, optional, `check_spec(spec)` and `warm()` (what a worker
does once before a deadline counts); a domain of your own is `m2rl/domains/<name>.py`. No tensor enters here;
importing one domain imports only what it needs."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from m2rl.types import DOMAINS, Verdict

MODULES = {"math": "math", "code": "code", "science": "science", "if": "instruct", "agent": "agent"}
THINK_END = "</think>"


@functools.cache
def module(domain: str) -> ModuleType:
    """The module that judges a domain; ValueError for an unknown one."""
    name = "m2rl.domains." + ("reasoning_gym" if domain.startswith("rg_") else MODULES.get(domain, domain))
    if (not domain.isidentifier() and domain not in MODULES) or importlib.util.find_spec(name) is None:
        near = difflib.get_close_matches(domain, DOMAINS, 1)
        raise ValueError(
            f"unknown domain {domain!r}{f', did you mean {near[0]!r}?' if near else ''} "
            f"(there are: {', '.join(DOMAINS)}; your own is a module m2rl/domains/<name>.py)"
        )
    found = importlib.import_module(name)
    if not hasattr(found, "verify"):
        raise ValueError(f"unknown domain {domain!r}: {name} has no verify(response, spec)")
    return found


def verify(domain: str, response: str, spec: Mapping[str, Any]) -> Verdict:
    """Judge one response on the calling thread, without a deadline: untrusted input goes through `pool`.

    spec["think_gate"]: without </think> the reward is 0 (status unparsed), and only what follows the last one counts.
    spec["preset"]: "reference" = the rules of the paper's reference code with their known defects; gated, except agent.
    """
    reference = spec.get("preset") == "reference" and domain != "agent"
    if spec.get("think_gate", reference):
        if THINK_END not in response:
            return Verdict(0.0, "unparsed", f"no {THINK_END}")
        response = response.rpartition(THINK_END)[2].removesuffix("\n").removesuffix("<|im_end|>")
    return module(domain).verify(response, spec)


def check_spec(domain: str, spec: Mapping[str, Any]) -> None:
    """ValueError, naming the key and the rule, unless `verify` can judge responses to this row."""
    check = getattr(module(domain), "check_spec", None)
    if check is not None:
        check(spec)
