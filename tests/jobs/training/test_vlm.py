"""Vision–language models as a task: the loss of a document is its own, however it lies; parts, and what is shown."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import doctor
from jobs.training.loop import train as run_training
from jobs.training.recipe import load_training
from jobs.training.task import Draws
from jobs.training.vlm.conversations import Captions, Collate, Documents, texts_of, written_of
from jobs.training.vlm.recipe import Written
from jobs.training.vlm.task import Runs, build, scores
from jobs.training.vlm.visuals import budget_table
from models.curation.vlm.model import VLM, Look
from pipeline.faults import StoreError
from pipeline.recipe import RecipeError
from pipeline.shards.reader import BrokenSample, ShardReader
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import TINY_VLM
from tests.fixtures.toy_training import Notes, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TINY = [
    f"model={TINY_VLM}",
    "frames.frames=2",
    "data={tokens: 512, workers: 0, lanes: 1, pool: 2, micro_batches: 1}",
    "tokenizer=280",
    "held_out=0",
    "measured=2",
    "answer=4",
    "run.sample_every=0",
]
DRAWS = Draws(0, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_sharded_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def talks(tmp_path_factory, run):
    """Conversations about a picture, a clip, two pictures, and nothing."""
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    reader = ShardReader(f"{run}/shards", decode=False, shuffle=False)
    (folder / "clip.mp4").write_bytes(reader.read(0)["video"])

    def turn(asked, said):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    lines = [
        {"messages": turn("what?", "a picture") + turn("sure?", "yes"), "images": ["a.png"]},
        {"messages": turn("which differs?", "neither"), "images": ["a.png", "b.png"]},
        {"messages": turn("what happens?", "a gradient moves"), "video": "clip.mp4"},
        {"messages": turn("how are you?", "well, and never seen")},
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made(run, *more):
    recipe = load_training("small-vlm", [*TINY, *more])
    return build(recipe, start(run))


def documents(task, source, n):
    process = Documents(task.chat, task.visuals)
    return [process(source.nth(i)) | {"key": str(i)} for i in range(n)]


def packed(task, items, length=None):
    collate = Collate(task.visuals, task.chat.tokenizer.pad_token_id, packed=True)
    lengths = [item["length"] for item in items]
    return collate(items, length or sum(lengths)) | {"key": [i["key"] for i in items], "lengths": lengths}


def loss(task, batch):
    task.model.train()
    task.model.zero_grad()
    total = task.loss("vlm", task.model, batch, DRAWS).sums["documents"]
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "more", [[], ["frames.static=3", "model.projector={map: linear}"]], ids=["all", "static"]
)
def test_packed_documents_weigh_and_teach_as_each_does_alone(run, talks, more):
    """Loss and gradients of one sequence with padding are the sums of those of its documents."""
    task, _ = made(run, f"data.mixture=[{{data: {talks}/talks.jsonl, share: 0.5}}]", *more)
    recipe = task.recipe
    items = documents(task, Runs(recipe, run).source(), 8)
    assert {len(item["visuals"]) for item in items} == {0, 1, 2}
    batch = packed(task, items, sum(i["length"] for i in items) + 9)
    assert task.counts(batch) == {"documents": 8}
    whole, gradients = loss(task, batch)
    alone = [loss(task, packed(task, [item])) for item in items]
    assert whole == pytest.approx(sum(x for x, _ in alone), rel=1e-5)
    for name, g in gradients.items():
        torch.testing.assert_close(g, sum(own[name] for _, own in alone), rtol=1e-3, atol=1e-6)
    alone_means = [x for x, _ in alone]
    n = [int(item["learnt"].sum()) for item in items]
    by_token = sum(x * k for x, k in zip(alone_means, n, strict=True)) / sum(n)
    assert abs(by_token - whole / 8) > 1e-4  # a mean over tokens is another number


def test_rows_give_the_loss_of_a_sequence(run, talks):
    mixed = f"data.mixture=[{{data: {talks}/talks.jsonl, share: 0.5}}]"
    task, loader = made(run, mixed, "data.packing=false", "data.batch=6")
    batch = next(iter(loader))
    assert batch["tokens"].shape[0] == 6
    assert batch["tokens"].shape[1] == max(n for (n,) in batch["lengths"])
    items = documents(task, loader.source, 6)
    assert loss(task, batch)[0] == pytest.approx(loss(task, packed(task, items))[0], rel=1e-5)


def test_each_lane_has_all_sources_in_their_shares(run, tmp_path):
    """Long documents close more sequences: a lane of these alone would give fewer of them than their share."""
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y " * 120}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    lanes = "data={tokens: 512, workers: 0, lanes: 2, pool: 2, micro_batches: 1}"
    _, loader = made(run, lanes, f"data.mixture=[{{data: {tmp_path}/long.jsonl, share: 0.5}}]")
    keys = [key for _, batch in zip(range(40), loader, strict=False) for key in batch["key"]]
    assert np.mean(["jsonl" in key for key in keys]) == pytest.approx(0.5, abs=0.05)


def asked(run, folder, line):
    """What a conversation becomes: its text with marks counted, and the first colours of its frames."""
    (folder / "line.jsonl").write_text(json.dumps(line) + "\n")
    task, loader = made(run, f"data.mixture=[{{data: {folder}/line.jsonl, share: 0.5}}]")
    item = loader.process(loader.source.sources[1].nth(0)) | {"key": "k"}
    return task, item, packed(task, [item])


def test_pictures_are_shown_where_their_own_mark_is(run, talks):
    """A video that is named before an image is not taken for it."""
    answer = {"role": "assistant", "content": "x"}

    def shown(text):
        line = {
            "messages": [{"role": "user", "content": text}, answer],
            "images": ["a.png"],
            "video": "clip.mp4",
        }
        _, item, batch = asked(run, talks, line)
        return [len(x.numbers) for x in item["visuals"]], batch["frames"]

    (before, frames), (after, other) = shown("<video> or <image>?"), shown("<image> or <video>?")
    assert (before, after) == ([2, 0], [0, 2])
    assert torch.equal(frames[2], other[0])
    assert shown("which?")[0] == [0, 2]


def test_an_empty_answer_is_not_learnt(run, tmp_path):
    said = [("q", ""), ("r", "yes")]
    turns = [
        {"role": role, "content": text}
        for pair in said
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    task, item, _ = asked(run, tmp_path, {"messages": turns})
    learnt = [t for t, there in zip(item["tokens"].tolist(), item["learnt"], strict=True) if there]
    assert learnt == task.chat.answered("yes")


def test_conversations_that_cannot_be_shown_are_named(run, talks):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "<image>"},
    ]
    with pytest.raises(ValueError, match=r"line\.jsonl:1: 0 marks of pictures"):
        asked(run, talks, {"messages": turns, "images": ["a.png"]})
    with pytest.raises(StoreError, match="none of the first 1 pictures"):
        asked(run, talks, {"messages": turns[:2], "images": ["elsewhere/a.png"]})


def test_a_broken_clip_is_captioned_as_a_black_one_whatever_frames_are_seen(run):
    task, _ = made(run, "held_out=0.3", "frames.frames=1")

    def broken(media):
        raise BrokenSample("broken")

    task.visuals.clip = broken
    assert task.evaluate(task.model, 1).texts


def test_rows_go_on_where_they_stood(run):
    _, loader = made(run, "data.packing=false", "data.batch=3")
    batches = iter(loader)
    seen = [next(batches)["key"] for _ in range(5)]
    _, other = made(run, "data.packing=false", "data.batch=3")
    again = iter(other)
    for _ in range(2):
        next(again)
    state = other.state_dict()
    _, third = made(run, "data.packing=false", "data.batch=3")
    third.load_state_dict(state)
    assert [key["key"] for key, _ in zip(third, range(3), strict=False)] == seen[2:]
    with pytest.raises(ValueError, match="size"):
        made(run, "data.packing=false", "data.batch=2")[1].load_state_dict(state)


def test_only_the_tokens_of_what_moves_are_there(run):
    task, _ = made(run, "frames={frames: 4, static: 255}", "model.projector={map: linear}")
    process = Documents(task.chat, task.visuals)
    source = Runs(task.recipe, run).source()
    item = process(source.nth(0))
    (kept,) = item["kept"]
    assert kept[0].all()
    assert kept[1:].flatten(1).sum(1).tolist() == [1] * (len(kept) - 1)
    mark = task.chat.marks[1]
    assert (item["tokens"] == mark).sum() == kept.sum()


READS = ["written={}", "model.reader={depth: 1, heads: 2}"]


def test_what_is_written_about_a_clip_is_read_beside_it(run):
    """Packed as alone; the clip's tokens are twice as many, and the second half changes with the text alone."""
    task, _ = made(run, *READS)
    source, process = Runs(task.recipe, run).source(), Documents(task.chat, task.visuals)
    told = ["", "Title: a river", "Subtitles: hello"]
    items = [process(source.nth(i) | {"text": t}) | {"key": t} for i, t in enumerate(told)]
    assert [len(item["texts"][0]) > 0 for item in items] == [False, True, True]
    whole, gradients = loss(task, packed(task, items, sum(i["length"] for i in items) + 5))
    alone = [loss(task, packed(task, [item])) for item in items]
    assert whole == pytest.approx(sum(x for x, _ in alone), rel=1e-5)
    for name, g in gradients.items():
        torch.testing.assert_close(g, sum(own[name] for _, own in alone), rtol=1e-3, atol=1e-6)
    batch = packed(task, items)
    visuals = task.visuals.tensors(batch["frames"], batch["counts_of_frames"])
    seen, other = task.model.see(visuals, texts=texts_of(batch)), task.model.see(visuals)
    n = task.model.projector.tokens(*task.model.tower.grid(2, 32, 32))
    for a, b, text in zip(seen, other, told, strict=True):
        assert len(a) == 2 * n
        assert torch.equal(a[:n], b[:n])
        assert torch.equal(a[n:], b[n:]) == (not text)


