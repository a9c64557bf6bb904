"""What is refused before work."""

import dataclasses

import pytest
import tiny
from studies import with_run

from m2rl import embedded
from m2rl.domains.procedural import DOMAINS
from m2rl.study.preflight import preflight
from m2rl.types import InputError


def test_what_cannot_work_is_refused_before_work(made, tmp_path):
    embedded.save(tmp_path / "sft", 0)
    made = with_run(made, "sft", checkpoint=str(tmp_path / "sft"))
    preflight(made, tmp_path)

    def refused(changed, message):
        with pytest.raises(InputError, match=message):
            preflight(changed, tmp_path)

    refused(with_run(made, "math", checkpoint=str(tmp_path / "nowhere")), "run math: checkpoint .*nowhere")
    tiny.model("llama").save_pretrained(tmp_path / "llama")
    embedded.build_tokenizer().save_pretrained(tmp_path / "llama")
    refused(with_run(made, "math", checkpoint=str(tmp_path / "llama")), "lacks|has shape|tensors that")
    embedded.save(tmp_path / "words", 1)
    path = tmp_path / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace('"boxed', '"baxed').replace("(v)", "(w)").replace('"km"', '"kn"'))
    refused(with_run(made, "math", checkpoint=str(tmp_path / "words")), "tokenizer")
    refused(with_run(made, "math", config="qwen3_4b_math"), "run math: .*data/rl/math.jsonl")
    refused(with_run(made, "code", config="qwen3_4b_math"), r"run code: .* has no \[\[domain\]\] of that name")
    refused(with_run(made, "distill", config="embedded"), "has algorithm 'grpo', must be 'distill'")

    def sampled(**changes):
        return dataclasses.replace(made, sampling=dataclasses.replace(made.sampling, **changes))

    refused(sampled(benchmarks=("math", "mths")), "unknown benchmark mths, did you mean math")
    refused(sampled(benchmarks=("math", "code")), "no benchmark of domain science, which has an expert")
    refused(sampled(problems=5000), "math: domain math has only .* held-out problems, 5000 were asked for")
    (tmp_path / "aime.jsonl").write_text("")
    empty = {"benchmarks": (*DOMAINS, "aime24"), "data_files": (f"aime24={tmp_path}/aime.jsonl",)}
    refused(sampled(**empty), "aime")
