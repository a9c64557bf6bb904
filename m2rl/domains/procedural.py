"""Generated problems of four domains with demonstrations of mixed quality: what the embedded default trains on.

    problem(domain, seed, index) -> Problem        the training stream; a pure function, never a held-out problem
    eval_set(domain, n) -> [Problem]               n distinct held-out problems, the same ones always
    demonstration(problem, seed, index) -> text    good, or sloppy with the domain's probability

math: a running sum with every partial result spelled out, or a one-step equation. code: a Python one-liner, judged by
running it. science: unit conversion and comparison of lengths. if: a few words under verifiable constraints.
A problem is held out when crc32(prompt) % 8 == 0. Sloppy demonstrations (no working, wrong operator, one constraint
broken) leave RL room to improve.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DOMAINS = ("math", "code", "science", "if")
SLOPPY = {"math": 0.60, "code": 0.50, "science": 0.45, "if": 0.45}
"""Share of flawed demonstrations per domain."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One generated problem."""

    domain: str
    prompt: str
    spec: Mapping[str, Any]  # for m2rl.domains.verify
    good: str  # a response that earns the reward
    sloppy: str  # a plausible one that mostly does not


def problem(domain: str, seed: int, index: int) -> Problem:
    """Problem `index` of the training stream; never a held-out one. ValueError for an unknown domain."""
    rng = random.Random(f"m2rl/{seed}/{domain}/{index}")
    while held_out((made := _make(domain, rng)).prompt):
        pass
    return made


def eval_set(domain: str, n: int) -> list[Problem]:
    """`n` distinct held-out problems. ValueError if the domain does not have so many (math has about 190)."""
    rng, idle = random.Random(f"m2rl/held out/{domain}"), 0
    found: dict[str, Problem] = {}
    while len(found) < n:
        made = _make(domain, rng)
        idle += 1
        if held_out(made.prompt) and made.prompt not in found:
            found[made.prompt], idle = made, 0
        if idle > 20_000:
            raise ValueError(f"domain {domain} has only {len(found)} held-out problems, {n} were asked for")
    return list(found.values())


def demonstration(problem: Problem, seed: int, index: int, sloppy_scale: float = 1.0) -> str:
    """A response of mixed quality, a pure function of its arguments."""
    chance = random.Random(f"m2rl/demo/{seed}/{problem.domain}/{index}").random()
    return problem.sloppy if chance < SLOPPY[problem.domain] * sloppy_scale else problem.good


def held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 8 == 0


def _make(domain: str, rng: random.Random) -> Problem:
    if domain not in _MAKERS:
        raise ValueError(f"no procedural problems for domain {domain!r} (there are: {', '.join(DOMAINS)})")
    return _MAKERS[domain](rng)


# ---- math ----


def _math(rng: random.Random) -> Problem:
    """Every step echoes its operands, so that each is a local computation."""
    if rng.random() < 0.7:
        while True:
            a, b, c = (rng.randrange(10) for _ in range(3))
            f, g = rng.choice("+-"), rng.choice("+-")
            first = a + b if f == "+" else a - b
            answer = first + c if g == "+" else first - c
            if 0 <= first <= 9 and 0 <= answer <= 9:
                break
        prompt, working = f"math: what is {a}{f}{b}{g}{c}", f"{a}{f}{b}={first} {first}{g}{c}={answer}"
    else:
        answer = rng.randrange(10)
        b = rng.randrange(10 - answer)
        letter, total = rng.choice("abcdghjkmnpqrstuvwxyz"), answer + b
        prompt, working = f"solve for {letter}: {letter}+{b}={total}", f"{total}-{b}={answer}"
    wrong = (answer + rng.choice((-2, -1, 1, 2))) % 10
    return Problem("math", prompt, {"answer": str(answer)}, f"{working} \\boxed{{{answer}}}", f"\\boxed{{{wrong}}}")


# ---- code ----

_FILTERS = {"even": "v%2==0", "odd": "v%2==1", "positive": "v>0", "negative": "v<0"}
_REDUCERS = {"sum": "sum({})", "max": "max({})", "min": "min({})", "sorted list": "sorted({})", "count": "len([{}])"}


