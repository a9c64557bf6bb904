"""Agent: a conversation with an office full of tools; reward 1 iff the office ends up as the reference calls leave it.

    episode = Episode(spec, world)
    while not (seen := episode.step(assistant_text)).done:    # seen.messages: the tools' answers, for the chat template
        ...
    episode.verdict()                                         # Verdict(reward, status, detail)

    reward = 1 if differences(state, replay(spec["ground_truth"])) == [] else 0

`spec` holds `tools` (OpenAI function schemas, flat or nested under "function"), `ground_truth` (a list of
{"name", "arguments"}, arguments a JSON text or an object), optionally `tables_dir`, `max_turns`, `think_gate` (a turn
without `</think>` is unparsed) and `preset`. A turn is what the assistant wrote, in Qwen's format:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them; what precedes the last `</think>` is not
read. A call that fails (unknown tool or argument, wrong type or value) is answered with its error and the episode goes
on; a call that is not JSON ends it with status `unparsed`. So does a cut before the last turn is written, unless preset
is "reference", which scores the state reached. No torch, no HTTP, no session to leak: state dies with its Episode.

Source: arXiv 2602.12566 (v3), the workplace-assistant environment it trains in.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m2rl.domains import workplace
from m2rl.domains.workplace import State, ToolError, World, load_world
from m2rl.types import InputError, Verdict

MAX_TURNS = 6
MAX_CALLS_PER_TURN = 64
MAX_ANSWER_CHARS = 200_000
"""Of all tools in one turn: more than the 32k tokens of a whole episode. What exceeds it is replaced by an error."""

Reason = Literal["", "answered", "max_turns", "unparsed", "error"]


class MalformedCall(ValueError):
    """A tool call that cannot be read."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment says to one turn."""

    messages: list[dict[str, str]] | None  # one {"role": "tool", "name", "content"} per call; None once done
    done: bool
    reason: Reason  # why it is done: answered = a turn without a call; max_turns; unparsed; error; "" = not done


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The calls of one assistant turn, in order; empty for a plain answer. Raises MalformedCall.

    A call is one JSON object between `<tool_call>` and `</tool_call>` with a `name` and `arguments` (or `parameters`):
    an object, the JSON text of one, or nothing. Line breaks inside JSON strings are let pass.
    """
    text = text.rpartition("</think>")[2]
    decoder = json.JSONDecoder(strict=False)
    calls: list[ToolCall] = []
    at = 0
    while (start := text.find("<tool_call>", at)) >= 0:
        start = _skip_space(text, start + len("<tool_call>"))
        try:
            call, end = decoder.raw_decode(text, start)
            json.dumps(call, ensure_ascii=False).encode()  # half a surrogate pair cannot be tokenised
            calls.append(_tool_call(call, decoder))
        except (ValueError, RecursionError) as error:
            raise MalformedCall(f"call {len(calls) + 1} cannot be read: {error}"[:200]) from None
        at = _skip_space(text, end)
        if not text.startswith("</tool_call>", at):
            raise MalformedCall(f"call {len(calls)} is not closed by </tool_call>")
        if len(calls) > MAX_CALLS_PER_TURN:
            raise MalformedCall(f"more than {MAX_CALLS_PER_TURN} calls in one turn")
    return calls


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _tool_call(call: Any, decoder: json.JSONDecoder) -> ToolCall:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise MalformedCall("not an object with a name")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = decoder.decode(arguments)
        json.dumps(arguments, ensure_ascii=False).encode()
    if not isinstance(arguments or {}, dict):
        raise MalformedCall("arguments are not an object")
    return ToolCall(call["name"], arguments or {})


def schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Tool name -> JSON schema of its arguments, from the row's OpenAI schemas; shared by rows with the same tools, so
    read only. Raises InputError if malformed."""
    return _schemas(json.dumps(list(tools)))


@functools.lru_cache(maxsize=64)
def _schemas(tools: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(json.loads(tools)):
        function = tool.get("function") or tool if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise InputError(f"tools[{i}] has no function name")
        schema = function.get("parameters") or {}
        properties = (schema.get("properties") or {}) if isinstance(schema, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(r or {}, dict) for r in properties.values()):
            raise InputError(f"tools[{i}] {name}: parameters is not a JSON schema with properties")
        # Arrow gives every schema the properties of all the others, as nulls
        found[name] = {**schema, "properties": {key: rule for key, rule in properties.items() if rule is not None}}
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int, float),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (),
}


