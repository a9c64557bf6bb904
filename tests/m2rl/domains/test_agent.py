"""Agent episodes on a made-up office: parsing, turns, errors that go back to the model, rewards."""

import gc
import json
import re
import tracemalloc
from pathlib import Path

import office
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rl.domains import workplace
from m2rl.domains.agent import (
    MAX_ANSWER_CHARS,
    MAX_CALLS_PER_TURN,
    Episode,
    MalformedCall,
    ToolCall,
    argument_error,
    assistant_turns,
    ground_truth,
    lint,
    parse_tool_calls,
    replay,
    schemas,
    verify,
)
from m2rl.domains.workplace import State, World, load_world
from m2rl.types import InputError


@pytest.fixture(scope="module")
def office_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return office.write(tmp_path_factory.mktemp("office"))


@pytest.fixture(scope="module")
def world(office_folder: Path) -> World:
    return load_world(office_folder)


def schema_of(name: str) -> dict:
    """An OpenAI function schema for one of the workplace's tools, in the flat form of the blend."""
    parameters = workplace.TOOLS[name].parameters
    return {
        "type": "function",
        "name": name,
        "description": f"Does {name}.",
        "strict": False,
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                k: {"type": "integer" if p.annotation == "int" else "string"} for k, p in parameters.items()
            },
            "required": [k for k, p in parameters.items() if p.default is p.empty],
        },
    }


TOOLS = [schema_of(name) for name in workplace.TOOLS]
SEND = ("email_send_email", {"recipient": "bo@office.example", "subject": "Hi", "body": "There"})
PLOT = (
    "analytics_create_plot",
    {"time_min": "2023-10-01", "time_max": "2023-10-31", "value_to_plot": "user_engaged", "plot_type": "bar"},
)


def write(*calls: tuple[str, dict]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


def spec(*calls: tuple[str, dict], **more: object) -> dict:
    return {"tools": TOOLS, "ground_truth": [{"name": n, "arguments": json.dumps(a)} for n, a in calls], **more}


def play(world: World, row: dict, *turns: str):
    episode = Episode(row, world)
    for turn in turns:
        seen = episode.step(turn)
    return episode, seen


# ---- parsing ----


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("All done.", []),
        ("", []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [("f", {"a": 1})]),
        ('Let me.\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>', [("f", {})]),
        (
            '<tool_call>{"name":"f","arguments":null}</tool_call>'
            ' <tool_call>{"name":"g","parameters":{"b":1}}</tool_call>',
            [("f", {}), ("g", {"b": 1})],
        ),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"b\\"}"}</tool_call>', [("f", {"a": "b"})]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "two\nlines </tool_call> <tool_call>"}}</tool_call>',
            [("f", {"a": "two\nlines </tool_call> <tool_call>"})],
        ),
        (
            "<think>Maybe <tool_call>{broken</think>\n\n"
            '<tool_call>{"name": "f", "arguments": {"é": "日本"}}</tool_call>',
            [("f", {"é": "日本"})],
        ),
        ('<think><tool_call>{"name": "f"}</tool_call></think>Nothing to do.', []),
        ("</tool_call> alone", []),
    ],
)
def test_calls_are_read(text: str, calls: list):
    assert parse_tool_calls(text) == [ToolCall(n, a) for n, a in calls]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>{"name": "f", "arguments": {"a": 1}}<tool_call>',
        "<tool_call></tool_call>",
        "<tool_call>f(a=1)</tool_call>",
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>[{"name": "f"}]</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "a=1"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000,
        '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g",}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>' * (MAX_CALLS_PER_TURN + 1),
    ],
)
def test_malformed_calls_end_the_episode_unparsed(text: str, world: World):
    with pytest.raises(MalformedCall):
        parse_tool_calls(text)
    episode, seen = play(world, spec(), text)  # doing nothing would be right here, and still scores 0
    assert (seen.messages, seen.done, seen.reason) == (None, True, "unparsed")
    assert (episode.verdict().reward, episode.verdict().status) == (0.0, "unparsed")
    assert workplace.differences(episode.state, State(world)) == []


