"""What the stages of a study do by themselves; the whole runs in CI."""

from m2rl import embedded
from m2rl.domains.procedural import DOMAINS
from m2rl.study.plan import Seed
from m2rl.study.stages import validation_config, validation_prompts


def test_coefficients_are_never_chosen_on_problems_of_the_report(made, tmp_path):
    """The validation prompts come from the training stream, after all that the mixed run draws."""
    from m2rl.domains import procedural

    s = Seed(made, 0, tmp_path)
    found = validation_prompts(s, embedded.build_tokenizer())
    assert {d: len({p.text for p in found[d]}) for d in DOMAINS} == dict.fromkeys(DOMAINS, made.validation.problems)
    texts = {p.text.removeprefix("<bos>").removesuffix("\n") for d in DOMAINS for p in found[d]}
    steps = validation_config(made).train.steps
    stream = {procedural.problem("if", 0, i).prompt for i in range(4 * steps, 4 * steps + 100)}
    assert {p.text.removeprefix("<bos>").removesuffix("\n") for p in found["if"]} < stream
    assert not any(procedural.held_out(text) for text in texts)
