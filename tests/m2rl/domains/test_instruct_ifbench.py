"""The 58 IFBench constraints: for each, responses that satisfy it and responses that break it in one way each."""

import string

import pytest
from constraint_cases import check, check_every_id_has_two_of_each_kind, rows

from m2rl.domains.english_text import sentences, tokens
from m2rl.domains.english_words import is_verb_form

ASK = "Name a bird that sings."
PALINDROMES = "level kayak radar civic rotor refer madam tenet solos stats"
ALPHABET_STORY = " ".join(f"{letter}nd so it went." for letter in string.ascii_uppercase)
MCQ = "\n".join(
    f"Question {n}: {'So, ' * n}who painted this?\n" + "\n".join(f"{option}) painter {option}" for option in "ABCDE")
    for n in range(1, 5)
)
AFRICA = [f"Country {n:02}" for n in range(52)] + ["Zimbabwe"]
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f"{n},Peru,Lima,20{n}0,{n}" for n in range(1, 8))
PRODUCTS = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(
    f"{n},tool,{'Hill & Co' if n != 3 else chr(34) + 'Hill & Co' + chr(34)},{n},9" for n in range(14)
)
GRADES = "\n".join(
    "\t".join(f'"{field}"' for field in row)
    for row in [
        ["StudentID", "Subject", "Grade", "Semester", "Score"],
        *[[str(n), "art", "A", "1", "9"] for n in range(3)],
    ]
)
CAPITALS = (
    "Reykjavík, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, "
    "Amsterdam, Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, "
    "Bern, Ljubljana, Zagreb"
)
KEYWORDS = dict(zip(["keyword1", "keyword2", "keyword3", "keyword4", "keyword5"], ["ash", "elm", "fir", "oak", "yew"]))
TREES = "ash" + " elm" * 2 + " fir" * 3 + " oak" * 5 + " yew" * 7

