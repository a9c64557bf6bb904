"""One GRPO step of the default model: ours by phase, and TRL's GRPOTrainer on the same model, prompts, group size and
lengths.

    pytest bench/bench_step.py --benchmark-only

Both sides: the embedded model after a short warm start, 16 prompts x 16 samples of math and instruction following, at
most 24 new tokens, temperature 1, strictly on-policy, no KL, float32, one thread, rewards by the same verifiers. A step
is rollout + rewards + forward + backward + AdamW (+ ours: sync into the engine). The row to read is samples per second
in `extra_info`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time

import pytest
import torch

from m2rl import train
from m2rl.config import Config, Data, Domain, Model, build, read_toml
from m2rl.display import Display
from m2rl.domains import procedural, verify
from m2rl.launch import Stopping

ROUNDS, WARMUP = 8, 2
DOMAINS = (Domain("math", quota=8), Domain("if", quota=8))


class Gate:
    """Lets a loop that runs in its own thread take one step at a time, so that the benchmark times exactly that
    step."""

    def __init__(self, loop):
        self.go, self.done, self.error = threading.Semaphore(0), threading.Semaphore(0), None
        self.cpu_s: list[float] = []  # of this process; a busy machine does not lengthen it
        self.thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop) -> None:
        try:
            loop(self)
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def before_step(self) -> None:
        self.go.acquire()

    def after_step(self) -> None:
        self.done.release()

    def step(self) -> None:
        if not self.thread.is_alive():
            self.thread.start()
        start = time.process_time()
        self.go.release()
        self.done.acquire()
        self.cpu_s.append(time.process_time() - start)
        if self.error is not None:
            raise self.error


def config(folder, **changes):
    table, where = read_toml("embedded")
    base = build(Config, table, where)
    return dataclasses.replace(
        base,
        run_dir=str(folder / "run"),
        domain=DOMAINS,
        data=Data(eval=()),
        warm_start="",
        train=dataclasses.replace(base.train, steps=ROUNDS + WARMUP, save_every=0),
        **changes,
    )


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory):
    """A short warm start, so that responses end by themselves and groups have both right and wrong samples."""
    folder = tmp_path_factory.mktemp("step")
    table, where = read_toml("embedded_sft")
    sft = build(Config, table, where)
    sft = dataclasses.replace(
        sft,
        run_dir=str(folder / "sft"),
        domain=tuple(Domain(d.name, weight=1.0) for d in DOMAINS),
        train=dataclasses.replace(sft.train, steps=150),
    )
    torch.set_num_threads(1)
    model = train.Run(sft, torch.device("cpu"), Stopping(), Display(False)).sft()
    return model


def test_m2rl(benchmark, warm_model, tmp_path):
    benchmark.group = "one GRPO step, 16 x 16 samples"

    class Stepped(train.Run):
        def grpo_step(self, *args):
            gate.before_step()
            result = super().grpo_step(*args)
            gate.after_step()
            return result

    made = config(tmp_path, model=Model(path=str(warm_model)))
    gate = Gate(lambda g: Stepped(made, torch.device("cpu"), Stopping(), Display(False)).roll())
    benchmark.pedantic(gate.step, rounds=ROUNDS, warmup_rounds=WARMUP)
    gate.thread.join(60)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][WARMUP:]
    phases = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k.startswith("time/")}
    benchmark.extra_info |= phases | {
        "samples_per_s": 256 / benchmark.stats.stats.median,
        "cpu_s": statistics.median(gate.cpu_s[WARMUP:]),
        "torch": torch.__version__,
        "response_tokens": statistics.median(r["math/response_tokens"] for r in rows),
    }


def test_trl(benchmark, warm_model, tmp_path):
    trl = pytest.importorskip("trl", reason="the peer is not installed: pip install 'm2rl[peers]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    benchmark.group = "one GRPO step, 16 x 16 samples"
    tokenizer = AutoTokenizer.from_pretrained(warm_model)
    problems = [procedural.problem(d.name, 0, i) for i in range(8 * (ROUNDS + WARMUP)) for d in DOMAINS]
    specs = {p.prompt + "\n": (p.domain, p.spec) for p in problems}
    tokenizer.chat_template = None  # plain text on both sides: <bos> + prompt + newline
    rows = Dataset.from_list([{"prompt": tokenizer.bos_token + p.prompt + "\n"} for p in problems])
    lengths = []

    def reward(prompts, completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [verify(*_judge(p, c, specs)).reward for p, c in zip(prompts, completions)]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            gate.before_step()

        def on_step_end(self, *args, **kwargs):
            gate.after_step()

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=256,
        num_generations=16,
        max_completion_length=24,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        max_steps=ROUNDS + WARMUP,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        top_k=0,
    )
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(warm_model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    gate = Gate(lambda g: trainer.train())
    benchmark.pedantic(gate.step, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info |= {
        "samples_per_s": 256 / benchmark.stats.stats.median,
        "cpu_s": statistics.median(gate.cpu_s[WARMUP:]),
        "trl": trl.__version__,
        "response_tokens": statistics.mean(lengths),
    }


def _judge(prompt, completion, specs):
    domain, spec = specs[prompt.removeprefix("<bos>")]
    return domain, completion.split("<eos>")[0], spec
