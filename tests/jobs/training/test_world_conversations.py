"""Conversations of a world model: how words, pictures and videos are laid out, what is learnt, and that it trains."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.training.loop import train
from jobs.training.recipe import load_training
from jobs.training.task import Draws
from jobs.training.world import task as training
from jobs.training.world.conversations import Looks, laid_out
from jobs.training.world.system import load_vq
from pipeline.faults import StoreError
from pipeline.shards.pixels import BrokenSample, clock
from pipeline.split import shown
from tests.fixtures import videos
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import Notes, in_ranks, start, weights
from tests.fixtures.videos import cfr, made
from tests.jobs.training.test_world import VQ, alone, recipe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
SIZE = (16, 16)
CODES, FRAME = 24, 4
DATA = {"fps": 4, "buckets": [{"frames": n, "height": 16, "width": 16} for n in (2, 3)], "tokens": 256}
DATA |= {"workers": 0, "micro_batches": 2}
TALKS = [
    {  # both draw, in turn
        "messages": [
            {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "Stripes."},
            {"role": "user", "content": "Draw it."},
            {"role": "assistant", "content": "Here: <image> as you said."},
        ],
        "images": ["a.png", "b.png"],
    },
    {  # no mark: before the user's words
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What moves?"},
            {"role": "assistant", "content": "A ball."},
        ],
        "video": "clips/ball.mp4",
    },
    {"messages": [{"role": "user", "content": "Hi <image>"}, {"role": "assistant", "content": "Hello."}]},
    {  # the answer is a video
        "messages": [{"role": "user", "content": "Show me."}, {"role": "assistant", "content": "<video>"}],
        "video": "clips/ball.mp4",
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(make_sharded_run(tmp_path_factory.mktemp("world") / "run", sources=4))


@pytest.fixture(scope="module")
def vq(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("vq")
    train(load_training("toy-vq", VQ), run, out, device="cpu", monitor=Notes)
    return str(out)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    (folder / "clips").mkdir()
    shutil.copy(made(cfr), folder / "clips/ball.mp4")
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::8] = 255
    Image.fromarray(stripes).save(folder / "a.png")
    Image.fromarray(255 - stripes[:, :40]).save(folder / "b.png")
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return folder


def talking(vq: str | None, talks: Path, **more):
    documents = {"text_to_video": 0, "video_to_text": 0, "text": 1, "chat": str(talks / "talks.jsonl")}
    return recipe(vq, **({"documents": documents, "data": DATA} | more))


def documents_of(task, loader) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, which are visual, and which are learnt, of each conversation by its key."""
    found = {}
    for _, batch in zip(range(8), loader, strict=False):
        tokens, learnt = task.tokens_of(batch), torch.zeros(len(batch["tokens"]), dtype=torch.bool)
        for kind in ("text", "vision"):
            learnt[batch[f"{kind}_at"] + 1] = True
        ends = np.cumsum(batch["lengths"])
        for key, end, length in zip(batch["key"], ends, batch["lengths"], strict=True):
            part = slice(int(end - length), int(end))
            found[key] = tokens[part], batch["vision"][part], learnt[part]
    return found


def visual(codes: torch.Tensor) -> list[int]:
    """With <eof> after each frame and <eov> after the last."""
    rows = [[*row.tolist(), CODES] for row in codes]
    rows[-1][-1] = CODES + 1
    return [x for row in rows for x in row]


def coded(folder: str, pixels: np.ndarray) -> torch.Tensor:
    frames = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return load_vq(folder, "vq.path", CPU).encode(frames[:, :, None]).flatten(1)


def test_words_pictures_and_videos_stand_in_turn_and_what_the_assistant_says_is_learnt(run, vq, talks):
    task, loader = training.build(talking(vq, talks), start(run))
    looks = Looks(SIZE, (2, 3), 4)
    a, b = (coded(vq, looks.image(str(talks / name))) for name in ("a.png", "b.png"))
    ball = coded(vq, looks.video(str(talks / "clips/ball.mp4")).pixels)
    assert len(ball) == 3
    golden = {  # (text or codes, learnt)
        1: [
            *(
                ("USER: ", 0),
                (a, 0),
                ("What is it?", 0),
                (" ASSISTANT: ", 0),
                ("Stripes.", 1),
                (" USER: ", 0),
            ),
            *(("Draw it.", 0), (" ASSISTANT: ", 0), ("Here: ", 1), (b, 1), (" as you said.", 1)),
        ],
        2: [
            *(("Be brief.", 0), (" USER: ", 0), (ball, 0), ("What moves?", 0)),
            *((" ASSISTANT: ", 0), ("A ball.", 1)),
        ],
        3: [("USER: ", 0), ("Hi ", 0), (" ASSISTANT: ", 0), ("Hello.", 1)],
        4: [("USER: ", 0), ("Show me.", 0), (" ASSISTANT: ", 0), (ball, 1)],
    }
    found = documents_of(task, loader)
    assert len(found) == len(golden)
    begin, end = 256, 257
    for line, parts in golden.items():
        tokens, seen, learnt = [begin], [False], [False]
        for what, mine in parts:
            if isinstance(what, str):
                row, kinds = list(what.encode()), [False] * len(what)
            else:
                codes = visual(what)
                row = [*b"<vision>", *codes, *b"</vision>"]
                kinds = [False] * 8 + [True] * len(codes) + [False] * 9
            tokens, seen, learnt = tokens + row, seen + kinds, learnt + [bool(mine)] * len(row)
        got = found[f"talks.jsonl:{line}"]
        assert got[0].tolist() == [*tokens, end]
        assert got[1].tolist() == [*seen, False]
        assert got[2].tolist() == [*learnt, True]
        assert len(task.system.layout.read(got[0], got[1])) > 0


