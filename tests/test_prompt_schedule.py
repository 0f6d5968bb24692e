"""Texts over time, against the examples in AUTOMATIC1111's own source.

Its modules/prompt_parser.py holds them as doctests of get_learned_conditioning_prompt_schedules,
for 10 steps, and for 10 steps of a second pass after 10 of a first.
"""

import re

import pytest

from sdbatch.prompt_schedule import Calls, schedule

AB = ["a", "(b:1.1)"]
EXAMPLES = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(i, AB[(i - 1) % 2]) for i in range(1, 11)],
    "[fe|]male": [(i, ["female", "male"][(i - 1) % 2]) for i in range(1, 11)],
    "[fe|||]male": [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)],
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_texts_change_where_automatic1111s_examples_say(prompt):
    assert schedule(prompt, Calls(10)) == EXAMPLES[prompt]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a [b:.5] c", [(10, "a b c")]),
        ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:14] c", [(4, "a  c"), (10, "a b c")]),
    ],
)
def test_a_second_pass_goes_on_counting_after_the_first(prompt, texts):
    assert schedule(prompt, Calls(10, first_pass=10)) == texts


def test_the_example_of_automatic1111s_grammar_is_read_as_it_says():
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert [(end, " ".join(text.split())) for end, text in schedule(prompt, Calls(100))] == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:12]", [(10, "a")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:b:4 ]", [(4, "a"), (10, "b")]),
        ("[a:b:0.29]", [(2, "a"), (10, "b")]),
        ("[a::0.3]", [(3, "a"), (10, "")]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), *((i, "c") for i in range(3, 11))]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:three]", [(10, "[a:b:three]")]),
        ("(a [b:3]:1.2)", [(3, "(a :1.2)"), (10, "(a b:1.2)")]),
        ("\\[a:b:3\\] \\|", [(10, "\\[a:b:3\\] \\|")]),
        ("[\\[a\\|:3]", [(3, ""), (10, "\\[a\\|")]),
        ("a | b, [c]", [(10, "a | b, [c]")]),
    ],
)
def test_numbers_brackets_and_escapes_are_read_as_automatic1111_does(prompt, texts):
    assert schedule(prompt, Calls(10)) == texts


def test_syntax_after_a_lone_bracket_or_colon_is_read():
    # AUTOMATIC1111's parser has two readings of these, and takes one by the order of a set
    assert schedule("[e::0.3]]:3a", Calls(10)) == [(3, "e]:3a"), (10, "]:3a")]
    assert schedule("[x::2]:[y::3]", Calls(10)) == [(2, "x:y"), (3, ":y"), (10, ":")]


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a | b [c:d:0.5]", "[c:d:0.5]"),
        ("a [b|c", "[b|"),
        ("[a|b:3]", "[a|b:3]"),
        ("[a:b:0.5] \\", "[a:b:0.5]"),
    ],
)
def test_syntax_that_automatic1111_would_take_as_text_is_rejected_with_the_way_out(prompt, part):
    reason = re.escape(f"{part!r}: must be [before:after:when] or [one|other], in a prompt with no")
    with pytest.raises(ValueError, match=rf"^{reason}.* Write \\\| for a plain"):
        schedule(prompt, Calls(10))


@pytest.mark.parametrize("opening", ["[", "(", "[a:", "[a|"])
def test_thousands_of_nested_brackets_are_read(opening):
    closing = {"[": "]", "(": ")", "[a:": ":3]", "[a|": "]"}[opening]
    texts = schedule(opening * 5000 + "b" + closing * 5000 + "[c:2]", Calls(10))
    assert "c" in texts[-1][1]
