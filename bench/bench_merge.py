"""Merging against mergekit, whole process, same checkpoints, in one run; and the kernels alone against torch eager.

    python bench/bench_merge.py --peer-python PEERS/bin/python --out bench/results/merge-cpu.json     (whole process)
    pytest bench/bench_merge.py --benchmark-enable                                                    (kernels)

A generator makes a Qwen3-0.6B-shaped base (596,049,920 parameters, bfloat16, tied) and four experts. Every command
runs alone, with OMP_WAIT_POLICY=passive; wall, CPU seconds and peak anonymous memory are those of the process and its
children. The IO floor is (bytes read + written) over bandwidths measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest

SHAPE = {"hidden": 1024, "layers": 28, "intermediate": 3072, "heads": 16, "kv": 8, "head_dim": 128, "vocab": 151936}
METHODS = {  # ours -> (our flags, mergekit's method, its parameters)
    "average": ([], "linear", {}),
    "task_arithmetic": (["--lambda", "0.5"], "task_arithmetic", {"lambda": 0.5}),
    "dare_linear": (["--density", "0.5"], "dare_linear", {"density": 0.5}),
    "dare_ties": (["--density", "0.5"], "dare_ties", {"density": 0.5}),
    "ties": (["--density", "0.2"], "ties", {"density": 0.2}),
    "sce": (["--density", "1.0"], "sce", {}),
    "sce-select": (["--density", "0.2"], "sce", {"select_topk": 0.2}),
}


# ---- the checkpoints ----


def tensor_shapes(s: dict[str, int]) -> dict[str, tuple[int, ...]]:
    h, q, kv = s["hidden"], s["heads"] * s["head_dim"], s["kv"] * s["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab"], h)}
    for i in range(s["layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (q, h),
            p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.o_proj.weight": (h, q),
            p + "self_attn.q_norm.weight": (s["head_dim"],),
            p + "self_attn.k_norm.weight": (s["head_dim"],),
            p + "mlp.gate_proj.weight": (s["intermediate"], h),
            p + "mlp.up_proj.weight": (s["intermediate"], h),
            p + "mlp.down_proj.weight": (h, s["intermediate"]),
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
        }
    return shapes | {"model.norm.weight": (h,)}


def generate(folder: Path, shape: dict[str, int] = SHAPE) -> None:
    """base, e0 (20 % changed), e1 (5 % changed, sigma 2e-3), e2 (all, 3e-4), e3 (all matrices, 1e-3)."""
    from m2rl.safetensors_io import SINGLE, plan_layout

    shapes = tensor_shapes(shape)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "intermediate_size": shape["intermediate"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "hidden_act": "silu",
    }
    layout = plan_layout([(n, "BF16", s) for n, s in shapes.items()], 1 << 62)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(1 << 24, dtype=np.float32)
    coin = rng.random(1 << 24, dtype=np.float32)

    def draw(source: np.ndarray, n: int) -> np.ndarray:
        start = int(rng.integers(len(source)))
        return np.resize(np.roll(source, -start)[: min(n, len(source))], n)

    models = ["base", "e0", "e1", "e2", "e3"]
    files = []
    for name in models:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=1))
        files.append(open(folder / name / SINGLE, "wb"))  # noqa: SIM115
        files[-1].write(layout.headers[SINGLE])
    for dims in shapes.values():
        n = int(np.prod(dims))
        base = np.ones(n, np.float32) if len(dims) == 1 else draw(pool, n) * 0.02
        base = from_bf16(to_bf16(base))
        files[0].write(to_bf16(base).tobytes())
        for k, (sigma, share) in enumerate(
            [(1e-3, 0.2), (2e-3, 0.05), (3e-4, 1.0), (1e-3 if len(dims) == 2 else 0.0, 1.0)]
        ):
            delta = draw(pool, n) * np.float32(sigma)
            if share < 1:
                delta *= draw(coin, n) < share
            files[k + 1].write(to_bf16(base + delta).tobytes())
    for file in files:
        file.close()


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


# ---- whole processes ----


def measure(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds, peak anonymous and resident MiB of one command (sampled every 5 ms)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = cpu_ticks()
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"RssAnon": 0, "VmHWM": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key = line.split(":")[0]
                    if key in peak:
                        peak[key] = max(peak[key], int(line.split()[1]))
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "user_s": after.ru_utime - before.ru_utime,
        "anon_mib": peak["RssAnon"] / 1024,
        "rss_mib": peak["VmHWM"] / 1024,
        "others_cpu_s": max(0.0, cpu_ticks() - others - cpu),
    }


def cpu_ticks() -> float:
    """CPU seconds all processes of the machine have used."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def bandwidths(folder: Path, read: Path) -> dict[str, float]:
    """GB/s: mapped read of a cached file with all cores, write to the page cache, write and fsync."""
    from concurrent.futures import ThreadPoolExecutor

    with open(read, "rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(view, np.uint64, len(view) // 8)
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(data, cores * 8)

    def scan() -> float:
        start = time.monotonic()
        with ThreadPoolExecutor(cores) as team:
            list(team.map(lambda p: int(np.bitwise_or.reduce(p)), parts))
        return data.nbytes / (time.monotonic() - start) / 1e9

    block = np.random.default_rng(0).integers(0, 1 << 62, 1 << 20, dtype=np.int64).tobytes()

    def write(sync: bool) -> float:
        start = time.monotonic()
        with open(folder / "bandwidth", "wb") as handle:
            for _ in range(64):
                handle.write(block)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        rate = 64 * len(block) / (time.monotonic() - start) / 1e9
        (folder / "bandwidth").unlink()
        return rate

    return {
        "read_gbs": max(scan() for _ in range(3)),
        "write_gbs": max(write(False) for _ in range(3)),
        "write_sync_gbs": max(write(True) for _ in range(3)),
    }


def peer_config(folder: Path, method: str, parameters: dict[str, float]) -> Path:
    import yaml

    shared = {k: v for k, v in parameters.items() if k in ("lambda", "select_topk")}
    own = {"weight": 1.0 if method != "sce" else None, **{k: v for k, v in parameters.items() if k not in shared}}
    own = {k: v for k, v in own.items() if v is not None}
    config: dict[str, object] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "parameters": shared,
        "models": [{"model": str(folder / f"e{k}"), "parameters": own} for k in range(4)],
    }
    if method != "linear":
        config["base_model"] = str(folder / "base")
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def whole_process(args: argparse.Namespace) -> None:
    folder = Path(args.work)
    if not (folder / "e3" / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        generate(folder)
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    size = (folder / "base" / "model.safetensors").stat().st_size
    result: dict[str, object] = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": sys.version.split()[0],
        "model": "Qwen3-0.6B shape, 596049920 parameters, bfloat16, 4 experts",
        "command": "bench/bench_merge.py " + " ".join(args.shown),
        "bandwidth": bandwidths(folder, folder / "base" / "model.safetensors"),
        "bytes_per_model": size,
    }
    rows: dict[str, dict[str, object]] = {}
    result["methods"] = rows
    for method in args.methods:
        flags, peer_method, parameters = METHODS[method]
        command = [
            sys.executable,
            "-m",
            "m2rl.merge",
            "--base",
            str(folder / "base"),
            "--experts",
            *(str(folder / f"e{k}") for k in range(4)),
            "--method",
            method.split("-")[0],
            *flags,
            "--out",
            str(folder / "ours"),
            "--overwrite",
            *([] if args.sync else ["--no-sync"]),
        ]
        ours, peers = [], []
        for _ in range(args.repeat):
            ours.append(measure(command, env))
            shutil.rmtree(folder / "ours")
        if args.peer_python:
            config = peer_config(folder, peer_method, parameters)
            for _ in range(args.peer_repeat):
                tool = str(Path(args.peer_python).with_name("mergekit-yaml"))
                peers.append(measure([tool, str(config), str(folder / "theirs"), "--random-seed", "7"], env))
                shutil.rmtree(folder / "theirs")
        reads = 4 if method == "average" else 5
        band = result["bandwidth"]
        assert isinstance(band, dict)
        floor = (
            reads * size / band["read_gbs"] / 1e9 + size / band["write_sync_gbs" if args.sync else "write_gbs"] / 1e9
        )
        row: dict[str, object] = {"ours": middle(ours), "io_floor_s": floor}
        if peers:
            row["mergekit"] = middle(peers)
            row["ratio"] = {key: middle(peers)[key] / middle(ours)[key] for key in ("wall_s", "cpu_s", "anon_mib")}
        rows[method] = row
        print(method, json.dumps(row, indent=None, default=lambda x: round(x, 3)), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(folder)


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]} | {"runs": len(runs)}


