"""FSDP2 over gloo: two ranks compute what one computes, and a checkpoint restores them bitwise."""

import numpy as np
import pytest
import torch
from commands import SUPPORT, torchrun


def run(folder, ranks, tokens_per_bin=1000, replicas=1, tied="tied", checkpointing="plain"):
    folder.mkdir()
    done = torchrun(
        str(SUPPORT / "two_ranks.py"), str(folder), str(tokens_per_bin), str(replicas), tied, checkpointing, ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "out.pt", weights_only=False)


@pytest.mark.parametrize(
    ("tied", "tokens_per_bin", "replicas", "checkpointing"),
    [
        ("tied", 40, 1, "plain"),  # several bins per rank: the gradient is reduced after the last one only
        ("untied", 1000, 2, "checkpointing"),  # one bin, HSDP: two replicas of the whole model
    ],
)
def test_two_ranks_equal_one(tmp_path, tied, tokens_per_bin, replicas, checkpointing):
    one = run(tmp_path / "one", 1, tied=tied)
    two = run(tmp_path / "two", 2, tokens_per_bin, replicas, tied, checkpointing)
    assert one["resumed_bitwise"] and two["resumed_bitwise"]
    torch.testing.assert_close(one["totals"], two["totals"], rtol=1e-5, atol=1e-6)
    assert one["grads"].keys() == two["grads"].keys()
    for name, g in one["grads"].items():
        assert (g - two["grads"][name]).norm() <= 3e-6 * g.norm(), name
    for a, b in zip(one["scores"], two["scores"]):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name, p in one["parameters"].items():
        torch.testing.assert_close(p, two["parameters"][name], rtol=0, atol=2e-4)


def test_a_rank_may_end_right_after_a_collective():
    done = torchrun(str(SUPPORT / "last_collective.py"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