_REDUCE: dict[str, Callable[[list[int]], Any]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "sorted list": sorted,
    "count": len,
}


def _code(rng: random.Random) -> Problem:
    names, bodies = [], []
    for _ in range(2):
        k = rng.randint(1, 9)
        name, body = rng.choice(
            (("double", "{}*2"), ("square", "{}**2"), (f"add {k}", f"{{}}+{k}"), (f"subtract {k}", f"{{}}-{k}"))
        )
        names.append(name)
        bodies.append(body)
    which, reducer = rng.choice(list(_FILTERS)), rng.choice(list(_REDUCERS))
    prompt = f"{names[0]} then {names[1]} each of the {which} items; {reducer}"
    good = _program(bodies, which, reducer)
    if rng.random() < 0.7:
        flaw = rng.randrange(3)
        sloppy = _program(bodies, None, reducer) if flaw == 0 else _program([bodies[flaw - 1]], which, reducer)
    else:
        sloppy = _program(bodies, which, rng.choice([r for r in _REDUCERS if r != reducer]))
    return Problem("code", prompt, {"tests": _tests(bodies, which, reducer, rng)}, good, sloppy)


def _program(bodies: list[str], which: str | None, reducer: str) -> str:
    expression = bodies[0].format("v")
    for body in bodies[1:]:
        expression = body.format(f"({expression})")
    generator = f"{expression} for v in x" + (f" if {_FILTERS[which]}" if which else "")
    return f"```python\ndef f(x):\n return {_REDUCERS[reducer].format(generator)}\n```"


def _tests(bodies: list[str], which: str, reducer: str, rng: random.Random) -> dict[str, Any]:
    """Four calls of f on lists of six integers; every list has an item to work on."""
    expression = bodies[1].format(f"({bodies[0].format('v')})")
    apply = eval(f"lambda v: {expression}")  # built from the tables above alone
    keep = eval(f"lambda v: {_FILTERS[which]}")
    inputs: list[list[list[int]]] = []
    outputs: list[Any] = []
    while len(inputs) < 4:
        items = [rng.randint(-9, 9) for _ in range(6)]
        kept = [apply(v) for v in items if keep(v)]
        if kept:
            inputs.append([items])
            outputs.append(_REDUCE[reducer](kept))
    return {"fn_name": "f", "inputs": inputs, "outputs": outputs}


# ---- science ----

_FACTORS = {("km", "m"): 1000, ("m", "cm"): 100, ("kg", "g"): 1000, ("h", "min"): 60}
_LENGTHS = ("km", "m", "cm", "mm")


def _science(rng: random.Random) -> Problem:
    if rng.random() < 0.5:
        units = rng.sample(_LENGTHS, 3)
        longest = rng.random() < 0.5
        best = (min if longest else max)(units, key=_LENGTHS.index)
        letter = "ABC"[units.index(best)]
        options = {x: f"{rng.randint(2, 9)} {u}" for x, u in zip("ABC", units)}
        prompt = ("longest" if longest else "shortest") + "".join(f"\n{x}) {text}" for x, text in options.items())
        return Problem(
            "science",
            prompt,
            {"answer": letter, "options": options},
            f"{best} \\boxed{{{letter}}}",
            f"\\boxed{{{rng.choice([x for x in 'ABC' if x != letter])}}}",
        )
    (big, small), factor = rng.choice(list(_FACTORS.items()))
    n = rng.randint(2, 9 if factor == 60 else 99)
    wrong = rng.choice([f for f in (10, 60, 100, 1000) if f != factor])
    if rng.random() < 0.5:
        value, source, target, answer, working, flaw = n, big, small, n * factor, f"*{factor}", n * wrong
    else:
        value, source, target, answer, working, flaw = n * factor, small, big, n, f"/{factor}", n * 10
    return Problem(
        "science",
        f"Convert {value} {source} to {target}",
        {"answer": str(answer)},
        f"{working} \\boxed{{{answer}}}",
        f"\\boxed{{{flaw}}}",
    )


# ---- instruction following ----

