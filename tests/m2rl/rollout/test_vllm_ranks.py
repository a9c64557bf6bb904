"""Two ranks under torchrun: FSDP2 and the trainer's process group beside an engine per rank, or one over both."""

import json
from pathlib import Path

import pytest
import served
from commands import SUPPORT, torchrun
from served import CLOSE

pytestmark = served.needs_vllm
SEGMENTS = "*-tp:*cpushm*"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.save(tmp_path_factory.mktemp("model"))


def run(folder, model, tensor_parallel, end="close"):
    done = torchrun(str(SUPPORT / "two_engines.py"), str(folder), str(model), str(tensor_parallel), end, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)] if end == "close" else []


def test_an_engine_per_rank_beside_a_sharded_policy(tmp_path, model):
    for found in run(tmp_path, model, 1):
        assert max(found["worst"]) < CLOSE and len({str(t) for t in found["tokens"]}) == 3
        assert found["all_reduces"] == 100 and found["group"]


def test_one_engine_over_two_ranks_and_after_a_hard_end(tmp_path, model):
    run(tmp_path, model, 2, "die")
    assert list(Path("/dev/shm").glob(SEGMENTS)), "the case this test is about: a killed run leaves its segments"
    first, second = run(tmp_path, model, 2)
    assert max(first["worst"]) < CLOSE and first["tokens"] == second["tokens"]
    assert first["all_reduces"] == 100
    assert not list(Path("/dev/shm").glob(SEGMENTS))
