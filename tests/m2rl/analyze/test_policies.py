"""KL estimators against the exact divergence of tiny models; standard errors, neighbourhoods and regression against
their definitions."""

import itertools
import json
import math

import numpy as np
import pytest
import tiny
import torch

from m2rl.analyze import information, policies
from m2rl.analyze.__main__ import main
from m2rl.analyze.policies import (
    Divergences,
    KLMatrix,
    Library,
    analyze,
    divergences,
    estimate,
    explain,
    kl_matrix,
    neighbours,
    regress,
    token_logprobs,
    transfer_table,
)
from m2rl.analyze.sampling import sample_models
from m2rl.evaluate import Evaluator
from m2rl.policy import Policy, load_model
from m2rl.samples import read_samples, write_samples
from m2rl.types import InputError, Prompt, Sample

V = 7


@pytest.fixture(scope="module")
def tiny_policies(tmp_path_factory):
    """Three models of seven tokens, loaded as the analyses load them."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {}
    for i, name in enumerate("abc"):
        tiny.model(vocab=V, seed=i).save_pretrained(folder / name)
        made[name] = Policy(load_model(folder / name)).eval().requires_grad_(False)
    return made


def every_response(prompt: Prompt, length: int) -> list[Sample]:
    return [
        Sample(prompt, i, list(tokens), [0.0] * length, "length", 0, reward=0.0)
        for i, tokens in enumerate(itertools.product(range(V), repeat=length))
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_all_three_estimators_have_the_exact_divergence_as_their_mean(tiny_policies, temperature):
    """Over all 49 responses of two tokens, weighted by their probability, nothing is left to chance."""
    a, b = tiny_policies["a"], tiny_policies["b"]
    samples = every_response(Prompt("math/0", "math", (3, 4, 5), "", {}), 2)
    sequences = [policies.sequence_of(s) for s in samples]
    log_a, log_b = (np.array([x.sum() for x in token_logprobs(p, sequences, temperature=temperature)]) for p in (a, b))
    weight = np.exp(log_a)
    assert weight.sum() == pytest.approx(1, abs=1e-5)
    exact = float((weight * (log_a - log_b)).sum())
    assert exact > 0.05
    found = divergences(a, b, samples, temperature=temperature)
    for values in (found.k1, found.k3, found.full):
        assert float((weight * values).sum()) == pytest.approx(exact, rel=1e-4)
    assert (found.full >= 0).all() and (found.k3 >= 0).all() and (found.k1 < 0).any()
    assert found.tokens.tolist() == [2.0] * 49


def test_sampled_estimates_agree_within_their_standard_errors_and_full_has_the_least(tiny_policies):
    a, b = tiny_policies["a"], tiny_policies["b"]
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"math/{i}", "math", (3, int(4 + i % 3), i % 5), "", {}) for i in range(24)]
    samples, exact = [], []
    for p in prompts:
        every = every_response(p, 2)
        sequences = [policies.sequence_of(s) for s in every]
        log_a, log_b = (np.array([x.sum() for x in token_logprobs(q, sequences)]) for q in (a, b))
        weight = np.exp(log_a)
        exact.append(float((weight * (log_a - log_b)).sum()))
        samples += [every[i] for i in rng.choice(49, size=12, p=weight / weight.sum())]
    found = divergences(a, b, samples)
    estimates = {k: estimate(getattr(found, k), found.tokens, found.prompt) for k in policies.ESTIMATORS}
    for e in estimates.values():
        assert abs(e.nats - np.mean(exact)) < 4 * e.se and e.prompts == 24
        assert e.nats_per_token == pytest.approx(e.nats / 2)
    assert estimates["full"].se < estimates["k1"].se


def test_environment_tokens_do_not_count(tiny_policies):
    p = Prompt("agent/0", "agent", (3, 4), "", {})
    whole = Sample(p, 0, [5, 6, 2], [0.0] * 3, "stop", 0, reward=1.0)
    masked = Sample(p, 0, [5, 6, 2], [0.0] * 3, "stop", 0, mask=[True, False, True], reward=1.0)
    a, b = tiny_policies["a"], tiny_policies["b"]
    every, some = divergences(a, b, [whole]), divergences(a, b, [masked])
    logp = [token_logprobs(q, [policies.sequence_of(whole)])[0] for q in (a, b)]
    difference = logp[0] - logp[1]
    assert every.k1[0] == pytest.approx(difference.sum(), abs=1e-5)
    assert some.k1[0] == pytest.approx(difference[[0, 2]].sum(), abs=1e-5) and some.tokens[0] == 2


def test_token_logprobs_are_those_of_a_plain_forward_in_any_packing(tiny_policies):
    model = tiny.model(vocab=V, seed=0)
    rng = np.random.default_rng(3)
    sequences = []
    for n in (2, 9, 5, 17, 3):
        mask = np.zeros(n, bool)
        mask[rng.integers(1, n) :] = True
        sequences.append((rng.integers(0, V, n).tolist(), mask))
    for tokens_per_bin in (20, 1000):
        found = token_logprobs(tiny_policies["a"], sequences, tokens_per_bin=tokens_per_bin)
        for (tokens, mask), got in zip(sequences, found):
            with torch.no_grad():
                logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            want = [float(logp[i - 1, tokens[i]]) for i in np.flatnonzero(mask)]
            assert got == pytest.approx(want, abs=1e-5)


def test_standard_errors_take_the_prompt_as_the_unit():
    values = np.array([1.0, 3.0, 2.0, 6.0, 10.0, 2.0])
    tokens = np.array([2.0, 4.0, 1.0, 1.0, 5.0, 5.0])
    e = estimate(values, tokens, ["p", "p", "q", "q", "r", "r"])
    y, n = np.array([2.0, 4.0, 6.0]), np.array([3.0, 1.0, 5.0])
    assert e.nats == 4.0 and e.se == pytest.approx(2 / math.sqrt(3))
    assert e.nats_per_token == pytest.approx(y.sum() / n.sum())
    residual = y - e.nats_per_token * n
    assert e.se_per_token == pytest.approx(math.sqrt((residual**2).sum() * 3 / 2) / 9)
    assert math.isnan(estimate(values[:2], tokens[:2], ["p", "p"]).se)


def made_matrix(nats: dict[tuple[str, str], list[float]], names: str, domain: str = "math") -> KLMatrix:
    """Divergences with the given nats per prompt."""
    P = len(next(iter(nats.values())))
    prompts = [f"{domain}/{i}" for i in range(P)]
    pairs = {}
    for a, b in itertools.product(names, names):
        v = np.array(nats.get((a, b), [0.0] * P))
        pairs[a, b] = Divergences(prompts, np.ones(P), v, v, v)
    return KLMatrix(list(names), [domain], dict.fromkeys(prompts, domain), pairs)


def test_neighbourhoods_rank_by_distance_and_compare_with_the_base_on_paired_prompts():
    nats = {("m", "0"): [3.0, 5.0], ("m", "x"): [1.0, 2.0], ("m", "y"): [4.0, 8.0]}
    rows = [r for r in neighbours(made_matrix(nats, "0mxy"), "0", "math") if r["policy"] == "m"]
    assert [r["neighbour"] for r in rows] == ["x", "0", "y"]
    assert [r["nearer_than_base"] for r in rows] == [True, False, False]
    assert rows[0]["closer"] == 2.5 and rows[0]["closer_se"] == pytest.approx(0.5)


def test_transfer_averages_the_experts_nearer_than_the_base():
    nats = {
        ("m", "0"): [3.0, 3.0],
        ("m", "x"): [1.0, 1.0],
        ("m", "y"): [2.0, 2.0],
        ("m", "z"): [4.0, 4.0],
        ("0", "x"): [5.0, 5.0],
        ("0", "y"): [2.0, 2.0],
        ("0", "z"): [9.0, 9.0],
    }
    kl = made_matrix(nats, "0mxyz")
    accuracy = {p: {"math": v} for p, v in zip("0mxyz", (0.1, 0.5, 0.9, 0.6, 0.2))}
    kl = KLMatrix(
        kl.names,
        ["math", "if"],
        kl.domain_of | {"if/0": "if"},
        {
            pair: Divergences([*d.prompt, "if/0"], np.ones(3), *([np.append(d.full, d.full[0])] * 3))
            for pair, d in kl.pairs.items()
        },
    )
    both = {p: v | {"if": 0.3} for p, v in accuracy.items()}
    rows = transfer_table(kl, both, base="0", experts={"math": "x", "if": "y"})
    assert {r["policy"] for r in rows if r["domain"] == "math"} == {"0", "m", "y", "z"}
    m = next(r for r in rows if (r["policy"], r["domain"]) == ("m", "math"))
    assert m["own_teacher_kl"] == 1.0 and m["accuracy"] == 0.5
    assert m["neighbours"] == "x y" and m["neighbour_transfer"] == pytest.approx((0.9 + 0.6) / 2)
    base = next(r for r in rows if (r["policy"], r["domain"]) == ("0", "math"))
    assert base["neighbours"] == "y"  # the base has no nearer-than-itself: its nearest expert


def test_regression_matches_least_squares_and_its_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    groups = [f"g{i // 4}" for i in range(80)]
    x = rng.normal(size=(80, 2))
    y = 0.3 * x[:, 0] - 0.5 * x[:, 1] + rng.normal(size=80) * 0.2
    r = regress(y, x, groups, ["u", "v"], resamples=500)
    z = (x - x.mean(0)) / x.std(0)
    design = np.column_stack([np.ones(80), z])
    beta = np.linalg.solve(design.T @ design, design.T @ y)
    residual = y - design @ beta
    se = np.sqrt((residual**2).sum() / 77 * np.diag(np.linalg.inv(design.T @ design)))
    assert r.coefficients == pytest.approx(beta[1:]) and r.se == pytest.approx(se[1:])
    assert r.r2 == pytest.approx(1 - residual.var() / y.var())
    assert r.low[0] < 0.3 * x[:, 0].std() < r.high[0] and r.low[1] < -0.5 * x[:, 1].std() < r.high[1]
    assert r.r2_low < r.r2 < 1 and r.r2_left_out < r.r2 and (r.observations, r.groups) == (80, 20)
    noise = regress(rng.normal(size=80), x, groups, ["u", "v"], resamples=200)
    assert noise.r2_left_out < 0.1 and noise.low[0] < 0 < noise.high[0]
    with pytest.raises(InputError, match="at least 4 observations, got 3"):
        regress(y[:3], x[:3], groups[:3], ["u", "v"])


def test_the_explanation_takes_domain_difficulty_out():
    table = []
    for d, level in (("math", 0.9), ("if", 0.1)):
        table += [
            {
                "policy": f"p{i}",
                "domain": d,
                "accuracy": level - 0.05 * i,
                "own_teacher_kl": float(i),
                "neighbour_transfer": 0.3 * ((i * 7) % 5),
            }
            for i in range(6)
        ]
    found = explain(table, resamples=50)
    assert found["own_teacher_kl"].r2 == pytest.approx(1) and found["own_teacher_kl"].coefficients[0] < 0
    assert found["neighbour_transfer"].r2 < 0.5 and found["mixture"].r2 == pytest.approx(1)


def test_a_library_holds_as_many_policies_as_it_may(embedded_folder):
    library = Library(dict.fromkeys("abc", embedded_folder), keep=2)
    first = library["a"]
    library["b"]
    assert library["a"] is first
    library["c"]
    assert set(library.loaded) == {"a", "c"}


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(embedded_folder, tmp_path_factory):
    """A base and two perturbed models with made-up samples: (folder of models, folder of samples)."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("base", "math", "if")):
        model = load_model(embedded_folder)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.02 * (i > 0))
        model.save_pretrained(root / name)
        for f in embedded_folder.glob("tok*"):
            (root / name / f.name).write_bytes(f.read_bytes())
        samples = []
        for domain in ("math", "if"):
            for j in range(6):
                prompt = Prompt(f"{domain}/{j}", domain, tuple(rng.integers(4, 60, 5).tolist()), f"what {j}", {})
                for k in range(2):
                    tokens = [*rng.integers(4, 60, int(rng.integers(2, 8))).tolist(), 1]
                    samples.append(
                        Sample(
                            prompt,
                            k,
                            tokens,
                            [-1.0] * len(tokens),
                            "stop",
                            0,
                            text=f"3-1=2 \\boxed{{{k}}}",
                            reward=float(rng.random() < 0.3 + 0.2 * i),
                            status="ok",
                        )
                    )
        write_samples(root / "samples" / f"{name}.jsonl", samples, name)
    return root


