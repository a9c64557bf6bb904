"""verify, check_spec, lint and the two levels and modes, on whatever is in the table of constraints."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rl.domains import constraints, instruct
from m2rl.domains.constraints import CONSTRAINTS

NO_COMMA = {"id": "punctuation:no_comma"}
LOWER = {"id": "change_case:english_lowercase", "kwargs": {}}


def one(id, **kwargs):
    return {"constraints": [{"id": id, "kwargs": kwargs}]}


# A value each kwarg accepts, by name; enough to make a row for every id in the table.
VALUES = {
    "keywords": ["lamp", "oil"],
    "forbidden_words": ["cat"],
    "letter": "e",
    "let_relation": "at least",
    "relation": "at least",
    "capital_relation": "at least",
    "language": "en",
    "postscript_marker": "P.S.",
    "section_spliter": "Section",
    "prompt_to_repeat": "Name a bird that sings at night.",
    "reference_text": "Name a bird that sings at night.",
    "phrase": "The old oak bends in wind",
    "options": "yes/no/maybe",
    "sep": "...",
    "n_end": 4,
    "max_words": 9,
    "instruction": "Name a bird.",
}


def row_of(id):
    return one(
        id, **{name: VALUES.get(name, 2 if _wants_number(k) else "lamp") for name, k in CONSTRAINTS[id].kwargs.items()}
    )


def _wants_number(kwarg):
    try:
        kwarg.read(2)
    except ValueError:
        return False
    return True


def test_the_table_holds_ifeval_open_instruct_ifbench_and_the_embedded_ids():
    assert len(CONSTRAINTS) == 25 + 29 + 58 + 3
    assert all(constraint.id == id and constraint.check.__doc__ for id, constraint in CONSTRAINTS.items())


# --- reward and status ----------------------------------------------------------------------------------------------


def test_binary_reward_is_one_only_if_every_constraint_holds():
    spec = {"constraints": [NO_COMMA, LOWER]}
    assert instruct.verify("a wren", spec).reward == 1.0
    verdict = instruct.verify("A wren", spec)
    assert (verdict.reward, verdict.status) == (0.0, "wrong")
    assert verdict.detail == "1 of 2 not satisfied: change_case:english_lowercase"


def test_fraction_reward_is_the_share_that_holds():
    spec = {"constraints": [NO_COMMA, LOWER], "grading": "fraction"}
    assert [instruct.verify(text, spec).reward for text in ("a wren", "A wren", "A, wren")] == [1.0, 0.5, 0.0]
    assert instruct.verify("A wren", spec).detail == "1 of 2 not satisfied: change_case:english_lowercase"


def test_blend_form_with_null_padded_kwargs():
    pad = {"keywords": None, "num_words": None, "relation": None, "letter": None}
    spec = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words", "detectable_format:title"],
        "kwargs": [pad, {**pad, "num_words": 3.0, "relation": "at least"}, None],
        "prompt": "ignored",
    }
    fraction, binary = {**spec, "grading_mode": "fraction"}, {**spec, "grading_mode": "binary"}
    instruct.check_spec(fraction)
    for response, failed in (
        ("<<one two three>>", []),
        ("one two three", ["detectable_format:title"]),
        ("one, two", spec["instruction_id_list"]),
    ):
        verdict = instruct.verify(response, fraction)
        assert verdict.reward == pytest.approx(1 - len(failed) / 3)
        assert verdict.detail.partition(": ")[2] == ", ".join(failed)
        assert instruct.verify(response, binary).reward == float(not failed)


def test_same_rows_in_either_form_agree():
    blend = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["wren"]}]}
    for text in ("a wren", "a tit"):
        assert instruct.verify(text, blend) == instruct.verify(text, one("keywords:existence", keywords=["wren"]))


@pytest.mark.parametrize("blank", ["", " ", "\n\n\t", "\u2003"])
@pytest.mark.parametrize("mode", instruct.MODES)
def test_blank_response_is_unparsed_whatever_the_row(blank, mode):
    for id in CONSTRAINTS:
        for grading in instruct.GRADINGS:
            verdict = instruct.verify(blank, {**row_of(id), "mode": mode, "grading": grading})
            assert (verdict.reward, verdict.status) == (0.0, "unparsed"), id


def test_foo_scores_zero_or_lint_names_the_row():
    satisfied = []
    for id in CONSTRAINTS:
        for mode in instruct.MODES:
            reward = instruct.verify("foo", {**row_of(id), "mode": mode}).reward
            assert bool(reward) == bool(instruct.lint(row_of(id))), id
        satisfied += [id] if reward else []
    assert "punctuation:no_comma" in satisfied
    for id in satisfied:  # with one constraint that asks for something the row is sound
        spec = {
            "constraints": [
                *row_of(id)["constraints"],
                *one("length_constraints:number_words", num_words=2, relation="at least")["constraints"],
            ]
        }
        assert instruct.lint(spec) == []
        assert instruct.verify("foo", spec).reward == 0.0


# --- strict and loose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "response"),
    [
        ({"id": "punctuation:no_comma"}, "Sure, here it is:\na wren"),  # without the first line
        ({"id": "punctuation:no_comma"}, "a wren\nYours, as ever"),  # without the last
        ({"id": "punctuation:no_comma"}, "Sure, here\na wren\nYours, as ever"),  # without both
        ({"id": "startend:end_checker", "kwargs": {"end_phrase": "the end"}}, "so *the* end"),  # without asterisks
        ({"id": "format:no_whitespace"}, "Here it is:\n\nwren \n"),  # and without the whitespace around
        ({"id": "startend:quotation"}, 'Here:\n**"a wren"**\nBye'),  # without both, and without asterisks
    ],
)
def test_loose_reads_past_an_opening_a_closing_and_asterisks(kwargs, response):
    spec = {"constraints": [kwargs]}
    for grading in instruct.GRADINGS:
        assert instruct.verify(response, {**spec, "mode": "strict", "grading": grading}).reward == 0.0
        loose = instruct.verify(response, {**spec, "mode": "loose", "grading": grading})
        assert (loose.reward, loose.status) == (1.0, "ok")


def test_loose_readings_may_differ_between_constraints_of_a_row():
    spec = {"constraints": [NO_COMMA, {"id": "startend:end_checker", "kwargs": {"end_phrase": "yours, a."}}]}
    assert instruct.verify("a wren\nyours, a.", {**spec, "mode": "loose"}).reward == 1.0


def test_loose_does_not_accept_a_reading_that_is_blank():
    assert instruct.verify("a, b", {"constraints": [NO_COMMA], "mode": "loose"}).reward == 0.0


# --- bad rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (one("punctuation:no_coma"), "unknown constraint 'punctuation:no_coma', did you mean 'punctuation:no_comma'?"),
        (one(None), "unknown constraint None"),
        (one("keywords:frequency", frequency=1, relation="at least"), "keywords:frequency: kwarg 'keyword' is missing"),
        (
            one("keywords:frequency", keyword="a", frequency=1, relation="above"),
            "keywords:frequency: kwarg 'relation' must",
        ),
        (
            one("keywords:frequency", keyword="a", frequency=1.5, relation="at least"),
            "'frequency' must be an integer >= 0",
        ),
        (
            one("keywords:frequency", keyword="a", frequency=-1, relation="at least"),
            "'frequency' must be an integer >= 0",
        ),
        (one("keywords:frequency", keyword="a", frequency=True, relation="at least"), "got True"),
        (one("keywords:frequency", keyword="a", frequency=float("nan"), relation="at least"), "got nan"),
        (
            one("keywords:frequency", keyword=" ", frequency=1, relation="at least"),
            "'keyword' must be a non-blank string",
        ),
        (one("keywords:existence", keywords=["a", " "]), "'keywords' must be a list of non-blank strings"),
        (one("keywords:existence", keywords=["a", 3]), "'keywords' must be a list of non-blank strings"),
        (one("ratio:stop_words", percentage=101), "'percentage' must be a number in [0, 100], got 101"),
        (one("keywords:existence", keywords=[]), "'keywords' must be a list of non-blank strings"),
        (one("keywords:existence", keywords="lamp"), "'keywords' must be a list of non-blank strings, got 'lamp'"),
        (
            one("keywords:letter_frequency", letter="ab", let_frequency=1, let_relation="at least"),
            "'letter' must be one",
        ),
        (one("language:response_language", language="tlh"), "'language' must be a language code"),
        (one("punctuation:no_comma", keyword="a"), "punctuation:no_comma: unknown kwarg 'keyword', it takes none"),
        (
            one("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=3, first_word="a"),
            "length_constraints:nth_paragraph_first_word: kwarg 'nth_paragraph' must be <= num_paragraphs 2, got 3",
        ),
        ({"constraints": []}, "at least one constraint"),
        ({"constraints": ["punctuation:no_comma"]}, "constraints must be a list"),
        (
            {"constraints": [{"id": "punctuation:no_comma", "kwargs": [1]}]},
            "kwargs must be a mapping or null, got list",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "kwargs must be a list as long as"),
        ({"answer": "B"}, "a row needs constraints or instruction_id_list"),
        ({"constraints": [NO_COMMA], "mode": "lax"}, "mode must be one of strict, loose, got 'lax'"),
        ({"constraints": [NO_COMMA], "grading": "mean"}, "grading must be one of binary, fraction, got 'mean'"),
    ],
)
def test_bad_row_is_a_load_time_error_and_never_a_reward(spec, message):
    with pytest.raises(ValueError) as error:
        instruct.check_spec(spec)
    assert message in str(error.value)
    assert instruct.lint(spec) == [str(error.value)]
    verdict = instruct.verify("a wren", spec)
    assert (verdict.reward, verdict.status, verdict.detail) == (0.0, "error", str(error.value))


def test_every_required_kwarg_is_named_when_it_is_missing():
    for id, constraint in CONSTRAINTS.items():
        full = row_of(id)["constraints"][0]["kwargs"]
        for name, kwarg in constraint.kwargs.items():
            if kwarg.default is constraints.REQUIRED:
                with pytest.raises(ValueError, match=f"{id}: kwarg '{name}' is missing"):
                    instruct.check_spec(one(id, **{k: v for k, v in full.items() if k != name}))


def test_missing_language_data_is_named(monkeypatch):
    monkeypatch.setattr(constraints.importlib.util, "find_spec", lambda name: None)
    for id, constraint in CONSTRAINTS.items():
        if constraint.needs is None:
            instruct.check_spec(row_of(id))
        else:
            package = constraints.PACKAGE_OF[constraint.needs]
            with pytest.raises(ValueError, match=f"{id} needs language data that is not installed: package {package}"):
                instruct.check_spec(row_of(id))


def test_a_check_that_fails_is_an_error_with_its_id(monkeypatch):
    def fail(response):
        raise KeyError("x")

    monkeypatch.setitem(CONSTRAINTS, "t:fail", constraints.Constraint("t:fail", fail, {}, None, None))
    verdict = instruct.verify("a wren", {"constraints": [NO_COMMA, {"id": "t:fail"}], "grading": "fraction"})
    assert (verdict.reward, verdict.status, verdict.detail) == (0.0, "error", "t:fail: KeyError: 'x'")


def test_over_long_response_is_not_judged():
    longest = "a" * instruct.MAX_RESPONSE_CHARS
    assert instruct.verify(longest, {"constraints": [NO_COMMA]}).status == "ok"
    for grading in instruct.GRADINGS:
        verdict = instruct.verify(longest + "a", {"constraints": [NO_COMMA], "grading": grading})
        assert (verdict.reward, verdict.status) == (0.0, "error")
        assert "characters" in verdict.detail


# --- no input crashes or hangs --------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [*"aA.,!?;:-*<>[](){}\"'#\n\t 1é中🙂", "\n\n", "***", "******", "P.S.", "<<", ">>", "n't", "Dr. ", "the "]
)
RESPONSES = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=60).map("".join))


@settings(max_examples=120, deadline=None)
@given(RESPONSES)
def test_no_response_crashes_a_check_and_loose_accepts_what_strict_does(response):
    for id in CONSTRAINTS:
        spec = row_of(id)
        strict, loose = (instruct.verify(response, {**spec, "mode": mode}) for mode in instruct.MODES)
        assert {strict.status, loose.status} <= {"ok", "wrong", "unparsed"}, (id, strict, loose)
        assert strict.reward <= loose.reward, id
        assert instruct.verify(response, {**spec, "grading": "fraction"}) == strict, id  # one constraint: all or none


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(CONSTRAINTS)),
    st.dictionaries(
        st.sampled_from(sorted({name for c in CONSTRAINTS.values() for name in c.kwargs})),
        st.one_of(
            st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3)
        ),
    ),
)
def test_no_kwargs_crash_a_check(id, kwargs):
    assert instruct.verify("one two", one(id, **kwargs)).status in ("ok", "wrong", "error")


def test_no_repeated_piece_makes_a_check_slow():
    # Every pattern that backtracks on one of these runs for minutes; a linear one needs milliseconds.
    for piece in ["\n", " ", "*", "[", "<<", "-", "a", ".", '"', "Section ", "p. p. ", "Question 1", "a-", "' "]:
        response = piece * (20_000 // len(piece))
        for id in CONSTRAINTS:
            instruct.verify(response, row_of(id))


def test_the_embedded_ids_import_nothing_heavy():
    program = (
        "import sys; from m2rl.domains import instruct;"
        "ids = ['embedded:use_commas', 'change_case:english_lowercase', 'punctuation:no_comma'];"
        "[instruct.verify('a wren', {'constraints': [{'id': id}]}) for id in ids];"
        "print([m for m in ('torch', 'numpy', 'langdetect', 'punkt', 'nltk', 'syllapy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("id", "kwargs", "good", "bad"),
    [
        ("embedded:exact_words", {"num_words": 2}, ["red tree", "red, tree!"], ["red", "red tree bye"]),
        ("embedded:start_with_word", {"word": "red"}, ["red tree", "RED. tree"], ["reds tree", "tree red"]),
        ("embedded:use_commas", {}, ["red, tree", "red,tree"], ["red tree", "red; tree"]),
    ],
)
def test_embedded_constraints(id, kwargs, good, bad):
    assert [instruct.verify(text, one(id, **kwargs)).status for text in good] == ["ok", "ok"]
    assert [instruct.verify(text, one(id, **kwargs)).status for text in bad] == ["wrong", "wrong"]
