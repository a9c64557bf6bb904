"""Against mergekit itself, where its result is well defined: no ties at the threshold, no exact cancellation.

Needs the `peers` extra. float32: bit for bit, or a stated number of float32 steps where its reductions add in another
order; bfloat16 arithmetic (`compute_dtype`): bit for bit for the elementwise rules. Random masks are not shared
(mergekit's depend on the number of threads), so for DARE ours is put into mergekit.
"""

import pytest
import torch

mergekit = pytest.importorskip("mergekit", reason="mergekit is not installed (pip install 'm2rl[peers]')")
methods = pytest.importorskip("mergekit.merge_methods", reason="this mergekit has no tensor interface (needs 0.1.5)")

from m2rl_kernels.delta_merge import merge_tensors, random_mask_ref  # noqa: E402
from mergekit import sparsify  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from m2rl.merge import main  # noqa: E402

K = 4


def models(sigma=1e-3, dtype=torch.float32, shape=(301, 157), seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g) * 0.05
    return base.to(dtype), [(base + torch.randn(shape, generator=g) * sigma * (k + 1)).to(dtype) for k in range(K)]


def theirs(method, base, experts, **parameters):
    own = {
        key: {k + 1: v for k, v in enumerate(value)} if isinstance(value, list) else value
        for key, value in parameters.items()
    }
    tensors = [base, *experts]
    return methods.merge_tensors(tensors, method, base_index=0, parameters=own)


def steps(a, b):
    """Largest difference in units of the last place of the larger operand."""
    a, b = a.double(), b.double()
    return float(((a - b).abs() / torch.exp2(torch.floor(torch.log2(b.abs().clamp(min=1e-30))) - 23)).max())


def ours(method, base, experts, **options):
    options = {"compute_dtype": "float32" if base.dtype == torch.float32 else "input", **options}
    return merge_tensors([base], [[x] for x in experts], method, preset="mergekit", **options)[0]


CASES = [
    ("task_arithmetic", "task_arithmetic", {}, {}),
    ("task_arithmetic", "task_arithmetic", {"normalize": True}, {"normalize": True}),
    ("task_arithmetic", "task_arithmetic", {"lam": 0.7}, {"lambda": 0.7}),
    ("ties", "ties", {"density": 0.2}, {"density": 0.2}),
    ("ties", "ties", {"density": 0.37, "lam": 0.5}, {"density": 0.37, "lambda": 0.5}),
    ("ties", "ties", {"density": 0.2, "weights": [1, 0.5, 2, 0.1]}, {"density": 0.2, "weight": [1.0, 0.5, 2.0, 0.1]}),
    ("breadcrumbs", "breadcrumbs", {"density": 0.3, "gamma": 0.02}, {"density": 0.3, "gamma": 0.02}),
    ("breadcrumbs_ties", "breadcrumbs_ties", {"density": 0.3}, {"density": 0.3}),
]


@pytest.mark.parametrize("name,peer,options,parameters", CASES)
def test_float32_is_bit_for_bit(name, peer, options, parameters):
    base, experts = models()
    want = theirs(peer, base, experts, **{"weight": 1.0, **parameters})
    assert torch.equal(ours(name, base, experts, **options), want)


@pytest.mark.parametrize("name,peer,options,parameters", CASES[:3])
def test_bfloat16_arithmetic_is_bit_for_bit(name, peer, options, parameters):
    base, experts = models(dtype=torch.bfloat16)
    want = theirs(peer, base, experts, **{"weight": 1.0, **parameters})
    assert torch.equal(ours(name, base, experts, **options), want)