def command(world, analysis: str, out, *more: str) -> list[str]:
    return [
        analysis,
        "--base",
        "base",
        "--models",
        *(f"{m}={world / m}" for m in ("base", "math", "if")),
        "--experts",
        "math=math",
        "if=if",
        "--samples",
        str(world / "samples"),
        "--threads",
        "1",
        "--out",
        str(out),
        *more,
    ]


def test_the_commands_read_samples_and_write_everything(world, tmp_path):
    for analysis in ("policies", "information", "verification"):
        assert main(command(world, analysis, tmp_path)) == 0
        found = json.loads((tmp_path / f"{analysis}.json").read_text())
        assert found["definitions"] and found["source"] and found["figures"]
        for name in found["tables"]:
            assert (tmp_path / f"{analysis}-{name}.csv").stat().st_size > 50
    found = json.loads((tmp_path / "policies.json").read_text())
    for d in ("math", "if"):
        assert np.diag(np.array(found["results"]["kl"]["full"][d])).tolist() == [0, 0, 0]
    assert set(found["results"]["regressions"]) == {"own_teacher_kl", "neighbour_transfer", "mixture"}
    found = json.loads((tmp_path / "verification.json").read_text())
    assert found["inputs"]["outcome_score"] == "logprob"


def test_a_matrix_agrees_with_its_pairs_and_with_the_column_of_the_base(world):
    models = {m: world / m for m in ("base", "math", "if")}
    samples = {m: read_samples(world / "samples" / f"{m}.jsonl") for m in models}
    kl = kl_matrix(models, samples)
    direct = divergences(
        *(Policy(load_model(models[m])).requires_grad_(False) for m in ("math", "base")), samples["math"]
    )
    assert kl.pairs["math", "base"].full == pytest.approx(direct.full)
    column = policies.kl_to(models, samples, "base")
    assert column.pairs["math", "base"].full == pytest.approx(direct.full) and ("base", "math") not in column.pairs
    accuracy = policies.accuracies(samples)
    a = analyze(kl, accuracy, base="base", experts={"math": "math", "if": "if"}, resamples=50)
    assert len(a.tables["pairs"]) == 2 * 9 and len(a.tables["transfer"]) == 2 * 2
    i = information.analyze(
        column,
        {m: {s.prompt.id: np.array([s.reward]) for s in v} for m, v in samples.items()},
        base="base",
        resamples=50,
    )
    row = next(r for r in i.tables["budgets"] if (r["model"], r["domain"]) == ("math", "if"))
    assert row["nats"] == pytest.approx(kl.estimate("math", "base", "if").nats)


