"""The office's five tables and 27 tools, on made-up data: every tool's success and error, states, loading."""

import json
from pathlib import Path

import office
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rl.domains.workplace import (
    FILES,
    KEYS,
    MAX_ARGUMENT_CHARS,
    MUTABLE,
    NOW,
    TOOLS,
    State,
    ToolError,
    World,
    call,
    differences,
    load_world,
)
from m2rl.types import InputError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(office.write(tmp_path_factory.mktemp("office")))


@pytest.fixture
def state(world: World) -> State:
    return State(world)


def first(state: State, table: str) -> dict:
    return state.tables[table][0]


def test_there_are_27_tools_in_six_kits():
    kits = {
        "company_directory": 1,
        "email": 6,
        "calendar": 5,
        "analytics": 6,
        "project_management": 5,
        "customer_relationship_manager": 4,
    }
    assert {kit: sum(name.startswith(kit + "_") for name in TOOLS) for kit in kits} == kits
    assert len(TOOLS) == 27


# One successful call per tool: (arguments, tables it changes). "$table.column" is the value in that table's first row.
SUCCESSES = {
    "company_directory_find_email_address": ({"name": "ADA"}, []),
    "email_get_email_information_by_id": ({"email_id": "$emails.email_id", "field": "subject"}, []),
    "email_search_emails": ({"query": "dear", "date_min": "2023-09-01", "date_max": "2023-12-31", "page": 2}, []),
    "email_send_email": ({"recipient": "Bo@office.example", "subject": "Hi", "body": "There"}, ["emails"]),
    "email_delete_email": ({"email_id": "$emails.email_id"}, ["emails"]),
    "email_forward_email": ({"email_id": "$emails.email_id", "recipient": "bo@office.example"}, ["emails"]),
    "email_reply_email": ({"email_id": "$emails.email_id", "body": "Thanks"}, ["emails"]),
    "calendar_get_event_information_by_id": ({"event_id": "$calendar.event_id", "field": "duration"}, []),
    "calendar_search_events": ({"query": "otter", "time_min": "2023-09-01 00:00:00", "page_size": 3}, []),
    "calendar_create_event": (
        {
            "event_name": "Tea",
            "participant_email": "Bo@office.example",
            "event_start": "2023-12-01 10:00:00",
            "duration": "30",
        },
        ["calendar"],
    ),
    "calendar_delete_event": ({"event_id": "$calendar.event_id"}, ["calendar"]),
    "calendar_update_event": ({"event_id": "$calendar.event_id", "field": "duration", "new_value": "45"}, ["calendar"]),
    "analytics_get_visitor_information_by_id": ({"visitor_id": "$analytics.visitor_id"}, []),
    "analytics_create_plot": (
        {"time_min": "2023-10-01", "time_max": "2023-10-31", "value_to_plot": "user_engaged", "plot_type": "bar"},
        ["plots"],
    ),
    "analytics_total_visits_count": ({"time_min": "2023-10-01"}, []),
    "analytics_engaged_users_count": ({"time_max": "2023-10-31"}, []),
    "analytics_traffic_source_count": ({"traffic_source": "direct"}, []),
    "analytics_get_average_session_duration": ({}, []),
    "project_management_get_task_information_by_id": ({"task_id": "$tasks.task_id", "field": "board"}, []),
    "project_management_search_tasks": ({"board": "design", "task_name": "plan"}, []),
    "project_management_create_task": (
        {
            "task_name": "Sweep",
            "assigned_to_email": "$tasks.assigned_to_email",
            "list_name": "Backlog",
            "due_date": "2023-12-01",
            "board": "Design",
        },
        ["tasks"],
    ),
    "project_management_delete_task": ({"task_id": "$tasks.task_id"}, ["tasks"]),
    "project_management_update_task": (
        {"task_id": "$tasks.task_id", "field": "task_name", "new_value": "Mop"},
        ["tasks"],
    ),
    "customer_relationship_manager_search_customers": ({"status": "won", "follow_up_by_min": "2023-09-15"}, []),
    "customer_relationship_manager_update_customer": (
        {"customer_id": "$customers.customer_id", "field": "notes", "new_value": "Wrote"},
        ["customers"],
    ),
    "customer_relationship_manager_add_customer": (
        {"customer_name": "Ivy", "assigned_to_email": "Bo@office.example", "status": "Lead"},
        ["customers"],
    ),
    "customer_relationship_manager_delete_customer": ({"customer_id": "$customers.customer_id"}, ["customers"]),
}