def test_nothing_of_a_turn_runs_if_one_of_its_calls_is_malformed(world: World):
    episode, _ = play(world, spec(SEND), write(SEND) + "<tool_call>oops</tool_call>")
    assert workplace.differences(episode.state, State(world)) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"n": 1}, "missing"),
        ({"s": "a", "x": 1}, "unexpected"),
        ({"s": 1}, "string"),
        ({"s": "a", "n": "1"}, "integer"),
        ({"s": "a", "n": True}, "integer"),
        ({"s": "a", "e": "blue"}, "red, green"),
        ({"s": "a", "o": 3}, "string or null"),
        ({"s": "a", "n": 2, "e": "red", "o": None, "free": object()}, ""),
        ({"s": None}, "missing"),
    ],
)
def test_arguments_are_held_against_the_schema(arguments: dict, part: str):
    schema = {
        "properties": {
            "s": {"type": "string"},
            "n": {"type": "integer"},
            "e": {"enum": ["red", "green"]},
            "o": {"type": ["string", "null"]},
            "free": {},
        },
        "required": ["s"],
    }
    error = argument_error(arguments, schema)
    assert part in error if part else error == ""


def test_schemas_come_flat_or_nested():
    nested = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
    assert schemas(nested) == schemas(TOOLS)
    padded = [
        {
            **tool,
            "parameters": {
                **tool["parameters"],
                "properties": {
                    **{k: {**v, "enum": None} for k, v in tool["parameters"]["properties"].items()},
                    "elsewhere": None,
                },
            },
        }
        for tool in TOOLS
    ]  # as read from parquet
    assert [set(s["properties"]) for s in schemas(padded).values()] == [
        set(s["properties"]) for s in schemas(TOOLS).values()
    ]
    assert argument_error(SEND[1], schemas(padded)[SEND[0]]) == ""
    bad_ones = [
        {"type": "function"},
        {"name": "f", "parameters": {"properties": ["a"]}},
        {"function": {"name": ""}},
        "f",
    ]
    for bad in [[one] for one in bad_ones]:
        with pytest.raises(InputError, match=r"tools\[0\]"):
            schemas(bad)


# ---- episodes and rewards ----


def test_calls_then_an_answer_score_one(world: World):
    episode, seen = play(world, spec(SEND, PLOT), write(SEND), "<think>\nNow the plot.\n</think>\n\n" + write(PLOT))
    path = "plots/2023-10-01_2023-10-31_user_engaged_bar.png"
    assert seen.messages == [{"role": "tool", "name": PLOT[0], "content": path}]
    assert not seen.done
    assert episode.step("Done.<|im_end|>").reason == "answered"
    assert (episode.verdict().reward, episode.verdict().status) == (1.0, "ok")
    with pytest.raises(ValueError, match="over"):
        episode.step("More.")


def test_several_calls_in_one_turn_are_answered_in_order(world: World):
    _, seen = play(world, spec(), write(("company_directory_find_email_address", {"name": "ada"}), SEND))
    assert [m["name"] for m in seen.messages] == ["company_directory_find_email_address", SEND[0]]
    assert json.loads(seen.messages[0]["content"]) == ["ada.quill@office.example"]


@pytest.mark.parametrize(
    "turns",
    [
        ["Done."],
        [write(SEND, SEND), "Done."],
        [write(PLOT), "Done."],
        [write((SEND[0], {**SEND[1], "body": "Elsewhere"})), "Done."],
    ],
)
def test_too_little_too_much_or_something_else_is_wrong(turns: list, world: World):
    episode, _ = play(world, spec(SEND), *turns)
    verdict = episode.verdict()
    assert (verdict.reward, verdict.status) == (0.0, "wrong")
    assert "emails" in verdict.detail


def test_another_way_to_the_same_state_scores_one(world: World):
    mail = world.tables["emails"][0]["email_id"]
    by_reply = write(("email_reply_email", {"email_id": mail, "body": "OK"}), PLOT)
    by_hand = spec(
        PLOT,
        (
            "email_send_email",
            {
                "recipient": world.tables["emails"][0]["sender/recipient"].upper(),
                "body": "ok",
                "subject": f"re: {world.tables['emails'][0]['subject']}",
            },
        ),
    )
    assert play(world, by_hand, by_reply, "Done.")[0].verdict().reward == 1.0


def test_a_failing_call_goes_back_to_the_model_and_can_be_put_right(world: World):
    wrong = [
        (("email_fly", {}), "no tool"),
        ((SEND[0], {**SEND[1], "cc": "x"}), "cc"),
        ((SEND[0], {"body": "x"}), "missing"),
        ((SEND[0], {**SEND[1], "body": 3}), "string"),
        ((SEND[0], {**SEND[1], "recipient": "bo"}), "address"),
        (("email_search_emails", {"page": "1"}), "integer"),
    ]
    episode, seen = play(world, spec(SEND), write(*(call for call, _ in wrong)))
    for message, (_, part) in zip(seen.messages, wrong, strict=True):
        assert message["content"].startswith("Error: ")
        assert part in message["content"]
    assert not seen.done
    episode.step(write(SEND))
    episode.step("Sorry, now it is done.")
    assert episode.verdict().reward == 1.0
    assert "7 calls, 6 failed" in episode.verdict().detail


