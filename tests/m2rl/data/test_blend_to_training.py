"""From the blend on disk to trained steps and scores: convert, train on five domains, evaluate, in the user's words."""

import json
import random

import benchmark_rows
import blend_rows
import office
import pyarrow
import pyarrow.parquet
import pytest
from commands import torchrun
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from m2rl import benchmarks
from m2rl.data.__main__ import main

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = """
name = "five"
[model]
path = "{0}/model"
[data]
train = ["{0}/rl/*.jsonl"]
eval = ["{0}/eval/*.jsonl"]
{1}
[[domain]]
name = "agent"
tables_dir = "{0}/tables"
[rollout]
prompts_per_step = 10
group_size = 2
max_prompt_tokens = 700
max_new_tokens = 12
[train]
steps = 2
tokens_per_bin = 2048
[evaluation]
k = 2
problems = 2
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """What a user has: the blend and its sources in two formats, tables, benchmark files, a byte-level model."""
    folder = tmp_path_factory.mktemp("user")
    office.write(folder / "tables")
    rows = []
    for i in range(1, 7):
        agent = blend_rows.agent_row(i)
        agent["ground_truth"][0]["arguments"] = json.dumps(
            {"recipient": "ada.quill@office.example", "subject": f"s{i}", "body": "b"}
        )
        rows += [blend_rows.dapo_row(i), blend_rows.skywork_row(i), blend_rows.code_row(i), blend_rows.science_row(i)]
        rows += [blend_rows.if_row(i), agent, blend_rows.dropped_row()]
    random.Random(0).shuffle(rows)
    write(folder / "train.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(blend_rows.dapo_source(9)), folder / "dapo.parquet")
    write(folder / "skywork.jsonl", blend_rows.skywork_source(9))
    for name in ("aime24", "aime25", "ifbench"):
        write(folder / f"{name}.jsonl", benchmark_rows.ALL[name]())
    raw = Tokenizer(models.BPE({t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape, **heads)
    ).save_pretrained(folder / "model")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_two_commands_from_the_blend_to_training_on_five_domains_and_the_table(user):
    sources = [f"--source=dapo={user}/dapo.parquet", f"--source=skywork={user}/skywork.jsonl"]
    assert main(["convert", f"{user}/train.jsonl", "--out", f"{user}/rl", *sources]) == 0
    for name in ("aime24", "ifbench"):
        benchmarks.main([name, "--data-file", f"{user}/{name}.jsonl", "--out", f"{user}/eval/{name}.jsonl"])
    four = "".join(f'[[domain]]\nname = "{d}"\n' for d in ("math", "code", "science", "if"))
    (user / "five.toml").write_text(CONFIG.format(user, four))

    run = torchrun("-m", "m2rl.train", "--config", "five.toml", "--rollout.sandbox", "trusted", cwd=user)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = [json.loads(line) for line in (user / "runs/five/metrics.jsonl").read_text().splitlines()]
    drawn = [s for s in steps if "math/reward" in s]
    assert len(drawn) == 2 and all(f"{d}/reward" in drawn[0] for d in ("code", "science", "if", "agent"))
    evaluated = [s for s in steps if "eval/avg_at_k" in s]
    assert {"eval/aime24/avg_at_k", "eval/ifbench/avg_at_k"} <= evaluated[-1].keys()

    files = [f"--data-file={n}={user}/{n}.jsonl" for n in ("aime24", "aime25", "ifbench")]
    options = ["--benchmarks", "aime24,aime25,ifbench", "--k", "2", "--max-new-tokens", "8", "--out", "evaluation"]
    run = torchrun("-m", "m2rl.evaluate", "--models", "runs/five/model", "model", *options, *files, cwd=user)
    assert run.returncode == 0, run.stdout + run.stderr
    table = (user / "evaluation" / "table.md").read_text()
    assert table.startswith("| benchmark | five-model | model |")
    assert "AIME'25 (Avg@2)" in table and "IFBench (Avg@2)" in table
