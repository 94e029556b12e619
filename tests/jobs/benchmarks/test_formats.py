"""Folders in the layouts that benchmarks are published in are read; what is missing or wrong is one sentence."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.benchmarks import srt
from jobs.benchmarks.formats import FORMATS, read
from jobs.benchmarks.items import BenchmarkError


def write(path: Path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def videos(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name, "not decoded here")


def items(name: str, folder: Path, wanted: str, split: str | None = None):
    return {item.id: item for item in read(name, folder, wanted, split)[0].items}


# ---------------------------------------------------------------- MSR-VTT


def msrvtt(folder: Path) -> None:
    info = {
        "contributor": "Microsoft MSM group",
        "version": "1.0",
        "year": "2016",
        "data_created": "2016-04-14",
    }
    made = {"category": 9, "url": "https://www.youtube.com/watch?v=x", "start time": 1.0, "end time": 3.5}
    write(
        folder / "train_val_videodatainfo.json",
        {
            "info": info,
            "videos": [
                made | {"id": 0, "video_id": "video0", "split": "train"},
                made | {"id": 6513, "video_id": "video6513", "split": "validate"},
            ],
            "sentences": [
                {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
                {"caption": "a cat plays", "video_id": "video6513", "sen_id": 1},
            ],
        },
    )
    write(
        folder / "test_videodatainfo.json",
        {
            "info": info,
            "videos": [
                made | {"id": 7010, "video_id": "video7010", "split": "test"},
                made | {"id": 10000, "video_id": "video10000", "split": "test"},
            ],
            "sentences": [
                {"caption": "girls cook", "video_id": "video10000", "sen_id": 200},
                {"caption": "a man sings", "video_id": "video7010", "sen_id": 201},
                {"caption": "somebody sings", "video_id": "video7010", "sen_id": 202},
            ],
        },
    )
    write(
        folder / "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\nret0,msr7010,video7010,a man is singing\nret1,msr9771,video9771,a car races\n",
    )
    write(
        folder / "test_qa.json",
        [
            {
                "answer": "sing",
                "category_id": 14,
                "id": 158581,
                "question": "what does a man do?",
                "video_id": 7010,
            }
        ],
    )
    videos(folder, "TrainValVideo/video0.mp4", "TrainValVideo/video6513.mp4")
    videos(folder, "TestVideo/video7010.mp4", "TestVideo/video10000.mp4")


def test_msrvtt_splits_pairs_and_questions(tmp_path):
    msrvtt(tmp_path)
    test = items("msr-vtt", tmp_path, "captions")
    assert list(test) == ["video7010", "video10000"]  # by number
    assert test["video7010"].captions == ("a man sings", "somebody sings")
    assert test["video7010"].video == tmp_path / "TestVideo/video7010.mp4"
    assert list(items("msr-vtt", tmp_path, "captions", "train")) == ["video0"]
    assert list(items("msr-vtt", tmp_path, "captions", "val")) == ["video6513"]
    found, split = read("msr-vtt", tmp_path, "retrieval")
    assert split == "1k-A"
    assert [(i.id, i.captions) for i in found.items] == [("video7010", ("a man is singing",))]
    assert found.missing == ["video9771"]
    assert "Left out, as they are not in the folder: 1 (video9771)" in found.note()
    (asked,) = items("msr-vtt", tmp_path, "questions").values()
    assert (asked.question, asked.answers, asked.group) == ("what does a man do?", ("sing",), ("what",))
    assert asked.video.name == "video7010.mp4"


# ---------------------------------------------------------------- MSVD


NAMES = ["-4wsuPCjDBc_5_15", "zzit5b_-ukg_5_20"]


@pytest.mark.parametrize("form", ["txt", "csv", "pkl"])
def test_msvd_captions_in_each_of_their_forms(tmp_path, form):
    videos(tmp_path, *(f"YouTubeClips/{name}.avi" for name in NAMES))
    write(tmp_path / "test_list.txt", f"{NAMES[1]}\n")
    if form == "txt":
        write(
            tmp_path / "AllVideoDescriptions.txt",
            "# English descriptions of short videos\n# one a line\n\n"
            f"{NAMES[0]} a squirrel is eating a peanut\n{NAMES[1]} a man is singing\n{NAMES[1]} the man sings\n",
        )
    elif form == "csv":
        write(
            tmp_path / "video_corpus.csv",
            "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
            "-4wsuPCjDBc,5,15,1,clean,16,English,a squirrel is eating a peanut\n"
            "zzit5b_-ukg,5,20,2,clean,16,English,a man is singing\n"
            "zzit5b_-ukg,5,20,2,clean,16,German,ein Mann singt\n"
            "zzit5b_-ukg,5,20,2,unverified,9,English,the man sings\n",
        )
    else:
        told = {
            NAMES[0]: [["a", "squirrel"]],
            NAMES[1]: [["a", "man", "is", "singing"], ["the", "man", "sings"]],
        }
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(told))
    (item,) = items("msvd", tmp_path, "captions").values()
    assert (item.id, item.captions) == (NAMES[1], ("a man is singing", "the man sings"))
    assert len(items("msvd", tmp_path, "captions", "all")) == 2


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write(tmp_path / "test_list.txt", f"{NAMES[1]}\n")
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({NAMES[1]: Evil()}))
    with pytest.raises(BenchmarkError, match="is no pickle of captions"):
        items("msvd", tmp_path, "captions")
    assert not (tmp_path / "ran").exists()


def test_msvd_questions_go_by_the_mapping_of_numbers(tmp_path):
    videos(tmp_path, f"{NAMES[0]}.avi")
    write(tmp_path / "youtube_mapping.txt", f"{NAMES[0]} vid1\n{NAMES[1]} vid1970\n")
    write(
        tmp_path / "test_qa.json",
        [
            {"answer": "squirrel", "id": 30933, "question": "who eats a peanut?", "video_id": 1},
            {"answer": "man", "id": 30934, "question": "who sings?", "video_id": 1970},
        ],
    )
    found, _ = read("msvd", tmp_path, "questions")
    assert [(i.id, i.answers, i.group) for i in found.items] == [("30933", ("squirrel",), ("who",))]
    assert found.missing == [NAMES[1]]


# ---------------------------------------------------------------- ActivityNet


def test_activitynet_stretches_paragraphs_and_questions(tmp_path):
    videos(tmp_path, "v_bXdq2zI1Ms0.mp4", "v_FsS_NCZEfaI.mkv")
    write(
        tmp_path / "val_1.json",
        {
            "v_bXdq2zI1Ms0": {
                "duration": 73.1,
                "timestamps": [[6.94, 69.08], [73.8, 43.5]],  # beyond the end, and the wrong way round
                "sentences": [" A man is seen.", " He talks."],
            },
            "v_gone": {"duration": 3.0, "timestamps": [[0, 1]], "sentences": ["Nothing."]},
        },
    )
    found, _ = read("activitynet", tmp_path, "captions")
    assert [(i.id, i.captions, i.span) for i in found.items] == [
        ("v_bXdq2zI1Ms0:0", ("A man is seen.",), (6.94, 69.08)),
        ("v_bXdq2zI1Ms0:1", ("He talks.",), (43.5, 73.1)),
    ]
    assert found.missing == ["v_gone"]
    (whole,) = items("activitynet", tmp_path, "retrieval").values()
    assert (whole.captions, whole.span) == (("A man is seen. He talks.",), None)
    write(
        tmp_path / "test_q.json",
        [
            {"video_name": "FsS_NCZEfaI", "question": "is he young", "question_id": "q_1"},
            {"video_name": "FsS_NCZEfaI", "question": "what happens", "question_id": "q_2"},
        ],
    )
    write(
        tmp_path / "test_a.json",
        [
            {"answer": "yes", "type": 3, "question_id": "q_1"},
            {"answer": "he falls", "type": 0, "question_id": "q_2"},
        ],
    )
    asked = items("activitynet", tmp_path, "questions")
    assert asked["q_1"].group == ("free", "yes/no")
    assert (asked["q_2"].group, asked["q_2"].answers) == (("motion",), ("he falls",))
    assert asked["q_1"].video.suffix == ".mkv"


# ---------------------------------------------------------------- VATEX, NExT-QA, Video-MME


def test_vatex_english_captions(tmp_path):
    name = "G9zN5TTuGO4_000179_000189"
    videos(tmp_path, f"val/{name}.mp4")
    write(
        tmp_path / "vatex_validation_v1.0.json",
        [{"videoID": name, "enCap": ["A man swims.", "Somebody swims."], "chCap": ["一个人在游泳。"]}],
    )
    (item,) = items("vatex", tmp_path, "captions").values()
    assert (item.id, item.captions) == (name, ("A man swims.", "Somebody swims."))


def test_nextqa_multiple_choice_and_open(tmp_path):
    videos(tmp_path, "NExTVideo/1164/4010069381.mp4")
    write(
        tmp_path / "nextqa/val.csv",
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        '4010069381,369,640,480,how do they play the instrument,0,6,CH,roll the handle,"tap, feet",strum,hit,p\n',
    )
    (item,) = items("next-qa", tmp_path, "questions").values()
    assert (item.id, item.answer, item.group) == ("4010069381_6", 0, ("causal", "CH"))
    assert item.options == ("roll the handle", "tap, feet", "strum", "hit", "p")
    write(
        tmp_path / "nextqa/test.csv",
        "video,frame_count,width,height,question,answer,qid,type\n"
        "4010069381,369,640,480,what are the people doing in the video,performing,9,TC\n",
    )
    write(tmp_path / "nextqa/add_reference_answer_test.json", {"4010069381": {"9": "play music"}})
    (item,) = items("next-qa", tmp_path, "questions", "test").values()
    assert (item.options, item.answers, item.group) == ((), ("performing", "play music"), ("temporal", "TC"))


def test_videomme_table(tmp_path):
    videos(tmp_path, "data/fFjv93ACGo8.mp4")
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many bells are there?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."],
        "answer": "C",
    }
    (tmp_path / "videomme").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "videomme/test-00000-of-00001.parquet")
    (item,) = items("video-mme", tmp_path, "questions").values()
    assert item.options[item.answer] == "Berries."
    assert item.options[3] == "The three kinds are of the same number."
    assert item.group == ("short", "Knowledge", "Counting Problem")
    assert item.subtitles is None
    write(tmp_path / "subtitle/fFjv93ACGo8.srt", SRT)
    (item,) = items("video-mme", tmp_path, "questions").values()
    assert item.subtitles == tmp_path / "subtitle/fFjv93ACGo8.srt"


SRT = (
    "\ufeff1\r\n00:00:01,500 --> 00:00:03,000\r\n"
    '<font color="white" size=".72c">Hi guys, I\'m going</font>\r\n\r\n'
    "2\r\n00:00:02.000 --> 00:00:04.25\r\nto show\r\nyou 3 \r\n\r\n"
    "3\r\n01:00:00,000 --> 01:00:09,000\r\n\r\n"
    "4\r\n01:00:10,000 --> 01:00:12,000\r\n12\r\n"
)


def test_subtitles_are_read_as_they_are_shown(tmp_path):
    file = tmp_path / "a.srt"
    file.write_text(SRT, encoding="utf-8", newline="")
    cues = srt.read(file)
    assert cues == [(1.5, 3.0, "Hi guys, I'm going"), (2.0, 4.25, "to show you 3"), (3610.0, 3612.0, "12")]
    assert srt.shown_at(cues, [0.0, 1.4]) == []
    assert srt.shown_at(cues, [1.5, 2.5, 2.9]) == ["Hi guys, I'm going", "to show you 3"]
    assert srt.shown_at(cues, [3.0, 3611.0]) == ["to show you 3", "12"]
    line = "00:00:01,000 --> 00:00:02,000"
    written = {
        f"1\n{line}\n<i>3 < 5</i> and 7 > 6{{\\an8}}\n": ["3 < 5 and 7 > 6"],  # no tag
        f"{line}\nIt is\n1984\n\n{line}\nnow\n": ["It is 1984", "now"],  # nothing is numbered
        f"1\r{line}\rhé\r\r2\r{line}\r\r": ["hé"],
    }
    for text, said in written.items():
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            file.write_bytes(text.encode(encoding))
            assert [cue.text for cue in srt.read(file)] == said
    file.write_text("nonsense")
    with pytest.raises(BenchmarkError, match="holds no subtitles"):
        srt.read(file)


def test_questions_of_ones_own_with_and_without_options(tmp_path):
    videos(tmp_path, "scenes/a.mp4")
    write(
        tmp_path / "choices.json",
        [
            {
                "id": 1,
                "video": "scenes/a.mp4",
                "question": "Which?",
                "options": ["x", "y"],
                "answer": 1,
                "kind": "k",
            },
            {"id": 2, "video": "scenes/a.mp4", "question": "What?", "answer": ["a", "b"]},
            {"id": 3, "video": "scenes/gone.mp4", "question": "What?", "answer": "a"},
        ],
    )
    found, _ = read("questions", tmp_path, "questions")
    choice, open_one = found.items
    assert (choice.answer, choice.group, open_one.answers) == (1, ("k",), ("a", "b"))
    assert found.missing == ["scenes/gone.mp4"]


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("name", "wanted", "split", "files", "said"),
    [
        ("msr-vtt", "captions", None, {}, "there is no *videodatainfo*.json of MSR-VTT"),
        ("msr-vtt", "captions", "dev", {}, "--split dev: give one of train, val, test, 1k-A"),
        (
            "vatex",
            "questions",
            None,
            {},
            "--format vatex has no questions: formats that have are msr-vtt, msvd",
        ),
        ("vatex", "captions", None, {"vatex_validation_v1.0.json": "[{"}, "cannot be read as JSON"),
        ("vatex", "captions", None, {"vatex_validation_v1.0.json": '[{"id": 1}]'}, "without 'videoID'"),
        (
            "vatex",
            "captions",
            None,
            {"vatex_validation_v1.0.json": '[{"videoID": "x_1_2", "enCap": ["A."]}]'},
            "holds none of its videos (x_1_2.mp4, …)",
        ),
        ("next-qa", "questions", None, {"val.csv": "a,b\n1,2\n"}, "has no column 'video'"),
        ("video-mme", "questions", None, {"test-0.parquet": "nonsense"}, "is not Video-MME's table"),
        ("questions", "questions", None, {}, "has no choices.json of questions"),
        (
            "questions",
            "questions",
            None,
            {"choices.json": '[{"id": 1, "video": "a", "question": "?", "options": ["x"], "answer": 4}]'},
            "has the answer 4, which is no place in its options",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, name, wanted, split, files, said):
    for file, text in files.items():
        write(tmp_path / file, text)
    with pytest.raises(BenchmarkError) as e:
        read(name, tmp_path, wanted, split)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_every_format_says_what_is_missing_in_an_empty_folder(tmp_path):
    for name, known in FORMATS.items():
        for wanted in known.of:
            with pytest.raises(BenchmarkError):
                read(name, tmp_path, wanted)
