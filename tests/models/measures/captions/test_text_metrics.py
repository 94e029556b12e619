"""BLEU, ROUGE-L, CIDEr-D, METEOR against COCO's evaluation (pycocoevalcap), and by hand."""

from __future__ import annotations

import contextlib
import io
import math
import random
import shutil

import pytest

from models.measures.captions.bleu import bleu
from models.measures.captions.cider import cider_d, consensus
from models.measures.captions.diversity import distinct_n, self_bleu, vocabulary
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
java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


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


def coco(scorer, corpus):
    candidates, references = corpus
    with contextlib.redirect_stdout(io.StringIO()):
        return scorer.compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})


def test_bleu_is_that_of_coco(corpus):
    from pycocoevalcap.bleu.bleu import Bleu

    assert bleu(*corpus) == pytest.approx(coco(Bleu(4), corpus)[0], rel=1e-6)


def test_bleu_by_hand():
    # 'the' twice, once in the reference; of 3 pairs 'cat sat' alone; 4 words against 3
    assert bleu(["the the cat sat"], [["the cat sat"]])[:2] == pytest.approx(
        [3 / 4, math.sqrt(3 / 4 * 2 / 3)]
    )
    assert bleu(["cat sat"], [["the cat sat down"]])[0] == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu(["dog"], [["cat"]]) == bleu([""], [["cat"]]) == [0] * 4


def test_rouge_l_is_that_of_coco(corpus):
    from pycocoevalcap.rouge.rouge import Rouge

    _, each = coco(Rouge(), corpus)
    assert [rouge_l(*x) for x in zip(*corpus, strict=True)] == pytest.approx(each.tolist())
    assert longest_common("abcbdab", "bdcaba") == 4
    assert rouge_l("", ["a cat"]) == rouge_l("dog", ["cat"]) == 0


def test_cider_d_is_that_of_coco(corpus):
    from pycocoevalcap.cider.cider import Cider

    assert cider_d(*corpus) == pytest.approx(coco(Cider(), corpus)[1].tolist())


def test_cider_rewards_the_rare_word_and_what_all_say_is_worth_nothing():
    references = [["a dog runs"], ["a dog sits"], ["a zebra runs"]]
    common = cider_d(["a dog", "", ""], references)[0]
    assert common > 0
    assert cider_d(["a", "", ""], references)[0] == 0
    assert cider_d(["", "", "a zebra"], references)[2] > common


@java
@pytest.mark.slow
def test_meteor_is_that_of_its_authors_program_as_coco_runs_it(corpus):
    from pycocoevalcap.meteor.meteor import Meteor

    some = tuple(x[:10] for x in corpus)
    mean, each = coco(Meteor(), some)
    ours = meteor([*some[0], "a dog ||| runs"], [*some[1], ["a dog runs"]])
    assert ours[1][:-1] == pytest.approx(each)
    assert ours[1][-1] == 1  # what would part the fields is no part of a text
    assert 0 < mean < 1


@java
def test_words_are_those_of_stanfords_tokenizer():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [
        "A person is making a green clay model of a monster, using different tools.",
        "The man's dog doesn't bark; it can't. They're in a well-lit room!",
        'A "red" car drives 2.5 miles, past 10,000 people: fast...',
        "Two women cannot agree - one says: I'm leaving?",
        "Close-up of a T-shirt, 50% off & more",
        "A café; the child’s ball",
    ]
    theirs = PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in enumerate(texts)})
    assert [" ".join(tokens(t)) for t in texts] == [theirs[i][0] for i in range(len(texts))]


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
