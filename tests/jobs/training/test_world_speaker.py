"""A world model that is asked: in the layout it was trained on, one by one or together, shown what training shows."""

# ruff: noqa: F811 (fixtures are imported by their names)

import argparse
import json
import math

import numpy as np
import pytest
import torch

from jobs import chat, evaluate
from jobs.benchmarks.own import clips
from jobs.evaluation.looking import look
from jobs.speaking import load
from jobs.training.data.loader import held_out_of
from jobs.training.loop import train
from jobs.training.world import task as training
from jobs.training.world.system import load_world
from jobs.videos import write_mp4
from models.language.generate import Sampling
from pipeline.split import shown
from tests.fixtures.toy_training import Notes, start
from tests.jobs.training.test_world import recipe
from tests.jobs.training.test_world_conversations import documents_of, run, talking, talks, vq  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def talker(run, vq, talks, tmp_path_factory) -> str:
    """Knows its few conversations by heart."""
    out = tmp_path_factory.mktemp("talker")
    steps = {"steps": 160, "save_every": 160, "sample_every": 0}
    made = talking(vq, talks, run=steps, optimizer={"lr": 1e-2, "warmup": 5}, ema={"lengths": []})
    train(made, run, out, device="cpu", monitor=Notes)
    return str(out)


@pytest.fixture(scope="module")
def captioner(run, vq, tmp_path_factory) -> str:
    """Of clips and captions alone."""
    out = tmp_path_factory.mktemp("captioner")
    train(recipe(vq, held_out=0.5), run, out, device="cpu", monitor=Notes)
    return str(out)