# Calls that change nothing and tell the model why: (tool, arguments, a part of the text).
ERRORS = [
    ("company_directory_find_email_address", {}, "name"),
    ("email_get_email_information_by_id", {"email_id": "99999999", "field": "body"}, "no email"),
    ("email_get_email_information_by_id", {"email_id": "$emails.email_id", "field": "colour"}, "sent_datetime"),
    ("email_search_emails", {"date_min": "soon"}, "date_min"),
    ("email_search_emails", {"page_size": 0}, "page_size"),
    ("email_search_emails", {"query": "a " * 151}, "longer than"),
    ("email_send_email", {"recipient": "bo", "subject": "a", "body": "b"}, "address"),
    ("email_send_email", {"recipient": "bo@office.example", "subject": "", "body": "b"}, "subject"),
    ("email_delete_email", {"email_id": "99999999"}, "no email"),
    ("email_forward_email", {"email_id": "$emails.email_id", "recipient": "bo"}, "address"),
    ("email_forward_email", {"email_id": "99999999", "recipient": "bo@office.example"}, "no email"),
    ("email_reply_email", {"email_id": "99999999", "body": "Thanks"}, "no email"),
    ("calendar_get_event_information_by_id", {"event_id": "12", "field": "duration"}, "8 digits"),
    ("calendar_get_event_information_by_id", {"event_id": "$calendar.event_id", "field": "colour"}, "event_start"),
    ("calendar_search_events", {"time_max": "whenever"}, "time_max"),
    ("calendar_search_events", {"query": "a|" * 151}, "longer than"),
    (
        "calendar_create_event",
        {"event_name": "Tea", "participant_email": "b@o.e", "event_start": "later", "duration": "30"},
        "event_start",
    ),
    (
        "calendar_create_event",
        {"event_name": "Tea", "participant_email": "b@o.e", "event_start": "2023-12-01", "duration": "half"},
        "minutes",
    ),
    ("calendar_delete_event", {"event_id": "99999999"}, "no event"),
    ("calendar_update_event", {"event_id": "$calendar.event_id", "field": "event_id", "new_value": "1"}, "field"),
    ("calendar_update_event", {"event_id": "$calendar.event_id", "field": "duration", "new_value": "-5"}, "above 0"),
    ("calendar_update_event", {"event_id": "99999999", "field": "duration", "new_value": "5"}, "no event"),
    ("analytics_get_visitor_information_by_id", {"visitor_id": "none"}, "no visitor"),
    (
        "analytics_create_plot",
        {"time_min": "2023-10-01", "time_max": "2023-10-31", "value_to_plot": "mood", "plot_type": "bar"},
        "visits_direct",
    ),
    (
        "analytics_create_plot",
        {"time_min": "2023-10-01", "time_max": "2023-10-31", "value_to_plot": "total_visits", "plot_type": "pie"},
        "histogram",
    ),
    ("analytics_total_visits_count", {"time_min": 20231001}, "string"),
    ("analytics_engaged_users_count", {"day": "2023-10-01"}, "time_min"),
    ("analytics_traffic_source_count", {"traffic_source": ["direct"]}, "string"),
    ("analytics_get_average_session_duration", {"time_max": {}}, "string"),
    ("project_management_get_task_information_by_id", {"task_id": "99999999", "field": "board"}, "no task"),
    ("project_management_search_tasks", {}, "at least one"),
    ("project_management_search_tasks", {"assigned_to_email": "bo"}, "address"),
    (
        "project_management_create_task",
        {
            "task_name": "Sweep",
            "assigned_to_email": "no@one.example",
            "list_name": "Backlog",
            "due_date": "2023-12-01",
            "board": "Design",
        },
        "address",
    ),
    ("project_management_delete_task", {"task_id": "99999999"}, "no task"),
    ("project_management_update_task", {"task_id": "$tasks.task_id", "field": "board", "new_value": "design"}, "Front"),
    (
        "project_management_update_task",
        {"task_id": "$tasks.task_id", "field": "list_name", "new_value": "Done"},
        "Backlog",
    ),
    ("project_management_update_task", {"task_id": "$tasks.task_id", "field": "task_id", "new_value": "1"}, "field"),
    ("customer_relationship_manager_search_customers", {"page": 1}, "at least one"),
    (
        "customer_relationship_manager_update_customer",
        {"customer_id": "$customers.customer_id", "field": "status", "new_value": "won"},
        "Won",
    ),
    (
        "customer_relationship_manager_update_customer",
        {"customer_id": "$customers.customer_id", "field": "product_interest", "new_value": "Tea"},
        "Training",
    ),
    (
        "customer_relationship_manager_update_customer",
        {"customer_id": "99999999", "field": "status", "new_value": "Won"},
        "no customer",
    ),
    ("customer_relationship_manager_add_customer", {"customer_name": "Ivy", "status": "Lead"}, "assigned_to_email"),
    ("customer_relationship_manager_delete_customer", {"customer_id": "99999999"}, "no customer"),
    ("office_set_on_fire", {}, "no tool"),
]


