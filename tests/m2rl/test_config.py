import dataclasses
import tomllib

import pytest

from m2rl.config import Config, build, check, differing_keys, load, named_configs, read_toml, to_toml
from m2rl.types import InputError


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_the_default_is_the_embedded_run():
    config, dry_run = load([])
    assert (config.name, config.warm_start, config.algorithm) == ("embedded", "embedded_sft", "grpo")
    assert not dry_run


@pytest.mark.parametrize("name", named_configs())
def test_every_shipped_config_resolves_and_round_trips(name):
    config, _ = load(["--config", name])
    assert build(Config, tomllib.loads(to_toml(config)), "copy") == config


@pytest.mark.parametrize("name", ["code", "science", "if", "agent", "mixed", "mixed5"])
def test_the_4b_runs_are_one_recipe(name):
    """Every file is complete; what they must have in common is compared here."""
    math, other = (load(["--config", f"qwen3_4b_{n}"])[0] for n in ("math", name))
    own = {"data.train", "data.eval", "data.default_domain", "domain"}
    longer_prompts = {"rollout.max_prompt_tokens", "train.tokens_per_bin"} if name in ("agent", "mixed5") else set()
    assert set(differing_keys(math, other)) == own | longer_prompts
    assert other.train.steps == (2 if name.startswith("mixed") else 1) * math.train.steps


def test_dotted_overrides_reach_nested_keys_and_domains():
    config, dry_run = load(
        [
            "--rollout.group-size",
            "4",
            "--domain.0.quota",
            "5",
            "--domain.1.quota",
            "3",
            "--dry-run",
            "--model.compile",
            "True",
        ]
    )
    assert config.rollout.group_size == 4
    assert [d.quota for d in config.domain] == [5, 3, 4, 4]
    assert dry_run
    assert config.model.compile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rollout]\ngroup_sise = 4", "unknown key rollout.group_sise, did you mean group_size?"),
        ("[rollout]\ngroup_size = 'four'", "rollout.group_size must be int, got 'four'"),
        ("[optim]\nlr = true", "optim.lr must be float, got True"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size must be at least 2 for GRPO"),
        (
            "[objective]\nloss = 'grop'",
            "objective.loss must be one of 'grpo', 'cispo', 'gspo', 'reinforce', got 'grop'; did you mean 'grpo'",
        ),
        ("model = 3", "model must be a table, got 3"),
        ("[[domain]]\nname = 'math'\nquota = 99", "domain quotas add up to 99, more than rollout.prompts_per_step 16"),
        ("[[domain]]\nname = 'math'\n[[domain]]\nname = 'math'", "listed twice"),
        ("[[domain]]\nname = 'math'\nprompt_template = 'x'", "prompt_template must contain {prompt}"),
        ("rollout = [", "not valid TOML"),
    ],
)
def test_bad_config_names_file_key_and_rule(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load(["--config", path])
    assert message in str(error.value)
    assert path in str(error.value)


def test_a_missing_config_suggests_a_shipped_one():
    with pytest.raises(InputError, match=r"did you mean qwen3_4b_math\?"):
        load(["--config", "qwen3_4b_maths"])


def test_a_study_is_told_from_a_run():
    with pytest.raises(InputError, match=r"study_embedded is for python -m m2rl\.study"):
        load(["--config", "study_embedded"])
    with pytest.raises(InputError, match=r"embedded is for torchrun -m m2rl\.train"):
        read_toml("embedded", studies=True)
    with pytest.raises(InputError, match=r"did you mean study_embedded\?"):
        read_toml("study_embeded", studies=True)


def test_an_unknown_override_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--rollout.group-sise", "4"])
    assert stop.value.code == 2
    assert "group-size" in capsys.readouterr().err


def test_a_resumed_run_may_change_only_what_does_not_change_it():
    config = check(Config(), "here")
    longer = dataclasses.replace(config, threads=2, train=dataclasses.replace(config.train, steps=999))
    other = dataclasses.replace(config, seed=1, optim=dataclasses.replace(config.optim, lr=1.0))
    assert differing_keys(config, longer) == []
    assert differing_keys(config, other) == ["seed", "optim.lr"]
