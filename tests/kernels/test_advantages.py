"""group_advantages against its definition, group by group in float64, and its promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m2rl_kernels import group_advantages
from m2rl_kernels.advantages import MODES, group_advantages_op, group_advantages_ref

NAN = float("nan")
groups_of_rewards = st.lists(
    st.lists(st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0]), st.floats(-100, 100, width=32)), max_size=9),
    min_size=1,
    max_size=8,
)


def flat(groups, dtype=torch.float64):
    rewards = torch.tensor([r for g in groups for r in g], dtype=dtype)
    return rewards, torch.tensor([0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()])


@settings(deadline=None, max_examples=150)
@given(groups_of_rewards, st.sampled_from(MODES))
def test_equals_the_definition_on_ragged_groups(groups, mode):
    rewards, offsets = flat(groups)
    got, want = group_advantages(rewards, offsets, mode), group_advantages_ref(rewards, offsets, mode)
    assert torch.equal(got.live, want.live)
    for name in ("adv", "mean", "std"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-9, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(groups_of_rewards, st.sampled_from(MODES))
def test_float32_rewards_are_as_good_as_float64(groups, mode):
    rewards, offsets = flat(groups, torch.float32)
    got, want = group_advantages(rewards, offsets, mode), group_advantages_ref(rewards, offsets, mode)
    torch.testing.assert_close(got.adv.double(), want.adv, rtol=1e-6, atol=1e-6)
    assert got.adv.dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(groups_of_rewards, st.sampled_from(MODES))
def test_dead_groups_and_missing_samples_are_exactly_zero(groups, mode):
    rewards, offsets = flat(groups)
    got = group_advantages(rewards, offsets, mode)
    assert not got.adv[~got.live].any() and not got.live[rewards.isnan()].any()
    for g, group in enumerate(groups):
        present = [r for r in group if r == r]
        live = got.live[offsets[g] : offsets[g + 1]]
        assert bool(live.any()) == (len(set(present)) > 1)
        if len(set(present)) <= 1:
            assert got.std[g] == 0


def test_the_paper_s_setting_by_hand():
    """A = (r - mean) / (std_unbiased + 1e-6) over a group of 16."""
    r = torch.tensor([1.0] * 4 + [0.0] * 12)
    got = group_advantages(r, torch.tensor([0, 16]))
    std = (4 * 0.75**2 + 12 * 0.25**2) / 15
    assert got.adv[0].item() == pytest.approx(0.75 / (std**0.5 + 1e-6), rel=1e-6)
    assert got.adv.sum().abs() < 1e-6


def test_rloo_is_the_leave_one_out_baseline():
    r = torch.tensor([3.0, 1.0, 2.0, NAN, 7.0])
    got = group_advantages(r, torch.tensor([0, 5]), "rloo").adv
    others = torch.tensor([(1 + 2 + 7) / 3, (3 + 2 + 7) / 3, (3 + 1 + 7) / 3, 0, (3 + 1 + 2) / 3])
    torch.testing.assert_close(got, torch.where(r.isnan(), 0.0, r - others))


def test_a_common_offset_costs_no_accuracy():
    """E[x^2] - mean^2 would lose everything here."""
    small = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    a = group_advantages(small, torch.tensor([0, 4])).adv
    b = group_advantages(small + 2.0**26, torch.tensor([0, 4])).adv
    torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


def test_equal_rewards_whose_mean_rounds_are_dead():
    r = torch.full((3,), 0.1, dtype=torch.float64)  # 3 * 0.1 / 3 != 0.1
    assert (r.sum() / 3 != r[0]) and not group_advantages(r, torch.tensor([0, 3])).live.any()


@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_reward_is_not_a_missing_one(mode):
    """It is a mistake that must show, and not become a finite advantage."""
    inf = float("inf")
    rewards, offsets = flat([[inf, 0, 1, NAN], [inf, -inf], [-inf, -inf], [1, 2]])
    got, want = group_advantages(rewards, offsets, mode), group_advantages_ref(rewards, offsets, mode)
    torch.testing.assert_close(got.adv, want.adv, equal_nan=True)
    assert got.live.tolist() == [True, True, True, False, True, True, False, False, True, True]
    assert not got.adv[[0, 1, 2, 4, 5]].isfinite().any() and not got.adv[[3, 6, 7]].any()
    assert got.adv[8:].isnan().all() if mode == "batch_std" else got.adv[8:].isfinite().all()


def test_groups_do_not_see_each_other():
    rewards, offsets = flat([[0, 1, 1], [1e6, -1e6], [0.5, 0.25]])
    for mode in ("grpo", "dr_grpo", "rloo"):
        together = group_advantages(rewards, offsets, mode).adv
        alone = [
            group_advantages(rewards[a:b], torch.tensor([0, b - a]), mode).adv for a, b in ((0, 3), (3, 5), (5, 7))
        ]
        assert torch.equal(together, torch.cat(alone))


def test_broadcast_to_tokens():
    rewards, offsets = flat([[0.0, 1.0], [1.0, 0.0, 0.0]])
    cu = torch.tensor([0, 2, 2, 5, 6, 10], dtype=torch.int32)
    got = group_advantages(rewards, offsets, cu_seqlens=cu)
    assert torch.equal(got.token_adv, got.adv.repeat_interleave(cu.long().diff()))
    assert torch.equal(got.token_adv, group_advantages(rewards, offsets, cu_seqlens=cu, total_tokens=10).token_adv)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, "rewards must be float32 or float64"),
        ({"mode": "mean"}, "mode must be one of grpo, dr_grpo, rloo, batch_std, got 'mean'"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"group_offsets": torch.tensor([0, 3])}, "group_offsets must rise from 0 to 4"),
        ({"group_offsets": torch.tensor([0, 3, 2, 4])}, "group_offsets must rise"),
        ({"group_offsets": torch.tensor([0.0, 4.0])}, "group_offsets must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, "cu_seqlens must have S.1 = 5 entries"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4]), "total_tokens": 9}, "cu_seqlens must rise from 0 to 9"),
        ({"cu_seqlens": torch.tensor(4)}, r"cu_seqlens must be int32 or int64 .* got torch.int64 \[\]"),
        ({"eps": NAN}, "eps must be at least 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**{"rewards": torch.zeros(4), "group_offsets": torch.tensor([0, 4]), **change})


def test_registered_operation_passes_opcheck():
    rewards, offsets = flat([[0, 1, 1], [1, 0]])
    torch.library.opcheck(group_advantages_op, (rewards, offsets, "grpo", 1e-6, torch.tensor([0, 1, 2, 4, 5, 9]), 9))
