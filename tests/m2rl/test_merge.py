"""`python -m m2rl.merge` as a user runs it: on folders of safetensors."""

import errno
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from m2rl_kernels.delta_merge import merge_tensors
from safetensors.torch import load_file, save_file

from m2rl import merge as tool
from m2rl import merge_output, merge_sweep
from m2rl.merge_yaml import read_config
from m2rl.safetensors_io import Checkpoint
from m2rl.types import InputError

SHAPES = {
    "model.embed_tokens.weight": (512, 32),
    "model.layers.0.mlp.weight": (96, 32),
    "model.layers.0.norm.weight": (32,),
    "model.layers.1.mlp.weight": (96, 32),
    "model.layers.1.norm.weight": (32,),
    "model.norm.weight": (32,),
}
CONFIG = {
    "model_type": "toy",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
VOCABULARY = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


def write(folder: Path, tensors: dict, config=CONFIG, tokenizer=VOCABULARY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def models(tmp_path):
    """(base folder, three expert folders, their tensors)."""
    g = torch.Generator().manual_seed(0)
    base = {n: (torch.randn(s, generator=g) * 0.05).bfloat16() for n, s in SHAPES.items()}
    experts = [
        {
            n: (
                x.float() + torch.randn(x.shape, generator=g) * 1e-3 * (torch.rand(x.shape, generator=g) < 0.4)
            ).bfloat16()
            for n, x in base.items()
        }
        for _ in range(3)
    ]
    return (
        write(tmp_path / "base", base),
        [write(tmp_path / f"e{k}", e) for k, e in enumerate(experts)],
        base,
        experts,
    )


def cli(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "m2rl.merge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def in_memory(base, experts, method, **options):
    names = sorted(base) if options.get("scope") == "model" or options.get("preset") == "paper" else list(base)
    merged = merge_tensors(
        [base[n] for n in names], [[e[n] for n in names] for e in experts], method, names=names, **options
    )
    return dict(zip(names, merged))


@pytest.mark.parametrize(
    "method,options",
    [
        ("average", {}),
        ("task_arithmetic", {"lam": 0.5}),
        ("ties", {"density": 0.2}),
        ("ties", {"density": 0.2, "scope": "model"}),
        ("ties", {"density": 0.2, "preset": "paper"}),
        ("dare_linear", {"density": 0.5, "seed": 3}),
        ("dare_ties", {"density": 0.5}),
        ("sce", {}),
        ("sce", {"density": 0.3}),
        ("ram_plus", {"scope": "model"}),
        ("della", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.3}),
        ("model_stock", {}),
        ("karcher", {}),
        ("tsv_m", {}),
        ("iso_c", {}),
    ],
)
def test_a_folder_merge_equals_the_merge_in_memory(models, tmp_path, method, options):
    base, experts, base_t, experts_t = models
    out = tool.merge(base, experts, method, out=tmp_path / "out", **options)
    got, want = load_file(out / "model.safetensors"), in_memory(base_t, experts_t, method, **options)
    assert list(got) == list(want) or set(got) == set(want)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert not list(tmp_path.glob(".*"))  # no partial folder is left


def test_the_command_needs_no_torch_and_records_the_recipe(models, tmp_path):
    base, experts, *_ = models
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    for method in ("average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce"):
        program = (
            "import sys; from m2rl.merge import main; code = main(sys.argv[1:]); "
            "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'; sys.exit(code)"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                "--base",
                base,
                "--experts",
                *experts,
                "--method",
                method,
                *(["--density", "0.5"] if "density" in tool.METHODS[method].uses else []),
                "--out",
                tmp_path / method,
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    out = tmp_path / "ties"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {"tokenizer.json", "generation_config.json", "README.md", "merge.json"} <= {p.name for p in out.iterdir()}
    record = json.loads((out / "merge.json").read_text())
    assert record["recipe"]["density"] == [0.5] * 3 and len(record["models"]) == 4
    assert len({m["content"] for m in record["models"]}) == 4
    assert str(experts[0]) in (out / "README.md").read_text()


def test_command_line_options_reach_the_merge(models, tmp_path):
    base, experts, base_t, experts_t = models
    done = cli(
        "--base",
        base,
        "--experts",
        *experts,
        "--method",
        "ties",
        "--density",
        "0.3",
        "--lambda",
        "0.7",
        "--weights",
        "1",
        "2",
        "0.5",
        "--scope",
        "model",
        "--no-normalize",
        "--dtype",
        "float32",
        "--threads",
        "2",
        "--progress",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "100 %" in done.stderr and "GB/s" in done.stderr and "left" in done.stderr
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = in_memory(
        base_t,
        experts_t,
        "ties",
        density=0.3,
        lam=0.7,
        weights=[1, 2, 0.5],
        scope="model",
        normalize=False,
        dtype=torch.float32,
    )
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_sharded_in_and_out_and_content_hashes_do_not_depend_on_it(models, tmp_path):
    base, experts, base_t, experts_t = models
    split = tmp_path / "split"
    split.mkdir()
    names = list(experts_t[0])
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        save_file({n: experts_t[0][n] for n in part}, split / f"model-{i + 1:05d}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-00002.safetensors")
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tool.merge(base, experts, "ties", out=tmp_path / "one", density=0.3)
    tool.merge(base, [split, *experts[1:]], "ties", out=tmp_path / "many", density=0.3, shard_bytes=10_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.numel() * 2 for x in base_t.values())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    contents = [
        [m["content"] for m in json.loads((tmp_path / o / "merge.json").read_text())["models"]] for o in ("one", "many")
    ]
    assert contents[0] == contents[1]


def test_non_float_tensors_are_copied_and_must_agree(models, tmp_path):
    base, experts, base_t, experts_t = models
    for folder, tensors in ((base, base_t), *zip(experts, experts_t)):
        write(folder, {**tensors, "model.table": torch.arange(7)})
    out = tool.merge(base, experts, "ties", out=tmp_path / "out", density=0.5)
    assert torch.equal(load_file(out / "model.safetensors")["model.table"], torch.arange(7))
    write(experts[1], {**experts_t[1], "model.table": torch.arange(7) + 1})
    with pytest.raises(
        InputError,
        match=r"model.table is I64, which is copied and not merged \(merged are F32, BF16, F16\), and it differs",
    ):
        tool.merge(base, experts, "ties", out=tmp_path / "out2", density=0.5)
    assert not (tmp_path / "out2").exists() and not list(tmp_path.glob(".*"))


def test_an_expert_that_equals_the_base_is_a_warning(models, tmp_path, capsys):
    base, experts, base_t, _ = models
    write(experts[2], base_t)
    tool.merge(base, experts, "task_arithmetic", out=tmp_path / "out")
    assert f"expert {experts[2]} is identical to the base" in capsys.readouterr().err


def test_a_base_without_tokenizer_is_no_error(models, tmp_path):
    base, experts, *_ = models
    (base / "tokenizer.json").unlink()
    out = tool.merge(base, experts, "average", out=tmp_path / "out")
    assert not (out / "tokenizer.json").exists() and not (out / "generation_config.json").exists()


# ---- bad input: one clear error, nothing written ----


def drop(name):
    return lambda t, f: write(f, {n: x for n, x in t.items() if n != name})


def truncate(t, f):
    file = f / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def poison(t, f):
    t["model.norm.weight"][3:5] = float("nan")
    t["model.norm.weight"][7] = float("inf")
    write(f, t)


def adapter(t, f):
    (f / "model.safetensors").unlink()
    (f / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(2)}, f / "adapter_model.safetensors")


def lonely_index(t, f):
    (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    )


def only_bin(t, f):
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


BAD = {
    "missing": (drop("model.norm.weight"), "lacks 1 tensors that .*base has, first model.norm.weight"),
    "extra": (
        lambda t, f: write(f, {**t, "surplus": torch.zeros(2)}),
        "has 1 tensors that .*base lacks, first surplus",
    ),
    "shape": (
        lambda t, f: write(f, {**t, "model.norm.weight": torch.zeros(31).bfloat16()}),
        r"model.norm.weight has shape \[32\] in .* and \[31\]",
    ),
    "vocabulary": (
        lambda t, f: write(f, {**t, "model.embed_tokens.weight": torch.zeros(520, 32).bfloat16()}),
        "vocabulary sizes differ by 8 rows",
    ),
    "dtype": (
        lambda t, f: write(f, {**t, "model.norm.weight": torch.zeros(32, dtype=torch.int64)}),
        "model.norm.weight has dtype BF16 in .* and I64",
    ),
    "tied": (
        lambda t, f: write(
            f, {**t, "lm_head.weight": torch.zeros(512, 32).bfloat16()}, {**CONFIG, "tie_word_embeddings": False}
        ),
        "lm_head.weight is in .*ties the output head",
    ),
    "tokenizer": (
        lambda t, f: write(f, t, tokenizer={**VOCABULARY, "model": {"vocab": {"a": 1, "b": 0}}}),
        r"tokenizers of .* differ \(2 and 2 entries",
    ),
    "config": (lambda t, f: write(f, t, {**CONFIG, "hidden_size": 64}), "config.json: hidden_size is 32 in .* and 64"),
    "nan": (poison, "model.norm.weight of .*e1 has 3 NaN or infinite elements"),
    "truncated": (truncate, "is truncated: tensor"),
    "empty": (lambda t, f: (f / "model.safetensors").write_bytes(b""), "is truncated: its header needs"),
    "header": (
        lambda t, f: (f / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello"),
        "its header is not JSON",
    ),
    "header that is a list": (
        lambda t, f: (f / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"[1] "),
        "its header is a list, not a mapping",
    ),
    "header entry": (
        lambda t, f: (f / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a":{}}'),
        "tensor a must have dtype, shape and data_offsets",
    ),
    "lora": (adapter, "is a LoRA adapter: merge it into its base model first"),
    "index": (lonely_index, "names model-00001-of-00001.safetensors, which does not exist"),
    "index that is a list": (
        lambda t, f: (f / "model.safetensors.index.json").write_text("[]"),
        "index.json must hold a JSON mapping, got a list",
    ),
    "index that lies": (
        lambda t, f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys([*t, "ghost"], "model.safetensors")})
        ),
        "index.json says that model.safetensors holds ghost, which it does not",
    ),
    "tensor in two files": (
        lambda t, f: (
            save_file(t, f / "again.safetensors"),
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"x": "again.safetensors", "model.norm.weight": "model.safetensors"}})
            ),
        ),
        "is in two files: .*again.safetensors and .*model.safetensors",
    ),
    "broken config": (lambda t, f: (f / "config.json").write_text("{oops"), "e1/config.json is not JSON"),
    "broken tokenizer": (lambda t, f: (f / "tokenizer.json").write_text("{oops"), "e1/tokenizer.json is not JSON"),
    "bin": (only_bin, "has .bin weights: convert them"),
}


