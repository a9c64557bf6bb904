"""The plan of a study: what comes after what, what is redone, and what every run is configured with."""

import dataclasses

import pytest
from studies import with_run

from m2rl import embedded
from m2rl.domains.procedural import DOMAINS
from m2rl.study.definition import read, verify
from m2rl.study.plan import Seed, digests_of, plan, training_configs


def digests(made, out):
    return digests_of(plan(made, out))


def changed(a, b):
    return {name for name in a if a[name] != b[name]}


ANALYSES = {"policies", "verification", "skills"}


@pytest.mark.parametrize("name", ["study_embedded", "study_qwen3_4b"])
def test_the_shipped_studies_are_valid_and_every_stage_comes_after_what_it_needs(name, tmp_path):
    made = verify(*read(name))
    seen = set()
    for stage in plan(made, tmp_path):
        assert set(stage.after) <= seen
        seen.add(stage.key)
    runs = {"sft", *DOMAINS, "mixed", "distill"}
    assert seen == runs | {"merges", "samples", "merge_samples", "weights", "report"} | ANALYSES
    configs = training_configs(Seed(made, 3, tmp_path))
    assert all(c.seed == 3 and c.data.eval == () for c in configs.values())
    models = Seed(made, 3, tmp_path).models
    assert {d.name: d.teacher for d in configs["distill"].domain} == {d: models[d] for d in DOMAINS}
    assert all([d.name for d in configs[name].domain] == [name] for name in DOMAINS)


def test_the_mixed_run_has_the_prompts_of_all_experts_together(made, tmp_path):
    configs = training_configs(Seed(dataclasses.replace(made, scale=1.0), 0, tmp_path))
    assert configs["mixed"].train.steps == sum(configs[d].train.steps for d in DOMAINS)
    assert len({c.rollout.prompts_per_step for c in configs.values() if c.algorithm == "grpo"}) == 1


def test_a_changed_setting_redoes_exactly_what_depends_on_it(made, tmp_path):
    before = digests(made, tmp_path)
    assert changed(before, digests(made, tmp_path)) == set()
    k = dataclasses.replace(made, sampling=dataclasses.replace(made.sampling, k=4))
    assert changed(before, digests(k, tmp_path)) == {"samples", "merge_samples", "report"} | ANALYSES
    assert changed(before, digests(dataclasses.replace(made, seeds=(1,)), tmp_path)) == set(before)
    math = digests(with_run(made, "math", steps=90), tmp_path)
    rest = {"merges", "distill", "samples", "merge_samples", "weights", "report"} | ANALYSES
    assert changed(before, math) == {"math"} | rest
    merge = dataclasses.replace(made, merge={**made.merge, "ta": {"method": "task_arithmetic"}})
    assert changed(before, digests(merge, tmp_path)) == {"merges", "merge_samples", "weights", "report"} | ANALYSES


def test_several_seeds_are_several_studies_and_one_report(made, tmp_path):
    one = plan(made, tmp_path)
    stages = plan(dataclasses.replace(made, seeds=(0, 1, 2)), tmp_path)
    assert len(stages) == 3 * (len(one) - 1) + 1
    assert {s.key.split("/")[0] for s in stages} == {"seed0", "seed1", "seed2", "report"}
    assert len(stages[-1].after) == 12 and all(a.startswith(s.key.split("/")[0]) for s in stages[:-1] for a in s.after)


def test_a_given_checkpoint_is_not_trained_and_its_weights_decide_what_is_redone(made, tmp_path):
    for seed, name in enumerate(("sft", "math")):
        embedded.save(tmp_path / name, seed)
    given = with_run(with_run(made, "sft", checkpoint=str(tmp_path / "sft")), "math", checkpoint=str(tmp_path / "math"))
    before = digests(verify(given, "test"), tmp_path)
    assert not {"sft", "math"} & set(before) and {"code", "mixed", "merges"} < set(before)
    assert Seed(given, 0, tmp_path).models["math"] == str(tmp_path / "math")
    embedded.save(tmp_path / "math", 5)
    assert {"merges", "samples"} < changed(before, digests(given, tmp_path))
    assert "code" not in changed(before, digests(given, tmp_path))
