"""The command, end to end, as a user types it: embedded default, real input, kills, signals, bad input."""

import json
import signal
import time

import pytest
import tiny
import torch
from commands import start, torchrun
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from m2rl.config import named_configs
from m2rl.train import main
from m2rl.types import InputError

SMALL = (
    "--train.steps",
    "6",
    "--train.save-every",
    "2",
    "--warm-start-steps",
    "4",
    "--evaluation.problems",
    "4",
    "--evaluation.k",
    "2",
    "--rollout.prompts-per-step",
    "4",
    "--rollout.group-size",
    "4",
    "--domain.0.quota",
    "1",
    "--domain.1.quota",
    "1",
    "--domain.2.quota",
    "1",
    "--domain.3.quota",
    "1",
)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(folder, step, process, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "checkpoints" / f"step-{step:06d}" / "state.json").exists():
            return
        time.sleep(0.02)
    raise AssertionError(
        f"no checkpoint of step {step}: {process.stdout.read() if process.poll() is not None else 'timeout'}"
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "run"
    done = torchrun("-m", "m2rl.train", "--run-dir", str(folder), *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_default_run_ends_with_a_table_and_its_files(finished):
    folder, out = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["before"]) == set(summary["after"]) == {"math", "code", "science", "if"}
    for part in ("before", "after"):
        for scores in summary[part].values():
            assert scores["ci95"][0] <= scores["avg_at_k"] <= scores["ci95"][1]
            assert scores["k"] == 2 and scores["problems"] == 4
    assert {"warm_start", "rollout", "learn", "sync", "evaluate", "total"} <= set(summary["wall_s"])
    for text in ("Avg@2", "before", "after", "average", "Wall time", "tokens/s", str(folder), "Next"):
        assert text in out
    assert "lm_head.weight" not in load_file(folder / "model" / "model.safetensors")  # tied: written once
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type == "qwen3"


def test_every_step_logs_every_domain(finished):
    folder, _ = finished
    steps = [m for m in metrics(folder) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(6))
    wanted = {
        "reward",
        "pass_rate",
        "groups_all_right",
        "groups_all_wrong",
        "response_tokens",
        "truncated",
        "status/ok",
        "status/wrong",
        "status/unparsed",
        "status/timeout",
        "status/error",
    }
    for m in steps:
        for domain in ("math", "code", "science", "if"):
            assert wanted <= {k.removeprefix(f"{domain}/") for k in m if k.startswith(f"{domain}/")}
            if f"{domain}/mismatch_k3" in m:
                assert abs(m[f"{domain}/mismatch_k3"]) < 1e-6
        assert {"tokens_per_s", "time/rollout_s", "time/learn_s", "memory/resident_gib", "grad_norm", "lr"} <= set(m)
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {"prompt", "response", "reward", "status", "domain", "step"} <= set(rollouts[0])


def test_a_second_run_starts_from_the_cached_warm_start(finished):
    folder, _ = finished
    first = (folder / "model" / "model.safetensors").read_bytes()
    done = torchrun("-m", "m2rl.train", "--run-dir", str(folder), *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(cached)" in done.stdout
    assert (folder / "model" / "model.safetensors").read_bytes() == first  # same seed, same bits
    assert (folder / "previous" / "summary.json").exists()


def test_killed_at_any_moment_it_resumes_bitwise(tmp_path, finished):
    reference, _ = finished
    folder = tmp_path / "run"
    process = start("--run-dir", str(folder), *SMALL)
    wait_for_step(folder, 2, process)
    process.kill()  # while step 3 runs or a save is under way
    process.wait()
    (folder / "checkpoints" / ".step-000004.partial").mkdir(exist_ok=True)  # as a kill inside a save leaves it
    done = torchrun("-m", "m2rl.train", "--run-dir", str(folder), *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming" in done.stdout
    model = (folder / "model" / "model.safetensors").read_bytes()
    assert model == (reference / "model" / "model.safetensors").read_bytes()
    strip = [
        {k: v for k, v in m.items() if not k.startswith(("time/", "memory/")) and not k.endswith("_s")}
        for m in metrics(folder)
    ]
    want = [
        {k: v for k, v in m.items() if not k.startswith(("time/", "memory/")) and not k.endswith("_s")}
        for m in metrics(reference)
    ]
    assert strip == want


def test_killed_after_its_last_step_it_only_evaluates_and_exports(tmp_path, finished):
    reference, _ = finished
    folder, longer = tmp_path / "run", ("--evaluation.problems", "120")
    process = start("--run-dir", str(folder), *SMALL, *longer)
    wait_for_step(folder, 6, process)
    process.kill()  # inside the evaluation that follows
    process.wait()
    assert not (folder / "summary.json").exists()
    done = torchrun("-m", "m2rl.train", "--run-dir", str(folder), *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Resuming {folder} at step 6" in done.stdout and "grpo 6/6" not in done.stdout
    assert json.loads((folder / "summary.json").read_text())["after"]["math"]["problems"] == 4
    model = (folder / "model" / "model.safetensors").read_bytes()
    assert model == (reference / "model" / "model.safetensors").read_bytes()


def test_a_run_continued_from_an_older_checkpoint_gives_up_the_newer_ones(tmp_path):
    folder = tmp_path / "run"
    assert main(["--run-dir", str(folder), *SMALL, "--train.steps", "4"]) == 0
    older = str(folder / "checkpoints" / "step-000002")
    assert main(["--run-dir", str(folder), *SMALL, "--train.steps", "3", "--resume", older]) == 0
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    assert (folder / "previous" / "step-000004" / "state.json").exists()


def test_without_torchrun_bfloat16_trains_as_well(tmp_path):
    """FSDP's mixed precision needs a process group, of one process if need be."""
    process = start(
        "--run-dir", str(tmp_path / "run"), *SMALL, "--train.steps", "1", "--model.compute-dtype", "bfloat16"
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_sigterm_saves_and_exits_0(tmp_path):
    folder = tmp_path / "run"
    process = start("--run-dir", str(folder), *SMALL, "--train.save-every", "1", "--train.steps", "1000")
    wait_for_step(folder, 1, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "same command continues" in out
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert metrics(folder)[-1]["step"] + 1 == json.loads((newest / "state.json").read_text())["step"]


def test_a_resume_with_other_settings_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    process = start("--run-dir", str(folder), *SMALL)
    wait_for_step(folder, 2, process)
    process.kill()
    process.wait()
    done = torchrun("-m", "m2rl.train", "--run-dir", str(folder), *SMALL, "--optim.lr", "1e-5")
    assert done.returncode != 0
    assert "unfinished run with other settings (optim.lr)" in done.stderr


def test_two_ranks_train_the_default(tmp_path):
    """Dynamic sampling on as well: its rounds are collective."""
    done = torchrun(
        "-m",
        "m2rl.train",
        "--run-dir",
        str(tmp_path / "run"),
        *SMALL,
        "--train.steps",
        "2",
        "--warm-start-steps",
        "60",
        "--rollout.dynamic-sampling-rounds",
        "2",
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
    steps = [m for m in metrics(tmp_path / "run") if "loss" in m]
    assert len(steps) == 2
    assert all(m["groups_replaced"] >= 0 for m in steps)


def test_tensorboard_and_wandb_get_the_metrics_offline(tmp_path, monkeypatch, embedded_folder):
    pytest.importorskip("tensorboard", reason="pip install 'm2rl[log]'")
    pytest.importorskip("wandb", reason="pip install 'm2rl[log]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert (
        main(
            [
                "--run-dir",
                str(tmp_path / "run"),
                "--warm-start",
                "",
                "--model.path",
                str(embedded_folder),
                *SMALL[:4],
                *SMALL[6:],
                "--train.steps",
                "2",
                "--log.tensorboard",
                "True",
                "--log.wandb",
                "m2rl-test",
            ]
        )
        == 0
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "math/reward", "if/status/wrong"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [0, 1]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


# ---- real input ----

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_user_model(folder, family, tied, chat=True):
    """A tiny model with a byte tokenizer, as transformers saves it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|im_end|>", "<|im_start|>"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*specials, *alphabet])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    tiny.model(family, tied, vocab=len(tokenizer)).save_pretrained(folder)


ROWS = [
    {"domain": "math", "prompt": "What is 3+4?", "answer": "7"},
    {
        "domain": "math",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2*5?"}],
        "answer": "10",
    },
    {"domain": "math", "prompt": "long " * 200, "answer": "1"},
    {"domain": "science", "prompt": "Which is largest? A) 1 B) 3", "answer": "B", "options": ["A", "B"]},
    {"domain": "code", "prompt": "Print the square of the input.", "tests": {"inputs": ["3\n"], "outputs": ["9\n"]}},
    {"domain": "if", "prompt": "No commas.", "constraints": [{"id": "punctuation:no_comma", "kwargs": {}}]},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def user_toml(folder, algorithm="grpo", **extra):
    data = {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "train.jsonl")]} | extra
    lines = [
        f'name = "mine"\nalgorithm = "{algorithm}"\nrun_dir = "{folder / "run"}"',
        f'[model]\npath = "{folder / "model"}"',
        "[data]",
    ]
    lines += [f"{k} = {json.dumps(v)}" for k, v in data.items()]
    lines += [
        "[rollout]\nprompts_per_step = 5\ngroup_size = 2\nmax_prompt_tokens = 120\nmax_new_tokens = 6",
        "[objective]\nkl_coef = 0.01\nupdates_per_rollout = 2\naggregation = 'domain'\n[optim]\nlr = 1e-3",
        "[train]\nsteps = 2\nbatch_size = 4\ntokens_per_bin = 300\n[evaluation]\nk = 2",
    ]
    (folder / "my.toml").write_text("\n".join(lines))
    return str(folder / "my.toml")


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False), ("qwen2", True)])
def test_grpo_on_the_users_model_and_rows(tmp_path, family, tied):
    save_user_model(tmp_path / "model", family, tied)
    write_rows(tmp_path / "train.jsonl", ROWS)
    done = torchrun("-m", "m2rl.train", "--config", user_toml(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped rows: {'math': 1}" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["after"]) == {"math", "science", "code", "if"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.tie_word_embeddings == tied


def test_sft_on_chat_messages_lowers_the_loss(tmp_path):
    save_user_model(tmp_path / "model", "qwen3", True)
    write_rows(
        tmp_path / "train.jsonl",
        [
            {
                "domain": "chat",
                "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}],
            }
            for i in range(8)
        ],
    )
    done = torchrun("-m", "m2rl.train", "--config", user_toml(tmp_path, "sft", eval=[]), "--train.steps", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


def bad(tmp_path, rows=ROWS, chat=True, text=None, extra=(), **options):
    """The InputError of a run, raised before any model loads."""
    if not (tmp_path / "model").exists():
        save_user_model(tmp_path / "model", "qwen3", True, chat)
    write_rows(tmp_path / "train.jsonl", rows)
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(InputError) as error:
        main(["--config", user_toml(tmp_path, **options), *extra])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_input_prints_one_line_and_exits_2(tmp_path):
    process = start("--config", str(tmp_path / "nowhere.toml"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out.startswith("m2rl: --config") and out.count("\n") == 1


def test_under_torchrun_the_reason_is_printed_once_and_again_at_the_end():
    done = torchrun("-m", "m2rl.train", "--config", "qwen3_4b_maths", ranks=2)
    lines = done.stderr.strip().splitlines()
    assert sum(line.startswith("m2rl: --config qwen3_4b_maths: ") for line in lines) == 1
    assert "did you mean qwen3_4b_math?" in lines[-2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": '{"domain": "math", "prompt": "a", "answer": "1"}\n{"domain": \n'}, "train.jsonl:2: malformed JSON"),
        ({"rows": []}, "no usable row"),
        ({"rows": [{"domain": "maths", "prompt": "a", "answer": "1"}]}, "train.jsonl:1: unknown domain 'maths'"),
        ({"rows": [{"prompt": "a", "answer": "1"}]}, "train.jsonl:1: key domain is missing"),
        (
            {"rows": [{"domain": "math", "prompt": 3, "answer": "1"}]},
            "train.jsonl:1: key prompt must be a non-empty string",
        ),
        ({"rows": [{"domain": "math", "prompt": "a"}]}, "train.jsonl:1: "),
        ({"rows": [ROWS[1]], "chat": False}, "train.jsonl:1: the row holds chat messages, and the tokenizer has no"),
        ({"train": ["nowhere/*.jsonl"]}, "no file nowhere/*.jsonl"),
        ({"extra": ("--model.path", "nowhere")}, "model.path: nowhere does not exist"),
        (
            {"extra": ("--model.path", "no/where")},
            "model.path: no/where is neither a folder nor in the local hub cache",
        ),
        ({"extra": ("--rollout.max-sequences", "0")}, "rollout.max_sequences must be at least 1, got 0"),
        ({"extra": ("--rollout.group-size", "1")}, "rollout.group_size must be at least 2"),
    ],
)
def test_bad_input_is_one_line_naming_file_line_key_and_rule(tmp_path, kwargs, message):
    assert message in bad(tmp_path, **kwargs)


def test_nan_weights_are_refused(tmp_path):
    save_user_model(tmp_path / "model", "qwen3", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    assert "NaN or infinity in 1 weights, first model.norm.weight" in bad(tmp_path)


def test_three_non_finite_gradients_in_a_row_end_the_run_with_the_checkpoint_kept(tmp_path):
    """An entropy bonus so large that the gradient overflows."""
    done = torchrun(
        "-m",
        "m2rl.train",
        "--run-dir",
        str(tmp_path / "run"),
        *SMALL,
        "--train.save-every",
        "1",
        "--train.steps",
        "9",
        "--objective.entropy-coef",
        "1e38",
    )
    assert done.returncode != 0
    assert "not finite 3 steps in a row" in done.stderr
    assert [m["skipped"] for m in metrics(tmp_path / "run")] == [1, 1, 1]
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").exists()


@pytest.mark.parametrize("name", named_configs())
def test_every_config_prints_its_plan_without_a_gpu_or_its_files(name, capsys):
    assert main(["--config", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Dry run: nothing was loaded" in out
    if name.startswith("qwen3_4b"):
        assert "4,022,468,096 parameters" in out
        assert "total with context" in out
