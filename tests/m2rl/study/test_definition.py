"""What a study's file may not say."""

import dataclasses

import pytest
from studies import with_run

from m2rl.study.definition import Analyses, Sampling, verify
from m2rl.types import InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, run=s.run[:-1]), "stage distill is missing"),
        (lambda s: dataclasses.replace(s, run=(*s.run, s.run[0])), "listed twice"),
        (lambda s: with_run(s, "math", config=""), "run math: needs a config to train it, or a checkpoint"),
        (lambda s: with_run(s, "math", checkpoint="there"), "has a checkpoint but run sft has none"),
        (lambda s: dataclasses.replace(s, merge={**s.merge, "x": {"method": "tis"}}), "merge.x: method must be one of"),
        (
            lambda s: dataclasses.replace(s, merge={**s.merge, "x": {"method": "ties", "densty": 1}}),
            "unknown merge option 'densty'",
        ),
        (lambda s: with_run(s, "mixed", config="", checkpoint="x"), "has a checkpoint but run sft has none"),
        (
            lambda s: with_run(with_run(s, "mixed", config="", checkpoint="x"), "sft", checkpoint="x"),
            "merge.ta: choosing from a list needs run mixed's config",
        ),
        (lambda s: dataclasses.replace(s, merge={}), "no merge is named"),
        (lambda s: dataclasses.replace(s, analyses=Analyses(("tie",))), "analyses.merges: no merge"),
        (lambda s: dataclasses.replace(s, sampling=Sampling()), "sampling.benchmarks names none"),
        (lambda s: dataclasses.replace(s, seeds=(1, 1)), "seeds must differ"),
        (lambda s: dataclasses.replace(s, scale=-1.0), "scale must be above 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(made, change, message):
    with pytest.raises(InputError, match=message):
        verify(change(made), "my.toml")
