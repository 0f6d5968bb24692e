"""Prompt weights as AUTOMATIC1111 documents them."""

import pytest

from sdbatch.models.sd1 import prompt_weights

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
    parts, expected = prompt_weights.parse_weights(prompt), EXAMPLES[prompt]
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])
