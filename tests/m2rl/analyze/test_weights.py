"""Weight geometry of small checkpoints against brute force in float64; the projection unbiased over 200 seeds."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from m2rl_kernels import count_sketch
from safetensors.torch import load_file, save_file

from m2rl.analyze import weights
from m2rl.analyze.__main__ import main
from m2rl.analyze.weights import (
    CRITERIA,
    analyze,
    effective_rank,
    large_exponents,
    layer_of,
    measure,
    module_of,
    projected_cosine,
    spectrum,
    stable_rank,
)
from m2rl.types import InputError

NAMES = ("math", "code", "if")


def save(folder, tensors: dict[str, torch.Tensor], like) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((like / "config.json").read_text())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def checkpoints(request, tmp_path_factory):
    """A base and three models whose sparse updates share a direction and a part of their support."""
    root = tmp_path_factory.mktemp("weights")
    tiny.model(seed=0).save_pretrained(root / "made")
    base = {k: v.to(request.param) for k, v in load_file(root / "made" / "model.safetensors").items()}
    save(root / "base", base, root / "made")
    g = torch.Generator().manual_seed(0)
    common = {k: torch.randn(v.shape, generator=g) * (torch.rand(v.shape, generator=g) < 0.3) for k, v in base.items()}
    for i, name in enumerate(NAMES):
        moved = {}
        for k, v in base.items():
            own = torch.randn(v.shape, generator=g) * (torch.rand(v.shape, generator=g) < 0.2)
            moved[k] = (v.float() + 0.01 * (own + (i < 2) * common[k])).to(request.param)
        save(root / name, moved, root / "made")
    return root


@pytest.fixture(scope="module")
def measured(checkpoints):
    return measure(checkpoints / "base", {n: checkpoints / n for n in NAMES})


def exact_updates(root) -> dict[str, np.ndarray]:
    """tensor -> [M, n] float64 updates, in the order of the measurement."""
    base = load_file(root / "base" / "model.safetensors")
    models = [load_file(root / n / "model.safetensors") for n in NAMES]
    return {k: np.stack([(m[k].float() - base[k].float()).double().flatten().numpy() for m in models]) for k in base}


def exact_support(root, criterion: str) -> dict[str, np.ndarray]:
    """tensor -> [M, n] bool, from the definition."""
    base = load_file(root / "base" / "model.safetensors")
    out = {}
    for k, w in base.items():
        rows = []
        for n in NAMES:
            x = load_file(root / n / "model.safetensors")[k]
            d = (x.float() - w.float()).flatten().abs()
            if criterion == "nonzero":
                rows.append(d != 0)
            elif criterion == "bf16":
                rows.append((x.bfloat16() != w.bfloat16()).flatten())
            elif criterion == "relative":
                rows.append(d > 1e-3 * torch.maximum(x.float().abs(), w.float().abs()).flatten())
            else:
                limit = next(2.0**e for e in range(-126, 128) if (d >= 2.0**e).float().mean() <= 0.1)
                rows.append(d >= limit)
        out[k] = torch.stack(rows).numpy()
    return out


@pytest.mark.parametrize("criterion", CRITERIA)
def test_footprints_and_overlaps_are_those_of_the_definition(checkpoints, measured, criterion):
    support = exact_support(checkpoints, criterion)
    for t, name in enumerate(measured.tensors):
        m = support[name].astype(np.int64)
        assert (measured.supports[criterion][t] == m @ m.T).all(), name
    whole = np.concatenate([support[n] for n in measured.tensors], axis=1)
    a = analyze(measured)
    row = next(r for r in a.results["updates"] if r["model"] == "code")
    assert row[f"changed_{criterion}"] == pytest.approx(whole[1].mean())
    pair = next(r for r in a.results["pairs"] if (r["a"], r["b"]) == ("math", "code"))
    both, either = (whole[0] & whole[1]).sum(), (whole[0] | whole[1]).sum()
    assert pair[f"jaccard_{criterion}"] == pytest.approx(both / either)
    assert pair[f"overlap_{criterion}"] == pytest.approx(both / min(whole[0].sum(), whole[1].sum()))
    expected = sum(support[n][0].mean() * support[n][1].mean() * support[n].shape[1] for n in measured.tensors)
    assert pair[f"lift_{criterion}"] == pytest.approx(both / expected)
    assert pair[f"expected_overlap_{criterion}"] == pytest.approx(expected / min(whole[0].sum(), whole[1].sum()))


def test_independent_supports_meet_their_expectation(tmp_path):
    g = torch.Generator().manual_seed(1)
    tiny.model().save_pretrained(tmp_path / "made")
    base = load_file(tmp_path / "made" / "model.safetensors")
    save(tmp_path / "base", base, tmp_path / "made")
    for name in ("a", "b"):
        moved = {k: v + 0.1 * (torch.rand(v.shape, generator=g) < 0.2) for k, v in base.items()}
        save(tmp_path / name, moved, tmp_path / "made")
    stats = measure(tmp_path / "base", {n: tmp_path / n for n in "ab"}, rank_every=0)
    (pair,) = analyze(stats).results["pairs"]
    assert pair["lift_nonzero"] == pytest.approx(1, abs=0.05) and pair["sign_agreement"] == 1
    assert pair["jaccard_nonzero"] == pytest.approx(0.04 / 0.36, abs=0.01)


def test_geometry_is_exact_per_tensor_module_layer_and_whole(checkpoints, measured):
    updates = exact_updates(checkpoints)
    base = load_file(checkpoints / "base" / "model.safetensors")
    a = analyze(measured)

    def check(level, group, names):
        d = np.concatenate([updates[n] for n in names], axis=1)
        w = math.sqrt(sum(float(base[n].double().square().sum()) for n in names))
        for k, model in enumerate(NAMES):
            row = next(r for r in a.tables["updates"] if (r["level"], r["group"], r["model"]) == (level, group, model))
            assert row["norm"] == pytest.approx(np.linalg.norm(d[k]), rel=1e-5)
            assert row["relative_norm"] == pytest.approx(np.linalg.norm(d[k]) / w, rel=1e-5)
            assert row["max_abs"] == pytest.approx(np.abs(d[k]).max()) and row["parameters"] == d.shape[1]
        for r in a.tables["pairs"]:
            if (r["level"], r["group"]) == (level, group):
                i, j = NAMES.index(r["a"]), NAMES.index(r["b"])
                cosine = d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
                assert r["cosine"] == pytest.approx(cosine, abs=1e-6)
                both = (d[i] != 0) & (d[j] != 0)
                assert r["sign_agreement"] == pytest.approx((np.sign(d[i]) == np.sign(d[j]))[both].mean())

    check("model", "all", measured.tensors)
    check("layer", "1", [n for n in measured.tensors if ".layers.1." in n])
    check("module", "down_proj", [n for n in measured.tensors if "down_proj" in n])
    check("tensor", measured.tensors[0], measured.tensors[:1])
    cosine = a.results["cosine"]
    assert cosine[0, 1] > 0.3 and abs(cosine[0, 2]) < 0.05


def test_ranks_are_those_of_the_singular_values(checkpoints, measured):
    updates = exact_updates(checkpoints)
    assert len(measured.ranks) == sum(len(s) == 2 for s in measured.shapes)
    for t, found in measured.ranks.items():
        for k in range(3):
            sigma = np.linalg.svd(updates[measured.tensors[t]][k].reshape(measured.shapes[t]), compute_uv=False)
            p = sigma[sigma > 0] / sigma.sum()
            assert found["effective"][k] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
            assert found["stable"][k] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)


def test_rank_of_known_matrices():
    w = torch.zeros(48 * 20)
    u, _ = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(1)))
    for shape, x in (((48, 20), u @ v.T), ((20, 48), v @ u.T)):
        sigma = spectrum(w, x.contiguous().flatten(), shape)
        assert sigma[:5] == pytest.approx(np.ones(5), abs=1e-4) and stable_rank(sigma) == pytest.approx(5, rel=1e-4)
    assert effective_rank(np.array([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.zeros(3)) == 0 == stable_rank(np.zeros(3))


def test_projected_cosine_is_unbiased_with_the_stated_spread():
    """200 projections of two updates, each made of three tensors, to 256 dimensions."""
    g = torch.Generator().manual_seed(2)
    tensors = []
    for n in (700, 4000, 333):
        a = torch.randn(n, generator=g)
        tensors.append((a, 0.6 * a + 0.8 * torch.randn(n, generator=g)))
    a, b = (torch.cat([pair[k] for pair in tensors]).double() for k in (0, 1))
    true = float(a @ b / a.norm() / b.norm())
    found = []
    for seed in range(200):
        sketch = [
            sum(count_sketch(p[k], size=256, seed=seed, name=str(t)) for t, p in enumerate(tensors)) for k in (0, 1)
        ]
        found.append(projected_cosine(torch.stack(sketch).numpy())[0, 1])
    stated = math.sqrt((1 + true**2) / 256)
    assert abs(np.mean(found) - true) < 4 * stated / math.sqrt(200)
    assert np.std(found) < 1.1 * stated


def test_the_projection_of_a_measurement_is_the_sum_over_its_tensors(checkpoints, measured):
    a = analyze(measured)
    error = np.abs(a.results["projected_cosine"] - a.results["cosine"])
    assert (error <= 4 * a.results["projected_std_at_most"]).all() and error[0, 1] > 0
    again = measure(checkpoints / "base", {n: checkpoints / n for n in NAMES}, rank_every=0, seed=1)
    assert not np.allclose(again.sketch, measured.sketch) and again.ranks == {}


def test_the_large_threshold_is_the_least_power_of_two():
    exponents = np.zeros((2, 256), np.int64)
    exponents[0, [0, 100, 101, 102]] = 50, 30, 15, 5
    exponents[1, 0] = 100
    assert large_exponents(exponents).tolist() == [102, 1]
    exponents[0, [101, 102]] = 15, 10  # 10 of 105, then exactly 10 of 100
    exponents[0, 0] = 45
    assert large_exponents(exponents)[0] == 102
    assert large_exponents(exponents, 0.25)[0] == 101


def test_names_of_layers_and_modules():
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == 12 and layer_of("model.norm.weight") is None
    assert module_of("model.layers.12.self_attn.q_proj.weight") == "q_proj"
    assert module_of("model.embed_tokens.weight") == "embed_tokens" and module_of("gate") == "gate"


def test_the_command_writes_everything(checkpoints, tmp_path):
    models = [f"{n}={checkpoints / n}" for n in NAMES]
    base = ["--base", str(checkpoints / "base"), "--threads", "1"]
    assert main(["weights", *base, "--models", *models, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "weights.json").read_text())
    assert found["definitions"]["changed_relative"] and len(found["results"]["pairs"]) == 3
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".csv", ".svg"}


def test_bad_input_is_found_before_any_weight_is_read(checkpoints, tmp_path, monkeypatch):
    tiny.model("llama").save_pretrained(tmp_path / "llama")
    tiny.model(vocab=90).save_pretrained(tmp_path / "small")
    tiny.model().save_pretrained(tmp_path / "nan")
    broken = load_file(tmp_path / "nan" / "model.safetensors")
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, tmp_path / "nan" / "model.safetensors")
    base = checkpoints / "base"
    with pytest.raises(InputError, match=r"model.norm.weight of x or of .* has NaN or infinite elements"):
        measure(base, {"x": tmp_path / "nan"}, rank_every=0)
    monkeypatch.setattr(weights, "tensor_of", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="tensors that"):
        measure(base, {"x": tmp_path / "llama"})
    with pytest.raises(InputError, match="vocabulary sizes differ by 7 rows"):
        measure(base, {"x": tmp_path / "small"})
    with pytest.raises(InputError, match="absent does not exist"):
        measure(base, {"x": tmp_path / "absent"})
    with pytest.raises(InputError, match="at least one model"):
        measure(base, {})
