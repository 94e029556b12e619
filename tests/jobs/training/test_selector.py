"""Training selectors: what is learnt from, the loss over all of a step's clips, and the file that judges captions."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.training.distributed import World
from jobs.training.loop import train
from jobs.training.recipe import load_training
from jobs.training.selector import candidates
from jobs.training.selector.candidates import NONE, CandidateLoader, Candidates, Vote, told_apart, votes_of
from jobs.training.selector.task import FILE, Joined, Selection, both, build, first
from jobs.training.task import COUNTS, Draws, Start, Step, seed_torch
from models.choosing.chooser import Chooser, evenly
from models.choosing.file import Saved, Spec
from pipeline.inspector.votes import Votes
from pipeline.io.store import Store
from pipeline.recipe_schema import RecipeError
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import load
from tests.fixtures.toy_training import Notes, in_ranks, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WIDTH = 12
ANY: defaultdict[str, str] = defaultdict(str)  # of checkpoints, which a selector needs none of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_sharded_run(tmp_path_factory.mktemp("selector") / "run", sources=6)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(load("selector", ANY, "run.steps=4"), run, out, device="cpu", monitor=Notes)
    return out


# ---------------------------------------------------------------- what is learnt from


def meta(**more):
    said = {"a": "a dog runs", "b": "a cat sleeps", "c": "a  dog runs", "d": ""}
    captions = [
        {"model": m, "text": t, "scores": json.dumps({"consensus": i})}
        for i, (m, t) in enumerate(said.items())
    ]
    return {"captions": captions, "caption": "a dog runs", "caption_model": "a"} | more


def test_candidates_are_the_chosen_caption_and_those_that_say_something_else():
    assert told_apart(meta(), None) == (["a dog runs", "a cat sleeps"], [{"consensus": 0}, {"consensus": 1}])
    assert told_apart(meta(caption=""), None) is None


def test_votes_count_in_place_of_the_chosen_caption():
    assert told_apart(meta(), Vote(model="b"))[0] == ["a cat sleeps", "a dog runs", "a  dog runs"]
    assert told_apart(meta(), Vote(text="two dogs run"))[0][0] == "two dogs run"
    assert told_apart(meta(), Vote(bad=True)) is None
    assert told_apart(meta(), Vote(model="somebody who is gone"))[0][0] == "a dog runs"


def test_of_a_clip_counts_what_most_people_voted_and_then_who_won_blind(tmp_path):
    votes = Votes(Store(str(tmp_path)))

    def said(clip, who, kind, **more):
        votes.add({"clip": clip, "who": who, "kind": kind, **more})

    for who, model in (("ann", "x"), ("bob", "y"), ("cid", "y")):
        said("most", who, "best", model=model)
    said("tie", "ann", "best", model="x")
    said("tie", "bob", "best", model="y")
    said("bad", "ann", "bad")
    said("edit", "ann", "edit", model="x", text=" a fox ")
    said("undone", "ann", "best", model="x")
    said("undone", "ann", "undo")
    for clip in ("most", "blind"):
        for who, answer in (("ann", "left"), ("bob", "left"), ("cid", "tie"), ("dan", "right")):
            said(clip, who, "ab", left="x", right="y", answer=answer)
    votes.close()
    assert votes_of(str(tmp_path)) == {
        "most": Vote(model="y"),
        "bad": Vote(bad=True),
        "edit": Vote(text="a fox"),
        "blind": Vote(model="x"),
    }


def test_features_are_made_once_whatever_votes_change(run, tmp_path, monkeypatch):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    recipe, world = load("selector", ANY), World(0, 1, torch.device("cpu"))
    task, loader = build(recipe, Start(str(copy), out, world))
    clip = loader.sets[0].keys[0]
    right, wrong = (task.set.words[i] for i in task.set.which[0, :2])
    for tar in (copy / "shards").rglob("*.tar"):
        tar.rename(tar.with_suffix(".away"))
    again, _ = build(recipe, Start(str(copy), out, world))  # no clip is read
    assert torch.equal(again.set.video, task.set.video)
    for tar in (copy / "shards").rglob("*.away"):
        tar.rename(tar.with_suffix(".tar"))
    votes = Votes(Store(str(copy)))
    model = next(c["model"] for c in captions(copy, clip) if c["text"] == wrong)
    votes.add({"clip": clip, "who": "ann", "kind": "best", "model": model})
    votes.close()
    seen = []
    monkeypatch.setattr(candidates, "decode", lambda *args: seen.append(args))
    voted, other = build(recipe, Start(str(copy), out, world))
    assert not seen  # other votes, the same clips
    assert torch.equal(voted.set.video, task.set.video)
    assert [voted.set.words[i] for i in voted.set.which[0, :2]] == [wrong, right]
    with pytest.raises(ValueError, match="votes or features have changed"):
        other.load_state_dict(loader.state_dict())
    ignored, _ = build(load("selector", ANY, "votes=false"), Start(str(copy), out, world))
    assert ignored.set.words[ignored.set.which[0, 0]] == right


def test_what_was_looked_at_before_a_kill_is_not_looked_at_again(run, tmp_path, monkeypatch, capsys):
    recipe, world = load("selector", ANY), World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(candidates, "KEEP_S", 0.0)
    seen = []

    def stopped(*args, decode=candidates.decode):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(args)
        return decode(*args)

    monkeypatch.setattr(candidates, "decode", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, Start(str(run), tmp_path, world))
    assert "looked at 3 of" in capsys.readouterr().err
    again: list[int] = []
    monkeypatch.undo()
    monkeypatch.setattr(
        candidates, "decode", lambda *args, d=candidates.decode: (again.append(1), d(*args))[1]
    )
    task, _ = build(recipe, Start(str(run), tmp_path, world))
    assert len(again) == len(task.set.keys) - 3 > 0
    monkeypatch.undo()
    whole, _ = build(recipe, Start(str(run), tmp_path / "other", world))
    assert torch.equal(task.set.video, whole.set.video)
    assert task.set.identity == whole.set.identity


def captions(run, clip):
    from pipeline.shards.reader import ShardReader

    reader = ShardReader(f"{run}/shards", decode=False)
    return reader.read(list(reader.keys).index(clip))["meta"]["captions"]


# ---------------------------------------------------------------- the loss of a step


def made_up(clips=16, most=3):
    """Clips whose features say which text is theirs."""
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(clips * most, WIDTH, generator=g)
    which = torch.arange(clips * most).reshape(clips, most)
    which[::3, -1] = NONE
    which[5, 0] = which[4, 0]  # two clips of one caption
    held = torch.arange(clips) >= clips - 4
    video = texts[which[:, 0]].roll(1, dims=1)
    words = [f"text {i}" for i in range(len(texts))]
    return Candidates([f"clip {i}" for i in range(clips)], video, texts, words, which, {}, held, "made up")


class Encoders:
    hashes, given, hash = {}, {}, ""


def task_of(tmp_path, **options):
    recipe = load("selector", ANY, *(f"{k.replace('__', '.')}={v}" for k, v in options.items()))
    world = World(0, 1, torch.device("cpu"))
    encoders = (Encoders, Encoders)
    return Selection(
        recipe, Start("", tmp_path, world), Spec(("visual_fit",), "minilm", 1), encoders, [made_up()]
    )


@pytest.mark.parametrize(
    "options", [{}, {"loss__matching": 0}, {"loss__rivals": 0}, {"loss__contrastive": 0.5}]
)
def test_two_passes_over_micro_batches_give_the_gradients_of_one_loss_over_all_their_clips(options, tmp_path):
    task = task_of(tmp_path, **options)
    (phase,) = task.phases
    loader = CandidateLoader([made_up()], [1.0], batch=4)
    batches = [loader.batch(i) for i in range(3)]
    for batch in batches:
        batch[COUNTS] = task.counts(batch)
    step_weights = dict.fromkeys(task.weights, 1 / 12)
    told = []
    step = Step(
        phase,
        phase.module,
        batches,
        [0, 1, 2],
        step_weights,
        seed=0,
        world=task.world,
        tell=lambda batch, losses, total: told.append((batch["key"], total)),
    )
    task.backward(step)
    got = {n: p.grad for n, p in phase.module.named_parameters() if p.requires_grad}

    phase.module.zero_grad(set_to_none=True)
    parts, draws = [], [Draws(0, i, torch.device("cpu")) for i in range(3)]
    for i, batch in enumerate(batches):
        seed_torch(0, i)  # dropout is on
        parts.append(both(phase.module.selector, batch["video"], batch["texts"]))
    features = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), parts[0][2])
    sums, _ = task._sums(phase.module, features, Joined.of(batches, draws), None)
    expected = sum(sums.values()) / 12
    expected.backward()
    assert [key for keys, _ in told for key in keys] == [key for b in batches for key in b["key"]]
    torch.testing.assert_close(told[0][1], expected.detach())
    assert phase.module.selector.head[0].weight.requires_grad == (options.get("loss__matching") != 0)
    for name, p in phase.module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-4)
            assert p.grad.abs().max() > 0, name


def test_negatives_are_wrong_and_the_same_in_whatever_order_ranks_hold_the_clips(tmp_path):
    task = task_of(tmp_path)
    loader = CandidateLoader([made_up()], [1.0], batch=4)
    batches, draws = [loader.batch(i) for i in range(3)], [Draws(0, i, torch.device("cpu")) for i in range(3)]
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        these = [batches[i] for i in order]
        joined = Joined.of(these, [draws[i] for i in order])
        video, texts = (torch.cat([b[name] for b in these])[..., :8] for name in ("video", "texts"))
        wrong_text, wrong_clip = task._negatives(video, texts, torch.tensor(5.0), joined, None)
        said = joined.same.flatten()[wrong_text]
        assert not (said == joined.same[:, 0]).any()
        assert (said != NONE).all()
        assert not (joined.same[wrong_clip, 0] == joined.same[:, 0]).any()
        found.append(torch.stack([said, joined.place[wrong_clip]], dim=1)[joined.place.argsort()])
    assert torch.equal(*found)


def rank(run, out):
    train(load("selector", ANY, "run.steps=2", "ema.lengths=[]"), run, Path(out), device="cpu", monitor=Notes)


def test_two_ranks_train_as_one_that_makes_two_micro_batches(run, tmp_path):
    assert in_ranks(1, rank, run, tmp_path / "one") == [0]
    assert in_ranks(2, rank, run, tmp_path / "two") == [0, 0]
    one, two = (weights(tmp_path / name, 2) for name in ("one", "two"))
    for name, x in one.items():
        if name.startswith("model/"):
            torch.testing.assert_close(two[name], x, atol=1e-5, rtol=1e-4)
    assert two.keys() == one.keys()


# ---------------------------------------------------------------- measures and the file


def test_a_chosen_caption_counts_as_found_where_it_scores_above_all_others():
    which = torch.tensor([[0, 1, 2], [3, 4, NONE], [5, NONE, NONE]])
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 9.0], [0.0, 0.0, 0.0]])
    assert first(scores, which) == 0.5  # a draw is none, nor is a clip of one caption
    assert first(scores.fill_(torch.nan), which) is None


def test_the_file_judges_as_it_was_measured_and_is_calibrated(trained):
    saved = Saved.read(trained / FILE)
    assert {"auc", "chosen/selector", "text_of_clip/R@1", "clip_of_text/R@5"} <= saved.figures.keys()
    assert not torch.equal(saved.weights["platt"], torch.tensor([1.0, 0.0]))
    chooser = Chooser(saved)
    frames = [np.full((20, 30, 3), i, np.uint8) for i in (10, 200)]
    one, other = chooser(frames, ["a gradient", "a dog runs"]), chooser(frames, ["a dog runs"])
    assert one[1] == pytest.approx(other[0], abs=1e-6)
    assert chooser(frames, []) == []


def test_frames_are_spread_and_some_are_shown_again_where_there_are_fewer():
    assert evenly("abcdef", 3) == ["b", "d", "f"]
    assert evenly("ab", 4) == ["a", "a", "b", "b"]


def test_what_is_no_selector_or_has_other_encoders_is_refused_with_a_sentence(trained, tmp_path):
    with pytest.raises(ValueError, match="is no selector: give"):
        Saved.read(trained / "model.pt")
    saved = Saved.read(trained / FILE)
    saved.hashes["minilm"] = "other"
    with pytest.raises(ValueError, match="minilm has other weights"):
        Chooser(saved)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("features.video=[nothing]", "feature network 'nothing' is none of"),
        ("features.text=bert", "are neither minilm nor"),
        ("data.fps=4", "a selector does not use it"),
        ("run.sample_every=0", "calibrated and written when it is looked at"),
        ("loss={rivals: 0, contrastive: 0}", "are both 0"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused_with_a_sentence(setting, said):
    with pytest.raises(RecipeError, match=said):
        load_training("selector", [setting])


def test_clips_of_one_caption_alone_are_refused(run, tmp_path):
    recipe = load("selector", ANY, "data.batch=1", "data.micro_batches=1")
    with pytest.raises(ValueError, match="a step needs two or more"):
        build(recipe, Start(run, tmp_path, World(0, 1, torch.device("cpu"))))
