"""clipmill eval vlm: right numbers of what a model says, with their protocol, gone on with where it was stopped."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, toy
from jobs.benchmarks.items import Item
from jobs.evaluation import captions, needle, questions, retrieval
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import look
from jobs.training.vlm.speaker import load_speaker
from pipeline.split import shown
from tests.fixtures import tiny_selector, tiny_speaker


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_speaker.export(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "toy"
    assert toy.main(["--out", str(out), "--videos", "1", "--scenes", "4", "--size", "32", "--questions"]) == 0
    return out / "questions"


@pytest.fixture(scope="module")
def captioned(world, tmp_path_factory) -> Path:
    """The scenes and their captions in VATEX's layout."""
    folder = tmp_path_factory.mktemp("vatex")
    truth = [json.loads(line) for line in (world.parent / "truth.jsonl").read_text().splitlines()]
    rows = []
    for scene, line in zip(sorted((world / "scenes").iterdir()), truth, strict=True):
        shutil.copy(scene, folder)
        rows.append({"videoID": scene.stem, "enCap": [line["caption"], "Something moves."], "chCap": []})
    (folder / "vatex_validation_v1.0.json").write_text(json.dumps(rows))
    return folder


def run(model: Path, what: str, against: Path, out: Path, *more: str) -> dict:
    args = ["vlm", str(model), what, "--against", str(against), "--out", str(out), "--device", "cpu", *more]
    assert evaluate.main(args) == 0
    return json.loads((out / "eval.json").read_text())


def value(result: dict, name: str) -> float:
    return next(row["value"] for row in result["numbers"] if row["name"] == name)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- with a real model


def test_captions_are_what_the_model_says_and_are_measured_as_the_metrics_do(
    model, captioned, tmp_path, capsys
):
    from models.measures.captions.cider import cider_d

    result = run(model, "captions", captioned, tmp_path / "out", "--format", "vatex", "--most", "6")
    first, *rows = lines(tmp_path / "out")
    assert first["protocol"] == result["protocol"]
    told = {
        "what": "captions",
        "format": "vatex",
        "split": "val",
        "frames": "3 frames",
        "prompt": "What is it?",
    }
    assert result["protocol"].items() >= (told | {"temperature": 0.0, "most": 6}).items()
    speaker = load_speaker(model)
    asked = [{"role": "user", "content": "What is it?"}]
    for row in rows:
        clip = speaker.frames(str(captioned / f"{row['id']}.mp4"))
        assert row["said"] == speaker.answer([asked], [[clip]], most=6)[0]
    said, references = [row["said"] for row in rows], [row["captions"] for row in rows]
    assert value(result, "CIDEr-D") == pytest.approx(np.mean(cider_d(said, references)))
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert f"written to {tmp_path / 'out'}" in printed


def test_probability_is_the_models_own(model, captioned, tmp_path):
    result = run(model, "probability", captioned, tmp_path / "out", "--format", "vatex")
    speaker = load_speaker(model)
    asked = [{"role": "user", "content": "What is it?"}]
    _, *rows = lines(tmp_path / "out")
    given = json.loads((captioned / "vatex_validation_v1.0.json").read_text())
    total = tokens = 0.0
    for row, item in zip(rows, given, strict=True):
        clip = speaker.frames(str(captioned / f"{row['id']}.mp4"))
        known = speaker.log_likelihood(asked, [clip], item["enCap"])
        assert row["log_p"] == pytest.approx([p for p, _ in known], abs=1e-4)
        total, tokens = total - sum(p for p, _ in known), tokens + sum(n for _, n in known)
    assert value(result, "nats a caption") == pytest.approx(total / 8, rel=1e-4)
    assert value(result, "bits a token") == pytest.approx(total / tokens / math.log(2), rel=1e-4)
    assert value(result, "perplexity") == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_stopped_and_run_again_it_says_the_same_and_asks_nothing_twice(model, captioned, tmp_path, capsys):
    whole = run(model, "captions", captioned, tmp_path / "whole", "--format", "vatex", "--batch", "2")
    text = (tmp_path / "whole/answers.jsonl").read_text()
    kept = text.splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    marked = kept[1].replace('"said": "', '"said": "kept ')
    (cut / "answers.jsonl").write_text(
        kept[0] + marked + kept[2] + kept[3][:10]
    )  # killed in the midst of a line
    again = run(model, "captions", captioned, cut, "--format", "vatex", "--batch", "2")
    assert (cut / "answers.jsonl").read_text() == kept[0] + marked + "".join(kept[2:])
    assert again["protocol"] == whole["protocol"]
    capsys.readouterr()
    args = [
        "vlm",
        str(model),
        "captions",
        "--against",
        str(captioned),
        "--format",
        "vatex",
        "--out",
        str(cut),
    ]
    assert evaluate.main([*args, "--frames", "2"]) == 2
    assert "holds answers with frames '3 frames', not '2 frames'" in capsys.readouterr().err