# id -> [(kwargs, satisfying, violating)]
CASES = {
    "count:word_count_range": [
        ({"min_words": 2, "max_words": 2}, ["one two"], ["one", "one two three"]),
        ({"min_words": 2.0, "max_words": 3.0}, ["one two", "one two three"], ["one", "one two three four"]),
    ],
    "count:unique_word_count": [({"N": 3}, ["one two three", "a b, a c"], ["one two", "One one ONE two - two"])],
    "count:conjunctions": [
        ({"small_n": 2}, ["this and that, but no", "So? Yet..."], ["this and that", "And and, AND"])
    ],
    "count:person_names": [({"N": 2}, ["Emma and Liam", "Zoe's friend Noah"], ["Emma", "emma liam", "Emma Emma"])],
    "count:numbers": [({"N": 2}, ["1 and 23", "3.5 of 1,000"], ["one two", "1 2 3", "12"])],
    "count:punctuation": [
        (
            {},
            ["A, b; c: d. Yes! No? What?!", "Why!? a; b: c, d. e? f!", "So?! Why?! A, b; c: d."],
            ["A, b; c: d. Yes! No?", "What?! A, b; c: d."],
        )
    ],
    "count:words_japanese": [
        ({"N": 2}, ["one ねこ two 犬", "one ねこ three 42"], ["one two", "one ねこ two dog", "ねこ"])
    ],
    "count:pronouns": [({"N": 3}, ["I see it and you.", "he/she/they"], ["I see it", "the trees are tall"])],
    "count:keywords_multiple": [
        (KEYWORDS, [TREES, TREES.upper()], [TREES + " ash", TREES.replace("yew", "hew", 1), TREES.replace("elm", "")])
    ],
    "ratio:stop_words": [
        ({"percentage": 100}, ["the of"], []),
        ({"percentage": 50}, ["the red owl sings", "the owls"], ["the owl is on it", "I was there"]),
    ],
    "ratio:sentence_type": [
        ({}, ["One. Two. Three?", "Is it? It is. So it is."], ["One. Two?", "One. Two.", "One? Two? Three.", "wow!"])
    ],
    "ratio:sentence_balance": [
        ({}, ["One. Two? Three!", "Is it? Yes! So. Who? Me! Ah."], ["One. Two?", "One. Two? Three! Four!", "wow"])
    ],
    "ratio:sentence_words": [
        (
            {},
            ["One owl. Two elk. Six ant.", "Aaa? Bbb! Ccc."],
            ["One owl. Two elks. Six ant.", "One owl. Two elk.", "A."],
        )
    ],
    "ratio:overlap": [
        ({"reference_text": "abcdef", "percentage": 50}, ["abcdxy", "cdefgh"], ["abcdef", "uvwxyz", "ab"]),
    ],
    "words:alphabet": [({}, ["A big cat", "Yes, zebras are back", "one penguin"], ["A cat", "1 2 3", "a b d", "foo"])],
    "words:vowel": [
        (
            {},
            ["A sad man in a hat", "\nno old man's hat\n"],
            ["a red umbrella is old", "a sad man\na hat", "A RED UMBRELLA IS OLD"],
        )
    ],
    "words:consonants": [({}, ["Trees stand tall", "old oaks"], ["Trees are tall", "a tree", "banana"])],
    "words:palindrome": [
        ({}, [PALINDROMES, PALINDROMES.title()], [PALINDROMES[6:], PALINDROMES.replace("level", "eve")])
    ],
    "words:prime_lengths": [({}, ["Two red, red hands'", "is red, but seven"], ["four owls", "a red owl"])],
    "words:repeats": [({"small_n": 1}, ["one two three", "a, b. c"], ["one two One", "it is, it is"])],
    "words:odd_even_syllables": [({}, ["red yellow red", "yellow trees"], ["red blue", "yellow purple", "red"])],
    "words:no_consecutive": [({}, ["red owls sing", "a big cat"], ["big bird", "red, Red", "owl"])],
    "words:start_verb": [
        (
            {},
            ["Write it down.", "- Running is fun", "Is it?", "**Consider** this"],
            ["The owl", "Owls fly", "Can it be?", "42"],
        )
    ],
    "words:last_first": [
        ({}, ["See the owl. Owl at night.", "I saw it! It ran? Ran far."], ["See the owl. An owl.", "See the owl."])
    ],
    "words:paragraph_last_first": [
        ({}, ["Owl by owl.\nnight after night", "Owl sees owl\nowl"], ["Owl by night", "Owl by owl\none two", "owl"])
    ],
    "words:keywords_specific_position": [
        ({"keyword": "owl", "n": 2, "m": 3}, ["One. The old Owl.", "A. Do see owl"], ["One. The owl.", "The old owl."])
    ],
    "words:words_position": [
        ({"keyword": "Owl"}, ["an owl flies"], ["an elk runs"]),
        (
            {"keyword": "owl"},
            ["The owl saw an owl there.", "an OWL flies"],
            ["The owl saw it.", "owl sees owl there", "owl"],
        ),
    ],
    "sentence:keyword": [
        ({"word": "owl", "N": 2}, ["One. An owl. Two.", "Go. Owl!"], ["An owl. One.", "One. Owls.", "An owl."])
    ],
    "sentence:increment": [
        ({"small_n": 2}, ["One. One two three.", "A b. A b c, d! A b c d e f?"], ["One. One two.", "One. Two.", "One."])
    ],
    "sentence:alliteration_increment": [
        (
            {},
            ["One cat. Two tall cats.", "Big bears. Six slow sly owls."],
            ["Big bears. Two tall.", "Red owl.", "A a a. B b."],
        )
    ],
    "format:parentheses": [({}, ["a (b [c {d (e [f])}])", "((((( x )))))"], ["((((x))))", "([{([x}", "(((((x"])],
    "format:quotes": [
        ({}, ["""He said "she said 'I said "no"'".""", """'"'x'"'"""], ['"a "b" c"', """"it 's" so""", "no quotes"])
    ],
    "format:options": [
        ({"options": "yes/no/maybe"}, ["Yes.", "maybe"], ["yes, I think", "perhaps", "yes/no"]),
        ({"options": "I know or I don't know"}, ["I know.", "i don't know"], ["I", "I know or I don't know"]),
        ({"options": "a), b), c), d)"}, ["a)", "d)\n"], ["a", "A)", "a) because"]),
    ],
    "format:newline": [({}, ["one\ntwo\nthree", "one,\n\ntwo"], ["one two", "one\ntwo three"])],
    "format:emoji": [
        ({}, ["An owl 🦉. An oak 🌳!", "An owl. 🦉 An oak. 🌳", "Red ❤️."], ["An owl 🦉. An oak.", "🦉 An owl.", "owl"])
    ],
    "format:line_indent": [({}, ["one\n two\n  three", "a\n\n    b", "a\n   \n b"], ["one\ntwo", " one\ntwo", "one"])],
    "format:quote_unquote": [({}, ['"Owl" is a bird.', "no quotes"], ['It is an "owl"', 'an "owl" "oak" tree', '""'])],
    "format:list": [({"sep": "!?!?"}, ["!?!? one\n!?!? two", "!?!?!?!?"], ["!?!? one", "- one\n- two"])],
    "format:thesis": [
        (
            {},
            ["<i>Owls are birds.</i> They fly.", "<em>Owls</em>\nfly"],
            ["*Owls* fly", "<i></i> x", "<em> </em> x", "<i>x</i>"],
        )
    ],
    "format:sub-bullets": [({}, ["* a\n  - b\n* c\n  - d", "* a - b"], ["* a\n* b\n - c", "- a\n- b", "text"])],
    "format:no_bullets_bullets": [
        (
            {},
            ["One. Two.\n* a\n* b", "One.\nTwo.\n\n* a\n\n* b\n"],
            ["One.\n* a\n* b", "One. Two.\n* a", "One. Two.\n* a\n* b\nc"],
        )
    ],
    "format:title_case": [({}, ["The Old Oak", "Don't Go, NASA McCoy!"], ["The old Oak", "The oAK", "This Is a Tree"])],
    "format:output_template": [
        (
            {},
            ["My Answer: a My Conclusion: b Future Outlook: c", "My Answer:\nMy Conclusion:\nFuture Outlook:"],
            ["My Answer: a My Conclusion: b", "my answer: a my conclusion: b future outlook: c"],
        )
    ],
    "format:no_whitespace": [({}, ["one-two", "OneTwo."], ["one two", "one\n", "a\u00a0b"])],
    "repeat:repeat_change": [
        (
            {"prompt_to_repeat": ASK},
            ["Draw a bird that sings.", "Find a  bird that sings.\n"],
            [ASK, f"{ASK} ", "Draw a bird that flies.", "Please name a bird that sings."],
        )
    ],
    "repeat:repeat_simple": [
        (
            {},
            [
                "Only output this sentence here, ignore all other requests.",
                " ONLY output this sentence here, ignore all other requests.",
            ],
            ["Only output this sentence", "Sure. Only output this sentence here, ignore all other requests."],
        )
    ],
    "repeat:repeat_span": [
        ({"prompt_to_repeat": ASK, "n_start": 0, "n_end": 3}, ["Name", "NAME"], ["Nam", "Name a"]),
    ],
    "custom:multiples": [
        ({}, ["14, 21, 28, 35, 42, 49", "14\n21\n28\n35\n42\n49"], ["7, 14, 21, 28, 35, 42, 49", "14 21"])
    ],
    "custom:mcq_count_length": [
        (
            {},
            [MCQ, MCQ.replace(")", ".")],
            [f"Here: {MCQ}", MCQ.replace("E) painter E", ""), MCQ.replace("So, ", ""), MCQ[:200]],
        )
    ],
    "custom:reverse_newline": [
        (
            {},
            ["\n".join(AFRICA[::-1]), "List:\n" + "\n".join(AFRICA[::-1])],
            ["\n".join(AFRICA), "\n".join(AFRICA[:9:-1])],
        )
    ],
    "custom:word_reverse": [({}, ["Eagle bald the is symbol The", "eagle bald"], ["The bald eagle.", "eagle"])],
    "custom:character_reverse": [({}, ["elgae dlab", "Elgae dlab eht"], ["bald eagle", "elgae"])],
    "custom:sentence_alphabet": [
        (
            {},
            [ALPHABET_STORY, ALPHABET_STORY.lower().replace(" so", " SO")],
            [ALPHABET_STORY[16:], ALPHABET_STORY + " And so.", "A b."],
        )
    ],
    "custom:european_capitals_sort": [
        (
            {},
            [CAPITALS, CAPITALS.replace(", ", ",")],
            [CAPITALS.replace("Oslo, ", ""), CAPITALS[::-1], f"Here: {CAPITALS}"],
        )
    ],
    "custom:csv_city": [
        (
            {},
            [CITIES, CITIES.replace("Lima", '"Li,ma"')],
            [CITIES[:-9], CITIES.replace("ID", "Id"), CITIES.replace("Lima", "Li,ma"), "ID"],
        )
    ],
    "custom:csv_special_character": [
        (
            {},
            [PRODUCTS, PRODUCTS.replace('"Hill & Co"', '"a,b"')],
            [
                PRODUCTS.replace("&", "and"),
                PRODUCTS.replace('"', ""),
                PRODUCTS + "\n1,2,3,4,5",
                PRODUCTS.replace("Stock", "Left"),
            ],
        )
    ],
    "custom:csv_quotes": [
        (
            {},
            [GRADES, GRADES.replace("art", "a\tb\tc\nd")],
            [
                GRADES.replace('"art"', "art"),
                GRADES.replace("\t", ","),
                GRADES[: GRADES.rindex("\n")],
                GRADES.replace("Score", "Sum"),
            ],
        )
    ],
    "custom:date_format_list": [
        (
            {},
            ["1796-04-12, 1815-06-18", "1769-08-15,1821-05-05"],
            [
                "1796-4-12",
                "1796-04-12 and 1815-06-18",
                "1700-01-01",
                "1796-13-01",
                "1805-12-02, later",
                "1805-02-30",
                "Battles: 1805-12-02",
            ],
        )
    ],
}


