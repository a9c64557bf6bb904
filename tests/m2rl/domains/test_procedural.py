"""The generated problems: pure, split without overlap, spoken by the tokenizer, their demonstrations judged."""

import subprocess
import sys
import zlib

import pytest

from m2rl.domains import check_spec, procedural, sandbox, verify
from m2rl.domains.procedural import DOMAINS, SLOPPY, VOCABULARY

EVAL_PROBLEMS = 160  # what the default evaluates on


@pytest.fixture(params=DOMAINS)
def domain(request):
    return request.param


def pieces(text):
    """Greedy longest match, the embedded tokenizer's rule."""
    found, at, longest = [], 0, max(map(len, VOCABULARY))
    known = set(VOCABULARY)
    while at < len(text):
        size = next((n for n in range(longest, 0, -1) if text[at : at + n] in known), None)
        assert size, f"no piece for {text[at:]!r}"
        found.append(text[at : at + size])
        at += size
    return found


def test_a_problem_is_a_function_of_seed_domain_and_index(domain):
    code = f"from m2rl.domains import procedural as p; print([p.problem({domain!r}, 3, i) for i in range(20)])"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{[procedural.problem(domain, 3, i) for i in range(20)]}\n"}
    assert procedural.problem(domain, 3, 0) != procedural.problem(domain, 4, 0)
    assert procedural.problem(domain, 3, 0) != procedural.problem(domain, 3, 1)


def test_the_training_stream_never_meets_a_held_out_problem(domain):
    held_out = {p.prompt for p in procedural.eval_set(domain, EVAL_PROBLEMS)}
    assert len(held_out) == EVAL_PROBLEMS
    assert all(zlib.crc32(prompt.encode()) % 8 == 0 for prompt in held_out)
    stream = {procedural.problem(domain, seed, i).prompt for seed in range(3) for i in range(1000)}
    assert not stream & held_out


def test_the_stream_is_varied(domain):
    distinct = {procedural.problem(domain, 0, i).prompt for i in range(1000)}
    assert len(distinct) > {"math": 600, "code": 650, "science": 600, "if": 900}[domain]


def test_asking_for_more_held_out_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"math has only \d+ held-out problems, 400"):
        procedural.eval_set("math", 400)
    assert procedural.eval_set("math", 5) == procedural.eval_set("math", EVAL_PROBLEMS)[:5]


def test_unknown_domain():
    with pytest.raises(ValueError, match=r"poetry.*math, code, science, if"):
        procedural.problem("poetry", 0, 0)


def test_good_demonstrations_earn_the_reward_and_sloppy_ones_mostly_do_not(domain):
    sandbox.use("auto")
    problems = [procedural.problem(domain, 7, i) for i in range(100)]
    for p in problems:
        check_spec(domain, p.spec)
        assert verify(domain, p.good, p.spec).status == "ok", p
    passed = sum(verify(domain, p.sloppy, p.spec).reward for p in problems)
    assert passed <= 30, f"{passed} of 100 sloppy demonstrations pass"
    assert all(verify(domain, reply, problems[0].spec).reward == 0 for reply in ("", "foo", problems[0].prompt))


def test_the_mixture_of_demonstrations_is_as_stated(domain):
    problems = [procedural.problem(domain, 1, i) for i in range(1000)]
    sloppy = sum(procedural.demonstration(p, 1, i) == p.sloppy != p.good for i, p in enumerate(problems))
    assert abs(sloppy / 1000 - SLOPPY[domain]) < 0.05
    assert all(procedural.demonstration(p, 1, i, 0.0) == p.good for i, p in enumerate(problems[:50]))
    again = [procedural.demonstration(p, 1, i) for i, p in enumerate(problems[:50])]
    assert again == [procedural.demonstration(p, 1, i) for i, p in enumerate(problems[:50])]


def test_the_vocabulary_covers_every_text_within_the_limits(domain):
    for i in range(1000):
        p = procedural.problem(domain, 2, i)
        assert len(pieces(p.prompt)) <= 29, p.prompt  # 30 with the newline that follows
        for response in (p.good, p.sloppy):
            assert len(pieces(response)) <= 23, response  # 24 with the end token


def test_the_vocabulary_is_small_and_without_repeats():
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 260
    assert {c for piece in VOCABULARY for c in piece} <= set(VOCABULARY), "every character stands alone as well"


def test_the_tokenizer_built_from_it_agrees():
    embedded = pytest.importorskip("m2rl.embedded")
    tokenizer = embedded.build_tokenizer()
    for name in DOMAINS:
        for i in range(100):
            p = procedural.problem(name, 5, i)
            for text in (p.prompt, p.good, p.sloppy):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.convert_ids_to_tokens(ids) == pieces(text)
                assert tokenizer.decode(ids) == text