@pytest.mark.parametrize("method", ["average", "ties", "iso_c"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_nothing_is_written(models, tmp_path, case, method):
    base, experts, _, experts_t = models
    spoil, message = BAD[case]
    spoil(experts_t[1], experts[1])
    command = ["--base", str(base), "--experts", *map(str, experts), "--method", method, "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=message) as raised:
        tool.main([*command, *(["--density", "0.5"] if method == "ties" else [])])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--density", "0"], r"density must lie in (0, 1], got 0.0"),
        (["--density", "1.01"], r"density must lie in (0, 1], got 1.01"),
        ([], "density must be given for ties: the fraction"),
        (["--density", "0.5", "--epsilon", "0.1"], "ties does not read epsilon; it reads preset"),
        (["--method", "average", "--density", "0.5"], "average does not read density; it reads preset"),
        (["--density", "0.5", "--threads", "-1"], "threads must be 0 (as many as the process may use) or more, got -1"),
        (["--density", "0.5", "--shard-bytes", "0"], "shard_bytes must be at least 1, got 0"),
        (["--method", "dare_linear", "--density", "0.5", "--seed", str(2**63)], "seed must be a signed 64-bit integer"),
        (["--density", "0.5", "--weights", "1", "2"], "weights must be one number or one per expert (3), got 2"),
        (["--lambda", "1", "2"], "--lambda takes one value without --sweep"),
        (["--density", "0.5", "--lambda", "nan"], "lam must be finite"),
    ],
)
def test_bad_options(models, tmp_path, arguments, message):
    base, experts, *_ = models
    with pytest.raises(InputError, match=re.escape(message)):
        tool.main(["--base", str(base), "--experts", *map(str, experts), *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_output_folder_is_protected(models, tmp_path):
    base, experts, *_ = models
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="exists and is not empty"):
        tool.merge(base, experts, "average", out=tmp_path / "out")
    with pytest.raises(InputError, match="lies inside the input"):
        tool.merge(base, experts, "average", out=experts[0] / "sub")
    tool.merge(base, experts, "average", out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    with pytest.raises(InputError, match="neither a folder nor in the local hub cache"):
        tool.merge("someone/nothing-here", experts, "ties", out=tmp_path / "x", density=0.5)


@pytest.mark.parametrize("sweeping", [False, True])
@pytest.mark.parametrize(
    "out,message",
    [("base", "is the input"), (".", "holds the input"), ("link", "is the input"), ("file", "is a file")],
)
def test_overwrite_never_harms_an_input(models, tmp_path, out, message, sweeping):
    base, experts, *_ = models
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").write_text("x")
    sweep = ["--sweep", "--evaluate", "math", "--k", 1] if sweeping else []
    done = cli(
        "--base", base, "--experts", *experts, "--density", 0.2, "--out", tmp_path / out, "--overwrite", *sweep
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (base / "model.safetensors").exists() and (experts[0] / "model.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_out_may_be_a_link_to_a_folder(models, tmp_path):
    base, experts, *_ = models
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    tool.merge(base, experts, "average", out=tmp_path / "link")
    assert (tmp_path / "disk" / "real" / "model.safetensors").exists() and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["real"]


def test_scalars_and_empty_tensors_merge_with_every_method(tmp_path):
    tensors = {"w": torch.randn(8, 4), "scalar": torch.tensor(1.0), "empty": torch.empty(0, 4)}
    write(tmp_path / "b", {n: x.bfloat16() for n, x in tensors.items()})
    for k in range(2):
        write(tmp_path / f"e{k}", {n: (x + 0.1 * (k + 1)).bfloat16() for n, x in tensors.items()})
    for method, rule in tool.METHODS.items():
        options = {"density": 0.5} if "density" in rule.uses else {}
        out = tool.merge(tmp_path / "b", [tmp_path / "e0", tmp_path / "e1"], method, out=tmp_path / method, **options)
        assert {n: x.shape for n, x in load_file(out / "model.safetensors").items()} == {
            n: x.shape for n, x in tensors.items()
        }


def test_float16_overflow_is_an_error(tmp_path):
    write(tmp_path / "b", {"w": torch.full((4,), 60000.0).half()})
    write(tmp_path / "e", {"w": torch.full((4,), 65000.0).half()})
    with pytest.raises(InputError, match="w: 4 merged elements overflow F16"):
        tool.merge(tmp_path / "b", [tmp_path / "e"] * 2, "task_arithmetic", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_ids_resolve_to_the_local_cache(models, tmp_path, monkeypatch):
    base, experts, *_ = models
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(experts[0], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert Checkpoint("someone/model").folder == snapshot
    out = tool.merge(base, ["someone/model", *experts[1:]], "average", out=tmp_path / "out")
    assert json.loads((out / "merge.json").read_text())["models"][1]["source"] == "someone/model"


# ---- interruption ----

KILLED = """
import os, signal, sys
from m2rl import merge, merge_output
after = int(sys.argv[1])
real, count = merge_output.Journal.add, [0]
def add(self, **entry):
    real(self, **entry)
    count[0] += "tensor" in entry
    if count[0] == after:
        os.kill(os.getpid(), signal.SIGKILL)
merge_output.Journal.add = add
if after < 0:
    merge.finish = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
merge.BATCH_ELEMENTS = 1
sys.exit(merge.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("after", [1, 4, -1])
@pytest.mark.parametrize("method", ["ties", "tsv_m"])
def test_kill_9_leaves_no_half_checkpoint_and_resume_completes_it(models, tmp_path, after, method):
    base, experts, *_ = models
    arguments = [
        "--base",
        str(base),
        "--experts",
        *map(str, experts),
        "--method",
        method,
        *(["--density", "0.3"] if method == "ties" else []),
        "--out",
        str(tmp_path / "out"),
    ]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(after), *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    # what a crash of the machine could do to a page that was journalled but not written back: it must be noticed
    partial = tmp_path / ".out.partial" / "model.safetensors"
    where = Checkpoint(partial.parent).tensors["model.embed_tokens.weight"].begin
    with open(partial, "r+b") as handle:
        handle.seek(where)
        handle.write(b"\0" * 64)
    done = cli(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    finished = {1: 1, 4: 4, -1: 6}[after]
    assert f"resuming: {finished - 1} of 6" in done.stderr or finished == 1
    tool.merge(base, experts, method, out=tmp_path / "fresh", **({"density": 0.3} if method == "ties" else {}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / ".out.partial").exists()


def test_an_interruption_while_the_disk_is_waited_for_can_be_continued(models, tmp_path, monkeypatch, capsys):
    base, experts, *_ = models

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge_output, "_sync", interrupt)
        tool.merge(base, experts, "ties", density=0.5, out=tmp_path / "out")
    gc.collect()  # the interrupted merge holds its lock as long as it lives
    tool.merge(base, experts, "ties", density=0.5, out=tmp_path / "out", resume=True)
    assert f"resuming: {len(SHAPES)} of {len(SHAPES)} tensors" in capsys.readouterr().err


def test_resume_of_another_merge_starts_over_and_says_so(models, tmp_path):
    base, experts, *_ = models
    arguments = [
        "--base",
        str(base),
        "--experts",
        *map(str, experts),
        "--method",
        "ties",
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run([sys.executable, "-c", KILLED, "3", *arguments, "--density", "0.3"], capture_output=True)
    done = cli(*arguments, "--density", "0.4", "--resume")
    assert done.returncode == 0 and "is a different one: starting over" in done.stderr


def test_disk_full_is_an_error_before_anything_is_written(models, tmp_path):
    base, experts, *_ = models
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        done = cli("--base", base, "--experts", *experts, "--method", "average", "--out", small / "out")
        assert done.returncode == 2 and "MB free, the merge needs" in done.stderr, done.stderr
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_disk_that_fills_while_writing_leaves_nothing(models, tmp_path, monkeypatch):
    base, experts, *_ = models
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(InputError, match=r"the disk of .* is full"):
            tool.merge(base, experts, "average", out=small / "out", dtype="float32")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_finished_bytes_are_sent_early_and_a_disk_error_then_is_not_lost(models, tmp_path, monkeypatch):
    base, experts, *_ = models
    out, partial, seen = tmp_path / "out", tmp_path / ".out.partial", threading.Event()
    stream = tool.stream

    def send(handle):  # as the kernel does: the error is told once, and the fsync at the end succeeds
        seen.set()
        raise OSError(errno.EIO, "Input/output error")

    def slow(*args, **kwargs):
        summary = stream(*args, **kwargs)
        assert seen.wait(20) and not out.exists()
        return summary

    monkeypatch.setattr(tool, "stream", slow)
    monkeypatch.setattr(os, "fdatasync", send)
    with pytest.raises(OSError, match="Input/output error"):
        tool.merge(base, experts, "average", out=out)
    assert not out.exists() and not partial.exists()  # what the page cache holds must not be resumed from
    monkeypatch.setattr(tool, "stream", stream)
    tool.merge(base, experts, "average", out=out, sync=False)  # nothing is sent, nothing can fail
    assert out.exists()


def test_api_names_what_does_not_fit(models):
    *_, base, experts = models
    one, norm = experts[0], "model.norm.weight"
    whole, wide = {"n": torch.ones(2).long()}, {"n": torch.ones(2).double()}
    assert torch.equal(
        tool.merge({**base, **wide}, [{**one, **wide}], "average")["n"], wide["n"]
    )  # copied, as from disk
    for arguments, options, message in [
        ((base, [{**one, norm: torch.zeros(3)}]), {}, f"{norm} has shape [32] in model 0 and [3] in model 1"),
        (
            ({**base, **whole}, [{**one, "n": torch.ones(2)}]),
            {},
            "n has dtype torch.int64 in model 0 and torch.float32",
        ),
        ((base, []), {}, "experts must name at least one model"),
        ((base, [one]), {"seed": 3}, "ties does not read seed"),
        ((base, [one]), {"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ((base, ["folder"]), {}, "must all be folders, or all state dicts or modules"),
        ((base, [one]), {"out": "folder"}, "out must be given for folders, and only for folders"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            tool.merge(*arguments, "ties", density=0.5, **options)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": ["0", "4"]},
        {"data_offsets": [0.0, 4.0]},
        {"shape": [-1, -1]},
        {"shape": "1"},
        {"dtype": ["F32"]},
    ],
)
def test_a_header_of_wrong_types_is_one_error(tmp_path, entry):
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor x"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(InputError, match="its header is not JSON"):
        Checkpoint(tmp_path)


def test_the_card_tells_every_input_and_its_weight(models, tmp_path):
    base, experts, *_ = models
    same = [str(experts[0]), str(experts[1]), str(experts[0])]
    tool.merge(str(base), same, "task_arithmetic", weights=[0.5, 0.25, 0.125], out=tmp_path / "sum")
    tool.merge(str(base), same, "iso_c", out=tmp_path / "spectral")
    tool.merge(None, [str(tmp_path / "sum")], "average", out=tmp_path / "copy")
    rows = [
        line for line in (tmp_path / "sum" / "README.md").read_text().splitlines() if line.startswith(f"| {tmp_path}")
    ]
    assert [row.split(" | ")[1] for row in rows] == ["base", "0.5", "0.25", "0.125"]
    found = {n: json.loads((tmp_path / n / "merge.json").read_text()) for n in ("sum", "spectral", "copy")}
    contents = [m["content"] for m in found["sum"]["models"]]
    assert contents[1] == contents[3] and len(set(contents)) == 3
    assert [m["content"] for m in found["spectral"]["models"]] == contents  # a method in torch reads the same bytes
    assert found["sum"]["content of the merge"] == found["copy"]["models"][0]["content"]
    assert found["copy"]["content of the merge"] == found["sum"]["content of the merge"]


def test_progress_fits_the_terminal_and_ends_its_line(models, tmp_path, capsys, monkeypatch):
    base, experts, base_t, _ = models
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(tool, "BATCH_ELEMENTS", 1)
    tool.merge(base, experts, "ties", density=0.5, scope="model", out=tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert shown.endswith("\n") and shown.count("\n") == 1 and "-:-- left  statistics" in shown.split("\r")[1]
    assert all(len(line.strip("\n")) < 50 for line in shown.split("\r")) and "100 %" in shown and "GB/s" in shown
    bad = dict(base_t)
    bad["model.norm.weight"] = bad["model.norm.weight"].clone().fill_(float("nan"))
    write(tmp_path / "bad", bad)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        tool.merge(base, [tmp_path / "bad"], "ties", density=0.5, out=tmp_path / "no", progress=True)
    assert capsys.readouterr().err.endswith("\n")  # what the command says next starts on its own line


def test_the_reading_of_a_whole_model_moves_the_bar(models, capsys):
    base, experts, *_ = models
    inputs, seen = tool.open_inputs(base, experts), np.zeros(1, np.int64)
    chosen = tool.recipe("ties", len(experts), density=0.5, scope="model")
    tool.whole_statistics(inputs, [chosen], True, tool.Device("cpu", 2), seen)
    assert seen[0] == sum(math.prod(inputs.info(n).shape) for n in inputs.merged)
    bar = tool.Progress(200, True)
    with bar.following(100, lambda: 0.5, "statistics"):
        time.sleep(0.5)
    bar.close()
    shown = capsys.readouterr().err.split("\r")
    assert any(" 25 %" in line for line in shown) and bar.done == 100


def test_an_error_beside_the_work_ends_it_there_and_is_raised_after_it():
    calls = []

    def full_disk():
        calls.append(1)
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"), tool.repeatedly(full_disk, 0.001):
        time.sleep(0.1)
        calls.append("the work went on")
    assert calls == [1, "the work went on"]


def test_a_seed_beside_a_recipe_file_draws_other_masks(models, tmp_path):
    base, experts, *_ = models
    (tmp_path / "dare.yaml").write_text(
        f"merge_method: dare_linear\nbase_model: {base}\nmodels:\n"
        + "".join(f"- model: {e}\n  parameters: {{weight: 1.0, density: 0.5}}\n" for e in experts)
    )
    drawn = {}
    for name, seed in (("none", []), ("zero", ["--seed", "0"]), ("one", ["--seed", "1"])):
        assert tool.main(["--config", str(tmp_path / "dare.yaml"), *seed, "--out", str(tmp_path / name)]) == 0
        drawn[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert drawn["none"] == drawn["zero"] != drawn["one"]
    (tmp_path / "ties.yaml").write_text((tmp_path / "dare.yaml").read_text().replace("dare_linear", "ties"))
    with pytest.raises(InputError, match="ties does not read seed"):
        tool.main(["--config", str(tmp_path / "ties.yaml"), "--seed", "1", "--out", str(tmp_path / "x")])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config", "merge.yaml", "--density", "0.5"], "--density has no effect with --config"),
        (["--config", "merge.yaml", "--lambda", "0.5"], "--lambda has no effect with --config"),
        (["--config", "merge.yaml", "--no-normalize"], "--normalize has no effect with --config"),
        (["--config", "merge.yaml", "--sweep"], "--sweep has no effect with --config"),
        (["--k", "3", "--density", "0.5"], "--k has no effect without --sweep"),
        (["--sweep", "--method", "ties", "average", "--seed", "3"], "ties does not read seed"),
        (["--shard-bytes", "inf", "--density", "0.5"], "infinity"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(models, tmp_path, arguments, message):
    base, experts, *_ = models
    own = [] if "--config" in arguments else ["--base", base, "--experts", *experts]
    done = cli(*own, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- mergekit's YAML ----


def yaml_file(tmp_path, **config):
    path = tmp_path / "merge.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_yaml_recipe_with_scalars_gradients_and_filters(models, tmp_path):
    base, experts, base_t, experts_t = models
    path = yaml_file(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=str(base),
        dtype="float32",
        out_dtype="bfloat16",
        models=[
            {"model": str(base)},
            {"model": str(experts[0]), "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 2}]}},
            {"model": str(experts[1]), "parameters": {"weight": [1.0, 3.0]}},
        ],
        parameters={"lambda": 0.5},
    )
    done = cli("--config", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, weights in {
        "model.embed_tokens.weight": (2, 1),
        "model.layers.0.mlp.weight": (0.5, 1),
        "model.layers.1.mlp.weight": (0.5, 3),
        "model.layers.1.norm.weight": (2, 3),
        "model.norm.weight": (2, 1),  # in no layer: the start of the gradient, as in mergekit
    }.items():
        want = merge_tensors(
            [base_t[name]], [[e[name]] for e in experts_t[:2]], "task_arithmetic", weights=list(weights), lam=0.5
        )[0]
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize(
    "change,message",
    [
        ({"slices": []}, "key 'slices' is not supported"),
        ({"merge_method": "slerp"}, "merge_method 'slerp' is not supported"),
        ({"tokenizer_source": "union"}, "tokenizer_source 'union' is not supported"),
        ({"parameters": {"t": 1}}, "parameter 't' is not supported"),
        ({"models": [{"model": "x", "parameters": {"weigth": 1}}]}, "parameter 'weigth' of a model is not supported"),
        ({"models": [{"model": "x"}]}, "parameter 'weight' is missing for model 1"),
        ({"models": [{"model": "x+lora", "parameters": {"weight": 1}}]}, "LoRA"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16"),
        ({"base_model": None}, "base_model is needed by ties"),
        (
            {"base_model": {"model": {"path": "b", "revision": "r"}}},
            "base_model: a model is a folder or a hub id, got {",
        ),
        ({"models": [{"model": "x", "parameters": {"weight": [{"filter": 3, "value": 1}]}}]}, "a list of {value, filt"),
        ({"merge_method": ["ties"]}, "merge_method ['ties'] is not supported"),
        ({"models": [{"model": "b"}]}, "models must name a model beside the base, got only b"),
        ({"models": [{"model": "x", "parameters": {"weight": "much"}}]}, "'weight' must be a number, got 'much'"),
        ({"models": [{"model": "x", "parameters": [1]}]}, "parameters of x must be a mapping"),
        ({"models": [{"model": "x", "parameters": {"weight": [{"filter": "mlp"}]}}]}, "a list of {value, filter}"),
        ({"parameters": ["normalize"]}, "parameters must be a mapping of names to values, got ['normalize']"),
        ({"parameters": {"normalize": "maybe"}}, "'normalize' must be true or false, got 'maybe'"),
    ],
)
def test_yaml_that_is_not_supported_names_the_key(tmp_path, change, message):
    config = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": 1, "density": 0.5}}],
    }
    with pytest.raises(InputError, match=re.escape(message)):
        read_config(yaml_file(tmp_path, **{**config, **change}))


def test_yaml_numbers_in_exponent_notation_are_numbers(tmp_path):
    """PyYAML reads 1e-1 as text: the recipe once got 1.0 in its place. mergekit reads a number."""
    path = tmp_path / "merge.yaml"
    path.write_text(
        "merge_method: breadcrumbs\nbase_model: b\nmodels:\n"
        "- model: x\n  parameters: {weight: 1e-1, density: 5e-1, gamma: 1e-2}\nparameters: {lambda: 2e-1}\n"
    )
    found = read_config(path).recipe
    assert (found.weights, found.density, found.gamma, found.lam) == ((0.1,), (0.5,), 0.01, 0.2)


# ---- sweep ----


def test_sweep_keeps_the_best_and_reads_the_inputs_once(models, tmp_path, monkeypatch, capsys):
    base, experts, base_t, experts_t = models
    calls = []
    real = tool.passes.select
    monkeypatch.setattr(tool.passes, "select", lambda *a, **k: calls.append(a[3].shape) or real(*a, **k))

    def score(folder):
        merged = load_file(Path(folder) / "model.safetensors")
        moved = float(sum((merged[n].float() - base_t[n].float()).abs().sum() for n in base_t))
        return {"math": (1 / (1 + abs(moved - 10)), 0.01), "if": (0.5, 0.02)}

    rows = merge_sweep.sweep(
        str(base),
        [str(e) for e in experts],
        tmp_path / "out",
        methods=["ties", "task_arithmetic"],
        densities=[0.2, 0.5],
        lambdas=[0.5, 1.0],
        options={},
        score=score,
    )
    assert len(rows) == 6 and rows[0].mean == max(r.mean for r in rows)
    assert len(calls) == 1 and calls[0][-1] == 2  # one selection for both densities, none per lambda
    best = rows[0]
    options = {"lam": best.recipe.lam} | ({"density": best.recipe.density[0]} if best.recipe.method == "ties" else {})
    want = in_memory(base_t, experts_t, best.recipe.method, **options)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert "| ties-density0.2-lambda1 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())[0]["label"] == best.label
    assert (tmp_path / "out" / "sweep.svg").read_text().count("<polyline") == 3
    assert not list(tmp_path.glob(".*"))


def test_sweep_scores_with_the_evaluator(embedded_folder, tmp_path):
    for k in range(2):
        shutil.copytree(embedded_folder, tmp_path / f"e{k}")
        tensors = load_file(embedded_folder / "model.safetensors")
        g = torch.Generator().manual_seed(k)
        tuned = {n: x + 0.01 * torch.randn(x.shape, generator=g).to(x.dtype) for n, x in tensors.items()}
        save_file(tuned, tmp_path / f"e{k}" / "model.safetensors", metadata={"format": "pt"})
    done = cli(
        "--base", embedded_folder, "--experts", tmp_path / "e0", tmp_path / "e1", "--method", "ties",
        "--density", "0.5", "--lambda", "0.5", "--sweep", "--evaluate", "math", "--k", "1", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [r["label"] for r in rows] == ["ties-density0.5-lambda0.5"]
    assert all(0 <= r["scores"]["math"][0] <= 1 for r in rows) and (tmp_path / "out" / "tokenizer.json").exists()


def test_api_on_state_dicts_and_modules(models):
    *_, base_t, experts_t = models
    merged = tool.merge(base_t, experts_t, "ties", density=0.3)
    assert all(torch.equal(merged[n], x) for n, x in in_memory(base_t, experts_t, "ties", density=0.3).items())
    modules = [torch.nn.Linear(3, 2) for _ in range(3)]
    assert set(tool.merge(modules[0], modules[1:], "average")) == {"weight", "bias"}
    with pytest.raises(ValueError, match="out must be given for folders, and only for folders"):
        tool.merge(base_t, experts_t, "ties", out="x")


def test_memory_is_bounded_by_chunks_not_by_the_model(tmp_path):
    """160 MB of weights in, 40 MB out; the anonymous memory beyond the interpreter's stays under 40 MB, thresholds of
    the whole model included."""
    tensors = {f"w{i}": torch.randn(2_000_000).bfloat16() for i in range(10)}
    for name in ("b", "e0", "e1", "e2"):
        write(
            tmp_path / name,
            {n: (x.float() + torch.randn(1) * 1e-3 + 1e-3 * x.float().roll(1)).bfloat16() for n, x in tensors.items()},
        )
    program = """if True:
        import re, sys, threading, time
        from m2rl.merge import main
        def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
        before = peak = anonymous()
        def watch():
            global peak
            while True:
                peak = max(peak, anonymous())
                time.sleep(0.001)
        threading.Thread(target=watch, daemon=True).start()
        code = main(sys.argv[1:])
        print(peak - before)
        sys.exit(code)"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--base",
            tmp_path / "b",
            "--experts",
            *[tmp_path / f"e{k}" for k in range(3)],
            "--method",
            "ties",
            "--scope",
            "model",
            "--density",
            "0.2",
            "--out",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < 40_000


def test_reader_refuses_what_overlaps_or_lies(tmp_path):
    def craft(header, size=64):
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        return Checkpoint(tmp_path)

    with pytest.raises(InputError, match="a and b overlap"):
        craft(
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
            }
        )
    with pytest.raises(InputError, match="needs 16 bytes, its offsets give 12"):
        craft({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}})
    with pytest.raises(InputError, match="has dtype F4, which is not known"):
        craft({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}})
    assert np.array_equal(
        craft({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).bytes("a"), np.zeros(4, np.uint8)
    )
    assert os.path.exists(tmp_path / "model.safetensors")