def test_reading_teaches_the_pictures_nothing(run):
    """Panda-70M: the video's tokens are detached where they ask for the text."""
    task, _ = made(run, *READS)
    task.model.see([torch.randn(2, 3, 32, 32)])[0][-8:].sum().backward()
    taught = {
        n.partition(".")[0] for n, p in task.model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert taught == {"reader"}


def test_subtitles_and_the_rest_are_left_out_independently():
    meta = {
        "meta": json.dumps({"title": "a  river", "description": "flows", "subtitles": "hello", "views": 3})
    }
    rng, written = np.random.default_rng(0), Written(dropout=0.5)
    told = [written_of(meta, written, rng) for _ in range(400)]
    whole = "Title: a river\nDescription: flows\nSubtitles: hello"
    counts = {x: told.count(x) for x in (whole, "Title: a river\nDescription: flows", "Subtitles: hello", "")}
    assert sum(counts.values()) == 400
    assert all(70 < n < 130 for n in counts.values())
    assert written_of(meta, written) == whole
    assert written_of({}, written) == ""


@pytest.mark.parametrize("shuffle", [[], ["data.shuffle=shards", "data.streams=2"]], ids=["full", "shards"])
def test_every_lane_takes_from_every_source(run, talks, shuffle):
    mixture = f"data.mixture=[{{data: {talks}/talks.jsonl, share: 0.5}}]"
    recipe = load_training("small-vlm", [*TINY, mixture, "data.lanes=4", *shuffle])
    source = Runs(recipe, run).source()
    for lane in range(4):
        assert {source.nth(n)["source"] for n in range(lane, 64, 4)} == {0, 1}


def test_prompts_are_drawn_for_each_sample_the_same_each_time(run):
    reader = ShardReader(f"{run}/shards", decode=False)
    a, b = (Captions(reader, ["one?", "two?", "three?"], seed=4) for _ in range(2))
    asked = [a.nth(i)["messages"][0]["content"] for i in range(30)]
    assert asked == [b.nth(i)["messages"][0]["content"] for i in range(30)]
    assert set(asked) == {"one?", "two?", "three?"}
    assert a.identity() != Captions(reader, ["one?"], seed=4).identity()


def test_frames_are_drawn_for_each_sample_the_same_each_time(run):
    _task, loader = made(run, "frames.anywhere=true")
    again = made(run, "frames.anywhere=true")[1]
    a, b = ([x.process(x.source.nth(i))["visuals"][0].numbers for i in range(20)] for x in (loader, again))
    assert a == b
    epoch = loader.source.samples
    assert [loader.process(loader.source.nth(i + epoch))["visuals"][0].numbers for i in range(20)] != a


def test_what_is_said_of_times_is_what_the_captioner_says(run):
    task, _ = made(run, "frames={frames: 2, times: prompt}")
    clip = task.visuals.clip(ShardReader(f"{run}/shards", decode=False, shuffle=False).read(0)["video"])
    (message,) = task.visuals.timed([{"role": "user", "content": "What is it?"}], [clip])
    mill = VLM.__new__(VLM)
    mill.times, mill.input = "prompt", "video"
    frames = [np.zeros((2, 2, 3), np.uint8)] * 2
    assert message["content"] == mill.asked(Look(frames, list(clip.seconds), clip.duration, "What is it?"))


def test_a_clip_that_breaks_late_teaches_nothing(run, monkeypatch):
    task, loader = made(run)
    items = documents(task, loader.source, 2)
    video = items[0]["visuals"][0]
    items[0]["visuals"] = [type(video)(b"no mp4", video.numbers, video.seconds, video.duration)]
    batch = packed(task, items)
    assert batch["documents"] == 1
    assert batch["skipped"] == ["0"]
    whole, _ = loss(task, batch)
    assert whole == pytest.approx(loss(task, packed(task, items[1:]))[0], rel=1e-5)


def test_parts_are_frozen_adapted_and_given_their_rates(run):
    task, _ = made(
        run, "train={tower: frozen, language: lora}", "lora={rank: 2}", "optimizer.rates={projector: 0.5}"
    )
    trained = {n for n, p in task.model.named_parameters() if p.requires_grad}
    assert all(n.startswith("projector.") or ".lora_" in n for n in trained)
    assert any(".lora_A." in n for n in trained)
    rates = {g["lr"]: sum(p.numel() for p in g["params"]) for g in task.phases[0].optimizer.param_groups}
    assert rates[0.5] == sum(
        p.numel() for n, p in task.model.named_parameters() if n.startswith("projector.")
    )


def test_it_learns_the_captions_and_shows_those_of_held_out_clips(run, tmp_path):
    more = ["held_out=0.3", "run={steps: 60, save_every: 100, sample_every: 60, log_every: 1}", "answer=12",
            "optimizer={lr: 0.01, warmup: 5}", "ema.lengths=[]", "train.tower=full"]  # fmt: skip
    run_training(load_training("small-vlm", [*TINY, *more]), run, tmp_path, device="cpu", monitor=Notes)
    rows = Notes.newest.rows
    assert rows[1]["loss"] > 5
    assert rows[60]["loss"] < 0.5 * rows[1]["loss"]
    assert 0 < rows[60]["filled"] <= 1


def test_captions_are_compared_with_the_chosen_ones():
    assert scores([("A red ball.", "a red ball."), ("A cat", "a dog")])["exact"] == 0.5
    same = [
        ("a red ball rolls over grass", "a red ball rolls over grass"),
        ("two cats sleep on a sofa", "two cats sleep on a sofa"),
    ]
    assert scores(same)["cider"] == pytest.approx(10)


def test_the_table_says_what_clips_cost(run):
    task, loader = made(run)
    assert budget_table(task.model, task.visuals, 512) in loader.table()
    assert "8 (2 fr.)" in loader.table()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["train={tower: frozen, projector: frozen, language: frozen}"], "nothing to train"),
        (["lora={rank: 2}"], "no part of `train`"),
        (["data.batch=2"], "packing: false"),
        (["written={}"], "go together"),
        (["frames={anywhere: true, fps: 2}"], "spread over a clip"),
        (["frames.least=9"], "1 ≤ least ≤ frames"),
        (["prompts=[' ']"], "asks for nothing"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(more, says):
    with pytest.raises(RecipeError) as told:
        load_training("small-vlm", more)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model={kind: llava, tower: {model_type: siglip_vision_model}}"], "model.language: must be given"),
        (["model.layer=7"], "layer 7: the tower has hidden states 0 to 2"),
        (["model.tower.num_hidden_layer=3"], "no option 'num_hidden_layer'; num_hidden_layers is one"),
        (["model.language.bogus=3"], "qwen2 has no option 'bogus'"),
        (["model.language.num_key_value_heads=4"], "no multiple of num_key_value_heads"),
        (["model.projector={map: nothing}"], "projector.map 'nothing': give linear, mlp, qformer"),
        (["model.projector={map: qformer, pools: 2}"], "projector takes no 'pools'; it takes map, "),
        (["model.language={model_type: nothing}"], "name a causal one"),
        (["frames.static=3", "model.projector={map: mlp, newline: frame}"], "newline"),
        (["data.mixture=[{data: nowhere, share: 0.5}]"], "nowhere"),
        (["data.tokens=20"], "raise data.tokens"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_sentence(more, says, run):
    with pytest.raises((ValueError, StoreError)) as told:
        _, loader = made(run, *more)
        next(iter(loader))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_doctor_names_the_parts_that_are_missing(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.main(["--recipe", "vlm"]) != 0
    told = capsys.readouterr()
    for part in ("google/siglip-so400m-patch14-384", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert part in told.out + told.err