@pytest.fixture(scope="module")
def reader(run, talks, tmp_path_factory) -> str:
    """Of text alone."""
    out = tmp_path_factory.mktemp("reader")
    lines = [json.loads(line) for line in (talks / "talks.jsonl").read_text().splitlines()]
    (out / "talks").mkdir()
    alone = [line for line in lines if "images" not in line and "video" not in line]
    (out / "talks/talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alone))
    train(talking(None, out / "talks"), run, out / "model", device="cpu", monitor=Notes)
    return str(out / "model")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- what it says


def test_answers_are_those_of_the_model_after_the_same_document(talker, talks):
    speaker, system = load(talker, "cpu"), load_world(talker, device="cpu")
    ball = speaker.frames(str(talks / "clips/ball.mp4"))
    parts = ["Be brief.", " USER: ", ball.codes, "What moves?", " ASSISTANT: "]
    asked = [{"role": "system", "content": "Be brief."}, user("What moves?")]
    assert speaker.answer([asked], [[ball]]) == system.tell([parts]) == ["A ball."]
    warm = Sampling(temperature=2.0)
    drawn = speaker.answer([asked], [[ball]], most=9, temperature=2.0, seed=5)
    assert drawn == system.tell([parts], most=9, how=warm, seed=5)


def test_a_clip_without_conversations_is_followed_by_its_caption(captioner, run):
    speaker, system = load(captioner, "cpu"), load_world(captioner, device="cpu")
    clip = look(speaker, clips(run).items[0])
    assert speaker.answer([[user("")]], [[clip]], most=20) == system.tell([[clip.codes]], most=20)
    begun = speaker.answer([[user("two red")]], [[clip]], most=20)
    assert begun == system.tell([[clip.codes, "two red"]], most=20)


def test_several_turns_are_the_document_as_training_lays_it_out(run, vq, talks, talker):
    speaker = load(talker, "cpu")
    trained = documents_of(*training.build(talking(vq, talks), start(run)))
    a, b = (speaker.image(str(talks / name)) for name in ("a.png", "b.png"))
    ball = speaker.frames(str(talks / "clips/ball.mp4"))
    told = [user("<image>\nWhat is it?"), assistant("Stripes."), user("Draw it.")]
    for line, conversation, visuals, answer in (
        (1, told, [a], "Here: <image> as you said."),
        (2, [{"role": "system", "content": "Be brief."}, user("What moves?")], [ball], "A ball."),
        (4, [user("Show me.")], [], "<video>"),
    ):
        tokens, vision, _ = trained[f"talks.jsonl:{line}"]
        layout = speaker.system.layout
        laid = layout.lay_out(speaker.document(conversation, visuals), end=False)
        assert torch.equal(laid.tokens, tokens[: laid.length])
        assert torch.equal(laid.vision, vision[: laid.length])
        shown_last = {1: [b], 2: [], 4: [ball]}[line]  # and with its answer
        whole = [*conversation, assistant(answer)]
        again = layout.lay_out(speaker.document(whole, [*visuals, *shown_last])[:-1])
        assert torch.equal(again.tokens, tokens)
        assert torch.equal(again.vision, vision)


def test_company_in_the_batch_changes_nothing(talker, talks):
    speaker = load(talker, "cpu")
    ball, a = speaker.frames(str(talks / "clips/ball.mp4")), speaker.image(str(talks / "a.png"))
    asked = [[user("What moves?")], [user("What is it?")], [user("Hi ")], [user("?" * 30)]] * 3
    visuals = [[ball], [a], [], [a, ball]] * 3
    for temperature in (0.0, 1.5):
        together = speaker.answer(asked, visuals, most=12, temperature=temperature, seed=3)
        assert len(set(together)) > 2
        for i in (0, 3, 9):
            alone = speaker.answer([asked[i]], [visuals[i]], most=12, temperature=temperature, seed=3 + i)
            assert alone == [together[i]]
    texts = ["A ball.", "", "Stripes. And more of them than there are of others."]
    both = speaker.log_likelihood(asked[0], [ball], texts)
    each = [speaker.log_likelihood(asked[0], [ball], [text])[0] for text in texts]
    for (p, n), (q, m) in zip(both, each, strict=True):
        assert (p, n) == (pytest.approx(q, abs=1e-4), m)


@pytest.mark.parametrize("which", ["talker", "captioner"])
def test_log_likelihood_is_that_of_a_pass_through_the_whole_document(which, talks, request):
    speaker = load(request.getfixturevalue(which), "cpu")
    model, layout = speaker.system.model, speaker.system.layout
    ball = speaker.frames(str(talks / "clips/ball.mp4"))
    answers = ["A ball.", "", "Something else that is much longer, to the end.", *(f"{i}" for i in range(9))]
    found = speaker.log_likelihood([user("What moves?")], [ball], answers)
    around = ("USER: ", " ASSISTANT: ") if which == "talker" else ("", "")
    for text, (log_p, n) in zip(answers, found, strict=True):
        laid = layout.lay_out([around[0], ball.codes, "What moves?", around[1], text])
        said = model(laid.tokens[None], laid.vision[None]).text[0, :-1].log_softmax(-1)
        every = said.gather(1, laid.tokens[1:, None].clamp(max=257))[:, 0]
        assert n == len(text.encode()) + 1
        assert log_p == pytest.approx(float(every[-n:].sum()), abs=1e-4)


def test_what_was_shown_decides_what_is_likely(talker, talks):
    speaker = load(talker, "cpu")
    ball, a = speaker.frames(str(talks / "clips/ball.mp4")), speaker.image(str(talks / "a.png"))
    known = [speaker.log_likelihood([user("What is it?")], [x], ["Stripes."])[0][0] for x in (a, ball)]
    assert known[0] > known[1]


# ---------------------------------------------------------------- what it is shown


def test_a_clip_of_a_run_is_seen_as_training_sees_those_it_holds_out(captioner, run):
    speaker = load(captioner, "cpu")
    held = held_out_of(speaker.system.recipe, run, 0.5)
    by_key = {item.id: item for item in clips(run).items}
    for row in range(len(held.keys)):
        wanted = torch.from_numpy(held.sound(row)["video"]).transpose(0, 1)
        found = look(speaker, by_key[held.keys[row]])
        assert torch.equal(found.frames, wanted)
        assert torch.equal(found.codes, speaker.system.encode(wanted, [len(wanted)]))


def test_a_stretch_is_seen_as_if_it_were_all(talker, talks, tmp_path):
    speaker = load(talker, "cpu")
    path = str(talks / "clips/ball.mp4")
    every = shown.read(path, None).pictures
    fps = shown.read(path, None).fps
    half = len(every) // 2
    write_mp4(tmp_path / "half.mp4", every[half:], fps, crf=1)
    alone, part = speaker.frames(str(tmp_path / "half.mp4")), speaker.stretch(path, half / fps, math.inf)
    assert part.frames.shape == alone.frames.shape
    assert (part.frames.float() - alone.frames.float()).abs().mean() < 6
    assert [t - part.seconds[0] for t in part.seconds] == pytest.approx([0, 1 / 4, 2 / 4])


def test_clips_end_to_end_are_one_video_of_all_their_frames(captioner, run):
    speaker = load(captioner, "cpu")
    media = [item.video() for item in clips(run).items[:3]]
    whole = speaker.end_to_end(media, 2)
    each = [speaker.frames(m) for m in media]
    assert torch.equal(whole.frames, torch.cat([x.frames for x in each]))
    assert torch.equal(whole.codes, torch.cat([x.codes for x in each]))
    assert list(whole.seconds) == sorted(whole.seconds)


def test_other_frames_are_looked_at_when_asked(captioner, run):
    speaker = load(captioner, "cpu")
    speaker.look_at(5, 24)
    clip = look(speaker, clips(run).items[0])
    assert len(clip.frames) == len(clip.codes) == len(clip.seconds) == speaker.most_frames == 5
    assert speaker.protocol()["frames"] == "5 at 24 fps from the middle"


# ---------------------------------------------------------------- in the terminal


def talk_of(model: str, out, **more) -> chat.Talk:
    given = {"model": model, "video": [], "image": [], "frames": None, "fps": None, "most": None}
    given |= {"temperature": 0.0, "seed": 0, "device": "cpu", "locate": [], "out": out}
    return chat.begin(argparse.Namespace(**given | more))


def test_what_it_shows_is_a_file_and_stays_in_the_conversation_as_its_codes(talker, talks, tmp_path):
    talk = talk_of(talker, tmp_path / "out")
    assert talk.ask("Show me.") == f"[{tmp_path / 'out/said-1.mp4'}]"
    ball = talk.speaker.frames(str(talks / "clips/ball.mp4"))
    written = shown.read(str(tmp_path / "out/said-1.mp4"), None)
    decoded = talk.speaker.system.decode(ball.codes).numpy()
    assert written.pictures.shape == decoded.shape
    assert np.abs(written.pictures.astype(int) - decoded).mean() < 12
    assert written.fps == pytest.approx(4)
    talk.ask("And now?")
    document = talk.speaker.document(talk.messages, talk.visuals)
    assert torch.equal(document[3].content, ball.codes)
    talk.anew()
    talk.ask("Show me.")
    assert (tmp_path / "out/said-2.mp4").is_file()  # nothing is written over


def test_words_and_pictures_stand_in_turn(talker, talks, tmp_path):
    talk = talk_of(talker, tmp_path, image=[str(talks / "a.png")])
    assert talk.ask("What is it?") == "Stripes."
    assert talk.ask("Draw it.") == f"Here:  [{tmp_path / 'said-1.png'}]  as you said."
    b = talk.speaker.image(str(talks / "b.png"))
    assert torch.equal(talk.visuals[-1].codes, b.codes)


def test_a_script_asks_and_gets_lines(talker, captioner, talks, capsys, tmp_path, monkeypatch):
    ball = str(talks / "clips/ball.mp4")
    capsys.readouterr()  # of their training
    asked = ["--video", ball, "--device", "cpu", "--out", str(tmp_path)]
    assert chat.main([talker, *asked, "--ask", "What moves?"]) == 0
    out, err = capsys.readouterr()
    speaker = load(talker, "cpu")
    said = speaker.reply([user("<video>\nWhat moves?")], [speaker.frames(ball)])
    if all(
        isinstance(part, str) for part in said
    ):  # so little trained, it may show something: by its file's name
        assert out == speaker.answer([[user("<video>\nWhat moves?")]], [[speaker.frames(ball)]])[0] + "\n"
    else:
        printed = "".join(part if isinstance(part, str) else f" [{tmp_path}/said-1.png] " for part in said)
        assert out == printed.strip() + "\n"
    assert err == ""
    assert chat.main([captioner, *asked, "--most", "5", "--ask", ""]) == 0
    assert "was trained on no conversations" in capsys.readouterr().err


# ---------------------------------------------------------------- in evaluations


def evaluated(model: str, what: str, run: str, out, *more: str) -> dict:
    given = ["vlm", model, what, "--against", run, "--out", str(out), "--device", "cpu", *more]
    assert evaluate.main(given) == 0
    return json.loads((out / "eval.json").read_text())


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()][1:]