def test_bfloat16_ties_with_distinct_magnitudes_is_bit_for_bit():
    magnitudes = (
        (torch.arange(1, 25_000)).to(torch.int16).view(torch.bfloat16)
    )  # every positive bfloat16 up to ~1e12, once
    g = torch.Generator().manual_seed(0)
    base = torch.zeros_like(magnitudes)
    experts = [
        magnitudes[torch.randperm(len(magnitudes), generator=g)]
        * (torch.randint(2, (len(magnitudes),), generator=g) * 2 - 1).bfloat16()
        for _ in range(K)
    ]
    assert torch.equal(ours("ties", base, experts, density=0.2), theirs("ties", base, experts, weight=1.0, density=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average(dtype):
    _, experts = models(dtype=dtype)
    weights = [1.0, 2.0, 0.5, 1.0]
    want = methods.merge_tensors(experts, "linear", parameters={"weight": dict(enumerate(weights))})
    got = merge_tensors(None, [[x] for x in experts], "average", weights=weights)[0]
    if dtype == torch.bfloat16:
        assert torch.equal(got, want)
    else:
        assert steps(got, want) <= 1  # its addcmul may round once where ours rounds twice


@pytest.mark.parametrize("peer", ["dare_linear", "dare_ties"])
def test_dare_with_our_mask_in_theirs(peer, monkeypatch):
    base, experts = models()
    masks = iter([random_mask_ref(0, "0", k, base.numel(), 0.6).float().view(base.shape) for k in range(K)])
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda p: next(masks))
    want = theirs(peer, base, experts, weight=1.0, density=0.6)
    got = ours(peer, base, experts, density=0.6)
    assert (
        float((got - want).abs().max()) < 3e-8
    )  # of values up to 0.25; the L1 norms are float32 sums there, float64 here


@pytest.mark.parametrize("select", [1.0, 0.3])
def test_sce_where_its_energies_are_large_enough(select):
    base, experts = models(sigma=1e-2)
    want = theirs("sce", base, experts, select_topk=select)
    got = ours("sce", base, experts, density=select)
    far = (got.double() - want.double()).abs() > 8 * 2**-24 * base.double().abs().clamp(min=0.05)
    assert float(far.float().mean()) < 1e-4  # the variance of an element at the threshold may round to the other side


def test_sce_at_rl_size_mergekit_is_uniform_and_the_default_is_not():
    base, experts = models(sigma=1e-4)
    want = theirs("sce", base, experts, select_topk=1.0)
    assert steps(ours("sce", base, experts), want) <= 4  # the preset reproduces the fallback
    delta = torch.stack([x - base for x in experts]).double()
    w = delta.square().mean(1).mean(1)
    s = torch.where(delta.sum(0) >= 0, 1.0, -1.0)
    agree = (delta.sign() == s) * (w / w.sum())[:, None, None]
    authors = base.double() + (agree * delta).sum(0) / agree.sum(0).clamp(min=1e-30)
    default = merge_tensors([base], [[x] for x in experts], "sce")[0]
    assert float((default.double() - authors).abs().max()) < 1e-8
    assert float((want.double() - authors).abs().max()) > 1e-5  # the same call of mergekit is not the authors' rule


@pytest.mark.parametrize("name,peer", [("ram", "ram"), ("ram_plus", "ramplus_tl")])
def test_ram(name, peer):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(5000, generator=g) * 0.05
    experts = [base + torch.randn(5000, generator=g) * 1e-2 * (torch.rand(5000, generator=g) < 0.3) for _ in range(K)]
    assert float((ours(name, base, experts) - theirs(peer, base, experts)).abs().max()) <= 4 * 2**-24 * 0.25


def test_model_stock_and_karcher():
    base, experts = models()
    assert float((ours("model_stock", base, experts) - theirs("model_stock", base, experts)).abs().max()) < 1e-7
    want = methods.merge_tensors(experts, "karcher", parameters={})
    got = merge_tensors(None, [[x] for x in experts], "karcher", preset="mergekit", compute_dtype="float32")[0]
    assert float((got - want).abs().max()) < 1e-6


RECIPES = {  # the shapes of recipe that mergekit's documentation shows
    "linear": "models: [{model: A, parameters: {weight: 1.0}}, {model: B, parameters: {weight: 0.3}}]\n",
    "task_arithmetic": "base_model: BASE\nparameters: {lambda: 0.7}\n"
    "models: [{model: A, parameters: {weight: 0.5}}, {model: B, parameters: {weight: 1}}]\n",
    "ties": """
models:
  - model: BASE
  - model: A
    parameters:
      density: [1, 0.7, 0.1]  # a gradient over the layers
      weight: 1.0
  - model: B
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - filter: self_attn
          value: [0.2, 0.9]
        - value: 0.1
base_model: BASE
parameters:
  normalize: true
  int8_mask: true
tokenizer_source: base
""",
    "breadcrumbs_ties": """
base_model: BASE
models:
  - model: A
    parameters: {density: 0.6, weight: 1, gamma: 0.01}
  - model: B
    parameters: {density: 0.6, weight: 1, gamma: 0.01}
""",
}


@pytest.mark.parametrize("method", RECIPES)
def test_one_recipe_file_gives_both_tools_the_same_weights(method, tmp_path):
    """`mergekit-yaml recipe out` and `python -m m2rl.merge --config recipe --out out` on a small Qwen3, float32."""
    transformers = pytest.importorskip("transformers")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "BASE")
    for name in ("A", "B"):
        for p in model.parameters():
            p.data += 1e-2 * torch.randn_like(p)
        model.save_pretrained(tmp_path / name)
    text = f"merge_method: {method}\ndtype: float32\n" + RECIPES[method].replace("tokenizer_source: base\n", "")
    for name in ("BASE", "A", "B"):
        text = text.replace(f"model: {name}", f"model: {tmp_path / name}")
    (tmp_path / "recipe.yml").write_text(text)
    import yaml

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), MergeOptions())
    assert main(["--config", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "ours")]) == 0
    want, got = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert set(want) == set(got)
    for name, x in want.items():
        # linear: its addcmul may round once where ours rounds twice: a step of the largest weights, ~1
        assert torch.equal(got[name], x) or (method == "linear" and float((got[name] - x).abs().max()) <= 2**-23), name
