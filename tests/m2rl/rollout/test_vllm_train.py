"""`torchrun -m m2rl.train` through the real vLLM: the built-in model learns as through the default engine, and a run
whose engine stalls ends with the reason and continues from its last checkpoint."""

import json
import shutil

import pytest
import served
from commands import SUPPORT, torchrun

pytestmark = served.needs_vllm
STEPS = ["--train.steps", "16", "--warm-start-steps", "250", "--evaluation.problems", "40", "--train.save-every", "4"]
VLLM = ["--rollout.engine", "vllm", "--rollout.kv-cache-gib", "0.25", "--rollout.stall-timeout-s", "10"]


def train(folder, *options, script=("-m", "m2rl.train")):
    return torchrun(*script, "--run-dir", str(folder), *STEPS, *options, timeout_s=280)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "native"
    done = train(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def gains(folder):
    summary = json.loads((folder / "summary.json").read_text())
    mean = {when: sum(d["avg_at_k"] for d in summary[when].values()) / 4 for when in ("before", "after")}
    return mean["before"], mean["after"] - mean["before"]


def test_it_learns_as_through_the_default_engine_over_a_stall(native, tmp_path):
    folder = tmp_path / "vllm"
    folder.mkdir()
    shutil.copytree(native / "warm_start", folder / "warm_start")
    stalled = train(folder, *VLLM, script=(str(SUPPORT / "stalling_train.py"), "9"))
    assert stalled.returncode != 0
    assert "vLLM generated no token for" in stalled.stderr and "rollout.stall_timeout_s = 10" in stalled.stderr
    assert "wait_for_a_lost_kernel" in stalled.stderr  # where it hangs
    done = train(folder, *VLLM)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "Resuming" in done.stdout and "at step 8" in done.stdout
    (start, gain), (native_start, native_gain) = gains(folder), gains(native)
    print(f"gain {gain:.3f} from {start:.3f}, native {native_gain:.3f} from {native_start:.3f}")
    assert abs(start - native_start) < 0.05 and gain > 0.05 and abs(gain - native_gain) < 0.1
    steps = [m for m in metrics(folder) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(16)) and {m["weight_lag"] for m in steps} == {0}
    for m in steps:  # the engine's log-probabilities are the trainer's, every step and domain
        assert max(abs(v) for k, v in m.items() if k.endswith("/mismatch_k3")) < 1e-8
