"""BLEU, ROUGE-L, CIDEr-D, METEOR and words against what COCO's evaluation gives, and by hand.

What it gave of `corpus` and of the texts (pycocoevalcap 1.2) is written down here, since a part of it may not be used
freely.
"""

from __future__ import annotations

import math
import random

import pytest

from models.hub import MissingModel
from models.measures.captions.bleu import bleu
from models.measures.captions.cider import cider_d, consensus
from models.measures.captions.diversity import distinct_n, self_bleu, vocabulary
from models.measures.captions.meteor import jar as meteor_jar
from models.measures.captions.meteor import meteor
from models.measures.captions.rouge_l import longest_common, rouge_l
from models.measures.captions.tokens import tokens

WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "man",
    "woman",
    "red",
    "small",
    "runs",
    "sits",
    "on",
    "under",
    "grass",
    "table",
    "with",
    "of",
    "and",
    "two",
    "walks",
    "plays",
]
COCO_BLEU = [0.7835346767952405, 0.660108500837987, 0.5762289456573082, 0.5131244805316322]
COCO_ROUGE_L = [
    0.715543,
    1.0,
    0.916667,
    0.6,
    0.401977,
    1.0,
    0.938462,
    0.818182,
    0.5,
    0.3086,
    0.814885,
    0.6,
    0.7,
    0.245968,
    1.0,
    0.435714,
    0.660991,
    0.571429,
    0.2,
    0.809019,
    0.666667,
    0.628866,
    0.589372,
    0.7,
    0.758706,
    0.923077,
    0.521368,
    0.64346,
    0.519886,
    0.649924,
    0.772152,
    0.428571,
    0.666667,
    1.0,
    0.75,
    0.923077,
    0.575472,
    0.351248,
    0.764624,
    0.4,
]
COCO_CIDER_D = [
    0.967862,
    3.336132,
    3.005624,
    3.225755,
    1.238728,
    3.801672,
    4.886738,
    2.602483,
    0.874862,
    0.498693,
    2.706855,
    1.624902,
    1.807076,
    0.43007,
    3.278045,
    0.824064,
    1.378717,
    1.346685,
    0.177097,
    1.981187,
    1.018304,
    2.726821,
    1.859967,
    2.124117,
    1.885675,
    3.625897,
    0.991787,
    1.106743,
    1.178517,
    1.601145,
    3.577859,
    1.211154,
    2.352932,
    10.0,
    1.257225,
    3.919629,
    1.293456,
    0.409055,
    3.887241,
    0.924039,
]
COCO_METEOR = [
    0.344888,
    1.0,
    0.507188,
    0.242472,
    0.198254,
    1.0,
    0.58047,
    0.370254,
    0.312715,
    0.151151,
]  # of the first ten


