"""Prompt weights and LoRAs as AUTOMATIC1111 documents them."""

import pytest

from sdbatch import prompt_syntax

EXAMPLES = {
    "(abc)": [("abc", 1.1)],
    "((abc))": [("abc", 1.21)],
    "[abc]": [("abc", 1 / 1.1)],
    "(abc: 3.12 )": [("abc", 3.12)],
    "(unbalanced": [("unbalanced", 1.1)],
    "unbalanced)": [("unbalanced)", 1.0)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "\\[a|b\\]": [("[a|b]", 1.0)],
    "a\\b \\| c\\": [("ab | c", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_weights_are_read_as_automatic1111_documents_them(prompt):
    [parts] = prompt_syntax.parse_weights(prompt, chunked=False)
    expected = EXAMPLES[prompt]
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


# As AUTOMATIC1111 splits them (re_break in its modules/prompt_parser.py)
BREAKS = {
    "a BREAK b": [[("a", 1.0)], [("b", 1.0)]],
    "a\nBREAK\n b": [[("a", 1.0)], [("b", 1.0)]],
    "BREAK a BREAK BREAK": [[], [("a", 1.0)], [], []],
    "(a:1.5)BREAK[b] c:BREAK(d": [
        [("a", 1.5)],
        [("b", 1 / 1.1), (" c:", 1.0)],
        [("d", 1.1)],
    ],
    "BREAKFAST break": [[("BREAKFAST break", 1.0)]],
}


@pytest.mark.parametrize("prompt", BREAKS)
def test_break_splits_a_prompt_into_pieces(prompt):
    pieces = prompt_syntax.parse_weights(prompt, chunked=True)
    assert [[part for part in piece if part[0]] for piece in pieces] == BREAKS[prompt]


@pytest.mark.parametrize("prompt", ["(a BREAK b)", "(a BREAK b", "[a:(b BREAK:1.2)"])
def test_break_within_brackets_is_rejected_with_the_way_out(prompt):
    with pytest.raises(
        ValueError, match=r"'BREAK': must not be within brackets.*Close them before"
    ):
        prompt_syntax.parse_weights(prompt, chunked=True)


def test_break_needs_chunks():
    with pytest.raises(
        ValueError, match=r"'BREAK': must have chunk_prompts: true.*or remove BREAK"
    ):
        prompt_syntax.parse_weights("a BREAK b", chunked=False)


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a fox <lora:ink:0.8>, day", "<lora:"),
        ("a (red:1.2) fox", "(red:1.2)"),
        ("a ((red)) fox", "((red))"),
        ("a fox BREAK a dog", "BREAK"),
        ("a fox AND a dog", "AND"),
        ("[fox:dog:0.5]", "[fox:dog:0.5]"),
        ("[fox|dog]", "[fox|"),
        ("a fox (red), at night [2019]", None),
        ("ratio 3:4 (of 16:9 or so) and \\(red:1.2\\)", None),
        ("breakfast and land", None),
    ],
)
def test_syntax_that_is_hardly_meant_as_text_is_found(prompt, part):
    assert prompt_syntax.find_syntax(prompt) == part


DECLARED = {"ink": 0.8, "soft fur": 1.0}


@pytest.mark.parametrize(
    ("prompt", "loras", "text", "chosen"),
    [
        ("a fox", "", "a fox", {}),
        ("a fox", "  ", "a fox", {}),
        ("a fox", "ink", "a fox", {"ink": 0.8}),
        ("a fox", " soft fur : .5,ink:-2 ", "a fox", {"soft fur": 0.5, "ink": -2}),
        ("a <lora:ink:0.5>fox", "", "a fox", {"ink": 0.5}),
        ("<lyco:ink> a fox", "", " a fox", {"ink": 0.8}),
        ("<lora:ink:1><lora:soft fur:0>", "", "", {"ink": 1, "soft fur": 0}),
        ("<lora:ink:1> <lora:ink:2>", "ink:0.5", " ", {"ink": 3.5}),
        ("a <hypernet:ink:1> <fox>", "", "a <hypernet:ink:1> <fox>", {}),
    ],
)
def test_loras_of_a_row_are_those_of_its_tags_and_of_its_key(prompt, loras, text, chosen):
    assert prompt_syntax.choose_loras(prompt, loras, DECLARED) == (text, chosen)


def test_a_tag_is_text_where_the_job_declares_no_lora():
    assert prompt_syntax.choose_loras("<lora:ink:1>", "", {}) == ("<lora:ink:1>", {})


@pytest.mark.parametrize(
    "loras",
    [":", "ink:", "ink:1:1", "ink,", ",ink", "ink:nan", "ink:1e3", "ink:10.1", "<lora:ink>"],
)
def test_a_value_that_lists_no_loras_is_rejected(loras):
    with pytest.raises(ValueError, match="NAME or NAME:WEIGHT"):
        prompt_syntax.parse_loras(loras)


def test_written_loras_have_the_weights_that_the_row_left_to_the_job():
    written = prompt_syntax.write_loras("ink, soft fur:2 , other", DECLARED)
    assert written == "ink:0.8, soft fur:2, other"
    assert prompt_syntax.lora_tags(written) == "<lora:ink:0.8><lora:soft fur:2><lora:other>"