def test_captions_are_asked_for_as_the_recipes_documents_have_them(talker, captioner, run, tmp_path):
    for model, prompt, how in (
        (talker, "Describe this video in one sentence.", "USER: clip prompt ASSISTANT:"),
        (captioner, "", "clip, then its text"),
    ):
        out = tmp_path / prompt[:8].strip()
        told = evaluated(model, "captions", run, out / "out", "--most", "6", "--n", "3")["protocol"]
        assert (told["prompt"], told["asked"]) == (prompt, how)
        speaker, items = load(model, "cpu"), {item.id: item for item in clips(run).items}
        assert len(rows(out / "out")) == 3
        for row in rows(out / "out"):
            clip = look(speaker, items[row["id"]])
            assert row["said"] == speaker.answer([[user(prompt)]], [[clip]], most=6)[0]


def test_probability_is_the_models_own(captioner, run, tmp_path):
    result = evaluated(captioner, "probability", run, tmp_path)
    system = load_world(captioner, device="cpu")
    speaker = load(captioner, "cpu")
    nats = []
    for item in clips(run).items:
        if item.captions[0].strip():
            laid = system.layout.lay_out([look(speaker, item).codes, item.captions[0]])
            said = system.model(laid.tokens[None], laid.vision[None]).text[0, :-1].log_softmax(-1)
            n = len(item.captions[0].encode()) + 1
            nats.append(-float(said[-n:].gather(1, laid.tokens[-n:, None]).sum()))
    (mean,) = (row["value"] for row in result["numbers"] if row["name"] == "nats a caption")
    assert mean == pytest.approx(sum(nats) / len(nats), rel=1e-4)


