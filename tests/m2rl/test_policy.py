"""Packed forward passes equal unpacked ones, for every architecture that users bring."""

import itertools

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from m2rl.policy import ATTENTION, Packed, Policy, _varlen, load_model, packed_attention, shard
from m2rl.types import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_packed_log_probabilities_and_gradients_equal_unpacked_ones(family, tied):
    plain = tiny.model(family, tied)
    policy = Policy(tiny.model(family, tied, attention=ATTENTION))
    sequences = tiny.sequences((5, 17, 2, 9, 8))
    packed = Packed.of(sequences, CPU)
    rows = torch.cat([torch.arange(len(s) - 1) + sum(map(len, sequences[:i])) for i, s in enumerate(sequences)])
    logp, entropy = policy(packed, rows, packed.tokens[rows + 1], 0.7)
    want, want_entropy = [], []
    for s in sequences:
        dist = (plain(input_ids=torch.tensor([s])).logits[0, :-1] / 0.7).log_softmax(-1)
        want.append(dist.gather(1, torch.tensor(s)[1:, None])[:, 0])
        want_entropy.append(-(dist.exp() * dist).sum(-1))
    torch.testing.assert_close(logp, torch.cat(want), atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, torch.cat(want_entropy), atol=5e-5, rtol=0)
    weight = torch.randn(len(logp), generator=torch.Generator().manual_seed(0))
    (logp * weight).sum().backward()
    (torch.cat(want) * weight).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, p in policy.model.named_parameters():
        error = (p.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert error < 1e-5, (name, float(error))


def test_attention_never_crosses_sequences():
    policy = Policy(tiny.model(attention=ATTENTION))
    a, b, c = tiny.sequences((7, 8, 6))
    alone = policy.hidden(Packed.of([b], CPU))
    together = policy.hidden(Packed.of([a, b, c], CPU))[7:15]
    torch.testing.assert_close(alone, together, atol=2e-6, rtol=0)


def stand_in(q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal, scale, window_size, enable_gqa=False, *_):
    """torch's varlen attention by its definition, for a CPU."""
    assert is_causal and window_size == [-1, 0] and longest_q == longest_k
    outputs = []
    for a, b in itertools.pairwise(cu_q.tolist()):
        x, y, z = (t[a:b].transpose(0, 1) for t in (q, k, v))
        out = F.scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs), q.new_zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def test_the_gpu_branch_of_attention_computes_the_same_and_compiles_to_one_graph_for_every_shape():
    """Only the kernel itself differs from a GPU's: the same call of torch's varlen op, layers checkpointed and compiled
    with dynamic shapes."""
    from torch._dynamo.utils import counters
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(stand_in)

    def attention(module, query, key, value, attention_mask, scaling, packed, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _varlen(q, k, v, packed, scaling)[None], None

    want = Policy(tiny.model(attention=ATTENTION))
    batches = [Packed.of(tiny.sequences(lengths), CPU) for lengths in ((5, 17, 2, 9, 8), (30, 3), (7,) * 6)]
    scored = [torch.arange(0, len(packed.tokens), 2) for packed in batches]
    with torch.no_grad():
        expected = [want.hidden(packed)[rows] for packed, rows in zip(batches, scored)]
    AttentionInterface.register(ATTENTION, attention)
    try:
        got = Policy(tiny.model(attention=ATTENTION))
        layers = got.model.get_decoder().layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
            layers[i].compile(dynamic=True, backend="aot_eager", fullgraph=True)
        counters.clear()
        with torch.no_grad():
            for packed, rows, hidden in zip(batches, scored, expected):
                torch.testing.assert_close(got.hidden(packed, rows), hidden, atol=1e-5, rtol=0)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_last_feed_forward_runs_on_scored_rows_only_with_the_same_results_and_gradients(family, checkpointed):
    want, got = (Policy(tiny.model(family, attention=ATTENTION)) for _ in range(2))
    seen = []
    got.model.get_decoder().layers[-1].mlp.down_proj.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
    shard(got, CPU, torch.float32, activation_checkpointing=checkpointed)
    packed, rows = Packed.of(tiny.sequences((5, 17, 2, 9, 8)), CPU), torch.tensor([3, 4, 20, 39])
    hidden, expected = got.hidden(packed, rows), want.hidden(packed)[rows]
    torch.testing.assert_close(hidden, expected, atol=2e-6, rtol=0)
    got.hidden(packed, rows[:2])  # a recomputation takes the rows of its own pass
    hidden.square().sum().backward()
    expected.square().sum().backward()
    assert seen == [4, 2, 4] if checkpointed else seen == [4, 2]
    for p, q in zip(got.parameters(), want.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=2e-6 * float(q.grad.abs().max()) + 1e-9, rtol=1e-4)


def test_packed_layout():
    packed = Packed.of([[5, 6, 7], [8], [9, 10]], CPU)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.max_seqlen == 3
    assert Packed.of([[5], [6], [7, 8], [9]], CPU).runs == ((2, 1), (1, 2), (1, 1))


def test_a_model_with_nan_weights_is_refused_by_name(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = np.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"NaN or infinity in 1 weights, first model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a Hugging Face model folder"):
        load_model(tmp_path)