def fill(arguments: dict, state: State) -> dict:
    def value(v):
        if isinstance(v, str) and v.startswith("$"):
            table, column = v[1:].split(".")
            return first(state, table)[column]
        return v

    return {k: value(v) for k, v in arguments.items()}


def test_the_examples_below_cover_every_tool():
    assert set(SUCCESSES) == set(TOOLS)
    assert {name for name, _, _ in ERRORS} - {"office_set_on_fire"} == set(TOOLS)


@pytest.mark.parametrize("name", SUCCESSES)
def test_success_changes_only_what_it_should(name: str, world: World, state: State):
    arguments, changed = SUCCESSES[name]
    value = call(state, name, fill(arguments, state))
    json.dumps(value)
    assert value not in ("", None, [])
    assert differences(state, State(world)) == changed


@pytest.mark.parametrize(("name", "arguments", "part"), ERRORS)
def test_error_says_why_and_changes_nothing(name: str, arguments: dict, part: str, world: World, state: State):
    with pytest.raises(ToolError, match=part) as caught:
        call(state, name, fill(arguments, state))
    assert str(caught.value).startswith("Error: ")
    assert all(state.tables[t] is State(world).tables[t] or not state.tables[t] for t in MUTABLE)


def test_what_the_tools_write(state: State):
    mail = first(state, "emails")
    call(state, "email_send_email", {"recipient": "Bo@Office.Example", "subject": "Hi", "body": "There"})
    sent = state.tables["emails"][-1]
    highest = max(int(row["email_id"]) for row in state.tables["emails"][:-1])
    assert sent == {
        "email_id": str(highest + 1),
        "inbox/outbox": "outbox",
        "sender/recipient": "bo@office.example",
        "subject": "Hi",
        "sent_datetime": NOW,
        "body": "There",
    }
    call(state, "email_forward_email", {"email_id": mail["email_id"], "recipient": "bo@office.example"})
    forwarded = state.tables["emails"][-1]
    assert (forwarded["subject"], forwarded["body"]) == (f"FW: {mail['subject']}", mail["body"])
    call(state, "email_reply_email", {"email_id": mail["email_id"], "body": "Thanks"})
    reply = state.tables["emails"][-1]
    assert (reply["subject"], reply["sender/recipient"]) == (f"RE: {mail['subject']}", mail["sender/recipient"])
    new = call(
        state,
        "calendar_create_event",
        {
            "event_name": "Tea",
            "participant_email": "Bo@office.example",
            "event_start": "2023-12-01 10:00:00",
            "duration": "30",
        },
    )
    assert new == "00000040"
    assert state.tables["calendar"][-1] == {
        "event_id": new,
        "event_name": "Tea",
        "participant_email": "bo@office.example",
        "event_start": "2023-12-01 10:00:00",
        "duration": "30",
    }
    assert (
        call(
            state,
            "customer_relationship_manager_add_customer",
            {"customer_name": "Ivy", "assigned_to_email": "Bo@office.example", "status": "Lead"},
        )
        == "00000030"
    )
    assert state.tables["customers"][-1]["notes"] is None
    assert (
        call(
            state,
            "analytics_create_plot",
            {"time_min": "2023-10-01", "time_max": "2023-10-31", "plot_type": "bar", "value_to_plot": "user_engaged"},
        )
        == "plots/2023-10-01_2023-10-31_user_engaged_bar.png"
    )


