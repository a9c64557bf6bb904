"""The blends of the paper as plain rows: schemas recognised, placeholders restored from copies of the source datasets.

    RL   {"dataset", "responses_create_params": {"input", "tools"}, "expected_answer", "options", ...}
         -> {"id", "domain", "prompt": messages, and one of: answer | answer + options | tests | constraints |
             tools + ground_truth}
    SFT  {"messages": [{"role", "content", "reasoning_content", "tool_calls": JSON text}], "tools": JSON text}
         -> {"messages", "tools"} as chat templates take them

Seven sub-corpora of the RL blend are told apart by `dataset`; structured outputs have no verifier and are dropped, as
in arXiv 2602.12566. Its math rows hold no text: {"_hf_placeholder": {"row", "question_template"}} points into
DAPO-Math-17k or Skywork-OR1. An SFT coding row whose user message is "-" points into TACO, APPS, CodeContests or
Codeforces by (dataset, split, index). A placeholder that cannot be restored is an InputError, never a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from m2rl.data import hub
from m2rl.data.rows import files, read_records
from m2rl.types import InputError

DATASETS = {  # part of `dataset` or of `agent_ref.name` -> domain, None = dropped
    "dapo17k": "math",
    "skywork": "math",
    "math_with_judge": "math",
    "comp_coding": "code",
    "code_gen": "code",
    "stem_mcqa": "science",
    "mcqa": "science",
    "instruction_following": "if",
    "workbench": "agent",
    "workplace_assistant": "agent",
    "structured_outputs": None,
}
HUB = {  # source -> (dataset id, config, split)
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", "default", "train"),
    "skywork": ("Skywork/Skywork-OR1-RL-Data", "default", "math"),
}
SFT_SOURCES = ("taco", "apps", "code_contests", "codeforces")  # parts of an SFT row's `dataset`
_DAPO_HEAD, _DAPO_TAIL = (
    "Solve the following math problem step by step.",
    "\n\nRemember to put your answer on its own line",
)

NESTED = (  # keys that some conversions hold as JSON text
    "responses_create_params",
    "agent_ref",
    "options",
    "template_metadata",
    "instruction_id_list",
    "kwargs",
    "verifier_metadata",
    "ground_truth",
    "_hf_placeholder",
)
Key = tuple[str, int]  # source ("dapo", "taco/train" ...), row


class Sources:
    """The rows that placeholders point at. paths: source -> files, globs, or "hub"."""

    def __init__(self, paths: Mapping[str, str]):
        known = {*HUB, *(s for s in paths if s.split("/")[0] in SFT_SOURCES)}
        for name in paths:
            if name not in known:
                raise InputError(
                    f"--source {name}: unknown source (there are: {', '.join(HUB)}, and <name>/<split> for "
                    f"{', '.join(SFT_SOURCES)})"
                )
        self.paths, self.rows = dict(paths), dict[Key, dict[str, Any]]()

    def load(self, wanted: set[Key]) -> None:
        """Read the wanted rows, each source once from its start: what is not wanted is never held."""
        for name in sorted({source for source, _ in wanted} & self.paths.keys()):
            rows = sorted(row for source, row in wanted if source == name)
            found = dict(_pick(self._files(name), rows))
            if missing := [row for row in rows if row not in found]:
                raise InputError(
                    f"--source {name}={self.paths[name]}: has no row {missing[0]}, which the blend asks for "
                    f"({len(missing)} such rows); is it the right file, complete and in its original order?"
                )
            for row, record in found.items():
                self.rows[name, row] = record

    def _files(self, name: str) -> list[Path]:
        if self.paths[name] != "hub":
            return files([self.paths[name]])
        if name not in HUB:
            raise InputError(f"--source {name}=hub: give the files of this source")
        return hub.dataset_files(*HUB[name])

    def get(self, key: Key, where: str) -> dict[str, Any]:
        if key not in self.rows:
            raise InputError(
                f"{where}: a placeholder for row {key[1]} of {key[0]}; restore it first: python -m m2rl.data "
                f"convert FILE --out DIR --source {key[0]}=FILE"
            )
        return self.rows[key]


def _pick(paths: Sequence[Path], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, record) of these rows (sorted), counted over all files."""
    wanted, start = set(rows), 0
    for path in paths:
        if path.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=8192):
                here = [row for row in range(start, start + batch.num_rows) if row in wanted]
                if here:
                    yield from zip(here, batch.take([row - start for row in here]).to_pylist())
                start += batch.num_rows
        else:
            for _, record in read_records(path):
                if start in wanted:
                    yield start, record
                start += 1