def test_questions_by_letter_likelihood_and_words_choose_as_the_model_would(model, world, tmp_path):
    speaker = load_speaker(model)
    asked = json.loads((world / "choices.json").read_text())
    for by in ("letter", "likelihood", "words"):
        out = tmp_path / by
        result = run(model, "questions", world, out, "--format", "questions", "--by", by)
        _, *rows = lines(out)
        right = 0
        for row, question in zip(rows, asked, strict=True):
            clip = speaker.frames(str(world / question["video"]))
            text = question["question"]
            if by != "words":
                text = questions.lettered(text, question["options"])
            talk = [{"role": "user", "content": text}]
            if by == "letter":
                assert row["said"] == speaker.answer([talk], [[clip]])[0]
            else:
                options = (
                    list("ABCDE"[: len(question["options"])]) if by == "likelihood" else question["options"]
                )
                known = speaker.log_likelihood(talk, [clip], options)
                weighed = [p / n if by == "words" else p for p, n in known]
                assert row["chosen"] == int(np.argmax(weighed))
            right += row["chosen"] == question["answer"]
        assert value(result, "accuracy") == right / len(asked)
        kinds = [value(result, kind) for kind in ("count", "colour", "shape", "direction", "background")]
        assert np.mean(kinds) == pytest.approx(right / len(asked))
        chance = next(row["chance"] for row in result["numbers"] if row["name"] == "accuracy")
        assert chance == pytest.approx((1 / 3 + 1 / 5 + 1 / 3 + 1 / 5 + 1 / 2) / 5)


def test_blind_the_video_makes_no_difference(model, world, tmp_path):
    run(model, "questions", world, tmp_path / "a", "--format", "questions", "--by", "likelihood", "--blind")
    _, *rows = lines(tmp_path / "a")
    asked = json.loads((world / "choices.json").read_text())
    by_question: dict[tuple, set] = {}
    for row, question in zip(rows, asked, strict=True):
        told = (question["question"], tuple(question["options"]))
        by_question.setdefault(told, set()).add(tuple(row["log_p"]))
    assert len(by_question) < len(asked)
    assert all(len(answers) == 1 for answers in by_question.values())


def test_retrieval_ranks_by_the_models_likelihoods(model, captioned, tmp_path):
    result = run(model, "retrieval", captioned, tmp_path / "out", "--format", "vatex")
    speaker = load_speaker(model)
    asked = [{"role": "user", "content": "What is it?"}]
    given = json.loads((captioned / "vatex_validation_v1.0.json").read_text())
    texts = [row["enCap"][0] for row in given]
    clips = [speaker.frames(str(captioned / f"{row['videoID']}.mp4")) for row in given]
    log_p = np.array([[p for p, _ in speaker.log_likelihood(asked, [clip], texts)] for clip in clips])
    prior = np.array([p for p, _ in speaker.log_likelihood(asked, [], texts)])
    own = np.arange(len(texts))
    texts_right = ((log_p - prior).argmax(1) == own).mean()
    videos_right = (log_p.argmax(0) == own).mean()
    assert value(result, "text of a video, R@1") == texts_right
    assert value(result, "video of a text, R@1") == videos_right
    assert value(result, "video of a text, R@10") == 1.0


def test_the_needle_is_asked_about_clips_end_to_end(model, captioned, tmp_path):
    more = ["--format", "vatex", "--lengths", "1,2", "--depths", "2", "--trials", "3", "--options", "2"]
    result = run(model, "needle", captioned, tmp_path / "out", *more, "--by", "words", "--frames", "2")
    assert [row["name"] for row in result["numbers"]] == [
        "1 clip",
        "  needle is clip 1",
        "2 clips",
        "  needle is clip 1",
        "  needle is clip 2",
    ]
    assert [row["n"] for row in result["numbers"]] == [3, 3, 6, 3, 3]
    assert {row["chance"] for row in result["numbers"] if "chance" in row} == {0.5}


# ---------------------------------------------------------------- parts


