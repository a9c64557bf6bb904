"""Run under torchrun: an FSDP2 policy and a vLLM engine on every rank; each rank writes what it measured.

python two_engines.py FOLDER MODEL TENSOR_PARALLEL END ROUTE
    END: "close", or "die" to end hard with the engine alive; ROUTE: "reload", or "in place" to switch the packing off
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import served
import torch
import torch.distributed as dist

from m2rl.launch import process_group
from m2rl.policy import Policy, full_parameters, load_model, shard
from m2rl.rollout.engine import generate
from m2rl.rollout.vllm import VllmEngine


def main(folder: str, model: str, tensor_parallel: int, end: str, route: str) -> None:
    with process_group(1) as device:
        rank, world = dist.get_rank(), dist.get_world_size()
        policy = shard(Policy(load_model(model)), device, torch.float32).requires_grad_(False)
        whole = served.policy(Path(model))
        rollout = dataclasses.replace(served.CONFIG.rollout, tensor_parallel=tensor_parallel)
        with served.unpacked() if route == "in place" else contextlib.nullcontext():
            engine = VllmEngine(dataclasses.replace(served.CONFIG, rollout=rollout), model, device, [served.END])
        assert engine.route == route
        found: dict = {"worst": [], "tokens": []}
        for version in range(3):
            engine.sync(policy, version)
            served.restore(whole, {f"model.{n}": p for n, p in full_parameters(policy).items()})
            # Uneven batches, but the same on the ranks of one engine.
            asked = served.requests(4 if tensor_parallel > 1 else 2 + 3 * rank)
            answers = generate(engine, asked)
            found["worst"].append(served.worst(served.transformers(whole), asked, answers))
            found["tokens"].append([a.tokens for a in answers])
            for p in policy.parameters():
                local = p.to_local() if hasattr(p, "to_local") else p
                local.add_(torch.randn(local.shape, generator=torch.Generator().manual_seed(version)) * 0.05)
        if end == "die":
            os._exit(0)
        right = 0
        for i in range(100):  # the trainer's own collectives, after the engine's
            total = torch.tensor([float(rank + i)])
            dist.all_reduce(total)
            right += total.item() == sum(r + i for r in range(world))
        engine.close()
        found["all_reduces"] = right
        found["group"] = dist.is_initialized()
        Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