def test_packed_conversations_weigh_as_much_as_each_alone(run, vq, talks):
    task, loader = training.build(talking(vq, talks), start(run))
    batch = next(b for b in loader if len(b["lengths"]) > 1 and b["vision_documents"])
    counts = task.counts(batch)
    assert counts["vision"] < counts["text"] == len(batch["lengths"])  # pictures of the user's are not learnt
    model = task.system.model

    def gradients(batches):
        model.zero_grad()
        for b in batches:
            losses = task.loss("world", model, b, Draws(0, 0, CPU)).sums
            sum(losses[k] * task.weights[k] / counts[k] for k in losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = gradients([batch])
    theirs = gradients([alone(batch, task, i) for i in range(len(batch["lengths"]))])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def talked(run: str, vq: str, talks: str, out: str, steps: int, parallel: str) -> None:
    runs = {"steps": steps, "save_every": 2, "sample_every": 0}
    made_of = talking(vq, Path(talks), run=runs, compute={"parallel": parallel})
    train(made_of, run, Path(out), device="cpu", monitor=Notes)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_it_trains_on_any_number_of_ranks_and_goes_on_bit_for_bit(run, vq, talks, tmp_path, ranks, parallel):
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        told = (run, vq, str(talks), str(tmp_path / out), steps, parallel)
        assert in_ranks(ranks, talked, *told) == [0] * ranks
    whole, parts = weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    assert [k for k in whole if not torch.equal(whole[k], parts[k])] == []


def test_a_video_is_seen_from_its_middle_at_the_recipes_rate_as_the_mill_shows_it(talks):
    path = str(talks / "clips/ball.mp4")
    every = shown.read(path, lambda _: SIZE).pictures
    when = clock(path)
    found = Looks(SIZE, (2, 3), 4).video(path).pixels
    begin = (when.duration - 3 / 4) / 2
    numbers = [max(i for i, t in enumerate(when.seconds) if t <= begin + k / 4 + 1e-6) for k in range(3)]
    assert np.array_equal(found, every[numbers].transpose(0, 3, 1, 2))
    assert len(Looks(SIZE, (2, 300), 4).video(path).pixels) == 2  # it does not fill the longest
    spread = Looks(SIZE, (2, 3), None).video(path).pixels
    thirds = [int((k + 0.5) * len(every) / 3) for k in range(3)]
    assert np.array_equal(spread, every[thirds].transpose(0, 3, 1, 2))


def test_a_picture_is_cropped_at_its_centre(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (Looks(SIZE, (2,), 4).image(str(tmp_path / "wide.png"))[0, :, :, 2:-2] > 190).all()


@pytest.mark.parametrize(
    ("talk", "with_vq", "said"),
    [
        (
            {"images": ["a.png"], "marks": 2},
            True,
            "has 2 <image> and 0 <video> in its messages, but 1 images",
        ),
        (
            {"images": ["a.png"], "marks": 1},
            False,
            "shows pictures, of which nothing makes codes: set vq.path",
        ),
        (
            {"images": ["gone.png"], "marks": 1},
            True,
            "documents.chat: none of the first 1 pictures and videos is",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_the_line(run, vq, talks, tmp_path, talk, with_vq, said):
    shutil.copy(talks / "a.png", tmp_path / "a.png")
    user = {"role": "user", "content": "<image>" * talk["marks"] + "?"}
    line = {"messages": [user, {"role": "assistant", "content": "x"}], "images": talk["images"]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises((ValueError, StoreError)) as e:
        _, loader = training.build(talking(vq if with_vq else None, tmp_path), start(run))
        loader.process(loader.source.nth(0))
    assert said in str(e.value)
    if "first" not in said:
        assert "talks.jsonl:1" in str(e.value)


@pytest.mark.parametrize(
    ("said", "learnt"),
    [
        (
            ["user: Hi", "assistant: Hello.", "user: Bye"],
            ["Hello."],
        ),  # </s> after the answer, not after the user's
        (["user: Hi", "assistant: Hello.", "user: And?", "assistant:  "], ["Hello."]),
        (["user: Hi", "assistant: ", "user: And?", "assistant: Well."], ["Well."]),
        (["user: Hi", "assistant:  "], None),
        (["assistant: Hello.", "user: See"], None),  # with a picture, which nothing comes after
    ],
)
def test_a_conversation_ends_with_its_last_answer_and_without_one_teaches_nothing(tmp_path, said, learnt):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    messages = [dict(zip(("role", "content"), line.split(": ", 1), strict=True)) for line in said]
    sample = {"key": "k", "messages": messages, "images": [str(tmp_path / "a.png")], "video": None}
    looks = Looks(SIZE, (2,), None)
    if learnt is None:
        with pytest.raises(BrokenSample, match="k: "):
            laid_out(sample, looks, FRAME, 1)
        return
    parts, pixels = laid_out(sample, looks, FRAME, 1)
    assert [p.content for p in parts if p.learnt and p.content.strip()] == learnt
    assert parts[-1].learnt
    assert len(pixels) == 1


def test_an_upright_video_is_seen_upright(talks, tmp_path):
    turned = made(videos.rotated, degrees=90)
    every = shown.read(str(turned), lambda _: SIZE).pictures
    found = Looks(SIZE, (2,), 25).video(str(turned)).pixels
    assert any(np.array_equal(found[0], x.transpose(2, 0, 1)) for x in every)