def test_a_stretch_of_a_video_gives_its_own_frames_at_its_own_times(model, world):
    speaker = load_speaker(model)  # 3 frames
    file = sorted((world / "scenes").iterdir())[0]  # 8 fps
    item = Item("a", file, span=(0.5, 1.25))  # frames 4 … 9
    seen = look(speaker, item)
    chosen = speaker.sampling.of(6, 8.0)
    whole = shown.read(str(file), None).pictures
    expected = speaker.visuals.pixels.resized(whole[[4 + i for i in chosen]])
    assert (seen.frames == expected).all()
    assert seen.seconds == pytest.approx([i / 8 for i in chosen])
    assert seen.duration == 0.75
    late = look(speaker, Item("b", file, span=(99.0, 120.0)))  # beyond the end: what is shown then
    assert len(late.frames) == 1


def test_figures_of_captions_of_the_small_world_count_attributes():
    said = ["two red circles move left on black", "one red circle moves left on white", "nonsense"]
    wanted = [
        "two red circles move left on black",
        "one red square moves up on white",
        "one red circle moves up on black",
    ]
    rows = [{"said": s, "captions": [w]} for s, w in zip(said, wanted, strict=True)]
    found = {row["name"]: row["value"] for row in captions.figures(rows, [])}
    assert found["word for word"] == pytest.approx(1 / 3)
    assert found["shape"] == pytest.approx(1 / 3)
    assert found["colour"] == pytest.approx(2 / 3)
    assert found["attributes"] == pytest.approx((1 + 3 / 5 + 0) / 3)
    assert found["all attributes"] == pytest.approx(1 / 3)
    assert captions.attributes([{"said": "a dog", "captions": ["a dog runs"]}]) == []


def test_figures_of_open_questions_and_intervals_by_video():
    items = [
        Item("1", Path("a.mp4"), question="?", answers=("a cat", "kitten"), group=("what",)),
        Item("2", Path("a.mp4"), question="?", answers=("two",), group=("how",)),
        Item("3", Path("b.mp4"), question="?", options=("x", "y", "z"), answer=2, group=("what",)),
        Item("4", Path("b.mp4"), question="?", options=("x", "y"), answer=0, group=("what",)),
    ]
    rows = [
        {"said": "The cat."},
        {"said": " two "},
        {"said": "C", "chosen": 2},
        {"said": "?", "chosen": None},
    ]
    found = {row["name"]: row for row in questions.figures(items, rows)}
    assert found["accuracy"]["value"] == 0.5  # of those with options
    assert found["exact match, open"]["value"] == 0.5
    assert found["normalised accuracy, open"]["value"] == 1.0
    assert found["what"]["value"] == pytest.approx(2 / 3)
    assert found["how"]["value"] == 1
    assert found["no option chosen"]["value"] == 1
    from models.measures.wilson import wilson

    assert (found["what"]["low"], found["what"]["high"]) == wilson(2 / 3, 2)  # two videos
    assert [row["name"] for row in questions.figures(items[:2], rows[:2])][:2] == [
        "exact match, open",
        "normalised accuracy, open",
    ]


