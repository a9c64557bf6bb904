"""A made-up office in one process: five tables, a directory, 27 tools; nothing but the standard library.

    world = load_world(folder)              # six CSV files, checked once, shared by every episode
    state = State(world)                    # five references: opening an episode copies nothing
    call(state, name, arguments) -> value   # whatever JSON can hold; ToolError, with a text for the model, if it fails
    differences(a, b) -> [table, ...]       # empty when the two states are equal

The semantics (tables, tool names, arguments, results) are those of the WorkBench / workplace-assistant environment
(arXiv 2405.00823). A table is a tuple of rows and a row is never changed in place: a write builds a new tuple that
shares every untouched row, so hundreds of open episodes hold one copy of the data, and a dropped one leaves nothing.

Deliberate differences from the public implementation, where its behaviour is an accident of its data frames:
- search texts are matched literally (`|` separates alternatives, `.*` matches any gap), never as regular expressions,
  with which a model could hang the process;
- two states are compared by their rows, not by the index a frame keeps beside them: send-then-delete equals
  delete-then-send wherever the rows and their numbers come out the same;
- an empty cell and an empty text are the same, and an empty cell never breaks a search; an identifier cannot be
  overwritten; a page has at least one row; what is not a time or an integer is refused before anything is searched.
"""

from __future__ import annotations

import csv
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from m2rl.types import InputError

NOW = "2023-11-30 23:59:00"
"""The moment every episode takes place at; what is sent gets this timestamp."""
MAX_ARGUMENT_CHARS = 20_000
"""Longer arguments are refused: no honest call needs one."""
MAX_QUERY_CHARS = 300
"""The same for what is searched for: thousands of alternatives in every cell of a table take seconds."""

Row = dict[str, Any]

FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "analytics": (
        "analytics_data.csv",
        ("date_of_visit", "visitor_id", "page_views", "session_duration_seconds", "traffic_source", "user_engaged"),
    ),
    "calendar": ("calendar_events.csv", ("event_id", "event_name", "participant_email", "event_start", "duration")),
    "customers": (
        "customer_relationship_manager_data.csv",
        (
            "customer_id",
            "assigned_to_email",
            "customer_name",
            "customer_email",
            "customer_phone",
            "last_contact_date",
            "product_interest",
            "status",
            "follow_up_by",
            "notes",
        ),
    ),
    "emails": ("emails.csv", ("email_id", "inbox/outbox", "sender/recipient", "subject", "sent_datetime", "body")),
    "tasks": ("project_tasks.csv", ("task_id", "task_name", "assigned_to_email", "list_name", "due_date", "board")),
}
"""Table -> (file, its columns). The visits are read only; a fifth mutable table, `plots`, starts empty."""
DIRECTORY_FILE = "email_addresses.csv"
"""One address per line, without a header."""
KEYS = {"calendar": "event_id", "customers": "customer_id", "emails": "email_id", "tasks": "task_id"}
MUTABLE = ("calendar", "customers", "emails", "plots", "tasks")
CASE_MATTERS = frozenset({"status", "list_name", "board"})
"""Columns compared letter for letter; every other one is compared without regard to case."""

STATUSES = ("Qualified", "Won", "Lost", "Lead", "Proposal")
PRODUCTS = ("Software", "Hardware", "Services", "Consulting", "Training")
LISTS = ("Backlog", "In Progress", "In Review", "Completed")
BOARDS = ("Back end", "Front end", "Design")
PLOT_VALUES = (
    "total_visits",
    "session_duration_seconds",
    "user_engaged",
    "visits_direct",
    "visits_referral",
    "visits_search_engine",
    "visits_social_media",
)
PLOT_TYPES = ("bar", "line", "scatter", "histogram")
EVENT_FIELDS = ("event_name", "participant_email", "event_start", "duration")


class ToolError(Exception):
    """A call that did nothing; the message is for the model."""


@dataclass(frozen=True, slots=True)
class World:
    """The tables as loaded; shared by all episodes and never written to."""

    folder: str
    tables: Mapping[str, tuple[Row, ...]]  # the five files; None for an empty cell
    directory: tuple[str, ...]  # addresses, in the order of the file


class State:
    """The five mutable tables of one episode, sharing every row it has not changed with the world."""

    __slots__ = ("directory", "tables")

    def __init__(self, world: World) -> None:
        self.directory = world.directory
        self.tables: dict[str, tuple[Row, ...]] = {**world.tables, "plots": ()}