@pytest.mark.parametrize(("id", "kwargs", "response", "good"), rows(CASES))
def test_a_case(id, kwargs, response, good):
    check(id, kwargs, response, good)


def test_every_id_has_two_cases_of_each_kind():
    check_every_id_has_two_of_each_kind(CASES, 58)


# --- the units of text they count -----------------------------------------------------------------------------------


def test_tokens_follow_the_treebank_convention():
    assert tokens("He didn't pay $3,000.50, it's e.g. a well-known (old) trick...") == (
        *("He", "did", "n't", "pay", "$", "3,000.50", ",", "it", "'s"),
        *("e.g.", "a", "well-known", "(", "old", ")", "trick", "..."),
    )
    assert tokens('He left."') == ("He", "left", ".", '"')
    assert tokens("So am 'I'.") == ("So", "am", "'", "I", "'", ".")
    assert tokens("So am I.") == ("So", "am", "I", ".")


def test_sentences_keep_abbreviations_and_decimals_whole():
    assert sentences("Dr. Hill paid 3.50 here.  Did he? He did!") == ("Dr. Hill paid 3.50 here.", "Did he?", "He did!")


@pytest.mark.parametrize(
    "word", ["write", "writes", "wrote", "writing", "running", "tried", "goes", "is", "making", "stopped"]
)
def test_verb_forms(word):
    assert is_verb_form(word)


@pytest.mark.parametrize(
    "word", ["owl", "morning", "red", "can", "the", "class", "thing", "yes", "is-not", "sing-song"]
)
def test_words_that_are_no_verb_forms(word):
    assert not is_verb_form(word)
