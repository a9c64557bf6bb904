"""Run under torchrun: two ranks, rank 0 decoding slowly, roll out the same prompts; what each got is written down."""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from m2rl.launch import process_group
from m2rl.rollout.carry import CarryOver
from m2rl.rollout.sharing import Sharing

sys.path.insert(0, str(Path(__file__).parents[1] / "m2rl" / "rollout"))
from test_collect import Scripted, rollout

LENGTHS = range(2, 34)


class Timed(Scripted):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.started = seconds, set()

    def submit(self, requests):
        requests = list(requests)
        self.started |= {r.tokens[1] for r in requests}
        super().submit(requests)

    def poll(self):
        time.sleep(self.seconds)
        return super().poll()


def main(folder: str) -> None:
    with process_group(1):
        rank = dist.get_rank()

        def run(name, pull):
            engine = Timed(0.006 if rank == 0 else 0.001)
            samples = rollout(engine, LENGTHS, sharing=Sharing(pull), ahead=8)
            mine = [None, None]
            dist.all_gather_object(mine, len(engine.started))
            assert all(s.status == "ok" for s in samples)
            if rank == 0:
                found = {"order": [[s.prompt.tokens[1], s.index] for s in samples], "mine": mine}
                Path(folder, f"{name}.json").write_text(json.dumps(found))

        run("dealt", False)
        run("pulled", True)
        sharing, carry, engine = Sharing(True), CarryOver(4), Timed(0.006 if rank == 0 else 0.001)
        all_, left = [], []
        for step in range(3):
            engine.version = step
            if step == 2:
                carry.allowance = 0
            waiting = list(carry.places)
            samples = rollout(engine, LENGTHS, step=step, sharing=sharing, ahead=8, carry=carry)
            groups = [s.prompt.tokens[1] for s in samples if s.index == 0]
            old = len(waiting)
            all_ += [(s, LENGTHS[i]) for s, i in waiting] + [(step, k) for k in groups[old:]]
            assert groups[:old] == [LENGTHS[i] for _, i in waiting]
            left.append(len(carry.places))
        if rank == 0:
            Path(folder, "carried.json").write_text(json.dumps({"all": all_, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1])