def test_searches_agree_with_a_plain_filter(state: State):
    rows = state.tables["calendar"]
    found = call(state, "calendar_search_events", {"query": "OTTER", "time_min": "2023-10-01", "page_size": 1000})
    expected = [r for r in rows if "Otter" in r["event_name"] and r["event_start"] >= "2023-10-01"]
    assert found["events"] == sorted(expected, key=lambda r: r["event_start"], reverse=True)
    mails = call(state, "email_search_emails", {"query": "lamp ada", "date_max": "2023-10-31", "page_size": 1000})
    expected = [
        r
        for r in state.tables["emails"]
        if r["sent_datetime"] < "2023-11"
        and all(w in f"{r['subject']} {r['body']} {r['sender/recipient']}".lower() for w in ("lamp", "ada"))
    ]
    assert {r["email_id"] for r in mails["emails"]} == {r["email_id"] for r in expected}
    days = call(state, "analytics_total_visits_count", {})
    assert sum(days.values()) == len(state.tables["analytics"])
    assert list(days) == sorted(days)
    assert sum(call(state, "analytics_engaged_users_count", {}).values()) == sum(
        r["user_engaged"] for r in state.tables["analytics"]
    )
    per_source = [
        call(state, "analytics_traffic_source_count", {"traffic_source": s})
        for s in ("direct", "referral", "search engine", "social media")
    ]
    assert {day: sum(p[day] for p in per_source) for day in days} == days
    mean = call(state, "analytics_get_average_session_duration", {})
    assert sum(mean[d] * days[d] for d in days) == pytest.approx(
        sum(float(r["session_duration_seconds"]) for r in state.tables["analytics"])
    )
    assert call(state, "email_search_emails", {"query": "no such words"}).startswith("There are no")


def test_pages_partition_the_results(state: State):
    pages = [call(state, "email_search_emails", {"page": p, "page_size": 7}) for p in range(1, 10)]
    ids = [r["email_id"] for page in pages for r in page["emails"]]
    assert pages[0]["pagination"] == {"total_emails": 60, "page": 1, "page_size": 7, "total_pages": 9}
    assert len(set(ids)) == len(ids) == 60
    assert call(state, "email_search_emails", {"page": 99, "page_size": 7}) == pages[-1]  # clamped
    assert call(state, "email_search_emails", {"page": -3, "page_size": 7.0}) == pages[0]


def test_patterns_are_literal_but_for_alternatives_and_gaps(state: State):
    def names(query: str) -> set[str]:
        found = call(state, "calendar_search_events", {"query": query, "page_size": 1000})
        return set() if isinstance(found, str) else {r["event_name"] for r in found["events"]}

    assert names("otter|lamp") == {"Otter census", "Lamp inventory"}
    assert names("paper.*race") == {"Paper boat race"}
    assert names("race.*paper") == names("(a+)+$") == names("[") == names("o.ter") == set()


def test_states_are_equal_whatever_the_order_of_independent_writes(world: World):
    row, other = world.tables["tasks"][0], world.tables["tasks"][5]
    calls = [
        ("project_management_update_task", {"task_id": row["task_id"], "field": "task_name", "new_value": "Mop"}),
        ("project_management_delete_task", {"task_id": other["task_id"]}),
        ("email_send_email", {"recipient": "bo@office.example", "subject": "Hi", "body": "There"}),
        ("email_delete_email", {"email_id": world.tables["emails"][3]["email_id"]}),
        ("calendar_delete_event", {"event_id": world.tables["calendar"][2]["event_id"]}),
    ]
    forth, back = State(world), State(world)
    for name, arguments in calls:
        call(forth, name, arguments)
    for name, arguments in reversed(calls):
        call(back, name, arguments)
    assert differences(forth, back) == []
    assert differences(forth, State(world)) == ["calendar", "emails", "tasks"]


