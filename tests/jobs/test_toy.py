"""clipmill toy: the world as raw videos, which the mill takes apart again without a mistake."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest

from jobs import curate, toy
from pipeline.shards.chat import ChatReader
from pipeline.toy import questions
from pipeline.toy import world as toy_world


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    assert toy.main(["--out", str(out), "--videos", "3", "--scenes", "6", "--pan", "0.4", "--seed", "5"]) == 0
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "truth.jsonl").read_text().splitlines()]


def test_the_truth_covers_every_frame_once(made):
    assert len(lines(made)) == 18
    for path in sorted((made / "videos").iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
            assert stream.codec_context.name == "h264"
            frames = sum(1 for _ in container.decode(video=0))
        told = [line for line in lines(made) if line["video"] == path.name]
        edges = [0, *(line["end_frame"] for line in told)]
        assert [line["start_frame"] for line in told] == edges[:-1]
        assert edges[-1] == frames
        for line in told:
            assert len(line["positions"]) == line["end_frame"] - line["start_frame"]
            assert len(line["positions"][0]) == toy_world.COUNTS[line["count"]]
            assert toy_world.parse(line["caption"]).colour == line["colour"]


def test_the_mill_splits_at_the_true_cuts_and_captions_with_the_truth(made, tmp_path):
    run = tmp_path / "run"
    assert curate.main([str(made / "videos"), "--recipe", "toy", "--runner", "local", "--out", str(run)]) == 0
    clips = [r for f in (run / "clips").glob("*.parquet") for r in pq.read_table(f).to_pylist()]
    decisions = {r["clip_id"]: r for r in pq.read_table(run / "decisions.parquet").to_pylist()}
    found = {
        (c["name"], c["start_frame"], c["end_frame"]): decisions[c["clip_id"]]["caption"]
        for c in clips
        if decisions[c["clip_id"]]["keep"]
    }
    truth = {(line["video"], line["start_frame"], line["end_frame"]): line["caption"] for line in lines(made)}
    assert found == truth


def test_held_out_captions_are_listed_and_no_scene_has_one(tmp_path, capsys):
    args = ["--videos", "6", "--scenes", "40", "--size", "32", "--pan", "0.2"]
    assert toy.main(["--out", str(tmp_path / "some"), *args, "--hold-out", "0.5"]) == 0
    assert "225 of 450 combinations of attributes are in none" in capsys.readouterr().out
    listed = (tmp_path / "some/held_out.txt").read_text().splitlines()
    assert {toy_world.parse(c) for c in listed} == toy_world.held_out(0.5)
    shown = {line["caption"].partition(", camera")[0] for line in lines(tmp_path / "some")}
    assert not shown & set(listed)
    assert toy.main(["--out", str(tmp_path / "none"), *args[:4], "--hold-out", "0"]) == 0
    assert not (tmp_path / "none/held_out.txt").exists()
    assert "combinations" not in capsys.readouterr().out


def test_only_held_out_shows_what_other_worlds_never_do(tmp_path, capsys):
    args = ["--videos", "4", "--scenes", "40", "--size", "32", "--pan", "0.2", "--only-held-out"]
    assert toy.main(["--out", str(tmp_path / "held"), *args]) == 0
    assert "of 68 combinations of attributes that are held out of other worlds" in capsys.readouterr().out
    told = [toy_world.parse(line["caption"].partition(", camera")[0]) for line in lines(tmp_path / "held")]
    assert set(told) <= toy_world.held_out(0.15)
    assert len(set(told)) > 50  # of 160 scenes; evenly drawn, 62 are expected
    assert all(a.background != b.background for a, b in pairwise(told[:40]))
    assert {line["pan"] for line in lines(tmp_path / "held")} == {"none", "left", "right"}
    assert toy.main(["--out", str(tmp_path / "few"), *args[:6], "--hold-out", "0", "--only-held-out"]) == 2
    assert "holds out too few to show" in capsys.readouterr().err


def test_questions_are_answered_by_the_truth_and_open_as_conversations(tmp_path):
    out = tmp_path / "asked"
    assert toy.main(["--out", str(out), "--videos", "2", "--scenes", "6", "--size", "32", "--questions"]) == 0
    truths = lines(out)
    asked = json.loads((out / "questions/choices.json").read_text())
    assert len(asked) == 5 * len(truths) == 60
    assert len({q["id"] for q in asked}) == 60
    for truth, five in zip(truths, [asked[i : i + 5] for i in range(0, 60, 5)], strict=True):
        assert {q["kind"]: q["options"][q["answer"]] for q in five} == {
            q["kind"]: truth[q["kind"]] for q in five
        }
        with av.open(str(out / "questions" / five[0]["video"])) as container:
            frames = sum(1 for _ in container.decode(video=0))
        assert frames == truth["end_frame"] - truth["start_frame"]
    kinds = {text: kind for kind, text in questions.QUESTIONS.items()}
    for name in ("chat", "letters"):
        talks = ChatReader(str(out / f"questions/{name}.jsonl"), shuffle=False)
        assert talks.samples == 12
        for row, truth in enumerate(truths):
            sample = talks.read(row)
            assert Path(sample["video"]).is_file()
            turns = list(zip(sample["messages"][::2], sample["messages"][1::2], strict=True))
            assert {kinds[q["content"].partition("\n")[0]] for q, _ in turns} == set(questions.QUESTIONS)
            for question, answer in turns:
                first, _, options = question["content"].partition("\n")
                said = answer["content"]
                assert bool(options) == (name == "letters")
                if options:
                    said = dict(line.split(". ") for line in options.splitlines()[:-1])[said]
                assert said == truth[kinds[first]]
    assert ChatReader(str(out / "questions")).samples == 24  # the folder holds no other .jsonl


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.*") if p.is_file()}


def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            toy.main(["--out", str(tmp_path / name), "--videos", "2", "--scenes", "2", "--seed", seed]) == 0
        )
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a.values()) & set(c.values()) == {a["held_out.txt"]}  # which depends on no seed


def test_more_videos_leave_the_first_as_they_are(tmp_path):
    for name, videos in (("few", 1), ("more", 2)):
        assert toy.main(["--out", str(tmp_path / name), "--videos", str(videos), "--scenes", "2"]) == 0
    few, more = digests(tmp_path / "few"), digests(tmp_path / "more")
    assert few["00000.mp4"] == more["00000.mp4"] != more["00001.mp4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "63"], "--size 63: give an even number"),
        (["--size", "16"], "--size 16: give an even number of pixels, 32 or more"),
        (["--videos", "0"], "--videos 0: give 1 or more"),
        (["--pan", "2"], "--pan 2: give a share from 0 to 1"),
        (["--hold-out", "0.6"], "--hold-out 0.6: give a share from 0 to 0.5"),
        (["--hold-out", "0.001"], "--hold-out 0.001: that is none of the 450 combinations"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_2(options, said, tmp_path, capsys):
    assert toy.main(["--out", str(tmp_path / "x"), *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert toy.main(["--out", str(tmp_path)]) == 2
    assert "give a new or empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_help_shows_the_way_on_without_heavy_imports(capsys):
    with pytest.raises(SystemExit) as end:
        toy.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "clipmill curate toy/videos --recipe toy" in said


def test_a_missing_ffmpeg_is_one_sentence_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPMILL_FFMPEG", "no_such_program")
    assert toy.main(["--out", str(tmp_path / "x"), "--videos", "1", "--scenes", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "clipmill toy: CLIPMILL_FFMPEG=no_such_program is not a program"
    )