def load_world(folder: str | Path) -> World:
    """Read the six CSV files of `folder` (or of its `processed` and `raw` subfolders); cached per process.

    Raises InputError naming the folder, file, column or line that is missing or wrong.
    """
    return _load_world(str(Path(folder).expanduser().resolve()))


@functools.lru_cache(maxsize=4)
def _load_world(folder: str) -> World:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"agent.tables_dir: no folder {folder}")
    tables = {table: tuple(_read(_find(root, name), columns, table)) for table, (name, columns) in FILES.items()}
    with _find(root, DIRECTORY_FILE).open(encoding="utf-8-sig", newline="") as lines:
        directory = tuple(line[0].strip() for line in csv.reader(lines) if line and line[0].strip())
    if not directory:
        raise InputError(f"{_find(root, DIRECTORY_FILE)}: no addresses in it")
    return World(folder, tables, directory)


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / "processed" / name, root / "raw" / name):
        if path.is_file():
            return path
    raise InputError(f"agent.tables_dir: no file {name} in {root} or its subfolders processed and raw")


def _read(path: Path, columns: tuple[str, ...], table: str) -> Iterable[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}: no column {', '.join(missing)}")
            seen: set[str] = set()
            for cells in reader:
                if None in cells or None in cells.values():
                    count = "more" if None in cells else "fewer"
                    raise InputError(f"{path}:{reader.line_num}: {count} cells than columns")
                row: Row = {c: cells[c] or None for c in columns}
                _check(row, table, seen, f"{path}:{reader.line_num}")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}:{reader.line_num}: not a CSV file in UTF-8: {error}") from None


def _check(row: Row, table: str, seen: set[str], where: str) -> None:
    """The rules that the tools rely on: unique numeric keys, readable times and numbers."""
    if table == "analytics":
        row["user_engaged"] = row["user_engaged"] == "True"
        try:
            float(row["session_duration_seconds"] or "")
        except ValueError:
            raise InputError(f"{where}: session_duration_seconds must be a number") from None
        if not row["date_of_visit"]:
            raise InputError(f"{where}: date_of_visit is empty")
        return
    key = row[KEYS[table]] or ""
    if not (key.isascii() and key.isdigit()) or len(key) > 18 or key in seen:
        raise InputError(f"{where}: {KEYS[table]} must be a number of its own, got {key!r}")
    seen.add(key)
    for column in {"calendar": ("event_start",), "emails": ("sent_datetime",)}.get(table, ()):
        if _time(row[column] or "") is None:
            raise InputError(f"{where}: {column} must be a time like 2023-11-30 09:00:00, got {row[column]!r}")


def call(state: State, name: str, arguments: Mapping[str, Any]) -> Any:
    """Run one tool; `state` changes only if it succeeds.

    Arguments that are None count as not given. Raises ToolError, with a text for the model, for an unknown tool or
    argument, a missing or empty required argument, a wrong type or value, and a row that is not there.
    """
    tool = TOOLS.get(name)
    if tool is None:
        raise ToolError(f"Error: there is no tool named {name[:100]!r}.")
    given = {key: value for key, value in arguments.items() if value is not None}
    for key, value in given.items():
        parameter = tool.parameters.get(key)
        if parameter is None:
            raise ToolError(f"Error: {name} has no argument {str(key)[:100]!r}; it takes {', '.join(tool.parameters)}.")
        if parameter.annotation == "int":
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
                raise ToolError(f"Error: {key} must be an integer.")
            given[key] = int(value)
        elif not isinstance(value, str):
            raise ToolError(f"Error: {key} must be a string.")
        elif len(value) > MAX_ARGUMENT_CHARS:
            raise ToolError(f"Error: {key} is longer than {MAX_ARGUMENT_CHARS} characters.")
    for key, parameter in tool.parameters.items():
        if parameter.default is inspect.Parameter.empty and not given.get(key):
            raise ToolError(f"Error: {name} needs a value for {key}.")
    return tool.run(state, **given)


def differences(a: State, b: State) -> list[str]:
    """The mutable tables whose rows are not the same, in the same order, up to case where case does not matter."""
    return [t for t in MUTABLE if not _same(a.tables[t], b.tables[t])]


def _same(a: tuple[Row, ...], b: tuple[Row, ...]) -> bool:
    return a is b or (len(a) == len(b) and all(x is y or _folded(x) == _folded(y) for x, y in zip(a, b, strict=True)))


def _folded(row: Row) -> dict[str, str]:
    return {c: (v or "") if c in CASE_MATTERS else (v or "").lower() for c, v in row.items()}