# ---- kernels alone ----

N, K = 1 << 24, 4  # beyond the caches


def _models():
    import torch

    torch.manual_seed(0)
    base = (torch.randn(N) * 0.02).bfloat16()
    return base, [(base.float() + torch.randn(N) * 1e-3).bfloat16() for _ in range(K)]


def eager(method, base, experts):
    import torch

    b = base.float()
    d = torch.stack([x.float() - b for x in experts])
    if method == "average":
        return torch.stack([x.float() for x in experts]).mean(0).bfloat16()
    if method == "task_arithmetic":
        return (b + d.sum(0)).bfloat16()
    if method == "ties":
        for k in range(K):
            bar = d[k].abs().kthvalue(N - int(0.2 * N) + 1).values
            d[k] *= d[k].abs() >= bar
    if method == "dare_linear":
        return (b + (d * (torch.rand_like(d) < 0.5) * 2).sum(0)).bfloat16()
    w = torch.ones(K, 1) if method == "ties" else (d * d).mean(1, keepdim=True)
    s = torch.where((d * w if method == "ties" else d).sum(0) >= 0, 1.0, -1.0)
    agree = d.sign() == s
    return (b + (d * w * agree).sum(0) / (w * agree).sum(0).clamp(min=1e-30)).bfloat16()


