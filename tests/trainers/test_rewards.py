"""Rewards: the ready ones by their values, a user's function, and what a wrong one is told."""

import pytest

from trainers.rewards import Reward, RewardError, file_of, final_number, load_function


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", "42"),
        ("so 1,234.50 dollars", "1234.50"),
        ("4 apples, 3 eaten\n#### 1", "1"),
        ("#### 18 of 20\n#### 7", "7"),
        ("minus -3", "-3"),
        ("$ .5", "0.5"),
        ("2e3 units", "2000"),
        ("no number", None),
        ("1 2 ####", None),
        ("", None),
    ],
)
def test_final_number_of_a_text(text, number):
    found = final_number(text)
    assert found == (None if number is None else pytest.approx(float(number)))


@pytest.mark.parametrize(
    ("name", "completion", "answer", "reward"),
    [
        ("exact_match", " Paris\n", "Paris", 1),
        ("exact_match", "paris", "Paris", 0),
        ("numeric_answer", "6 * 7 = 42.00", "6 times 7 is 42\n#### 42", 1),
        ("numeric_answer", "I do not know", "#### 42", 0),
        ("numeric_answer", "#### 41", "#### 42", 0),
        ("regex:answer", "the answer is 3", "9", 1),
        ("regex:answer is (\\d+)", "the answer is 3", "3", 1),
        ("regex:answer is (\\d+)", "the answer is 3", "9", 0),
        ("regex:answer is (\\d+)", "3", "3", 0),
        ("format:<a>.*</a>", " <a>\n3</a>\n", "", 1),
        ("format:<a>.*</a>", "<a>3</a> so", "", 0),
    ],
)
def test_ready_rewards_by_their_values(name, completion, answer, reward):
    assert Reward({name: 1.0})(["p"], [completion], [answer]) == [reward]


def test_rewards_with_weights_are_summed():
    reward = Reward({"exact_match": 2.0, "format:\\d+": -0.5})
    assert reward(["", "", ""], ["3", "4", "x"], ["3", "3", "x"]) == [1.5, -0.5, 2.0]


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return f"{path}:score"


def test_function_of_a_file_gets_prompts_completions_and_answers(tmp_path):
    name = write(
        tmp_path,
        "def score(prompts, completions, answer, **others):\n"
        "    assert not others\n"
        "    return [len(p) + 10 * len(c) + 100 * len(a) for p, c, a in zip(prompts, completions, answer)]\n",
    )
    assert Reward({name: 1.0})(["p", ""], ["cc", "c"], ["", "aa"]) == [21, 210]
    assert file_of(name) == str(tmp_path / "mine.py")


def test_function_of_a_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def ones(completions, **_): return [1] * len(completions)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert Reward({"my_rewards:ones": 1.0})(["", ""], ["", ""], ["", ""]) == [1, 1]
    assert file_of("my_rewards:ones") is None


@pytest.mark.parametrize("given", ["np.ones(2)", "np.float32([1, 1])", "[True, 1]", "(1, 1.0)"])
def test_numbers_of_any_kind_are_taken(tmp_path, given):
    name = write(tmp_path, f"import numpy as np\ndef score(**_): return {given}\n")
    assert Reward({name: 1.0})(["", ""], ["", ""], ["", ""]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise KeyError('gold')", r"raised KeyError at .*mine\.py:2: 'gold'$"),
        ("return [1.0]", "a number for each of 2 completions, gave 1$"),
        ("return 1.0", r"must give a list of numbers, gave 1\.0 \(float\)$"),
        ("return None", r"must give a list of numbers, gave None \(NoneType\)$"),
        ("return ['a', 'b']", r"must give finite numbers, gave 'a' \(str\)$"),
        ("return [1.0, None]", r"must give finite numbers, gave None \(NoneType\)$"),
        ("return [1.0, float('nan')]", r"must give finite numbers, gave nan \(float\)$"),
        ("return [1.0, float('inf')]", r"must give finite numbers, gave inf \(float\)$"),
        ("return 'ab'", r"must give a list of numbers, gave 'ab' \(str\)$"),
        ("return {0: 1, 1: 1}", r"must give a list of numbers"),
    ],
)
def test_function_that_fails_is_told_in_one_line(tmp_path, body, told):
    name = write(tmp_path, f"def score(prompts, completions, answer):\n    {body}\n")
    with pytest.raises(RewardError, match=told) as error:
        Reward({name: 1.0})(["", ""], ["", ""], ["", ""])
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_numeric_answer_of_an_answer_without_a_number_is_an_error():
    with pytest.raises(RewardError, match="every answer must hold a number, got 'none'"):
        Reward({"numeric_answer": 1.0})([""], ["3"], ["none"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("exact", "reward must be one of exact_match, numeric_answer, regex:PATTERN"),
        ("regex:(", "not a regular expression"),
        ("nowhere.py:score", "nowhere.py is none"),
        ("no_such_module:score", "cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "no_such must be a function, has no such name"),
        ("math:pi", "pi must be a function, is a float"),
        ("math:sqrt", r"must take \(prompts, completions, answer\)"),
        ("math:", "MODULE:FUNCTION, got 'math:'"),
    ],
)
def test_name_that_means_no_reward_is_refused(name, told):
    with pytest.raises(RewardError, match=told) as error:
        load_function(name)
    assert "\n" not in str(error.value)


def test_file_that_cannot_be_imported_is_told_with_its_line(tmp_path):
    name = write(tmp_path, "import math\n1 / 0\n")
    with pytest.raises(RewardError, match=r"ZeroDivisionError at .*mine\.py:2: division by zero"):
        load_function(name)