def test_a_tool_that_the_row_does_not_offer_is_unknown(world: World):
    row = spec(SEND)
    row["tools"] = [t for t in TOOLS if t["name"] != SEND[0]]
    episode, seen = play(world, row, write(SEND))
    assert "no tool" in seen.messages[0]["content"]
    assert workplace.differences(episode.state, State(world)) == []


def test_the_last_turn_runs_and_ends_the_episode(world: World):
    look = write(("company_directory_find_email_address", {"name": "ada"}))
    episode, seen = play(world, spec(SEND), *[look] * 5, write(SEND))
    assert (episode.turns, seen.reason, seen.messages) == (6, "max_turns", None)
    assert episode.verdict().reward == 1.0
    assert play(world, spec(SEND, max_turns=1), write(SEND))[1].reason == "max_turns"


def test_an_episode_cut_short_scores_zero_but_for_the_reference_preset(world: World):
    assert play(world, spec(SEND), write(SEND))[0].verdict().status == "unparsed"
    assert play(world, spec(SEND, preset="reference"), write(SEND))[0].verdict().reward == 1.0


def test_the_think_gate_is_an_option(world: World):
    row = spec(SEND, think_gate=True)
    episode, seen = play(world, row, write(SEND))
    assert (seen.reason, episode.verdict().status) == ("unparsed", "unparsed")
    assert workplace.differences(episode.state, State(world)) == []
    assert play(world, row, f"Hm.</think>{write(SEND)}", "</think>Done.")[0].verdict().reward == 1.0


def test_very_long_answers_are_withheld_but_the_calls_run(world: World):
    everything = ("email_search_emails", {"page_size": 10**6})
    length = len(json.dumps(workplace.call(State(world), *everything), ensure_ascii=False))
    n = MAX_ANSWER_CHARS // length + 2
    assert n <= MAX_CALLS_PER_TURN
    episode, seen = play(world, spec(SEND), write(*[everything] * (n - 1), SEND))
    assert sum(len(m["content"]) for m in seen.messages) < MAX_ANSWER_CHARS + 100 * n
    assert "too long" in seen.messages[-2]["content"]
    episode.step("Done.")
    assert episode.verdict().reward == 1.0


def test_a_defect_of_a_tool_costs_one_sample(world: World, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(workplace, "call", broken)
    episode, seen = play(world, spec(), write(SEND))
    assert seen.reason == "error"
    assert (episode.verdict().reward, episode.verdict().status) == (0.0, "error")


# ---- ground truth ----


def test_ground_truth_comes_in_three_forms(world: World):
    as_objects = [{"name": SEND[0], "arguments": SEND[1]}]
    forms = [spec(SEND)["ground_truth"], as_objects, json.dumps(as_objects)]
    assert all(ground_truth({"ground_truth": form}) == [ToolCall(*SEND)] for form in forms)
    assert workplace.differences(replay([ToolCall(*SEND)], world), replay(ground_truth(spec(SEND)), world)) == []
    for bad in (None, "no", 3, [{"arguments": "{}"}], [{"name": "f", "arguments": "{"}], ["f"]):
        with pytest.raises(InputError, match="ground_truth"):
            Episode({"tools": TOOLS, "ground_truth": bad}, world)


def test_replay_equals_playing_the_same_calls(world: World):
    event = world.tables["calendar"][1]["event_id"]
    calls = [
        SEND,
        PLOT,
        ("calendar_update_event", {"event_id": event, "field": "duration", "new_value": "15"}),
        ("calendar_delete_event", {"event_id": "99999999"}),  # fails in both
        ("calendar_delete_event", {"event_id": world.tables["calendar"][2]["event_id"]}),
    ]
    episode, _ = play(world, spec(*calls), write(*calls), "Done.")
    assert workplace.differences(episode.state, replay(ground_truth(spec(*calls)), world)) == []
    assert episode.verdict().reward == 1.0


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (spec(("calendar_delete_event", {"event_id": "99999999"})), r"ground_truth\[0\] calendar_delete_event fails"),
        (spec(SEND, ("fly", {})), r"not among the row's tools"),
        (spec((SEND[0], {**SEND[1], "cc": "x"})), r"cc"),
        ({"tools": [{"name": "fly"}], "ground_truth": []}, "fly is not one of the 27"),
        ({"tools": [], "ground_truth": [{"name": SEND[0], "arguments": SEND[1]}]}, "tools is empty"),
        ({"tools": TOOLS, "ground_truth": "no"}, "not JSON"),
        (spec(("company_directory_find_email_address", {"name": "ada"})), "changes nothing"),
    ],
)
def test_lint_names_what_is_wrong_with_a_row(row: dict, part: str, world: World):
    assert any(re.search(part, problem) for problem in lint(row, world))