def test_bad_input_ends_before_any_weight_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "load_model", lambda *a: pytest.fail("weights were read"))
    wrong = tmp_path / "wrong"
    tiny.model(vocab=V).save_pretrained(wrong)
    other = tmp_path / "other"
    other.mkdir()
    for f in (world / "base").iterdir():
        (other / f.name).write_bytes(f.read_bytes())
    text = (other / "tokenizer.json").read_text()
    table = json.loads(text)
    words = list(table["model"]["vocab"])
    a, b = words[10], words[11]
    table["model"]["vocab"][a], table["model"]["vocab"][b] = table["model"]["vocab"][b], table["model"]["vocab"][a]
    (other / "tokenizer.json").write_text(json.dumps(table))
    samples = {m: read_samples(world / "samples" / "base.jsonl") for m in ("base", "x")}
    with pytest.raises(InputError, match="not a Hugging Face model folder"):
        kl_matrix({"base": world / "base", "x": tmp_path / "absent"}, samples)
    with pytest.raises(InputError, match=r"not a Hugging Face model|different vocabularies"):
        kl_matrix({"base": world / "base", "x": wrong}, samples)
    with pytest.raises(InputError, match="base and x have different tokenizers: 4 entries differ"):
        kl_matrix({"base": world / "base", "x": other}, samples)
    with pytest.raises(InputError, match="no samples of x: its benchmark is empty"):
        kl_matrix({"base": world / "base", "x": world / "math"}, samples | {"x": []})
    with pytest.raises(InputError, match="at least two policies"):
        kl_matrix({"base": world / "base"}, samples)
    with pytest.raises(InputError, match="absent is not among --models"):
        main([*command(world, "policies", tmp_path), "--experts", "math=absent"])
    with pytest.raises(InputError, match="--models takes name=value, got 'plain'"):
        main([*command(world, "policies", tmp_path), "--models", "plain"])