_STARTS = ("red", "blue", "fish", "tree", "rain", "sun", "cat", "dog")
_ENDS = ("ok", "yes", "bye", "end")
_WORDS = (
    *_STARTS,
    *_ENDS,
    "bird",
    "snow",
    "lake",
    "moon",
    "wind",
    "star",
    "hill",
    "milk",
    "book",
    "song",
    "fire",
    "gold",
)


def _if(rng: random.Random) -> Problem:
    count = rng.randint(2, 5)
    parts: list[tuple[str, str, dict[str, Any]]] = [
        (f"exactly {count} words", "embedded:exact_words", {"num_words": count})
    ]
    case = rng.choice((None, "lower", "upper"))
    end, start, commas = rng.choice((None, *_ENDS)), rng.choice((None, *_STARTS)), rng.choice((None, True, False))
    if case:
        parts.append((f"{case}case", f"change_case:english_{'lowercase' if case == 'lower' else 'capital'}", {}))
    if end:
        parts.append((f"end with {end}", "startend:end_checker", {"end_phrase": end}))
    if start:
        parts.append((f"start with {start}", "embedded:start_with_word", {"word": start}))
    if commas is not None:
        parts.append(("use commas", "embedded:use_commas", {}) if commas else ("no comma", "punctuation:no_comma", {}))
    if not 3 <= len(parts) <= 5:
        return _if(rng)
    rng.shuffle(parts)
    wanted = {"count": count, "case": case, "end": end, "start": start, "commas": commas}
    return Problem(
        "if",
        "; ".join(text for text, _, _ in parts),
        {"constraints": [{"id": name, "kwargs": kwargs} for _, name, kwargs in parts]},
        _words(wanted, rng),
        _words(_break_one(wanted, rng), rng),
    )


def _words(wanted: Mapping[str, Any], rng: random.Random) -> str:
    words = [rng.choice(_WORDS) for _ in range(wanted["count"])]
    if wanted["start"]:
        words[0] = wanted["start"]
    if wanted["end"]:
        words[-1] = wanted["end"]
    commas = rng.random() < 0.5 if wanted["commas"] is None else wanted["commas"]
    text = (", " if commas else " ").join(words)
    return text.upper() if wanted["case"] == "upper" else text


def _break_one(wanted: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    broken = dict(wanted)
    key = rng.choice([k for k, v in wanted.items() if v is not None])
    if key == "count":
        broken["count"] = rng.choice([n for n in range(2, 7) if n != wanted["count"]])
    elif key == "case":
        broken["case"] = "upper" if wanted["case"] == "lower" else "lower"
    elif key == "commas":
        broken["commas"] = not wanted["commas"]
    else:
        broken[key] = rng.choice([w for w in (_ENDS if key == "end" else _STARTS) if w != wanted[key]])
    return broken


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {"math": _math, "code": _code, "science": _science, "if": _if}

# ---- the tokenizer's pieces ----

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *"0123456789",
            *"abcdefghijklmnopqrstuvwxyz",
            *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            *" \n+-*/=%<>()[]{}:;,.!?'\"_\\`#",
            "\\boxed{",
            "```python\n",
            "\n```",
            "def f(x):\n return ",
            "sum(",
            "max(",
            "min(",
            "sorted(",
            "len([",
            "])",
            " for v in x",
            " if v",
            "%2==0",
            "%2==1",
            ">0",
            "<0",
            "*2",
            "**2",
            "math: what is ",
            "solve for ",
            ": ",
            "double",
            "square",
            "add ",
            "subtract ",
            " then ",
            " each of the ",
            *_FILTERS,
            " items; ",
            *_REDUCERS,
            "Convert ",
            " to ",
            "longest",
            "shortest",
            "\nA) ",
            "\nB) ",
            "\nC) ",
            " km",
            " m",
            " cm",
            " mm",
            " kg",
            " g",
            " h",
            " min",
            "km",
            "cm",
            "mm",
            "kg",
            "exactly ",
            " words",
            "; ",
            "uppercase",
            "lowercase",
            "end with ",
            "start with ",
            "use commas",
            "no comma",
            *(piece for w in _WORDS for piece in (w, f" {w}", w.upper(), f" {w.upper()}")),
        ]
    )
)
"""Single characters and the stock phrases above; greedy longest match covers every prompt and demonstration."""
