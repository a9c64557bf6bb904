"""A checkpoint is complete or absent; the export is a Hugging Face folder."""

import errno
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from m2rl import checkpoint
from m2rl.config import Objective, Optim
from m2rl.learner import Learner
from m2rl.objectives import PolicyGradient
from m2rl.policy import ATTENTION, Policy
from m2rl.types import InputError


def trained(steps=2):
    learner = Learner(Policy(tiny.model(attention=ATTENTION)), Optim(lr=1e-3), 10, 1000, ["a", "b"])
    for step in range(steps):
        learner.step(tiny.rows(), PolicyGradient(Objective()), step)
    return learner


def test_resume_continues_bitwise(tmp_path):
    learner = trained()
    path = checkpoint.save(tmp_path, 2, learner.policy, learner.optimizer, "", 2, {"before": {"a": 1}})
    learner.step(tiny.rows(), PolicyGradient(Objective()), 2)
    fresh = trained(0)
    state = checkpoint.load(path, fresh.policy, fresh.optimizer)
    assert state == {"step": 2, "before": {"a": 1}}
    fresh.step(tiny.rows(), PolicyGradient(Objective()), 2)
    for a, b in zip(learner.policy.parameters(), fresh.policy.parameters()):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept(tmp_path):
    learner = trained(1)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, learner.policy, learner.optimizer, "", 2, {})
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000002", "step-000003"]


def test_a_save_that_dies_leaves_the_older_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    learner = trained(1)
    checkpoint.save(tmp_path, 1, learner.policy, learner.optimizer, "", 2, {})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, learner.policy, learner.optimizer, "", 2, {})
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000001"]
    assert checkpoint.resume_path(tmp_path, "auto", 10).name == "step-000001"


def test_auto_resume_takes_an_unfinished_run_only(tmp_path):
    assert checkpoint.resume_path(tmp_path, "auto", 5) is None
    for step in (3, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").write_text(json.dumps({"step": step}))
    assert checkpoint.resume_path(tmp_path, "auto", 5) is None  # finished
    assert checkpoint.resume_path(tmp_path, "auto", 6).name == "step-000005"
    assert checkpoint.resume_path(tmp_path, "never", 6) is None
    with pytest.raises(InputError, match="not a complete checkpoint"):
        checkpoint.resume_path(tmp_path, str(tmp_path / "nowhere"), 6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_export_loads_in_transformers_with_the_same_outputs(tmp_path, family, tied, embedded_folder):
    from transformers import AutoTokenizer

    policy = Policy(tiny.model(family, tied, attention=ATTENTION))
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    checkpoint.export(tmp_path / "model", policy, tokenizer, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    ids = torch.tensor(tiny.sequences((12,)))
    assert torch.equal(loaded(input_ids=ids).logits, tiny.model(family, tied)(input_ids=ids).logits)
    assert loaded.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == tokenizer.eos_token_id
