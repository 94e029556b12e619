"""Which option an answer is."""

import pytest

from models.measures.multiple_choice import chosen, lettered, plain

OPTIONS = ["red", "dark blue", "blue", "a green one"]


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("B", 1),
        ("b", None),  # a letter that was asked for is upper case
        (" C. blue", 2),
        ("(D) because it is", 3),
        ("A: red", 0),
        ("The answer is B, I think", 1),
        ("Option (C)", 2),
        ("A blue thing", 2),  # an article, and the words of one option
        ("Red.", 0),
        ("the green one", 3),
        ("dark blue", 1),
        ("it is dark blue", 1),
        ("it is dark blue or red", None),  # of several
        ("E", None),
        ("", None),
        ("The answer isn't clear", None),
        ("option a's odd", None),
    ],
)
def test_which_option_an_answer_is(said, place):
    assert chosen(said, OPTIONS) == place


def test_options_get_letters():
    assert lettered("Which?", ["x", "y"]) == "Which?\nA. x\nB. y\nAnswer with the letter of the right option."
    assert lettered("Which?", ["x"], after="") == "Which?\nA. x"


def test_open_answers_compare_without_case_punctuation_and_articles():
    assert plain("The Cat!") == plain("a cat") == ["cat"]
    assert plain("two cats") != plain("a cat")
