"""SyncPlan writing a real vLLM model's fused parameters where they lie, as it does on a GPU.

vLLM's CPU build packs every matrix after loading; that is switched off here, by replacing the function that does it.
"""

import dataclasses
import os
import shutil

import pytest
import served
import torch
from safetensors.torch import load_file, save_file
from served import CLOSE, CONFIG, CPU, END, perturb, requests, restore, worst

from m2rl import merge_sweep
from m2rl.evaluate import Evaluator
from m2rl.rollout.engine import generate

pytestmark = served.needs_vllm
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a shell may say so; the engine stays in this process all the same
FILE = "model.safetensors"
LABELS = ["task_arithmetic-lambda0.5", "task_arithmetic-lambda1"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with served.engines(tmp_path_factory.mktemp, served.unpacked) as start:
        yield start


@pytest.fixture(params=served.EACH)
def pair(request, started):
    family, head = request.param.split()
    return started(family, head == "tied")


@pytest.fixture
def one(started):
    return started("qwen3", True)


def addresses(engine):
    return {name: p.data_ptr() for name, p in engine.model.named_parameters()}


def test_fused_parameters_are_written_where_they_lie(pair):
    engine, policy = pair
    assert engine.route == "in place"
    at = addresses(engine)
    assert any(name.endswith("qkv_proj.weight") for name in at) and any("gate_up_proj" in name for name in at)
    for version in range(3):
        asked = requests(6, (0.7, 1.0, 0.0)[version])
        assert worst(served.transformers(policy), asked, generate(engine, asked)) < CLOSE
        perturb(policy, version)
        assert worst(served.transformers(policy), asked, generate(engine, asked)) > 0.1
        engine.sync(policy, version + 1)
        assert addresses(engine) == at
    assert worst(served.transformers(policy), asked, generate(engine, asked)) < CLOSE


def test_rows_of_the_fused_tensors_are_the_policys_bitwise(one):
    engine, policy = one
    engine.sync(policy, 10)
    mine, theirs = dict(policy.model.named_parameters()), dict(engine.model.named_parameters())
    for layer in range(2):
        a = f"model.layers.{layer}.self_attn."
        assert torch.equal(theirs[a + "qkv_proj.weight"], torch.cat([mine[a + f"{x}_proj.weight"] for x in "qkv"]))
        m = f"model.layers.{layer}.mlp."
        fused = torch.cat([mine[m + f"{x}_proj.weight"] for x in ("gate", "up")])
        assert torch.equal(theirs[m + "gate_up_proj.weight"], fused)
    padded, embedding = theirs["model.embed_tokens.weight"], mine["model.embed_tokens.weight"]
    assert len(padded) > served.VOCAB and torch.equal(padded[: served.VOCAB], embedding)


def test_restored_weights_restore_the_output_bitwise(pair):
    served.check_restored_weights_restore_the_output(*pair)


def test_a_forgotten_prefix_cache_reset_would_be_seen(one, monkeypatch):
    served.check_a_forgotten_cache_reset_is_seen(*one, monkeypatch)


def test_checksums_find_a_weight_that_did_not_arrive(one):
    engine, policy = one
    engine.sync(policy, 40)
    engine.verify(policy)
    spoilt = dict(engine.model.named_parameters())["model.layers.1.mlp.gate_up_proj.weight"]
    value = spoilt[200, 3].item()
    spoilt.data[200, 3] += 2**-10
    with pytest.raises(RuntimeError, match=r"1 of \d+ engine tensors differ .*layers.1.mlp.gate_up_proj.weight"):
        engine.verify(policy)
    spoilt.data[200, 3] = value
    engine.verify(policy)


def test_the_first_sync_compares_both_sides(tmp_path, monkeypatch):
    from m2rl_kernels.weight_sync import SyncPlan

    from m2rl.rollout.vllm import VllmEngine

    folder = served.save(tmp_path)
    policy = served.policy(folder)
    with served.unpacked():
        engine = VllmEngine(CONFIG, str(folder), CPU, [END])
    with monkeypatch.context() as broken:
        broken.setattr(SyncPlan, "sync", lambda *a, **k: None)  # nothing is written: the engine still holds noise
        with pytest.raises(RuntimeError, match="engine tensors differ from the policy"):
            engine.sync(policy, 0)
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.poll()
    engine.sync(policy, 0)
    engine.close()


def test_storage_that_moved_is_refused(one):
    """A captured CUDA graph would go on reading the old storage."""
    engine, policy = one
    p = dict(engine.model.named_parameters())["model.norm.weight"]
    kept = p.data
    p.data = kept.clone()
    with pytest.raises(RuntimeError, match=r"moved since the plan was built: model\.norm\.weight"):
        engine.sync(policy, 50)
    p.data = kept
    engine.sync(policy, 51)


def test_unmapped_weights_are_errors_with_names(one):
    engine, policy = one
    weights = dict(policy.model.named_parameters())
    gone = weights.pop("model.layers.1.self_attn.k_proj.weight")
    whole = weights | {"model.layers.1.self_attn.k_proj.weight": gone}
    for wrong, before, after in (
        (weights, r"layers.1.self_attn.k_proj.weight, which no source has", r"got none for .*k_proj.weight"),
        (whole | {"extra": gone}, r"source extra .* has no target", r"got extra besides"),
    ):
        engine.plans.clear()
        with pytest.raises(ValueError, match=before):  # while the plan is made
            engine.load(wrong, 60)
        engine.load(whole, 60)
        with pytest.raises(ValueError, match=after):  # and with the plan at hand
            engine.load(wrong, 60)
    engine.sync(policy, 61)


def test_a_sweeps_merges_are_written_into_the_live_engine(embedded_folder, tmp_path):
    """From memory through the plan into vLLM's fused parameters: addresses stay, only the best reaches the disk."""
    folders = [tmp_path / "e0", tmp_path / "e1"]
    for k, folder in enumerate(folders):
        shutil.copytree(embedded_folder, folder)
        g = torch.Generator().manual_seed(k)
        tuned = {n: x + 0.05 * torch.randn(x.shape, generator=g) for n, x in load_file(folder / FILE).items()}
        save_file(tuned, folder / FILE, metadata={"format": "pt"})
    rollout = dataclasses.replace(CONFIG.rollout, max_new_tokens=8)
    with served.unpacked():
        evaluator = Evaluator(embedded_folder, dataclasses.replace(CONFIG, rollout=rollout))
    engine, seen, score = evaluator.engine, [], evaluator.score

    def watched(weights, *args, **kwargs):
        found = score(weights, *args, **kwargs)
        held = dict(engine.model.named_parameters())["model.layers.0.mlp.gate_up_proj.weight"]
        seen.append((held.data_ptr(), held.clone(), list(tmp_path.glob(f".out.sweep/**/{FILE}"))))
        return found

    evaluator.score = watched
    rows = merge_sweep.sweep(
        str(embedded_folder), list(map(str, folders)), tmp_path / "out", methods=["task_arithmetic"], densities=[1.0],
        lambdas=[0.5, 1.0], options={}, evaluator=evaluator, evaluate=["math"], k=1,
    )  # fmt: skip
    assert engine.route == "in place" and len(rows) == len(seen) == 2
    assert len({at for at, _, _ in seen}) == 1 and [on_disk for _, _, on_disk in seen] == [[], []]
    best = load_file(tmp_path / "out" / FILE)
    fused = torch.cat([best[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert [torch.equal(held, fused) for _, held, _ in seen] == [r == rows[0].label for r in LABELS]
    evaluator.close()


def test_whole_tensors_of_another_dtype_load_as_they_are_rounded(one):
    """A bfloat16 merge in a sweep: named tensors, never on disk."""
    engine, policy = one
    before = {n: p.clone() for n, p in policy.named_parameters()}
    merged = {n: (p * 0.9).bfloat16() for n, p in policy.model.named_parameters()}
    engine.load(merged, 70)
    asked = requests(4)
    answers = generate(engine, asked)
    for n, p in policy.model.named_parameters():
        p.copy_(merged[n])
    assert worst(served.transformers(policy), asked, answers) < CLOSE
    restore(policy, before)
    engine.sync(policy, 71)