def test_case_matters_only_in_status_list_and_board(world: World):
    def after(name: str, **arguments: str) -> State:
        state = State(world)
        call(state, name, arguments)
        return state

    mail = {"recipient": "bo@office.example", "subject": "Hi", "body": "There"}
    send = "email_send_email"
    assert differences(after(send, **mail), after(send, **{**mail, "body": "tHERE"})) == []
    assert differences(after(send, **mail), after(send, **{**mail, "body": "Where"})) == ["emails"]
    task = world.tables["tasks"][0]
    for column, values in {"list_name": ("Backlog", "Completed"), "board": ("Design", "Back end")}.items():
        new = values[0] if task[column] != values[0] else values[1]
        wanted, shouted = State(world), State(world)
        for state, value in ((wanted, new), (shouted, new.upper())):
            state.tables["tasks"] = ({**task, column: value}, *state.tables["tasks"][1:])
        assert differences(wanted, shouted) == ["tasks"]
    customer = {"customer_name": "Ivy", "assigned_to_email": "bo@office.example"}
    add = "customer_relationship_manager_add_customer"
    assert differences(after(add, **customer, status="Lead"), after(add, **customer, status="lead")) == ["customers"]
    assert (
        differences(
            after(add, **customer, status="Lead"),
            after(add, **{**customer, "customer_name": "IVY"}, status="Lead", notes=""),
        )
        == []
    )


def test_states_do_not_see_each_other_and_share_what_they_did_not_change(world: World):
    a, b = State(world), State(world)
    call(
        a,
        "project_management_update_task",
        {"task_id": world.tables["tasks"][0]["task_id"], "field": "task_name", "new_value": "Mop"},
    )
    assert b.tables["tasks"] is world.tables["tasks"]
    assert world.tables["tasks"][0]["task_name"] != "Mop"
    assert all(x is y for x, y in zip(a.tables["tasks"][1:], b.tables["tasks"][1:], strict=True))


@pytest.mark.parametrize("make", [lambda f: None, lambda f: f / "missing"])
def test_a_missing_folder_or_file_is_named(make, tmp_path: Path):
    folder = make(tmp_path) or tmp_path
    with pytest.raises(InputError, match=r"agent\.tables_dir: no (folder|file)") as caught:
        load_world(folder)
    assert str(folder) in str(caught.value)


def test_every_missing_file_and_column_is_named(tmp_path: Path):
    for i, (name, columns) in enumerate(FILES.values()):
        folder = office.write(tmp_path / str(i))
        path = folder / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(columns[-1], "other", 1), encoding="utf-8")
        with pytest.raises(InputError, match=columns[-1]) as caught:
            load_world(folder)
        assert name in str(caught.value)
        path.unlink()
        with pytest.raises(InputError, match=name):
            load_world(folder)


@pytest.mark.parametrize(
    ("table", "old", "new", "part"),
    [
        ("calendar", "00000007", "seven", "event_id"),
        ("emails", "00000007", "00000008", "a number of its own"),
        ("emails", "2023-1", "MMXXIII", "sent_datetime"),
        ("tasks", ",Design", "", "fewer cells"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(table: str, old: str, new: str, part: str, tmp_path: Path):
    folder = office.write(tmp_path / "office")
    path = folder / FILES[table][0]
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=part) as caught:
        load_world(folder)
    assert f"{path}:" in str(caught.value)


def test_files_may_lie_in_processed_and_raw(tmp_path: Path, world: World):
    flat = office.write(tmp_path / "flat")
    for name in [*(f for f, _ in FILES.values()), "email_addresses.csv"]:
        target = tmp_path / "split" / ("raw" if name == "email_addresses.csv" else "processed") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (flat / name).rename(target)
    assert load_world(tmp_path / "split").tables == world.tables


hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [
            "a" * (MAX_ARGUMENT_CHARS + 1),
            "a" * 5000,
            "9" * 6000,
            "'; DROP TABLE emails; --",
            "(a+)+$",
            "|" * 300,
            ".*" * 300,
            "\x00",
            "ß" * 50,
            "İ",
            "00000001",
            "00000000",
            10**400,
            "2023-11-30",
            "Won",
            "Design",
        ]
    ),
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_hostile_arguments_never_crash_a_tool(data: st.DataObject, world: World):
    state = State(world)
    for _ in range(3):
        name = data.draw(st.sampled_from(sorted(TOOLS)))
        keys = list(TOOLS[name].parameters)
        arguments = {key: data.draw(hostile) for key in data.draw(st.sets(st.sampled_from(keys)))}
        if data.draw(st.booleans()):  # mostly valid, so that the tool itself is reached
            arguments = {**fill(SUCCESSES[name][0], state), **arguments}
        try:
            value = call(state, name, arguments)
        except ToolError as error:
            assert str(error).startswith("Error: ")
        else:
            json.dumps(value)
        for table, key in KEYS.items():
            assert len({row[key] for row in state.tables[table]}) == len(state.tables[table])
