"""Lists on a command line: given again, one after the other, in brackets."""

import json

import pytest

from blockspec.runs.arguments import gathered

LINES = {
    "given again": ["--blocks.exclude", "a", "--out", "o", "--blocks.exclude", "b"],
    "one after the other": ["--blocks.exclude", "a", "b", "--out", "o"],
    "with equals": ["--blocks.exclude=a", "--out", "o", "--blocks.exclude=b"],
    "in brackets": ["--blocks.exclude", '["a", "b"]', "--out", "o"],
    "both": ["--blocks.exclude", '["a"]', "--out", "o", "--blocks.exclude=b"],
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_all_values_of_a_list_are_taken(line):
    assert gathered(line) == ["--blocks.exclude", '["a", "b"]', "--out", "o"]


def test_values_that_look_like_others_stay_what_they_are():
    line = ["run", "--out", "--x", "--checkpoints", "[qk]_proj", "-1", "--dtype", "float64"]
    assert gathered(line) == [*line[:4], json.dumps(["[qk]_proj", "-1"]), *line[6:]]
    assert gathered(["--include"]) == ["--include"]  # the parser says that its value is missing
    scalar = ["--estimate.num_steps", "3", "--estimate.num_steps", "5"]
    assert gathered(scalar) == scalar  # the later one overrides


def test_a_word_without_a_flag_is_no_value_of_a_list():
    line = ["--include", "a", "model", "--include", "b"]
    assert gathered(line, greedy=False) == ["--include", '["a", "b"]', "model"]