def argument_error(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The first rule of a JSON schema (properties, required, type, enum) that these arguments break, or ""."""
    properties = schema.get("properties") or {}
    given = {key: value for key, value in arguments.items() if value is not None}
    if properties or schema.get("additionalProperties") is False:
        for key in given:
            if key not in properties:
                return f"unexpected argument {key[:100]!r}; it takes {', '.join(properties) or 'none'}"
    for key in schema.get("required") or ():
        if key not in given:
            return f"missing argument {key!r}"
    for key, value in given.items():
        rule = properties.get(key) or {}
        kinds = [rule["type"]] if isinstance(rule.get("type"), str) else rule.get("type") or []
        if kinds and not any(_is_of(value, kind) for kind in kinds):
            return f"{key} must be of type {' or '.join(kinds)}"
        if rule.get("enum") and value not in rule["enum"]:
            return f"{key} must be one of: {', '.join(map(str, rule['enum']))}"
    return ""


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean" or kind not in _TYPES
    return isinstance(value, _TYPES.get(kind, (object,)))


def ground_truth(spec: Mapping[str, Any]) -> list[ToolCall]:
    """The reference calls of a row. Raises InputError naming the call that cannot be read."""
    calls = spec.get("ground_truth")
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError as error:
            raise InputError(f"ground_truth is not JSON: {error}") from None
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError(f"ground_truth must be a list of calls, got {calls!r}"[:200])
    decoder, read = json.JSONDecoder(strict=False), []
    for i, call in enumerate(calls):
        try:
            read.append(_tool_call(dict(call) if isinstance(call, Mapping) else call, decoder))
        except (ValueError, RecursionError) as error:
            raise InputError(f"ground_truth[{i}] cannot be read: {error}") from None
    return read


def replay(calls: Sequence[ToolCall], world: World) -> State:
    """The state that these calls leave in a fresh world; a call that fails changes nothing."""
    state = State(world)
    for call in calls:
        try:
            workplace.call(state, call.name, call.arguments)
        except ToolError:
            continue
    return state


def lint(spec: Mapping[str, Any], world: World) -> list[str]:
    """What is wrong with a row, for the loader: unreadable or failing reference calls, tools that do not exist here, a
    reference that changes nothing (so that doing nothing scores 1). Empty for a good row."""
    try:
        calls, known = ground_truth(spec), schemas(spec.get("tools") or ())
    except InputError as error:
        return [str(error)]
    problems = [] if known else ["tools is empty"]
    problems += [
        f"tool {name} is not one of the {len(workplace.TOOLS)} of the workplace"
        for name in known
        if name not in workplace.TOOLS
    ]
    state = State(world)
    for i, call in enumerate(calls):
        try:
            workplace.call(state, call.name, call.arguments)
        except ToolError as error:
            problems.append(f"ground_truth[{i}] {call.name} fails: {error}")
        if call.name not in known:
            problems.append(f"ground_truth[{i}] calls {call.name}, which is not among the row's tools")
        elif error_text := argument_error(call.arguments, known[call.name]):
            problems.append(f"ground_truth[{i}] {call.name}: {error_text}")
    if not workplace.differences(state, State(world)):
        problems.append("ground_truth changes nothing: doing nothing scores 1")
    return problems


class Episode:
    """One conversation about one row. Not thread-safe; costs five references until a tool writes."""

    def __init__(self, spec: Mapping[str, Any], world: World, max_turns: int = MAX_TURNS) -> None:
        """max_turns: assistant turns; the last one's calls still run. `spec["max_turns"]` goes first.

        Raises InputError for a row whose tools or ground truth cannot be read.
        """
        self.state = State(world)
        self.turns = 0
        self.reason: Reason = ""
        self._world = world
        self._schemas = schemas(spec.get("tools") or ())
        self._ground_truth = ground_truth(spec)
        self._max_turns = int(spec.get("max_turns") or max_turns)
        self._think_gate = bool(spec.get("think_gate"))
        self._score_unfinished = spec.get("preset") == "reference"
        self._calls = 0
        self._failed_calls = 0
        self._detail = ""

    def step(self, text: str) -> Observation:
        """Run the calls of one assistant turn (with or without its end-of-turn marker)."""
        if self.reason:
            raise ValueError(f"the episode is over ({self.reason})")
        self.turns += 1
        if self._think_gate and "</think>" not in text:
            return self._finish("unparsed", "no </think>")
        try:
            calls = parse_tool_calls(text)
        except MalformedCall as error:
            return self._finish("unparsed", str(error))
        if not calls:
            return self._finish("answered")
        messages, budget = [], MAX_ANSWER_CHARS
        for call in calls:
            try:
                content = self._run(call)
            except Exception as error:  # a defect of ours: this sample is lost, the run is not
                return self._finish("error", f"{call.name}: {type(error).__name__}: {error}"[:200])
            budget -= len(content)
            if budget < 0:
                content = "Error: the answers of this turn are too long to show; ask for less."
            messages.append({"role": "tool", "name": call.name, "content": content})
        if self.turns >= self._max_turns:
            return self._finish("max_turns")
        return Observation(messages, False, "")

    def _run(self, call: ToolCall) -> str:
        self._calls += 1
        try:
            if call.name not in self._schemas:
                raise ToolError(f"Error: there is no tool named {call.name[:100]!r}.")
            if problem := argument_error(call.arguments, self._schemas[call.name]):
                raise ToolError(f"Error: {call.name}: {problem}.")
            value = workplace.call(self.state, call.name, call.arguments)
        except ToolError as error:
            self._failed_calls += 1
            return str(error)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def _finish(self, reason: Reason, detail: str = "") -> Observation:
        self.reason, self._detail = reason, detail
        return Observation(None, True, reason)

    def verdict(self) -> Verdict:
        """Score the episode; one that is not over was cut short."""
        if self.reason == "unparsed":
            return Verdict(0.0, "unparsed", self._detail)
        if self.reason == "error":
            return Verdict(0.0, "error", self._detail)
        if not self.reason and not self._score_unfinished:
            return Verdict(0.0, "unparsed", f"cut off in turn {self.turns + 1}")
        wrong = workplace.differences(self.state, replay(self._ground_truth, self._world))
        done = f"{self.turns} turns, {self._calls} calls, {self._failed_calls} failed"
        return Verdict(0.0, "wrong", f"differs: {', '.join(wrong)}; {done}") if wrong else Verdict(1.0, "ok", done)


def check_spec(spec: Mapping[str, Any]) -> None:
    """InputError unless the row's tools, reference calls and tables can be read."""
    if not schemas(spec.get("tools") or ()):
        raise InputError("agent needs key tools, a list of function schemas")
    ground_truth(spec)
    _world(spec)


def episode(spec: Mapping[str, Any]) -> Episode:
    """A fresh conversation about a row whose `tables_dir` names the world."""
    return Episode(spec, _world(spec))


def _world(spec: Mapping[str, Any]) -> World:
    if not spec.get("tables_dir"):
        raise InputError("agent needs the workplace's tables: set tables_dir, their folder, in [[domain]] agent")
    return load_world(spec["tables_dir"])


_END = re.compile(r"<\|(?:im_end|endoftext)\|>")


def assistant_turns(transcript: str | Sequence[str] | Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of the assistant's turns.

    transcript: the turns themselves; chat messages; or one text in ChatML, special tokens included, from the start of
    the prompt or of the first response on; there, a last turn without its end is left out.
    """
    if isinstance(transcript, str):
        parts = transcript.split("<|im_start|>assistant\n")
        if parts[0].lstrip().startswith("<|im_start|>"):
            del parts[0]  # the prompt
        if parts and _END.search(transcript) and not _END.search(parts[-1]):
            del parts[-1]  # cut before its end
        return [_END.split(part, maxsplit=1)[0] for part in parts]
    return [
        turn if isinstance(turn, str) else str(turn.get("content") or "")
        for turn in transcript
        if isinstance(turn, str) or turn.get("role") == "assistant"
    ]


def verify(
    response: str | Sequence[str] | Sequence[Mapping[str, Any]], spec: Mapping[str, Any], world: World | None = None
) -> Verdict:
    """Score a finished transcript by running its calls again: what `Episode.verdict` said, from the text alone.

    The world comes from `spec["tables_dir"]` unless given; it is loaded once per process.
    """
    if world is None:
        world = _world(spec)
    episode = Episode(spec, world)
    for text in assistant_turns(response):
        if episode.step(text).done:
            break
    return episode.verdict()
