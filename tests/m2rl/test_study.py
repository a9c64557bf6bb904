"""The study's plan: what is done again and what is not. (The whole pipeline runs in CI at a reduced size.)"""

import dataclasses
import json
import tomllib

import pytest

from m2rl import study
from m2rl.config import Config, build, check
from m2rl.domains.procedural import DOMAINS
from m2rl.types import InputError


def digests(made):
    found = {}
    for stage in study.plan(made):
        found[stage.name] = study.digest(stage, found)
    return found


def changed(a, b):
    return {name for name in a if a[name] != b[name]}


@pytest.fixture
def made(tmp_path):
    return study.Study(tmp_path, scale=0.1)


def test_every_stage_comes_after_what_it_needs(made):
    seen = set()
    for stage in study.plan(made):
        assert set(stage.after) <= seen
        seen.add(stage.name)
    assert {"sft", *DOMAINS, "mixed", "merges", "distill", "samples", "analyses", "report"} == seen


def test_a_changed_setting_redoes_exactly_what_depends_on_it(made, monkeypatch):
    before = digests(made)
    assert changed(before, digests(made)) == set()
    assert changed(before, digests(dataclasses.replace(made, k=4))) == {"samples", "analyses", "report"}
    assert changed(before, digests(dataclasses.replace(made, seed=1))) == set(before)
    monkeypatch.setitem(study.EXPERT_STEPS, "math", 50)
    assert changed(before, digests(made)) == {"math", "merges", "distill", "samples", "analyses", "report"}


def test_the_runs_are_valid_and_equal_in_prompts(made):
    sft, runs = study.training_configs(dataclasses.replace(made, scale=1.0))
    for config in (sft, *runs.values()):
        check(config, config.name)
        assert build(Config, tomllib.loads(study.to_toml(config)), "copy") == config
    assert runs["mixed"].train.steps == sum(runs[d].train.steps for d in DOMAINS)
    assert {d.name: d.teacher for d in runs["distill"].domain} == {d: str(made.out / d / "model") for d in DOMAINS}


def test_only_done_stages_are_skipped_and_needs_are_named(made):
    found = digests(made)
    first = study.plan(made)[0]
    assert not study.finished(made, first, found)
    (made.out / "stages").mkdir()
    study.marker(made, "sft").write_text(json.dumps({"digest": found["sft"], "seconds": 1.0}))
    assert study.finished(made, first, found)
    study.marker(made, "sft").write_text(json.dumps({"digest": "another", "seconds": 1.0}))
    assert not study.finished(made, first, found)
    with pytest.raises(InputError, match="stage merges needs sft, which is not done"):
        study.run(made, ["merges"])
    with pytest.raises(InputError, match="no stage sfr"):
        study.run(made, ["sfr"])


def test_a_stage_that_fails_names_its_last_words_and_its_log(made, tmp_path):
    _, runs = study.training_configs(made)
    with pytest.raises(
        InputError, match=r"stage math ended with status 2: m2rl: model.path .*\(all of it: .*math.log\)"
    ):
        study.train(made, runs["math"])  # its sft model is not there
