"""The blends become plain rows; placeholders are restored or refused; what is dropped is counted."""

import json

import blend_rows
import office
import pyarrow
import pyarrow.parquet
import pytest

from m2rl.data import blend
from m2rl.data.__main__ import main
from m2rl.data.rows import normalise
from m2rl.domains import check_spec
from m2rl.types import InputError


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rl_blend(tmp_path):
    rows = [
        blend_rows.dapo_row(3),
        blend_rows.skywork_row(2),
        blend_rows.code_row(7),
        blend_rows.science_row(),
        blend_rows.if_row(),
        blend_rows.agent_row(),
        blend_rows.dropped_row(),
        blend_rows.skywork_row(0),
        blend_rows.rl("dapo17k", "What is 1 + 1?", expected_answer="2"),
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(blend_rows.dapo_source(9)), tmp_path / "dapo.parquet", row_group_size=2
    )
    write(tmp_path / "skywork.jsonl", blend_rows.skywork_source(5))
    return write(tmp_path / "train.jsonl", rows), [
        f"--source=dapo={tmp_path}/dapo.parquet",
        f"--source=skywork={tmp_path}/skywork.jsonl",
    ]


def test_convert_writes_one_plain_file_per_domain(rl_blend, tmp_path, capsys):
    path, sources = rl_blend
    assert main(["convert", path, "--out", str(tmp_path / "out"), *sources]) == 0
    out = capsys.readouterr().out
    rows = {name: read(tmp_path / "out" / f"{name}.jsonl") for name in ("math", "code", "science", "if", "agent")}
    assert [r["answer"] for r in rows["math"]] == ["6", "4", "2"]
    assert [r["prompt"][0]["content"] for r in rows["math"]] == [
        "What is 3 + 3?\n\nBox the answer.",
        "Think, then box.\n\nFind 2 squared.",
        "What is 1 + 1?",
    ]
    assert rows["code"][0]["tests"] == {"inputs": ["1\n", "2\n"], "outputs": ["7\n", "14\n"]}
    science = rows["science"][0]
    assert science["options"] == {"A": "helium", "B": "neon 0", "C": "argon"}
    assert science["output_regex"] == r"Answer:\s*([A-C])"
    assert rows["if"][0]["constraints"] == [
        {"id": "punctuation:no_comma", "kwargs": {}},
        {"id": "length_constraints:number_words", "kwargs": {"num_words": 9, "relation": "at least"}},
    ]
    assert rows["agent"][0]["tools"][0]["name"] == "email_send_email"
    assert rows["agent"][0]["ground_truth"][0]["arguments"] == '{"recipient": "a@example.com"}'
    counts = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert counts["dropped"] == {"structured_outputs (no verifier)": 1, "math: empty answer": 1}
    assert counts["written"] == {"math": 3, "code": 1, "science": 1, "if": 1, "agent": 1}
    assert "dropped  1  structured_outputs" in out and "math.jsonl  3 rows" in out


def test_every_converted_row_is_one_its_verifier_accepts(rl_blend, tmp_path):
    path, sources = rl_blend
    tables = str(office.write(tmp_path / "tables"))
    main(["convert", path, "--out", str(tmp_path / "out"), *sources])
    for file in (tmp_path / "out").glob("*.jsonl"):
        for record in read(file):
            row = normalise(record, str(file))
            check_spec(row.domain, {**row.spec, "tables_dir": tables})
            assert row.domain == file.stem


def test_an_unresolved_placeholder_is_refused(rl_blend, tmp_path):
    path, sources = rl_blend
    with pytest.raises(InputError, match=r"train.jsonl:1: a placeholder for row 3 of dapo; restore it first"):
        main(["convert", path, "--out", str(tmp_path / "out"), sources[1]])
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert main(["convert", path, "--out", str(tmp_path / "out"), sources[1], "--drop-unresolved"]) == 0
    assert (
        json.loads((tmp_path / "out" / "convert.json").read_text())["dropped"]["placeholder of dapo without --source"]
        == 1
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (blend_rows.dapo_row(99), "has no row 99, which the blend asks for"),
        (blend_rows.rl("poems", "hi"), "is none of the blend's"),
        (
            blend_rows.rl("instruction_following", "hi", instruction_id_list=["a"], kwargs=[None, None]),
            "kwargs must be as long",
        ),
        (blend_rows.rl("stem_mcqa", "", expected_answer="A", options=[{"A": "x"}]), "holds no text"),
        (blend_rows.rl("stem_mcqa", "hi", expected_answer="A", options=["A", "B"]), "not a row of the blend: Attrib"),
        (blend_rows.rl("dapo17k", _hf_placeholder={"question_template": {}}), "_hf_placeholder must be an object with"),
        (blend_rows.rl("dapo17k", _hf_placeholder="{bad"), "key _hf_placeholder is not JSON"),
        ({**blend_rows.code_row(), "responses_create_params": {"input": "hi"}}, "input must be a list of {role"),
        ({**blend_rows.code_row(), "responses_create_params": {"input": [{"content": "hi"}]}}, "KeyError: 'role'"),
        ({**blend_rows.code_row(), "agent_ref": "x"}, "key agent_ref is not JSON"),
        (
            blend_rows.sft_row("-", dataset="taco", split="train", index=None),
            "key index must be a row number, got None",
        ),
        ({"domain": "a/b", "prompt": "hi"}, "domain 'a/b' cannot name a file"),
    ],
)
def test_bad_rows_name_themselves(row, message, tmp_path):
    source = write(tmp_path / "dapo.jsonl", blend_rows.dapo_source(3))
    path = write(tmp_path / "t.jsonl", [blend_rows.science_row(), row])
    with pytest.raises(InputError, match=f"(?s)(t.jsonl:2: |--source).*{message}"):
        main(["convert", path, "--out", str(tmp_path / "o"), f"--source=dapo={source}"])
    assert not list((tmp_path / "o").glob("*")) if (tmp_path / "o").exists() else True