def test_lint_is_silent_about_a_good_row(world: World):
    assert lint(spec(SEND, PLOT), world) == []


# ---- finished transcripts ----


def chatml(*turns: str) -> str:
    """A response as the engine's tokens read: the environment's part between two turns, no header before the first."""
    env = "<|im_end|>\n<|im_start|>user\n<tool_response>\n<tool_call>{}</tool_call>\n</tool_response><|im_end|>\n"
    return (env + "<|im_start|>assistant\n").join(turns) + "<|im_end|>"


def test_verify_reads_turns_messages_and_chatml(office_folder: Path, world: World):
    turns = [write(SEND), write(PLOT), "Done."]
    messages = [{"role": "user", "content": write(SEND)}]
    for turn in turns:
        messages += [{"role": "assistant", "content": turn}, {"role": "tool", "content": write(SEND)}]
    prompt = "<|im_start|>user\nPlease.<|im_end|>\n<|im_start|>assistant\n"
    row = spec(SEND, PLOT, tables_dir=str(office_folder))
    for transcript in (turns, messages, chatml(*turns), prompt + chatml(*turns)):
        assert assistant_turns(transcript) == turns
        assert verify(transcript, row).status == "ok"
    assert verify(turns[:2], row).status == "unparsed"
    assert verify(chatml(*turns).removesuffix("<|im_end|>"), row).status == "unparsed"  # cut in the last turn
    assert verify("Done.", row, world).status == "wrong"
    assert verify("", row).status == "wrong"
    with pytest.raises(InputError, match="tables_dir"):
        verify(turns, spec(SEND))


# ---- hostile input, memory ----


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.builds(lambda a, b: f"<tool_call>{a}</tool_call>{b}", st.text(max_size=60), st.text(max_size=20)),
        st.builds(
            lambda call: f"<tool_call>{json.dumps(call)}</tool_call>",
            st.dictionaries(
                st.sampled_from(["name", "arguments", "parameters"]),
                st.recursive(
                    st.one_of(
                        st.none(),
                        st.booleans(),
                        st.integers(),
                        st.floats(),
                        st.text(max_size=9),
                        st.sampled_from(sorted(workplace.TOOLS)),
                    ),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3),
                        st.dictionaries(
                            st.sampled_from(["query", "page", "page_size", "name", "email_id", "field", "x"]),
                            inner,
                            max_size=4,
                        ),
                    ),
                    max_leaves=6,
                ),
                max_size=3,
            ),
        ),
    )
)
def test_no_text_crashes_an_episode(text: str, world: World):
    episode = Episode(spec(), world)
    seen = episode.step(text)
    assert seen.reason != "error"
    for message in seen.messages or ():
        message["content"].encode()
    assert episode.verdict().status in ("ok", "wrong", "unparsed")


def test_a_thousand_episodes_leave_nothing_behind(world: World):
    task = world.tables["tasks"][0]["task_id"]
    turn = write(SEND, PLOT, ("project_management_delete_task", {"task_id": task}))

    def many(n: int) -> int:
        for _ in range(n):
            assert play(world, spec(SEND, PLOT), turn, "Done.")[0].verdict().status == "wrong"
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = many(50)
        assert many(1000) - before < 50_000  # bytes; one copied table alone would be 1000 x 10 kB
    finally:
        tracemalloc.stop()


def test_a_thousand_open_episodes_share_the_tables(world: World):
    row = spec()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        episodes = [Episode(row, world) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[0] - before < 2_000_000  # bytes: 2 kB each; the tables are 60 kB
    finally:
        tracemalloc.stop()
    assert all(e.state.tables["emails"] is world.tables["emails"] for e in episodes)
