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


def run(folder, model, tensor_parallel, end="close", route="reload"):
    done = torchrun(str(SUPPORT / "two_engines.py"), str(folder), str(model), str(tensor_parallel), end, route, ranks=2)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)] if end == "close" else []


@pytest.mark.parametrize("route", ["reload", "in place"])
def test_an_engine_per_rank_beside_a_sharded_policy(tmp_path, model, route):
    for found in run(tmp_path, model, 1, route=route):
        assert max(found["worst"]) < CLOSE and len({str(t) for t in found["tokens"]}) == 3
        assert found["all_reduces"] == 100 and found["group"]


def test_one_engine_over_two_ranks_and_after_a_hard_end(tmp_path, model):
    """Weights travel from two FSDP2 shards to two tensor-parallel slices; a killed run leaves its segments behind."""
    run(tmp_path, model, 2, "die")
    assert list(Path("/dev/shm").glob(SEGMENTS)), "the case this test is about"
    first, second = run(tmp_path, model, 2, route="in place")
    assert max(first["worst"]) < CLOSE and first["tokens"] == second["tokens"]
    assert first["all_reduces"] == 100
    assert not list(Path("/dev/shm").glob(SEGMENTS))