def test_the_blend_as_parquet_and_with_nested_fields_as_text_gives_the_same_rows(rl_blend, tmp_path):
    path, sources = rl_blend
    rows = [r for r in read(tmp_path / "train.jsonl") if "workbench" not in r["dataset"]]
    for i, name in enumerate(("recipient", "subject")):  # Arrow gives each schema the other's property, as null
        tool = {"type": "function", "name": f"tool{i}", "parameters": {"properties": {name: {"type": "string"}}}}
        rows.append(blend_rows.agent_row(i))
        rows[-1]["responses_create_params"]["tools"] = [tool]
    path = write(tmp_path / "train.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    text = [{k: json.dumps(v) if k in blend.NESTED and v is not None else v for k, v in r.items()} for r in rows]
    write(tmp_path / "text.jsonl", text)
    converted = []
    for name in (path, str(tmp_path / "train.parquet"), str(tmp_path / "text.jsonl")):
        assert main(["convert", name, "--out", str(tmp_path / "out"), *sources]) == 0
        converted.append({p.name: read(p) for p in sorted((tmp_path / "out").glob("*.jsonl"))})
    assert (
        converted[1]["agent.jsonl"][1]["tools"] == [tool]
        and len(converted[0]) == 5
        and converted[0] == converted[1] == converted[2]
    )


def test_the_wrong_source_file_is_noticed(tmp_path):
    path = write(tmp_path / "t.jsonl", [blend_rows.dapo_row(1)])
    other = write(tmp_path / "skywork.jsonl", blend_rows.skywork_source(3))
    with pytest.raises(InputError, match="does not carry DAPO's own prompt"):
        main(["convert", path, "--out", str(tmp_path / "o"), f"--source=dapo={other}"])
    with pytest.raises(InputError, match="--source dappo: unknown source"):
        blend.Sources({"dappo": "x"})


def test_rows_without_a_known_dataset_are_told_by_their_agent():
    record = blend_rows.rl("new_name", "Which?", agent="mcqa_simple_agent", expected_answer="A", options=[{"A": "x"}])
    assert blend.plain(record, "f:1")["domain"] == "science"


@pytest.mark.parametrize(
    ("given", "want"),
    [('["7", "8"]', "7"), ("[]", ""), (["7"], "7"), ("[0, 1)", "[0, 1)"), ("[0, 1]", "[0, 1]"), (12, "12"), (None, "")],
)
def test_answers(given, want):
    assert blend._first(given) == want


def test_sft_rows_become_what_chat_templates_take():
    row = blend.plain(blend_rows.sft_row(domain="agent"), "f:1")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]  # the empty system message is gone
    assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    assert row["messages"][1]["reasoning_content"] == "short"
    assert row["tools"][0]["function"]["name"] == "f"
    assert normalise(row, "f:1").domain == "agent"


def test_sft_coding_placeholders_are_restored_from_their_source(tmp_path):
    path = write(
        tmp_path / "code.jsonl",
        [
            blend_rows.sft_row("-", dataset="BAAI/TACO", split="train", index="1"),
            blend_rows.sft_row("-", dataset="open-r1/codeforces", split="test", index=0),
        ],
    )
    taco = write(tmp_path / "taco.jsonl", [{"question": "first"}, {"question": "second"}])
    forces = write(
        tmp_path / "cf.jsonl",
        [
            {
                "description": "Sum.",
                "input_format": "Two numbers.",
                "output_format": "One.",
                "examples": [{"input": "1 2", "output": "3"}],
                "note": None,
            }
        ],
    )
    sources = [f"--source=taco/train={taco}", f"--source=codeforces/test={forces}"]
    with pytest.raises(InputError, match="placeholder for row 0 of codeforces/test"):
        main(["convert", path, "--out", str(tmp_path / "o"), "--domain", "code", sources[0]])
    main(["convert", path, "--out", str(tmp_path / "o"), "--domain", "code", *sources])
    users = [r["messages"][0]["content"] for r in read(tmp_path / "o" / "code.jsonl")]
    assert users == ["second", "Sum.\n\nInput\n\nTwo numbers.\n\nOutput\n\nOne.\n\nExamples\n\nInput\n1 2\nOutput\n3"]


def test_plain_rows_pass_untouched():
    row = {"domain": "math", "prompt": "1+1?", "answer": "2"}
    assert blend.plain(row, "f:1") is row
