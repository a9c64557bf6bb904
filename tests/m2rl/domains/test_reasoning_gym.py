"""Reasoning Gym's tasks as domains, where the library is installed; a clear sentence where it is not."""

import dataclasses
import importlib.util

import pytest

from m2rl import embedded
from m2rl.config import Config, Data, Domain, Evaluation
from m2rl.data import eval_prompts, load_sources
from m2rl.domains import check_spec, reasoning_gym, verify
from m2rl.types import InputError

CONFIG = Config(
    data=Data(train=("reasoning_gym",), eval=("reasoning_gym",)),
    evaluation=Evaluation(problems=5),
    domain=(Domain("rg_gcd"), Domain("rg_countdown")),
)
TOKENIZER = embedded.build_tokenizer()
installed = importlib.util.find_spec("reasoning_gym") is not None
needs_library = pytest.mark.skipif(
    not installed, reason="reasoning-gym is not installed (pip install 'm2rl[reasoning-gym]')"
)


class Even:
    """A stand-in for one of the library's data sets."""

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) % 2 == 0 else 0.01


@pytest.fixture
def even(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "_dataset", lambda task, seed: Even())
    return {"task": "even", "entry": {"question": "An even number?", "answer": "2", "metadata": {}}}


@pytest.mark.parametrize(
    ("response", "reward", "status"),
    [
        ("<answer>4</answer>", 1, "ok"),
        ("\\boxed{6}", 1, "ok"),
        ("so\nAnswer: 8", 1, "ok"),
        ("<answer>4</answer> no, <answer>5</answer>", 0, "wrong"),  # the last counts, and a hundredth is no reward
        ("Answer: many", 0, "wrong"),
        ("4", 0, "unparsed"),
        ("", 0, "unparsed"),
    ],
)
def test_the_last_answer_is_scored_by_the_task(response, reward, status, even):
    made = verify("rg_even", response, even)
    assert (made.reward, made.status) == (reward, status)


def test_the_think_gate_holds_here_too(even):
    assert verify("rg_even", "Answer: 4", even | {"think_gate": True}).status == "unparsed"


def test_a_row_without_its_record_is_refused(even):
    check_spec("rg_even", even)
    with pytest.raises(ValueError, match="needs key entry"):
        check_spec("rg_even", {"task": "even"})


@pytest.mark.skipif(installed, reason="reasoning-gym is installed")
def test_without_the_library_the_error_names_the_extra():
    with pytest.raises(InputError, match=r"domain rg_gcd: .*pip install 'm2rl\[reasoning-gym\]'"):
        load_sources(CONFIG.data.train, CONFIG, TOKENIZER, verifiable=True)


def test_the_tasks_have_to_be_named():
    with pytest.raises(InputError, match=r'"reasoning_gym" needs a .*domain.* for each task'):
        load_sources(("reasoning_gym",), Config(), TOKENIZER, verifiable=True)


@needs_library
def test_tasks_generate_without_end_and_their_answers_score():
    loaded = load_sources(CONFIG.data.train, CONFIG, TOKENIZER, verifiable=True)
    for domain, source in loaded.sources.items():
        assert source.size is None
        prompts = [source.prompt(i) for i in (0, 1, 10**12)]
        assert len({p.text for p in prompts}) == 3
        for p in prompts:
            check_spec(domain, p.spec)
            assert verify(domain, f"Answer: {p.spec['entry']['answer']}", p.spec).reward == 1
            assert verify(domain, "Answer: elephant", p.spec).reward == 0
    again = load_sources(CONFIG.data.train, CONFIG, TOKENIZER, verifiable=True)
    assert again.sources["rg_gcd"].prompt(7) == loaded.sources["rg_gcd"].prompt(7)


@needs_library
def test_held_out_problems_come_from_another_stream():
    held_out = {p.text for p in eval_prompts(CONFIG, TOKENIZER)}
    source = load_sources(CONFIG.data.train, CONFIG, TOKENIZER, verifiable=True).sources["rg_countdown"]
    assert len(held_out) == 10 and not held_out & {source.prompt(i).text for i in range(20)}


@needs_library
def test_an_unknown_task_names_a_near_one():
    config = dataclasses.replace(CONFIG, domain=(Domain("rg_gdc"),))
    with pytest.raises(InputError, match="Reasoning Gym has no task gdc, did you mean rg_gcd"):
        load_sources(("reasoning_gym",), config, TOKENIZER, verifiable=True)
