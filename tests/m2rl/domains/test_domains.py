"""verify and check_spec by domain name: the think gate, errors that name the domain, imports that stay small."""

import subprocess
import sys

import pytest

from m2rl.domains import check_spec, module, verify
from m2rl.types import DOMAINS, STATUSES

CASES = {  # domain: (spec, right, wrong)
    "math": ({"answer": "4"}, "\\boxed{4}", "\\boxed{5}"),
    "science": ({"answer": "B", "options": {"A": "x", "B": "y"}}, "Answer: B", "Answer: A"),
    "if": ({"constraints": [{"id": "punctuation:no_comma", "kwargs": {}}]}, "yes", "yes, no"),
}


@pytest.mark.parametrize("domain", CASES)
def test_right_and_wrong(domain):
    spec, right, wrong = CASES[domain]
    check_spec(domain, spec)
    assert verify(domain, right, spec).reward == 1.0
    assert verify(domain, wrong, spec).reward == 0.0


@pytest.mark.parametrize("domain", CASES)
@pytest.mark.parametrize("end", ["", "<|im_end|>", "\n"])
def test_the_think_gate_reads_only_what_follows_the_last_end_of_thought(domain, end):
    spec, right, wrong = CASES[domain]
    gated = {**spec, "think_gate": True}
    assert verify(domain, f"<think>{wrong}</think>{right}{end}", gated).reward == 1.0
    assert verify(domain, f"{wrong}</think>{wrong}</think>{right}{end}", gated).reward == 1.0
    assert verify(domain, f"<think>{right}</think>{wrong}{end}", gated).reward == 0.0
    truncated = verify(domain, f"<think>{right}", gated)
    assert (truncated.reward, truncated.status, truncated.detail) == (0.0, "unparsed", "no </think>")


@pytest.mark.parametrize("domain", CASES)
def test_the_reference_preset_gates_by_itself(domain):
    spec, right, _ = CASES[domain]
    spec = {**spec, "preset": "reference"}
    assert verify(domain, right, spec).status == "unparsed"
    reference_right = "Answer: \\boxed{4}" if domain == "math" else right
    assert verify(domain, f"</think>{reference_right}<|im_end|>", spec).reward == 1.0


def test_without_a_gate_the_thoughts_are_read_as_well():
    assert verify("math", "<think>\\boxed{4}", {"answer": "4"}).reward == 1.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [("maths", "did you mean 'math'"), ("", "there are: math"), ("a.b", "there are"), ("pool", "no verify")],
)
def test_an_unknown_domain_names_those_there_are(name, hint):
    with pytest.raises(ValueError, match=hint):
        verify(name, "x", {})


@pytest.mark.parametrize("domain", CASES)
@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "\ud800", "é" * 1000, "\u2028\u2029", "</think>", "\\boxed{" * 99, "```" * 99]
)
def test_odd_texts_are_judged(domain, text):
    verdict = verify(domain, text, CASES[domain][0])
    assert verdict.status in STATUSES and verdict.reward in (0.0, 1.0)
    assert (verdict.reward > 0) <= (verdict.status == "ok")


@pytest.mark.parametrize("domain", [d for d in DOMAINS if d in CASES])
def test_a_domain_imports_only_what_it_needs(domain):
    spec, right, _ = CASES[domain]
    heavy = {"torch", "transformers", "numpy", "pyarrow", "sympy", "math_verify", "nltk"}
    code = (
        "import sys; from m2rl.domains import verify;"
        f"v = verify({domain!r}, {right!r}, {spec!r}); assert v.reward == 1, v;"
        f"print(*sorted({heavy!r} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == [], ran.stdout + ran.stderr


def test_a_domain_of_ones_own_is_one_module(monkeypatch):
    import types

    from m2rl import domains
    from m2rl.types import Verdict

    own = types.ModuleType("m2rl.domains.shout")
    own.verify = lambda response, spec: Verdict(float(response.isupper()), "ok" if response.isupper() else "wrong")
    own.__spec__ = types.SimpleNamespace(name="m2rl.domains.shout")
    monkeypatch.setitem(sys.modules, "m2rl.domains.shout", own)
    module.cache_clear()
    try:
        assert domains.verify("shout", "HELLO", {}).reward == 1.0
        assert domains.verify("shout", "hello", {}).status == "wrong"
        domains.check_spec("shout", {"anything": 1})  # it has no check_spec: every row is accepted
    finally:
        module.cache_clear()