# ---- helpers of the tools ----

_TIME_FORMATS = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%Y-%m",
    "%Y",
    "%m/%d/%Y",
    "%m/%d/%Y %H:%M",
    "%m/%d/%Y %H:%M:%S",
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%B %d, %Y",
    "%b %d, %Y",
    "%d %B %Y",
    "%d %b %Y",
)


def _time(text: str) -> datetime | None:
    """ISO first, then the other usual ways to write a date; None for anything else. Time zones are dropped."""
    text = text.strip()
    if len(text) > 40:
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        pass
    for form in _TIME_FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return None


def _need_time(text: str | None, argument: str) -> datetime | None:
    if not text:
        return None
    time = _time(text)
    if time is None:
        raise ToolError(f"Error: {argument} is not a time; write YYYY-MM-DD HH:MM:SS.")
    return time


def _need_one_of(value: str, choices: tuple[str, ...], argument: str) -> None:
    if value not in choices:
        raise ToolError(f"Error: {argument} must be one of: {', '.join(choices)}.")


def _need_duration(text: str) -> None:
    try:
        minutes = int(text)
    except ValueError:
        raise ToolError("Error: duration must be a whole number of minutes.") from None
    if minutes <= 0:
        raise ToolError("Error: duration must be above 0 minutes.")


def _need_event_id(text: str) -> None:
    if not (len(text) == 8 and text.isascii() and text.isdigit()):
        raise ToolError("Error: an event_id has 8 digits.")


def _need_address(text: str) -> None:
    if "@" not in text or "." not in text:
        raise ToolError("Error: recipient is not an e-mail address.")


def _need_short(query: str) -> None:
    if len(query) > MAX_QUERY_CHARS:
        raise ToolError(f"Error: what is searched for is longer than {MAX_QUERY_CHARS} characters.")


def _matcher(query: str) -> Callable[[str | None], bool]:
    """Case-blind substring search; `a|b` is a or b, `a.*b` is a and later b. Linear in the length of the cell."""
    _need_short(query)
    alternatives = [[piece for piece in alternative.split(".*") if piece] for alternative in query.lower().split("|")]

    def matches(cell: str | None) -> bool:
        if cell is None:
            return False
        text = cell.lower()
        for pieces in alternatives:
            at = 0
            for piece in pieces:
                at = text.find(piece, at)
                if at < 0:
                    break
                at += len(piece)
            else:
                return True
        return False

    return matches


def _position(rows: tuple[Row, ...], key: str, value: str, noun: str) -> int:
    for i, row in enumerate(rows):
        if row[key] == value:
            return i
    raise ToolError(f"Error: there is no {noun} {value[:100]!r}.")


def _get(state: State, table: str, value: str, noun: str) -> Row:
    rows = state.tables[table]
    return rows[_position(rows, KEYS[table], value, noun)]


def _field(row: Row, field: str) -> dict[str, Any]:
    _need_one_of(field, tuple(row), "field")
    return {field: row[field]}


def _append(state: State, table: str, row: Row, width: int = 8) -> str:
    """Add a row under the next number, zero-padded to `width` digits; returns that number."""
    rows, key = state.tables[table], KEYS[table]
    number = str(max((int(r[key]) for r in rows), default=0) + 1).zfill(width)
    state.tables[table] = (*rows, {**row, key: number})
    return number


def _replace(state: State, table: str, value: str, noun: str, field: str, new_value: str) -> None:
    rows = state.tables[table]
    i = _position(rows, KEYS[table], value, noun)
    state.tables[table] = (*rows[:i], {**rows[i], field: new_value}, *rows[i + 1 :])


def _delete(state: State, table: str, value: str, noun: str) -> None:
    rows = state.tables[table]
    i = _position(rows, KEYS[table], value, noun)
    state.tables[table] = rows[:i] + rows[i + 1 :]