def is_rl(record: Mapping[str, Any]) -> bool:
    return "responses_create_params" in record


def placeholder(record: Mapping[str, Any], where: str) -> Key | None:
    """Where the text of a row has to come from; None if the row is whole."""
    if is_rl(record):
        mark = _decoded(record.get("_hf_placeholder"), "_hf_placeholder", where)
        if not mark or record.get("expected_answer"):
            return None
        if not isinstance(mark, Mapping) or not isinstance(mark.get("row"), int):
            raise InputError(f"{where}: key _hf_placeholder must be an object with a row number, got {mark!r}"[:300])
        return ("dapo" if "dapo" in str(record.get("dataset")) else "skywork"), mark["row"]
    messages = record.get("messages")
    if (
        isinstance(messages, list)
        and "index" in record
        and any(isinstance(m, Mapping) and m.get("role") == "user" and m.get("content") == "-" for m in messages)
    ):
        name = str(record.get("dataset")).lower()
        source = next((s for s in SFT_SOURCES if s in name), name)
        try:
            return f"{source}/{record.get('split')}", int(record["index"])
        except (ValueError, TypeError):
            raise InputError(f"{where}: key index must be a row number, got {record['index']!r}") from None
    return None


def plain(record: Mapping[str, Any], where: str, sources: Sources | None = None) -> Mapping[str, Any] | str:
    """The row in the plain schema, or the reason why it has to be left out; a plain row as it is."""
    try:
        if is_rl(record):
            record = {k: _decoded(v, k, where) if k in NESTED else v for k, v in record.items()}
            return _rl(record, where, sources or Sources({}))
        if isinstance(record.get("messages"), list):
            return _sft(record, where, sources or Sources({}))
    except (AttributeError, KeyError, TypeError) as error:  # some value is not of the kind that its schema says
        raise InputError(f"{where}: not a row of the blend: {type(error).__name__}: {error}") from None
    return record


def domain_of(record: Mapping[str, Any], where: str) -> str | None:
    """The domain of an RL row, None for a category without a verifier."""
    names = (str(record.get("dataset") or ""), str((record.get("agent_ref") or {}).get("name") or ""))
    for name in names:
        for part, domain in DATASETS.items():
            if part in name:
                return domain
    raise InputError(
        f"{where}: dataset {names[0]!r} (agent {names[1]!r}) is none of the blend's: {', '.join(DATASETS)}"
    )


def _rl(record: Mapping[str, Any], where: str, sources: Sources) -> dict[str, Any] | str:
    domain = domain_of(record, where)
    if domain is None:
        return "structured_outputs (no verifier)"
    parameters = record["responses_create_params"] or {}
    if not isinstance(parameters.get("input") or [], list):
        raise InputError(f"{where}: responses_create_params.input must be a list of {{role, content}} messages")
    messages = [
        {"role": "system" if m["role"] == "developer" else m["role"], "content": _text(m.get("content"))}
        for m in parameters.get("input") or ()
    ]
    out: dict[str, Any] = {"domain": domain}
    for key in ("id", "uuid", "hash_id"):
        if record.get(key) is not None:
            out["id"] = str(record[key])
            break
    if domain == "math":
        answer: Any = record.get("expected_answer")
        if source := placeholder(record, where):
            template = record["_hf_placeholder"].get("question_template")
            question, answer = _restore(sources.get(source, where), template, source, where)
            messages = [m for m in messages if m["role"] == "system"] + [{"role": "user", "content": question}]
            out["id"] = f"{source[0]}-{source[1]}"
        answer = _first(answer)
        if not answer:
            return "math: empty answer"
        out["answer"] = answer
    elif domain == "code":
        tests = (record.get("verifier_metadata") or {}).get("unit_tests") or {}
        out["tests"] = {k: tests[k] for k in ("inputs", "outputs", "fn_name") if tests.get(k) is not None}
    elif domain == "science":
        options = record.get("options") or ()
        options = [options] if isinstance(options, Mapping) else options
        options = {k: v for option in options for k, v in option.items() if v is not None}
        out |= {"answer": record.get("expected_answer"), "options": options}
        if pattern := (record.get("template_metadata") or {}).get("output_regex"):
            out["output_regex"] = pattern
    elif domain == "if":
        ids = record.get("instruction_id_list") or []
        kwargs = record.get("kwargs") or [None] * len(ids)
        if len(kwargs) != len(ids):
            raise InputError(f"{where}: kwargs must be as long as instruction_id_list, {len(kwargs)} and {len(ids)}")
        out["constraints"] = [
            {"id": i, "kwargs": {k: v for k, v in (_decoded(kw, "kwargs", where) or {}).items() if v is not None}}
            for i, kw in zip(ids, kwargs)
        ]
        messages = messages or [{"role": "user", "content": str(record.get("prompt") or "")}]
    else:
        out |= {
            "tools": _without_nulls(_decoded(parameters.get("tools"), "tools", where)),
            "ground_truth": record.get("ground_truth"),
        }
        out |= {k: record[k] for k in ("category",) if record.get(k) is not None}
    if not any(m["content"] for m in messages):
        raise InputError(f"{where}: responses_create_params.input holds no text")
    if record.get("pass_rate") is not None:
        out["pass_rate"] = record["pass_rate"]
    return out | {"prompt": messages}


