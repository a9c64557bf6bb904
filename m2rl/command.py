"""What every command does around its work, without torch: NAME=VALUE options, files that are complete or absent, and
errors as one line with an exit status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from m2rl.types import InputError


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a command; wrong input and a full disk become one line and exit status 2, Ctrl-C status 130."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        _end(str(error))
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" writing {Path(error.filename)}" if error.filename else ""
        _end(f"the disk is full{where}; what was saved before is intact")
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 2:  # the option parser has said what is wrong
            _tell_torchrun("the command line is wrong: see the message above")
        raise


def _end(message: str) -> NoReturn:
    if is_leader():
        print(f"m2rl: {message}", file=sys.stderr, flush=True)
    _tell_torchrun(f"m2rl: {message}")
    sys.exit(2)


def _tell_torchrun(message: str) -> None:
    """torchrun ends its own long report with what this file says: there the reason is read even by who missed it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        shown = {"py_callstack": message, "timestamp": int(time.time())}
        report = {"message": {"message": message, "extraInfo": shown}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report))


def is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def leader_speaks() -> Iterator[None]:
    """What every rank would print is printed once."""
    if is_leader():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def named(values: Sequence[str], flag: str) -> dict[str, str]:
    """`name=value` options; InputError for one of another form, or a name given twice."""
    out: dict[str, str] = {}
    for item in values:
        name, sign, value = item.partition("=")
        if not sign or not name or not value:
            raise InputError(f"{flag} takes name=value, got {item!r}")
        if name in out:
            raise InputError(f"{flag}: {name} is given twice")
        out[name] = value
    return out


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write that is complete or absent: written beside, renamed at the end, dropped on an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