@pytest.mark.parametrize("provider", ["ours", "torch eager", "copy of as many bytes"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "dare_linear", "ties", "sce"])
def test_bench_merge(benchmark, method, provider):
    """The floor is a copy that reads and writes as many bytes in all as the method must."""
    import torch
    from m2rl_kernels.delta_merge import merge_tensors

    base, experts = _models()
    options = {"ties": {"density": 0.2}, "dare_linear": {"density": 0.5}}.get(method, {})

    merged = [torch.empty_like(base)]

    def ours():
        return merge_tensors(
            None if method == "average" else [base], [[x] for x in experts], method, out=merged, **options
        )[0]

    if method not in ("ties", "dare_linear"):  # no ties at the threshold, no randomness: the same numbers
        wrong = (ours() != eager(method, base, experts)).float().mean()
        assert wrong < 1e-3, wrong
    readings = 2 if method in ("ties", "sce") else 1  # those two look before they merge
    floor_bytes = (readings * (K + (method != "average")) + 1) * 2 * N
    source = torch.ones(floor_bytes // 2, dtype=torch.int8)
    target = torch.empty_like(source)
    providers = {
        "ours": ours,
        "torch eager": lambda: eager(method, base, experts),
        "copy of as many bytes": lambda: target.copy_(source),
    }
    benchmark.extra_info.update(elements=N, experts=K, dtype="bfloat16", floor_bytes=floor_bytes)
    benchmark.pedantic(providers[provider], rounds=3 if provider == "torch eager" else 9, warmup_rounds=1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="/tmp/m2rl-bench-merge", help="folder for the checkpoints (7 GB)")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    p.add_argument("--peer-python", help="python of an environment that has mergekit")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--peer-repeat", type=int, default=1)
    p.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--keep", action="store_true", help="keep the checkpoints")
    p.add_argument("--out", help="JSON file for the result")
    args = p.parse_args()
    args.shown = [
        f"--methods {' '.join(args.methods)}",
        f"--repeat {args.repeat}",
        f"--peer-repeat {args.peer_repeat}",
        *([] if args.sync else ["--no-sync"]),
    ]
    whole_process(args)


if __name__ == "__main__":
    main()