def _restore(row: Mapping[str, Any], template: Any, key: Key, where: str) -> tuple[str, Any]:
    """(question in the blend's template, answer) of a source row."""
    try:
        text, answer = row["prompt"][0]["content"], row["reward_model"]["ground_truth"]
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"{where}: row {key[1]} of {key[0]} has no prompt[0].content and reward_model.ground_truth; is it "
            "the right file?"
        ) from None
    template = template or {}
    if key[0] == "dapo":
        if not text.startswith(_DAPO_HEAD) or _DAPO_TAIL not in text:
            raise InputError(f"{where}: row {key[1]} of dapo does not carry DAPO's own prompt; is it the right file?")
        question = text.partition("\n\n")[2].rpartition(_DAPO_TAIL)[0].strip()
        return (template.get("prefix") or "") + question + (template.get("suffix") or ""), answer
    frame = template if isinstance(template, str) else template.get("template") or "{question}"
    if "{question}" not in frame:
        raise InputError(f"{where}: question_template holds no {{question}}")
    return frame.replace("{question}", text), answer


def _first(answer: Any) -> str:
    """The first answer of a JSON list, as text; other answers as they are; "" for none."""
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        try:
            answer = json.loads(answer)
        except json.JSONDecodeError:
            return answer.strip()  # an interval such as [0, 1)
        if isinstance(answer, list) and not all(isinstance(a, str) for a in answer):
            return json.dumps(answer)  # an answer that is a list, e.g. [0, 1]
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    return "" if answer is None else str(answer).strip()


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts of the Responses API
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all the others, as nulls; a chat template would print them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _decoded(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: key {key} is not JSON: {error.msg}") from None


def _sft(record: Mapping[str, Any], where: str, sources: Sources) -> dict[str, Any]:
    messages = []
    for m in record["messages"]:
        if not isinstance(m, Mapping):
            raise InputError(f"{where}: messages must be a list of {{role, content}} messages")
        clean = {k: m[k] for k in ("role", "content", "reasoning_content", "tool_calls") if m.get(k)}
        if isinstance(clean.get("tool_calls"), str):
            clean["tool_calls"] = _decoded(clean["tool_calls"], "tool_calls", where)
        if len(clean) > 1:  # a message of nothing but its role says nothing
            messages.append({"content": "", **clean})
    if key := placeholder(record, where):
        row = sources.get(key, where)
        for m in messages:
            if m["role"] == "user" and m["content"] == "-":
                m["content"] = _problem(row, key, where)
    out = {k: v for k, v in record.items() if v is not None and k not in ("messages", "tools")} | {"messages": messages}
    if tools := _decoded(record.get("tools") or None, "tools", where):
        out["tools"] = tools
    return out


def _problem(row: Mapping[str, Any], key: Key, where: str) -> str:
    """The statement of a coding problem in its source's own fields."""
    text = row.get("question") or row.get("description")
    if not text:
        raise InputError(
            f"{where}: row {key[1]} of {key[0]} has neither question nor description; is it the right file?"
        )
    if not key[0].startswith("codeforces"):
        return str(text)
    parts = [str(text)]
    for heading, field in (
        ("Input", "input_format"),
        ("Output", "output_format"),
        ("Examples", "examples"),
        ("Note", "note"),
    ):
        if value := row.get(field):
            if isinstance(value, list):
                value = "\n\n".join(f"Input\n{e.get('input', '')}\nOutput\n{e.get('output', '')}" for e in value)
            parts.append(f"{heading}\n\n{value}")
    return "\n\n".join(parts)
