"""Files become sources without being held; long prompts, dropped rows and placeholders are met at load time."""

import json

import blend_rows
import pytest

from m2rl import embedded
from m2rl.config import Config, Data, Domain, Evaluation, Rollout
from m2rl.data import eval_prompts, load_sources, quotas, whereabouts
from m2rl.data.mixture import surely_short
from m2rl.data.rows import Shelf, files, normalise
from m2rl.types import InputError

TOKENIZER = embedded.build_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


def test_blend_files_train_directly(tmp_path):
    rows = [blend_rows.science_row(i) for i in range(4)] + [
        blend_rows.dropped_row(),
        blend_rows.code_row(),
        blend_rows.rl("dapo17k", "What is 1+1?", expected_answer="2"),
    ]
    loaded = load_sources(
        [write(tmp_path / "train.jsonl", rows)],
        Config(rollout=Rollout(max_prompt_tokens=512)),
        TOKENIZER,
        verifiable=True,
    )
    assert {d: s.size for d, s in loaded.sources.items()} == {"science": 4, "code": 1, "math": 1}
    assert loaded.skipped == {"structured_outputs (no verifier)": 1}
    assert loaded.sources["science"].prompt(2).spec["options"]["B"] == "neon 2"


def test_an_unresolved_placeholder_says_what_to_do(tmp_path):
    path = write(tmp_path / "train.jsonl", [blend_rows.skywork_row(4)])
    with pytest.raises(
        InputError, match=r"train.jsonl:1: a placeholder for row 4 of skywork; restore it first: python -m m2rl"
    ):
        load_sources([path], Config(), TOKENIZER, verifiable=True)


def test_rows_are_read_again_from_disk_when_drawn(tmp_path):
    rows = [{"domain": "math", "id": i, "prompt": f"text \u2028 {i}", "answer": "1"} for i in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    source = load_sources([path], Config(), TOKENIZER, verifiable=True).sources["math"]
    assert [source.row(i).prompt for i in (4, 0, 2)] == [f"text \u2028 {i}" for i in (4, 0, 2)]
    assert not source.shelf.held


def test_a_prompt_within_the_byte_bound_is_within_the_token_bound():
    row = normalise({"domain": "math", "prompt": "x" * 300, "answer": "1"}, "f:1")
    assert not surely_short(row, Domain("math"), 300) and surely_short(row, Domain("math"), 300 + 256)
    assert not surely_short(row, Domain("math", system_prompt="y" * 300), 300 + 256)
    tools = normalise({"domain": "agent", "prompt": "x", "tools": [{"name": "z" * 5000}]}, "f:1")
    assert not surely_short(tools, Domain("agent"), 2048)


def test_a_shelf_of_parquet_rows_keeps_their_json():
    shelf = Shelf()
    shelf.add("unused", -1, {"a": [1, None]})
    assert len(shelf) == 1 and shelf[0] == {"a": [1, None]}


def test_hub_addresses_are_files_too(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    write(tmp_path / "train.jsonl", [{"domain": "math", "prompt": "1+1?", "answer": "2"}])

    def listed(self, repo, *, revision, **_):
        asked.append((repo, revision))
        return ["README.md", "train.jsonl", "more/x.jsonl", "default/train/0000.parquet", "default/test/0000.parquet"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(tmp_path / name))
    loaded = load_sources(["hub:a/b/train.jsonl@c0ffee"], Config(), TOKENIZER, verifiable=True)
    assert loaded.sources["math"].prompt(0).spec["answer"] == "2"
    assert files(["hub:a/b"]) == [tmp_path / "default/train/0000.parquet"]
    assert asked == [("a/b", "c0ffee"), ("a/b", "refs/convert/parquet")]
    with pytest.raises(InputError, match=r"dataset a/b lacks the files that are needed at main; or give a local file"):
        files(["hub:a/b/nothing*"])
    with pytest.raises(InputError, match=r"data: hub:a: must be hub:OWNER/NAME"):
        files(["hub:a"])


def test_an_endless_domain_beside_files_needs_a_weight(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"domain": "math", "prompt": f"{i}?", "answer": "1"} for i in range(50)])
    domains = (Domain("math"), Domain("rg_gcd"))
    config = Config(domain=domains, rollout=Rollout(max_prompt_tokens=4096))
    pytest.importorskip("reasoning_gym")
    sources = load_sources([path, "reasoning_gym"], config, TOKENIZER, verifiable=True).sources
    with pytest.raises(InputError, match=r"domain rg_gcd never runs out.*weight or a quota"):
        quotas(domains, sources, 8)
    weighted = tuple(Domain(d.name, weight=1.0) for d in domains)
    assert quotas(weighted, sources, 8) == {"math": 4, "rg_gcd": 4}
    assert quotas((Domain("rg_gcd"),), sources, 8) == {"rg_gcd": 8}


def test_held_out_rows_may_be_of_any_domain_and_are_limited_by_benchmark(tmp_path):
    rows = [{"domain": "math", "benchmark": b, "prompt": f"{b} {i}?", "answer": "1"} for b in "ab" for i in range(5)]
    rows += [{"domain": "math", "prompt": "plain?", "answer": "1"}]
    config = Config(
        data=Data(eval=(write(tmp_path / "e.jsonl", rows),)),
        domain=(Domain("code"), Domain("if")),
        evaluation=Evaluation(problems=2),
    )
    assert [p.text.split()[0] for p in eval_prompts(config, TOKENIZER)] == [
        "<bos>a",
        "<bos>a",
        "<bos>b",
        "<bos>b",
        "<bos>plain?",
    ]


def test_a_plan_says_where_data_comes_from(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert whereabouts(f"{tmp_path}/*.jsonl") == "1 file(s)" and whereabouts(f"{tmp_path}/b.jsonl") == ""
    assert whereabouts("reasoning_gym") == "generated" and whereabouts("hub:owner/name").startswith("on the hub")