def test_models_are_sampled_once_and_stale_samples_are_refused(world, tmp_path):
    with Evaluator(world / "base") as evaluator:
        take = evaluator.take
        calls = []
        evaluator.take = lambda w: (calls.append(w), take(w))
        models = {m: world / m for m in ("base", "math")}
        first = sample_models(evaluator, models, ["math"], k=2, problems=3, folder=tmp_path)
        again = sample_models(evaluator, models, ["math"], k=2, problems=3, folder=tmp_path)
        assert len(calls) == 2 and [s.tokens for s in again["math"]] == [s.tokens for s in first["math"]]
        assert len(first["base"]) == 6 and all(s.reward in (0, 1) for s in again["base"])
        with pytest.raises(InputError, match="6 samples of 3 prompts, not the 8 of 4"):
            sample_models(evaluator, models, ["math"], k=2, problems=4, folder=tmp_path)
        with pytest.raises(InputError, match="--benchmarks names none"):
            sample_models(evaluator, models, [])


def test_samples_survive_the_file_and_bad_lines_name_their_place(tmp_path):
    p = Prompt("math/0", "math", (1, 2), "what", {})
    s = Sample(p, 3, [5, 1], [-0.5, -0.25], "stop", 0, mask=[True, False], text="ü", reward=float("nan"))
    write_samples(tmp_path / "a.jsonl", [s], "m")
    (back,) = read_samples(tmp_path / "a.jsonl")
    assert (back.prompt, back.index, back.tokens, back.logp, back.mask, back.text) == (
        p,
        3,
        [5, 1],
        [-0.5, -0.25],
        [True, False],
        "ü",
    )
    assert math.isnan(back.reward)
    (tmp_path / "b.jsonl").write_text('{"domain": "math", "prompt_id": "math/0", "reward": 1}\n')
    assert read_samples(tmp_path / "b.jsonl", tokens=False)[0].reward == 1.0
    with pytest.raises(InputError, match=r"b.jsonl:1: key prompt_tokens is missing"):
        read_samples(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"domain": "math", "prompt_id": "math/0", "reward": "1"}\n')
    with pytest.raises(InputError, match=r"b.jsonl:1: reward must be a number or null, got '1'"):
        read_samples(tmp_path / "b.jsonl", tokens=False)
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no samples"):
        read_samples(tmp_path / "c.jsonl")