def test_a_needle_is_found_by_words_and_by_letters_of_those_that_converse(talker, captioner, run, tmp_path):
    few = ["--lengths", "1,2", "--depths", "1", "--trials", "1", "--options", "2"]
    for model, by in ((captioner, "words"), (talker, "letter"), (talker, "likelihood")):
        out = tmp_path / f"{by}"
        numbers = evaluated(model, "needle", run, out, *few, "--by", by)["numbers"]
        assert {"1 clip", "2 clips"} <= {row["name"] for row in numbers}
        assert len(rows(out)) == 2


def test_videos_longer_than_its_documents_are_noted(captioner, run, tmp_path):
    speaker = load(captioner, "cpu")
    frames = next(n for n in range(1, 999) if speaker.system.layout.cost(n) > 256)
    assert speaker.beyond(frames - 1) == ""
    assert speaker.beyond(frames).endswith("longer than the 256 it was trained on.")
    few = ["--lengths", "1,2", "--depths", "1", "--trials", "1", "--options", "2", "--by", "words"]
    short = evaluated(captioner, "needle", run, tmp_path / "short", *few)
    long = evaluated(captioner, "needle", run, tmp_path / "long", *few, "--frames", str(frames))
    assert [n for n in short["notes"] if "longer than" in n] == []
    assert [n for n in long["notes"] if "longer than" in n] == [speaker.beyond(2 * frames)]


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("which", "what", "said"),
    [
        ("captioner", ["needle"], "trained on no conversations (documents.chat), so needle by letter"),
        ("captioner", ["retrieval"], "it was trained on none that a document begins with"),
        ("reader", ["captions"], "a model of text alone, without a VQ autoencoder (vq.path)"),
        ("talker", ["captions", "--locate", "vq.path=nowhere"], "nowhere is not there"),
        ("talker", ["captions", "--locate", "codes=x"], "--locate codes=x: give"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(which, what, said, run, request, capsys, tmp_path):
    model = request.getfixturevalue(which)
    capsys.readouterr()  # of its training
    out = tmp_path / "out"
    given = ["vlm", model, *what, "--against", run, "--out", str(out), "--device", "cpu"]
    assert evaluate.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_a_model_of_text_alone_talks_and_is_shown_nothing(reader, talks, capsys, tmp_path):
    capsys.readouterr()  # of its training
    asked = ["--device", "cpu", "--most", "4", "--ask", "Hi", "--out", str(tmp_path)]
    assert chat.main([reader, *asked]) == 0
    speaker = load(reader, "cpu")
    assert capsys.readouterr().out == speaker.answer([[user("Hi")]], [[]], most=4)[0] + "\n"
    for option, name in (("--video", "clips/ball.mp4"), ("--image", "a.png")):
        assert chat.main([reader, *asked, option, str(talks / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "a model of text alone" in line
