"""YAML as sdbatch reads it: what is accepted, and one line for everything else."""

import datetime

import pytest

from sdbatch.errors import JobError
from sdbatch.job import load
from sdbatch.job.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, parse
from tests.job.test_job import write

TOO_LARGE = "more than 10,000,000 characters with the aliases written out: must be fewer"
TOO_DEEP = "more than 50 lists and mappings inside each other: must be fewer"


def aliases(first, form, levels=9):
    """Return lines `name: &name value`, each of ten aliases of the line before it."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, levels + 1):
        lines.append(f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * 10)))
    return "\n".join(lines)


def chain(length):
    """Return lines of which each is a list around the line before it."""
    return "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, length))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("day: 2026-02-28", {"day": datetime.date(2026, 2, 28)}),
        ("\ufeffa: é", {"a": "é"}),
        ("1: a\n2: b", {1: "a", 2: "b"}),
    ],
)
def test_plain_yaml_is_read_as_it_is_written(text, value):
    assert parse(text, "job.yaml") == value


def test_anchors_and_merge_keys_are_read_and_a_merged_key_may_be_set_again():
    text = """
small: &small {width: 64, height: 64}
fast: &fast
  <<: *small
  steps: 8
slow:
  <<: [*fast, {seed: 1}]
  steps: 50
twice:
  <<: *small
  <<: *fast
again: *fast
"""
    values = parse(text, "job.yaml")
    size = {"width": 64, "height": 64}
    assert values["fast"] == values["twice"] == values["again"] == {**size, "steps": 8}
    assert values["slow"] == {**size, "steps": 50, "seed": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' appears twice: keep one of them"),
        ('a: 1\n"a": 2', "line 2: key 'a' appears twice"),
        ("x:\n  - {1: a,\n     0x1: b}", "line 3: key 1 appears twice"),
        ("<<: {x: 1, x: 2}", "line 1: key 'x' appears twice"),
        ("a: 1\n? [b]\n: 2", "line 2: a key is a list or a mapping: must be text or a number"),
        ("{{a: 1}: 2}", "line 1: a key is a list or a mapping"),
        ("days:\n- 2026-02-30", "line 2: '2026-02-30' is not a valid timestamp. Quote it if it is"),
        ("a: !!bool maybe", "line 1: 'maybe' is not a valid bool"),
        ("a: !!int ''", "line 1: '' is not a valid int"),
        ("a: " + "9" * 5000, "line 1: '999999.*999' is not a valid int"),
        ("a: 0x" + "f" * 5000, "line 1: '0xffff.*fff' is not a valid int"),
        ("&a [1, *a]", f"line 1: {TOO_LARGE}"),
        ("x: 1\ny: &a\n  b: {c: *a}", f"line 3: {TOO_LARGE}"),
        (aliases("[x, x]", "[{}]"), f"line 8: {TOO_LARGE}. Use fewer aliases"),
        (aliases("{x: 1, y: 2}", "{{<<: [{}]}}"), f"line 8: {TOO_LARGE}"),
        (f"a: &a {'x' * (MAX_CHARACTERS // 10)}\nb: [{'*a, ' * 10}]", f"line 2: {TOO_LARGE}"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"line 1: {TOO_DEEP}"),
        ("[" * 900 + "]" * 900, f"line 1: {TOO_DEEP}"),
        ("[" * 10_000, "= not YAML: .*exceeded maximum nesting depth"),
        ("- " * 10_000, "= not YAML: .*exceeded maximum nesting depth"),
        (chain(10_000), f"line {MAX_DEPTH + 1}: {TOO_DEEP}"),
        ("a: 1\n\tb: 2", "= not YAML: .*tab character.*line 2, column 1"),
        ("a: [", "= not YAML: .*line 2, column 1"),
        ("a: b: c", "= not YAML: mapping values are not allowed in this context.*line 1"),
        ("a: 1\n---\nb: 2", "= not YAML: expected a single document.*line 2"),
        ("a: x\0", "= not YAML: unacceptable character #x0000"),
        ("a: \ud800", "= not YAML: .*surrogates not allowed"),
        ("a: *b", "= not YAML: found undefined alias.*line 1"),
        ("<<: 1", "= not YAML: .*expected a mapping or list of mappings for merging"),
        ("a: !!map [b]", "= not YAML: expected a mapping node, but found sequence"),
        ("!!python/object:os.system x", "= not YAML: could not determine a constructor.*line 1"),
    ],
    ids=range(31),
)
def test_other_yaml_is_rejected_in_one_line_that_names_the_place(text, words):
    with pytest.raises(JobError, match=f"^job.yaml {words}") as rejected:
        parse(text, "job.yaml")
    assert "\n" not in str(rejected.value)
    assert len(str(rejected.value)) < 250


def test_lists_and_mappings_may_be_inside_each_other_up_to_the_limit():
    lists = parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "job.yaml")
    assert str(lists).count("[") == MAX_DEPTH
    mappings = parse("{a: " * MAX_DEPTH + "1" + "}" * MAX_DEPTH, "job.yaml")
    assert str(mappings).count("{") == MAX_DEPTH


def test_aliases_of_a_long_list_are_read_while_they_stay_below_the_limit():
    values = parse(aliases("[x, x]", "[{}]", levels=5), "job.yaml")
    assert values["a5"] == [values["a4"]] * 10


@pytest.mark.timeout(30)  # comparing each key with all before it would take minutes
def test_a_mapping_of_very_many_keys_is_read_in_time():
    keys = 50_000
    values = parse("".join(f"key{i}: {i}\n" for i in range(keys)), "job.yaml")
    assert len(values) == keys
    assert values["key49999"] == 49999


def test_a_job_file_with_a_nul_byte_is_rejected_with_its_path(tmp_path):
    with pytest.raises(JobError, match=r"job.yaml = not YAML: unacceptable character #x0000"):
        load(write(tmp_path, "name: a\0b"))


@pytest.mark.timeout(30)  # what it would hold takes minutes and gigabytes
@pytest.mark.parametrize("text", ["[" + "a," * MAX_NODES + "]", "- a\n" * 12_500_000])
def test_a_text_of_very_many_values_is_rejected_before_they_are_in_memory(text):
    words = "more than 1,000,000 keys and values: must be fewer. Put prompts into a table"
    with pytest.raises(JobError, match=rf"job.yaml line \d+: {words}"):
        parse(text, "job.yaml")


def test_a_job_file_that_is_too_long_is_rejected_before_it_is_read(tmp_path):
    with pytest.raises(JobError, match=r"job.yaml = more than 10,000,000 char.*prompts.path"):
        load(write(tmp_path, "name: " + "x" * 50_000_000))
