"""linear_logprob beside eager torch, torch.compile, TRL's formula, cut-cross-entropy and Liger's two: its scaled
cross-entropy (a Hopper kernel on sm_90, chunks of 512 tokens elsewhere) and its chunked GRPO loss.

    pytest bench/bench_linear_logprob.py --benchmark-only [-s]         a few shapes, CPU or GPU
    python bench/bench_linear_logprob.py [--full] [--out FILE]         the tables
    python bench/bench_linear_logprob.py --products [--out FILE]       TFLOP/s of each product (GPU): the kill test

Modes: `forward`; `both` = forward and backward to hidden and weight; `dead` = both, with 40% of the rows dead. The
upstream gradient is that of an on-policy policy gradient, c = -advantage / N with one advantage per sequence of 64
tokens, so that Liger's loss (which returns no log-probabilities) can be held to the same gradients. Floor: the bare
products of the mode (1 or 3, over live rows) by torch.mm in the same dtype and run, and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from bench_token_logprob import SEQUENCE, trl
from m2rl_kernels import linear_logprob

QWEN3_HEADS = {"0.6B": 1024, "1.7B": 2048, "4B": 2560, "8B": 4096}  # hidden width; vocabulary 151936
MODES = ("forward", "both", "dead")


def shapes(full: bool) -> list[tuple[int, int, int]]:
    """(N, V, H)"""
    if torch.cuda.is_available():
        tokens, heads = ((2048, 8192, 16384, 32768), QWEN3_HEADS) if full else ((2048, 8192), ("0.6B", "4B"))
        return [(N, 151936, QWEN3_HEADS[head]) for head in heads for N in tokens]
    return [(4096, 220, 128), (256, 32768, 1024)] + ([(512, 151936, 1024), (1024, 32768, 256)] if full else [])


class Case:
    def __init__(self, N, V, H, mode):
        device = protocol.device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        g = torch.Generator(device).manual_seed(0)
        self.N, self.V, self.H, self.mode = N, V, H, mode
        self.x = torch.randn(N, H, generator=g, device=device).to(dtype)
        self.w = (torch.randn(V, H, generator=g, device=device) * 2 / H**0.5).to(dtype)
        self.y = torch.randint(V, (N,), generator=g, device=device)
        self.advantage = torch.randn(N // SEQUENCE, generator=g, device=device)
        dead = torch.rand(N // SEQUENCE, generator=g, device=device) < (0.4 if mode == "dead" else 0.0)
        self.advantage[dead] = 0
        self.live = (~dead).repeat_interleave(SEQUENCE)
        self.live_rows = int(self.live.sum())
        self.c = -self.advantage.repeat_interleave(SEQUENCE) / N
        if mode != "forward":
            self.x.requires_grad_(), self.w.requires_grad_()

    def describe(self):
        return {
            "mode": self.mode,
            "N": self.N,
            "V": self.V,
            "H": self.H,
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "live": self.live_rows,
        }

    def finish(self, logp):
        """What a provider of log-probabilities returns: them, and the gradients in the modes that have them."""
        if self.mode == "forward":
            return {"logp": logp}
        dx, dw = torch.autograd.grad((logp.float() * self.c).sum(), (self.x, self.w))
        return {"logp": torch.where(self.live, logp.detach(), 0.0), "dX": dx, "dW": dw}

    def oracle(self):
        """float64, a chunk of rows at a time."""
        x, w = self.x.detach(), self.w.detach().double()
        logp = torch.zeros(self.N, dtype=torch.float64, device=x.device)
        dx, dw = torch.zeros(x.shape, dtype=torch.float64, device=x.device), torch.zeros_like(w)
        for r in range(0, self.N, 256):
            rows = slice(r, min(r + 256, self.N))
            z = (x[rows].double() @ w.T).log_softmax(-1)
            at = self.y[rows, None]
            logp[rows] = torch.where(self.live[rows], z.gather(1, at)[:, 0], 0.0)
            if self.mode != "forward":
                dz = z.exp_().neg_()
                dz.scatter_add_(1, at, torch.ones_like(at, dtype=torch.float64)).mul_(self.c[rows, None].double())
                dx[rows] = dz @ w
                dw += dz.T @ x[rows].double()
        return {"logp": logp} if self.mode == "forward" else {"logp": logp, "dX": dx, "dW": dw}

    def floor(self) -> protocol.Provider:
        """Bare products over the live rows; the [rows, V] operand in chunks of 4096 rows, as nobody needs it whole."""
        x, w = self.x.detach()[: self.live_rows], self.w.detach()
        E = torch.randn(min(4096, len(x)), self.V, device=x.device).to(x.dtype)

        def products():
            for part in x.split(4096):
                torch.mm(part, w.T, out=E[: len(part)])
                if self.mode != "forward":
                    torch.mm(E[: len(part)], w)
                    torch.mm(E[: len(part)].T, part)
            return {}

        return products


def providers(case: Case, full: bool) -> dict[str, protocol.Provider | str]:
    cuda = case.x.is_cuda
    live = case.live if case.mode == "dead" else None

    def eager(x, w, y):
        return (x @ w.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]

    found: dict[str, protocol.Provider | str] = {
        "ours": lambda: case.finish(linear_logprob(case.x, case.w, case.y, live=live)),
        "ours, no cache": lambda: case.finish(linear_logprob(case.x, case.w, case.y, live=live, cache_bytes=0)),
        "eager": lambda: case.finish(eager(case.x, case.w, case.y)),
    }
    if case.mode == "forward":
        found["ours, entropy"] = lambda: {"logp": linear_logprob(case.x, case.w, case.y, return_entropy=True)[0]}
    if cuda or full:
        compiled = torch.compile(eager, dynamic=False)
        found["torch.compile"] = lambda: case.finish(compiled(case.x, case.w, case.y))
    else:
        found["torch.compile"] = "on the CPU only with --full (a minute of compilation)"
    found["TRL formula"] = lambda: case.finish(trl(case.x @ case.w.T, case.y))
    try:
        from cut_cross_entropy import linear_cross_entropy

        if cuda:
            found["CCE exact"] = lambda: case.finish(
                -linear_cross_entropy(case.x, case.w, case.y, reduction="none", filter_eps=None)
            )
            found["CCE"] = lambda: case.finish(-linear_cross_entropy(case.x, case.w, case.y, reduction="none"))
        else:
            found["CCE"] = "its kernels need a GPU"
    except ImportError as problem:
        found["CCE"] = f"not importable: {problem}"
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as ce

        targets = case.y.masked_fill(~case.live, -100)  # its way to skip a row
        found["Liger scaled CE"] = lambda: case.finish(-ce.apply(case.x, case.w, targets))
    except ImportError as problem:
        found["Liger scaled CE"] = f"not importable: {problem}"
    if case.mode == "forward":
        return found
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=cuda)
        B = case.N // SEQUENCE

        def liger():
            x, w = case.x.detach().requires_grad_(), case.w.detach().requires_grad_()
            value = loss(
                x.view(B, SEQUENCE, case.H),
                w,
                case.y.view(B, SEQUENCE),
                torch.ones(B, SEQUENCE, dtype=torch.int64, device=x.device),
                case.advantage,
            )[0]
            dx, dw = torch.autograd.grad(value, (x, w))
            return {"dX": dx, "dW": dw}

        found["Liger GRPO"] = liger
    except ImportError as problem:
        found["Liger GRPO"] = f"not importable: {problem}"
    return found


def run(N, V, H, mode, full=False, rounds=None) -> list[dict]:
    torch.manual_seed(0)
    case = Case(N, V, H, mode)
    rows = protocol.compare(
        "linear_logprob", case.describe(), providers(case, full), case.oracle(), case.floor(), rounds=rounds
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


KILL_TFLOPS = 620  # a fused first product below this gives way to torch.mm and a pass over its result


def products(N=16384, V=151936, H=2560) -> list[dict]:
    """Each product of a step alone, beside cuBLAS and beside other tiles; each is 2 N V H operations. To act on it:
    edit TILES and LOGITS in linear_logprob_triton.py."""
    from m2rl_kernels import linear_logprob_triton as lt

    case = Case(N, V, H, "forward")
    x, w, y = case.x, case.w, case.y
    generation = lt.generation(torch.cuda.get_device_capability()[0])
    E = torch.empty(N, lt.cache_columns(V), dtype=x.dtype, device=x.device)[:, :V]
    dx, dw, scale = torch.empty_like(x), torch.empty_like(w), torch.ones(N, device=x.device)

    def forward(route="fused", tile=None):
        def call():
            old_route, old_tiles = lt.LOGITS[generation], dict(lt.TILES)
            lt.LOGITS[generation] = route
            if tile:
                lt.TILES["forward", generation, 2] = tile
                lt.TILES["guard", generation, 2] = dataclasses.replace(tile, num_stages=2)
            try:
                lt.forward(x, w, y, 1.0, False, E)
            finally:
                lt.LOGITS[generation] = old_route
                lt.TILES.update(old_tiles)
            return {}

        return call

    def grad_hidden(tile=None):
        def call():
            old = dict(lt.TILES)
            if tile:
                lt.TILES["grad_hidden", generation, 2] = tile
            try:
                lt._grad_hidden(E, w, None, dx, scale, True, True)
            finally:
                lt.TILES.update(old)
            return {}

        return call

    calls = {
        "forward, fused": forward(),
        "forward, blas": forward("blas"),
        "torch.mm": lambda: (torch.mm(x, w.T, out=E), {})[1],
        "dX, ours": grad_hidden(),
        "dX, torch.mm": lambda: (torch.mm(E, w, out=dx), {})[1],
        "dW, torch.mm": lambda: (torch.mm(E.T, x, out=dw), {})[1],
    }
    for operation, make in (("forward", lambda t: forward(tile=t)), ("grad_hidden", grad_hidden)):
        shipped = lt.configured(operation, generation, 2)
        for stages in (3, 4):
            for group in (8, 16, 32):
                tile = dataclasses.replace(shipped, num_stages=stages, group=group)
                if tile != shipped:
                    calls[f"{operation}, {stages} stages, group {group}"] = make(tile)
    rows = []
    for name, call in calls.items():
        row = {"kernel": "linear_logprob products", "N": N, "V": V, "H": H, "provider": name}
        try:
            seconds = statistics.median(protocol.interleaved({name: call}, 10, 3)[name])
            row |= {"median_s": seconds, "tflops": 2e-12 * N * V * H / seconds}
            print(f"{name:36} {seconds * 1e3:8.2f} ms {row['tflops']:7.1f} TFLOP/s", flush=True)
        except Exception as problem:  # a tile may need more shared memory than there is
            row["absent"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            print(f"{name:36} {row['absent']}", flush=True)
        rows.append(row)
    verdict = "stays" if rows[0].get("tflops", 0) >= KILL_TFLOPS else "gives way to torch.mm: set LOGITS to 'blas'"
    print(f"kill test, {KILL_TFLOPS} TFLOP/s on H100 and H200: the fused product {verdict}")
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("N", "V", "H"), shapes(full=False))
def test_linear_logprob(benchmark, N, V, H, mode):
    rows = run(N, V, H, mode, rounds=None if torch.cuda.is_available() else 5)
    ours = rows[0]
    benchmark.extra_info["rows"] = rows
    case = Case(N, V, H, mode)
    call = providers(case, False)["ours"]
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    assert ours["error"]["logp"] <= 2e-5


def measure(o: argparse.Namespace) -> list[dict]:
    if not o.products:
        return [row for shape in shapes(o.full) for mode in MODES for row in run(*shape, mode, o.full)]
    if not torch.cuda.is_available():
        sys.exit("--products needs an NVIDIA GPU: torch.cuda.is_available() is False")
    return products()


if __name__ == "__main__":
    protocol.main(measure, products="TFLOP/s of each product, on a GPU")
