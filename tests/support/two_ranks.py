"""Run under torchrun: the gradient of one step and a resumed optimizer over FSDP2 ranks, written by rank 0 for the test
to read."""

import sys

import tiny
import torch
import torch.distributed as dist

from m2rl import checkpoint
from m2rl.config import Objective, Optim
from m2rl.launch import process_group
from m2rl.learner import Learner
from m2rl.objectives import PolicyGradient
from m2rl.policy import ATTENTION, Policy, full_parameters, shard


def main(folder: str, tokens_per_bin: int, replicas: int, tied: str, checkpointing: str) -> None:
    from pathlib import Path

    with process_group(1) as device:
        policy = shard(
            Policy(tiny.model(tied=tied == "tied", attention=ATTENTION)),
            device,
            torch.float32,
            replicas,
            activation_checkpointing=checkpointing == "checkpointing",
        )
        learner = Learner(policy, Optim(lr=1e-3), 10, tokens_per_bin, ["a", "b"])
        objective = PolicyGradient(Objective())
        rows = tiny.rows()
        totals = learner.backward(rows, objective)
        grads = {}
        for name, p in policy.model.named_parameters():
            g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            grads[name.replace("_checkpoint_wrapped_module.", "")] = g
        scores = learner.score(rows)
        learner.optimizer.zero_grad(set_to_none=True)
        learner.step(rows, objective, 0)
        checkpoint.save(Path(folder) / "run", 1, policy, learner.optimizer, "", 2, {})
        learner.step(rows, objective, 1)
        uninterrupted = {k: v.clone() for k, v in full_parameters(policy).items()}
        checkpoint.load(Path(folder) / "run" / "checkpoints" / "step-000001", policy, learner.optimizer)
        learner.step(rows, objective, 1)
        resumed = full_parameters(policy)
        same = all(torch.equal(uninterrupted[k], resumed[k]) for k in resumed)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(
                {
                    "grads": grads,
                    "totals": totals,
                    "scores": scores,
                    "resumed_bitwise": same,
                    "parameters": uninterrupted,
                },
                f"{folder}/out.pt",
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