def test_subtitles_at_the_frames_that_are_looked_at_stand_before_the_question(model, world, tmp_path, capsys):
    folder = tmp_path / "mme"
    (folder / "subtitle").mkdir(parents=True)
    row = {"duration": "short", "domain": "d", "task_type": "t", "question": "Which?", "answer": "B"}
    rows = []
    for name, scene in zip(("a", "b"), sorted((world / "scenes").iterdir()), strict=False):
        shutil.copy(scene, folder / f"{name}.mp4")
        rows.append(row | {"videoID": name, "question_id": f"{name}-1", "options": ["A. x.", "B. y."]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    args = ["vlm", str(model), "questions", "--against", str(folder), "--format", "video-mme", "--subtitles"]
    assert evaluate.main([*args, "--out", str(tmp_path / "none")]) == 2
    assert f"--subtitles: {folder} has no .srt file named as one of its videos" in capsys.readouterr().err
    speaker = load_speaker(model)
    clips = {name: speaker.frames(str(folder / f"{name}.mp4")) for name in ("a", "b")}
    first, _, last = clips["a"].seconds
    cue = "1\n00:00:{:06.3f} --> 00:00:{:06.3f}\n{}\n\n"
    told = cue.format(first, first + 0.001, "one") + cue.format(first + 0.01, first + 0.02, "unseen")
    (folder / "subtitle/a.srt").write_text(told + cue.format(last, last + 1, "three"))
    out = tmp_path / "out"
    more = ("--format", "video-mme", "--subtitles", "--by", "likelihood")
    result = run(model, "questions", folder, out, *more)
    assert result["protocol"]["subtitles"] is True
    assert result["notes"] == ["Asked without subtitles, as there are none: 1 videos."]
    asked = {
        "a": "This video's subtitles are listed below:\none\nthree\nWhich?",
        "b": "Which?",
    }
    for row in lines(out)[1:]:
        name = row["id"][0]
        talk = [{"role": "user", "content": questions.lettered(asked[name], ["x.", "y."])}]
        known = speaker.log_likelihood(talk, [clips[name]], ["A", "B"])
        assert row["log_p"] == pytest.approx([p for p, _ in known], abs=1e-5)
    assert (
        "subtitles"
        not in run(model, "questions", folder, tmp_path / "plain", "--format", "video-mme")["protocol"]
    )


def test_open_nextqa_says_what_is_measured_in_place_of_wups(model, world, tmp_path):
    folder = tmp_path / "nextqa"
    folder.mkdir()
    shutil.copy(min((world / "scenes").iterdir()), folder / "7.mp4")
    (folder / "val.csv").write_text(
        "video,frame_count,width,height,question,answer,qid,type\n7,9,32,32,what moves,a ball,0,TC\n"
    )
    result = run(model, "questions", folder, tmp_path / "out", "--format", "next-qa")
    assert {"exact match, open", "normalised accuracy, open"} <= {row["name"] for row in result["numbers"]}
    (note,) = result["notes"]
    assert note.startswith("No WUPS, NExT-QA's own measure of open answers")


def test_equal_texts_are_each_others_right_answers():
    texts = ["a", "b", "a"]
    scores = np.array([[0.0, 0.5, 1.0], [0.1, 0.9, 0.0], [1.0, 0.5, 0.2]])
    found = {row["name"]: row["value"] for row in retrieval.both_ways(scores, scores.T, texts)}
    assert found["text of a video, R@1"] == 1.0
    assert found["video of a text, R@1"] == 1.0


def test_trials_hide_the_needle_at_every_depth_among_clips_that_are_unlike_it():
    items = [Item(str(i), Path(f"{i}.mp4"), captions=(f"caption {i // 2}",)) for i in range(40)]  # each twice
    made = needle.trials(items, [1, 5], 3, 4, 4, seed=1)
    assert made == needle.trials(items, [1, 5], 3, 4, 4, seed=1)
    assert [t.at for t in made if len(t.clips) == 5] == [0] * 4 + [2] * 4 + [4] * 4
    assert len([t for t in made if len(t.clips) == 1]) == 4
    for trial in made:
        own = items[trial.clips[trial.at]].captions[0]
        shown = [items[i].captions[0] for i in trial.clips]
        assert trial.options[trial.answer] == own
        assert shown.count(own) == 1
        assert not set(shown) & (set(trial.options) - {own})
        assert len(set(trial.options)) == 4
    answers = {t.answer for t in made}
    assert len(answers) > 2  # letters say nothing
    with pytest.raises(ValueError, match="are too few for videos of 30 clips and 4 options"):
        needle.trials(items, [30], 3, 1, 4, seed=1)


def test_a_video_that_could_not_be_read_is_asked_again(tmp_path):
    first = Answers(tmp_path, {"frames": "3"})
    first.add([{"id": "a", "said": "x"}, {"id": "b", "broken": "no file"}])
    again = Answers(tmp_path, {"frames": "3"})
    assert again.missing(["a", "b"]) == ["b"]
    again.add([{"id": "b", "said": "y"}])
    assert Answers(tmp_path, {"frames": "3"}).told["b"] == {"id": "b", "said": "y"}


def test_answers_of_another_protocol_are_refused_and_cut_lines_forgotten(tmp_path):
    first = Answers(tmp_path, {"frames": "3", "prompt": "?"})
    first.add([{"id": "a", "said": "x"}, {"id": "b", "said": "ü"}])
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    again = Answers(tmp_path, {"frames": "3", "prompt": "?"})
    assert again.missing(["a", "b", "c"]) == ["b", "c"]
    assert path.read_bytes().endswith(b"\n")
    with pytest.raises(ValueError, match="holds answers with frames '3', not '4'"):
        Answers(tmp_path, {"frames": "4", "prompt": "?"})
    with pytest.raises(ValueError, match="with prompt '\\?', not None"):
        Answers(tmp_path, {"frames": "3"})
    path.write_text("mine\n")
    with pytest.raises(ValueError, match="is not of 'clipmill eval vlm'"):
        Answers(tmp_path, {"frames": "3"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["captions", "--n", "0"], "--n 0: give 1 or more"),
        (["captions", "--fps", "0"], "--fps 0: give a rate above 0"),
        (["questions"], "questions: a run has none; give --format and its folder"),
        (["captions", "--split", "val"], "--split is of a benchmark: name it with --format"),
        (["needle", "--lengths", "4,x"], "--lengths 4,x: give numbers of clips"),
        (["captions", "--format", "video-mme"], "--format video-mme has no captions"),
        (["captions"], "give a folder of shards"),
    ],
)
def test_bad_arguments_are_one_sentence(model, tmp_path, capsys, arguments, said):
    assert evaluate.main(["vlm", str(model), *arguments, "--against", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


USELESS = [
    ("captions", "--blind", "questions"),
    ("captions", "--by words", "questions, needle"),
    ("captions", "--lengths 4", "needle"),
    ("captions", "--trials 4", "needle"),
    ("probability", "--temperature 1", "captions"),
    ("probability", "--most 5", "captions, questions, needle by letter"),
    ("retrieval", "--batch 2", "captions, probability, questions"),
    ("questions", "--prompt x", "captions, probability, retrieval, needle by words"),
    ("questions", "--temperature 0", "captions"),
    ("questions", "--options 3", "needle"),
    ("needle", "--fps 2", "captions, probability, retrieval, questions"),
    ("needle", "--prompt x", "captions, probability, retrieval, needle by words"),
    ("needle --by words", "--most 4", "captions, questions, needle by letter"),
]


@pytest.mark.parametrize(("what", "option", "able"), USELESS)
def test_an_option_that_would_change_nothing_is_refused(model, tmp_path, capsys, what, option, able):
    asked = [*what.split(), *option.split()]
    assert evaluate.main(["vlm", str(model), *asked, "--against", str(tmp_path), "--format", "msr-vtt"]) == 2
    told = what.replace("--by ", "by ") + (" by letter" if what == "needle" else "")
    said = f"{option.split()[0]} changes nothing of {told}: leave it out (it is for {able})\n"
    assert said in capsys.readouterr().err


def test_needle_trials_that_cannot_be_read_are_noted_and_counted_apart(model, captioned, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(captioned, folder)
    sorted(folder.glob("*.mp4"))[1].write_bytes(b"nonsense")
    more = ["--format", "vatex", "--lengths", "2", "--depths", "1", "--trials", "6", "--options", "2"]
    result = run(model, "needle", folder, tmp_path / "out", *more, "--by", "likelihood")
    _, *rows = lines(tmp_path / "out")
    gone = [row["id"] for row in rows if "broken" in row]
    assert 0 < len(gone) < 6
    assert value(result, "trials that cannot be read") == len(gone)
    assert [row["n"] for row in result["numbers"]] == [6 - len(gone), 6 - len(gone), 6]
    (note,) = result["notes"]
    assert note.startswith(
        f"Left out, as their video cannot be read: {len(gone)} of 6, the first {gone[0]} ("
    )
    for file in folder.glob("*.mp4"):
        file.write_bytes(b"nonsense")
    args = ["vlm", str(model), "needle", "--against", str(folder), *more, "--out", str(tmp_path / "none")]
    assert evaluate.main(args) == 2
    assert "no video can be read, the first: 2 clips, needle 1, 1: " in capsys.readouterr().err


def test_a_video_that_cannot_be_read_is_left_out_with_a_note(model, captioned, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(captioned, folder)
    sorted(folder.glob("*.mp4"))[1].write_bytes(b"nonsense")
    result = run(model, "captions", folder, tmp_path / "out", "--format", "vatex")
    assert result["numbers"][0]["n"] == 3
    (note,) = (x for x in result["notes"] if "METEOR" not in x)
    assert note.startswith("Left out, as their video cannot be read: 1 of 4, the first 00000-001 (")


def test_a_selector_is_measured_by_retrieval_as_it_judges(captioned, tmp_path, capsys):
    from jobs.evaluation import by_selector
    from models.choosing.chooser import Chooser

    file = tiny_selector.write(tmp_path / "selector.pt", frames=4)
    result = run(file, "retrieval", captioned, tmp_path / "out", "--format", "vatex")
    chooser = Chooser.load(file)
    given = json.loads((captioned / "vatex_validation_v1.0.json").read_text())
    wanted = [row["enCap"][0] for row in given]
    clips = [Item(row["videoID"], captioned / f"{row['videoID']}.mp4") for row in given]
    sure = np.array([chooser(list(by_selector._frames(clip, 4)), wanted) for clip in clips])
    right = (sure.argmax(1) == np.arange(len(wanted))).mean()
    assert value(result, "text of a video, R@1") == right
    assert value(result, "video of a text, R@1") == (sure.argmax(0) == np.arange(len(wanted))).mean()
    args = ["vlm", str(file), "captions", "--against", str(captioned), "--format", "vatex"]
    assert evaluate.main(args) == 2
    assert "is a selector, which is measured by retrieval alone" in capsys.readouterr().err
