"""Adam's moments wait on the host and come back bitwise; the step after is the step without."""

import copy

import torch
from torch import nn

from m2rl.rollout.memory import free_cache, free_gib, park


def trained(park_between: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(4):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if park_between:
            park(optimizer).restore()
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_parked_state_takes_no_memory_and_comes_back_bitwise():
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert park(optimizer).copies == []  # before the first step there is nothing to park
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    parked = park(optimizer)
    assert len(parked.copies) == 4 and all(m.untyped_storage().size() == 0 for m in moments)
    parked.restore()
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[i][key])
    assert next(iter(optimizer.state.values()))["exp_avg"] is moments[0]


def test_training_with_and_without_parking_is_the_same():
    with_, without = trained(True), trained(False)
    assert all(torch.equal(with_[k], without[k]) for k in without)


def test_a_cpu_has_no_edge():
    free_cache()
    assert free_gib(torch.device("cpu")) == float("inf")
