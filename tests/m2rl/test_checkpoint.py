"""A checkpoint is complete or absent; the export is a Hugging Face folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


FULL_DISK = """
import sys, torch
from pathlib import Path
from transformers import AutoTokenizer
from m2rl import checkpoint
sys.path.insert(0, sys.argv[3])
from test_checkpoint import trained
disk, learner = Path(sys.argv[1]), trained(1)
def save(step):
    return checkpoint.save(disk, step, learner.policy, learner.optimizer, "", 2, {})
def export(step):
    return checkpoint.export(disk / "model", learner.policy, AutoTokenizer.from_pretrained(sys.argv[2]), torch.float32)
save(1)
for write in (save, export):
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(65536)):
                pass
        except OSError:
            filler.truncate(filler.tell() - 2 * 65536)
    try:
        write(2)
    except OSError as error:
        print(error.errno, [p.name for p in checkpoint.complete(disk)], sorted(p.name for p in disk.iterdir()))
    (disk / "filler").unlink()
print(save(2).name, export(2).name)
"""


def test_a_full_disk_while_saving_is_named_and_leaves_what_was_there(tmp_path, embedded_folder):
    """A real one of 4 MiB: torch and safetensors report it as errors of their own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec "$@"'
    if not shutil.which("unshare") or subprocess.run([*mount, script, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (user namespaces are off)")
    run = [sys.executable, "-W", "ignore", "-c", FULL_DISK, disk, embedded_folder, Path(__file__).parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*mount, script, "sh", *map(str, run)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    failed_save, failed_export, saved = done.stdout.splitlines()
    assert failed_save == failed_export == f"{errno.ENOSPC} ['step-000001'] ['checkpoints', 'filler']"
    assert saved == "step-000002 model"


def test_what_a_kill_leaves_is_never_read_and_is_cleared_by_the_next_save(tmp_path):
    learner = trained(1)
    checkpoint.save(tmp_path, 1, learner.policy, learner.optimizer, "", 1, {})
    for name in (".step-000002.partial", ".step-000000.old"):
        shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / name)
    assert checkpoint.resume_path(tmp_path, "auto", 10).name == "step-000001"
    checkpoint.save(tmp_path, 2, learner.policy, learner.optimizer, "", 1, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_auto_resume_takes_an_unfinished_run_only(tmp_path):
    assert checkpoint.resume_path(tmp_path, "auto", 5) is None
    for step in (3, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").write_text(json.dumps({"step": step}))
    assert checkpoint.resume_path(tmp_path, "auto", 5).name == "step-000005"  # its evaluation may be missing
    (tmp_path / "summary.json").write_text("{}")
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