@pytest.fixture(scope="module")
def corpus():
    """Forty candidates with one to four references each, as lower-case words."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 14)))

    references = [[text() for _ in range(rng.randint(1, 4))] for _ in range(40)]
    candidates = []
    for its in references:
        words = rng.choice(its).split()
        for _ in range(rng.randint(0, 5)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        candidates.append(" ".join(words[: rng.randint(4, 14)]))
    return candidates, references


def test_bleu_is_that_of_coco(corpus):
    assert bleu(*corpus) == pytest.approx(COCO_BLEU, rel=1e-6)


def test_bleu_by_hand():
    # 'the' twice, once in the reference; of 3 pairs 'cat sat' alone; 4 words against 3
    assert bleu(["the the cat sat"], [["the cat sat"]])[:2] == pytest.approx(
        [3 / 4, math.sqrt(3 / 4 * 2 / 3)]
    )
    assert bleu(["cat sat"], [["the cat sat down"]])[0] == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu(["dog"], [["cat"]]) == bleu([""], [["cat"]]) == [0] * 4


def test_rouge_l_is_that_of_coco(corpus):
    assert [rouge_l(*x) for x in zip(*corpus, strict=True)] == pytest.approx(COCO_ROUGE_L, abs=1e-6)
    assert longest_common("abcbdab", "bdcaba") == 4
    assert rouge_l("", ["a cat"]) == rouge_l("dog", ["cat"]) == 0


def test_cider_d_is_that_of_coco(corpus):
    assert cider_d(*corpus) == pytest.approx(COCO_CIDER_D, abs=1e-6)


def test_cider_rewards_the_rare_word_and_what_all_say_is_worth_nothing():
    references = [["a dog runs"], ["a dog sits"], ["a zebra runs"]]
    common = cider_d(["a dog", "", ""], references)[0]
    assert common > 0
    assert cider_d(["a", "", ""], references)[0] == 0
    assert cider_d(["", "", "a zebra"], references)[2] > common


def test_meteor_is_that_of_its_authors_program_as_coco_runs_it(corpus):
    try:
        meteor_jar()
    except MissingModel as e:
        pytest.skip(str(e))
    some = tuple(x[:10] for x in corpus)
    ours = meteor([*some[0], "a dog ||| runs"], [*some[1], ["a dog runs"]])
    assert ours[1][:-1] == pytest.approx(COCO_METEOR, abs=1e-6)
    assert ours[1][-1] == 1  # what would part the fields is no part of a text


def test_where_the_program_of_meteor_is_not_is_said_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("METEOR_JAR", str(tmp_path / "x.jar"))
    with pytest.raises(
        MissingModel, match=r"no file '.*x\.jar': fetch meteor-1\.5\.jar, and say in METEOR_JAR"
    ):
        meteor(["a"], [["a"]])
    (tmp_path / "x.jar").touch()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingModel, match="install a Java runtime"):
        meteor(["a"], [["a"]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A person is making a green clay model of a monster, using different tools.",
         "a person is making a green clay model of a monster using different tools"),
        ("The man's dog doesn't bark; it can't. They're in a well-lit room!",
         "the man 's dog does n't bark it ca n't they 're in a well-lit room"),
        ('A "red" car drives 2.5 miles, past 10,000 people: fast...',
         "a red car drives 2.5 miles past 10,000 people fast"),
        ("Two women cannot agree - one says: I'm leaving?", "two women can not agree one says i 'm leaving"),
        ("Close-up of a T-shirt, 50% off & more", "close-up of a t-shirt 50 % off & more"),
        ("A café; the child’s ball", "a café the child 's ball"),
    ],
)  # fmt: skip
def test_words_are_those_of_stanfords_tokenizer(text, words):
    assert tokens(text) == words.split()


def test_the_consensus_is_the_caption_that_others_bear_out_whatever_the_order():
    texts = [
        "a brown dog runs on grass",
        "a dog runs on green grass",
        "a dog runs on grass",
        "a red car in rain",
    ]
    found = consensus(texts, frozenset(["a", "on", "in"]))
    assert max(range(4), key=found.__getitem__) == 2
    assert found[3] == 0  # what is shared are words that say nothing
    assert consensus(texts)[3] > 0
    turned = consensus(texts[::-1], frozenset(["a", "on", "in"]))
    assert turned[::-1] == pytest.approx(found)
    assert consensus(["a dog"]) == [0]


def test_diversity_by_hand():
    assert distinct_n(["a dog", "a cat"], 1) == 3 / 4
    assert distinct_n(["a dog runs", "a dog"], 2) == 2 / 3
    assert distinct_n([""], 1) is None
    assert vocabulary(["A dog.", "a cat"]) == 3
    same, different = ["a dog runs on the grass"] * 5, ["a b c d e", "f g h i j", "k l m n o"]
    assert self_bleu(same) == pytest.approx(1)
    assert self_bleu(different) == 0
    assert self_bleu(["one"]) is None
    assert self_bleu(same * 100, most=10) == pytest.approx(1)
