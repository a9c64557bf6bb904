"""Runs the Triton kernels of policy_loss and group_advantages in Triton's interpreter against the CPU paths.

A process of its own, because TRITON_INTERPRET is read when the kernels are defined: tests/kernels/test_small_triton.py.
"""

import itertools
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
from m2rl_kernels import advantages, policy_loss_triton  # noqa: E402
from m2rl_kernels.advantages_triton import group_advantages_triton  # noqa: E402
from m2rl_kernels.policy_loss import KINDS, KLS, STATS, policy_loss_cpu  # noqa: E402


def policy_losses():
    for N, cu in ((1300, [0, 3, 3, 700, 1300]), (1, [0, 1]), (512, [0, 512]), (513, [0, 513])):
        g = torch.Generator().manual_seed(N)
        f = lambda: torch.randn(N, generator=g) * 0.4 - 1  # noqa: E731, B023
        for kind, kl, on_policy in itertools.product(KINDS, KLS, (False, True)):
            weight = torch.rand(N, generator=g)
            weight[::5] = 0
            # dual clip, TIS cap; a strictly on-policy ratio is 1 and reaches neither
            options = (None, 2.0) if on_policy else (1.5, None) if kl == "k1" else (1.2, 1.1)
            segment = None if on_policy else torch.randint(-1, 3, (N,), generator=g)
            args = (
                f(),
                None if kl == "k1" else f(),
                f() + 1,
                weight,
                None if on_policy else f(),
                None if kl == "k2" else f(),
                None if kl == "k3" else f(),
                torch.tensor(cu, dtype=torch.int32) if kind == "gspo" else None,
                segment,
                kind,
                0.2,
                0.28,
                *options,
                kl,
                0.0 if kl == "k2" else 0.3,
                0.0 if kl == "k3" else 0.1,
                3,
            )
            want = policy_loss_cpu(*args)
            got = policy_loss_triton.policy_loss_triton(*args, len(STATS))
            again = policy_loss_triton.policy_loss_triton(*args, len(STATS))
            for name, w, x, y in zip(("loss", "stats", "grad_logp", "grad_entropy"), want, got, again):
                assert torch.equal(x, y), f"{name} is not repeatable: {kind} {kl} N={N}"
                error = (w - x).abs().max() if w.numel() else 0
                bound = 2e-6 * max(1.0, float(w.abs().max()) if w.numel() else 0)
                assert error <= bound, f"{name} is off by {error}: {kind} {kl} N={N} on_policy={on_policy}"


def poisoned_dead_tokens():
    logp, nan = torch.full((600,), -1.0), torch.full((600,), float("nan"))
    weight = torch.ones(600)
    weight[1::2] = 0
    bad = torch.where(weight == 0, nan, torch.ones(600))
    loss, _, grad, _ = policy_loss_triton.policy_loss_triton(
        logp,
        None,
        bad,
        weight,
        None,
        bad,
        None,
        None,
        None,
        "grpo",
        0.2,
        0.28,
        None,
        2.0,
        "k3",
        0.1,
        0.0,
        1,
        len(STATS),
    )
    assert loss.isfinite() and grad.isfinite().all() and not grad[1::2].any()


def group_advantages():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(300, generator=g)
    r[::7], r[10:20] = float("nan"), 1.0
    infinite = r.clone()
    infinite[5], infinite[20], infinite[21] = torch.inf, -torch.inf, torch.inf
    offsets = torch.tensor([0, 10, 20, 20, 22, 200, 300])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(0, 700, (300,), generator=g).cumsum(0)])
    for mode in advantages.MODES:
        for rewards, tokens in ((r, cu), (r.double(), None), (infinite, cu)):
            want = advantages.group_advantages(rewards, offsets, mode, cu_seqlens=tokens)
            got = group_advantages_triton(rewards, offsets, mode, 1e-6, tokens, int(cu[-1]))
            for name, w, x in zip(want._fields, want, got):
                if w is not None:
                    torch.testing.assert_close(x, w, rtol=2e-7, atol=1e-7, equal_nan=True, msg=f"{mode} {name}")


if __name__ == "__main__":
    policy_losses()
    poisoned_dead_tokens()
    group_advantages()
    print("ok")
    sys.exit(0)