def _page(rows: list[Row], noun: str, page: int, page_size: int) -> dict[str, Any] | str:
    if page_size < 1:
        raise ToolError("Error: page_size must be at least 1.")
    if not rows:
        return f"There are no {noun} that match."
    pages = -(-len(rows) // page_size)
    page = max(1, min(page, pages))
    return {
        noun: rows[(page - 1) * page_size : page * page_size],
        "pagination": {f"total_{noun}": len(rows), "page": page, "page_size": page_size, "total_pages": pages},
    }


def _visits(state: State, time_min: str, time_max: str) -> dict[str, list[Row]]:
    """Visits by day, days in order. Dates are compared as texts."""
    days: dict[str, list[Row]] = {}
    for row in state.tables["analytics"]:
        day = row["date_of_visit"]
        if (not time_min or day >= time_min) and (not time_max or day <= time_max):
            days.setdefault(day, []).append(row)
    return dict(sorted(days.items()))


# ---- the 27 tools; a parameter without a default must be given and not be empty ----


def company_directory_find_email_address(state: State, name: str) -> list[str]:
    matches = _matcher(name)
    return [address for address in state.directory if matches(address)]


def email_get_email_information_by_id(state: State, email_id: str, field: str) -> dict[str, Any]:
    return _field(_get(state, "emails", email_id, "email"), field)


def email_search_emails(
    state: State, query: str = "", date_min: str = "", date_max: str = "", page: int = 1, page_size: int = 5
) -> dict[str, Any] | str:
    """Every word of the query is in the subject, the body or the address; newest first; both days inclusive."""
    _need_short(query)
    words = sorted(set(query.lower().split()), key=len, reverse=True)  # the least likely first
    first, last = _need_time(date_min, "date_min"), _need_time(date_max, "date_max")
    found: list[tuple[datetime, Row]] = []
    for row in reversed(state.tables["emails"]):  # stable sort: of those of one moment, the last comes first
        sent = _time(row["sent_datetime"])
        assert sent is not None  # checked at load, and NOW otherwise
        if (first and sent.date() < first.date()) or (last and sent.date() > last.date()):
            continue
        text = f"{row['subject'] or ''} {row['body'] or ''} {row['sender/recipient'] or ''}".lower()
        if all(word in text for word in words):
            found.append((sent, row))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return _page([row for _, row in found], "emails", page, page_size)


def email_send_email(state: State, recipient: str, subject: str, body: str) -> str:
    _need_address(recipient)
    _send(state, recipient, subject, body)
    return "The email has been sent."


def _send(state: State, recipient: str, subject: str, body: str | None) -> None:
    _append(
        state,
        "emails",
        {
            "email_id": "",
            "inbox/outbox": "outbox",
            "sender/recipient": recipient.lower(),
            "subject": subject,
            "sent_datetime": NOW,
            "body": body,
        },
        width=1,
    )


def email_delete_email(state: State, email_id: str) -> str:
    _delete(state, "emails", email_id, "email")
    return "The email has been deleted."


def email_forward_email(state: State, email_id: str, recipient: str) -> str:
    _need_address(recipient)
    email = _get(state, "emails", email_id, "email")
    _send(state, recipient, f"FW: {email['subject'] or ''}", email["body"])
    return "The email has been forwarded."


def email_reply_email(state: State, email_id: str, body: str) -> str:
    email = _get(state, "emails", email_id, "email")
    _send(state, email["sender/recipient"] or "", f"RE: {email['subject'] or ''}", body)
    return "The reply has been sent."


def calendar_get_event_information_by_id(state: State, event_id: str, field: str) -> dict[str, Any]:
    _need_event_id(event_id)
    return _field(_get(state, "calendar", event_id, "event"), field)


def calendar_search_events(
    state: State, query: str = "", time_min: str = "", time_max: str = "", page: int = 1, page_size: int = 5
) -> dict[str, Any] | str:
    """The query is in the name or the participant's address; latest first; both bounds are on the start, inclusive."""
    first, last, matches = _need_time(time_min, "time_min"), _need_time(time_max, "time_max"), _matcher(query)
    found: list[tuple[datetime, Row]] = []
    for row in state.tables["calendar"]:
        if matches(row["event_name"]) or matches(row["participant_email"]):
            start = _time(row["event_start"])
            assert start is not None  # checked at load and on every write
            if not ((first and start < first) or (last and start > last)):
                found.append((start, row))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return _page([row for _, row in found], "events", page, page_size)


def calendar_create_event(
    state: State, event_name: str, participant_email: str, event_start: str, duration: str
) -> str:
    _need_time(event_start, "event_start")
    _need_duration(duration)
    return _append(
        state,
        "calendar",
        {
            "event_id": "",
            "event_name": event_name,
            "participant_email": participant_email.lower(),
            "event_start": event_start,
            "duration": duration,
        },
    )


def calendar_delete_event(state: State, event_id: str) -> str:
    _need_event_id(event_id)
    _delete(state, "calendar", event_id, "event")
    return "The event has been deleted."


def calendar_update_event(state: State, event_id: str, field: str, new_value: str) -> str:
    _need_event_id(event_id)
    _need_one_of(field, EVENT_FIELDS, "field")
    if field == "event_start":
        _need_time(new_value, "event_start")
    elif field == "duration":
        _need_duration(new_value)
    elif field == "participant_email":
        new_value = new_value.lower()
    _replace(state, "calendar", event_id, "event", field, new_value)
    return "The event has been updated."


def analytics_get_visitor_information_by_id(state: State, visitor_id: str) -> list[Row]:
    visits = [row for row in state.tables["analytics"] if row["visitor_id"] == visitor_id]
    if not visits:
        raise ToolError(f"Error: there is no visitor {visitor_id[:100]!r}.")
    return visits


def analytics_create_plot(state: State, time_min: str, time_max: str, value_to_plot: str, plot_type: str) -> str:
    _need_one_of(value_to_plot, PLOT_VALUES, "value_to_plot")
    _need_one_of(plot_type, PLOT_TYPES, "plot_type")
    path = f"plots/{time_min}_{time_max}_{value_to_plot}_{plot_type}.png"
    state.tables["plots"] = (*state.tables["plots"], {"file_path": path})
    return path


def analytics_total_visits_count(state: State, time_min: str = "", time_max: str = "") -> dict[str, int]:
    return {day: len(rows) for day, rows in _visits(state, time_min, time_max).items()}


def analytics_engaged_users_count(state: State, time_min: str = "", time_max: str = "") -> dict[str, int]:
    return {day: sum(row["user_engaged"] for row in rows) for day, rows in _visits(state, time_min, time_max).items()}


def analytics_traffic_source_count(
    state: State, time_min: str = "", time_max: str = "", traffic_source: str = ""
) -> dict[str, int]:
    return {
        day: sum(not traffic_source or row["traffic_source"] == traffic_source for row in rows)
        for day, rows in _visits(state, time_min, time_max).items()
    }


def analytics_get_average_session_duration(state: State, time_min: str = "", time_max: str = "") -> dict[str, float]:
    return {
        day: sum(float(row["session_duration_seconds"]) for row in rows) / len(rows)
        for day, rows in _visits(state, time_min, time_max).items()
    }


def project_management_get_task_information_by_id(state: State, task_id: str, field: str) -> dict[str, Any]:
    return _field(_get(state, "tasks", task_id, "task"), field)


_ADDRESS = re.compile(r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}")


def project_management_search_tasks(
    state: State,
    task_name: str = "",
    assigned_to_email: str = "",
    list_name: str = "",
    due_date: str = "",
    board: str = "",
) -> list[Row]:
    """The assignee is matched whole, the others as parts of the cell; every match is returned, there are no pages."""
    wanted = {"task_name": task_name, "list_name": list_name, "due_date": due_date, "board": board}
    matchers = {column: _matcher(text) for column, text in wanted.items() if text}
    if not matchers and not assigned_to_email:
        raise ToolError("Error: give at least one thing to search for.")
    if assigned_to_email and (len(assigned_to_email) > 320 or not _ADDRESS.fullmatch(assigned_to_email)):
        raise ToolError("Error: assigned_to_email is not an e-mail address.")
    return [
        row
        for row in state.tables["tasks"]
        if (not assigned_to_email or (row["assigned_to_email"] or "").lower() == assigned_to_email.lower())
        and all(matches(row[column]) for column, matches in matchers.items())
    ]


def _check_task(state: State, field: str, value: str) -> str:
    """The value as it is stored."""
    if field == "assigned_to_email":
        value = value.lower()
        if all((row["assigned_to_email"] or "").lower() != value for row in state.tables["tasks"]):
            raise ToolError("Error: no one with this address works on any task.")
    elif field == "list_name":
        _need_one_of(value, LISTS, field)
    elif field == "board":
        _need_one_of(value, BOARDS, field)
    return value


def project_management_create_task(
    state: State, task_name: str, assigned_to_email: str, list_name: str, due_date: str, board: str
) -> str:
    row = {
        "task_name": task_name,
        "assigned_to_email": assigned_to_email,
        "list_name": list_name,
        "due_date": due_date,
        "board": board,
    }
    return _append(state, "tasks", {"task_id": "", **{c: _check_task(state, c, v) for c, v in row.items()}})


def project_management_delete_task(state: State, task_id: str) -> str:
    _delete(state, "tasks", task_id, "task")
    return "The task has been deleted."


def project_management_update_task(state: State, task_id: str, field: str, new_value: str) -> str:
    _need_one_of(field, FILES["tasks"][1][1:], "field")
    _replace(state, "tasks", task_id, "task", field, _check_task(state, field, new_value))
    return "The task has been updated."


def customer_relationship_manager_search_customers(
    state: State,
    customer_name: str = "",
    customer_email: str = "",
    product_interest: str = "",
    status: str = "",
    assigned_to_email: str = "",
    last_contact_date_min: str = "",
    last_contact_date_max: str = "",
    follow_up_by_min: str = "",
    follow_up_by_max: str = "",
    page: int = 1,
    page_size: int = 5,
) -> dict[str, Any] | str:
    """Texts are parts of the cell. Dates are compared as texts, so a day as an upper bound ends at its midnight."""
    wanted = {
        "customer_name": customer_name,
        "customer_email": customer_email,
        "product_interest": product_interest,
        "status": status,
        "assigned_to_email": assigned_to_email,
    }
    matchers = {column: _matcher(text) for column, text in wanted.items() if text}
    ranges = {
        "last_contact_date": (last_contact_date_min, last_contact_date_max),
        "follow_up_by": (follow_up_by_min, follow_up_by_max),
    }
    ranges = {column: bounds for column, bounds in ranges.items() if any(bounds)}
    if not matchers and not ranges:
        raise ToolError("Error: give at least one thing to search for.")

    def inside(cell: str | None, low: str, high: str) -> bool:
        return cell is not None and (not low or cell >= low) and (not high or cell <= high)

    found = [
        row
        for row in state.tables["customers"]
        if all(matches(row[column]) for column, matches in matchers.items())
        and all(inside(row[column], *bounds) for column, bounds in ranges.items())
    ]
    return _page(found, "customers", page, page_size)


def customer_relationship_manager_update_customer(state: State, customer_id: str, field: str, new_value: str) -> str:
    _need_one_of(field, FILES["customers"][1][1:], "field")
    if field == "status":
        _need_one_of(new_value, STATUSES, "status")
    elif field == "product_interest":
        _need_one_of(new_value, PRODUCTS, "product_interest")
    elif field in ("customer_email", "assigned_to_email"):
        new_value = new_value.lower()
    _replace(state, "customers", customer_id, "customer", field, new_value)
    return "The customer has been updated."


def customer_relationship_manager_add_customer(
    state: State,
    customer_name: str,
    assigned_to_email: str,
    status: str,
    customer_email: str = "",
    customer_phone: str = "",
    last_contact_date: str = "",
    product_interest: str = "",
    notes: str = "",
    follow_up_by: str = "",
) -> str:
    row = {
        "assigned_to_email": assigned_to_email.lower(),
        "customer_name": customer_name,
        "customer_email": customer_email.lower(),
        "customer_phone": customer_phone,
        "last_contact_date": last_contact_date,
        "product_interest": product_interest,
        "status": status,
        "follow_up_by": follow_up_by,
        "notes": notes,
    }
    return _append(state, "customers", {"customer_id": "", **{c: v or None for c, v in row.items()}})


def customer_relationship_manager_delete_customer(state: State, customer_id: str) -> str:
    _delete(state, "customers", customer_id, "customer")
    return "The customer has been deleted."


@dataclass(frozen=True, slots=True)
class Tool:
    run: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]  # without the state


def _tool(run: Callable[..., Any]) -> Tool:
    return Tool(run, {n: p for n, p in inspect.signature(run).parameters.items() if n != "state"})


TOOLS: dict[str, Tool] = {
    run.__name__: _tool(run)
    for run in (
        company_directory_find_email_address,
        email_get_email_information_by_id,
        email_search_emails,
        email_send_email,
        email_delete_email,
        email_forward_email,
        email_reply_email,
        calendar_get_event_information_by_id,
        calendar_search_events,
        calendar_create_event,
        calendar_delete_event,
        calendar_update_event,
        analytics_get_visitor_information_by_id,
        analytics_create_plot,
        analytics_total_visits_count,
        analytics_engaged_users_count,
        analytics_traffic_source_count,
        analytics_get_average_session_duration,
        project_management_get_task_information_by_id,
        project_management_search_tasks,
        project_management_create_task,
        project_management_delete_task,
        project_management_update_task,
        customer_relationship_manager_search_customers,
        customer_relationship_manager_update_customer,
        customer_relationship_manager_add_customer,
        customer_relationship_manager_delete_customer,
    )
}
