"""Prompt weights as AUTOMATIC1111 documents them."""

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
    parts, expected = prompt_syntax.parse_weights(prompt), EXAMPLES[prompt]
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


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
