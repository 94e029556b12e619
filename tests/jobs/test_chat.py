"""clipmill chat: several turns about videos and pictures, in a terminal and in scripts."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import chat
from jobs.training.vlm.speaker import Speaker, load_speaker
from jobs.videos import write_mp4
from tests.fixtures import tiny_speaker


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_speaker.export(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("seen")
    rng = np.random.default_rng(0)
    write_mp4(folder / "clip.mp4", rng.integers(0, 255, (8, 32, 32, 3), np.uint8), 8)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "picture.png")
    return folder / "clip.mp4", folder / "picture.png"


@pytest.fixture
def asked(monkeypatch) -> list:
    """Conversations and visuals that the model was given."""
    given: list = []
    real = Speaker.answer

    def answer(self, conversations, visuals, **more):
        given.append(([dict(m) for m in conversations[0]], list(visuals[0])))
        return real(self, conversations, visuals, **more)

    monkeypatch.setattr(Speaker, "answer", answer)
    return given


def test_one_question_is_answered_on_a_line_as_the_model_answers(model, files, capsys):
    clip, _ = files
    assert chat.main([str(model), "--video", str(clip), "--ask", "What moves?", "--device", "cpu"]) == 0
    speaker = load_speaker(model)
    talk = [{"role": "user", "content": "<video>\nWhat moves?"}]
    assert capsys.readouterr().out == speaker.answer([talk], [[speaker.frames(str(clip))]])[0] + "\n"


def test_turns_follow_each_other_and_pictures_stay_where_they_were_shown(
    model, files, capsys, asked, monkeypatch
):
    clip, picture = files
    said = f"What moves?\n\nWhich way?\n/image {picture}\nAnd <image> here?\n/new\nOnce more?\n/quit\nnever asked\n"
    talk = chat.begin(_args(model, clip))
    chat.converse(talk, said.splitlines())
    first, second, third, anew = asked
    assert [m["role"] for m in third[0]] == ["user", "assistant", "user", "assistant", "user"]
    assert first[0][0]["content"] == "<video>\nWhat moves?"
    assert second[0][:1] == first[0]
    assert second[0][2]["content"] == "Which way?"
    assert third[0][4]["content"] == "<image>\nAnd   here?"  # what is typed shows nothing
    assert [len(v.frames) for v in third[1]] == [3, 1]
    assert anew[0] == [{"role": "user", "content": "<video>\nOnce more?"}]
    assert len(anew[1]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "/help says what can be typed"
    assert printed[1] == second[0][1]["content"]


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(model, files, capsys, asked):
    clip, _ = files
    talk = chat.begin(_args(model, clip))
    chat.converse(talk, ["/video nowhere.mp4", "/image", "/dance", "/help", "Still there?"])
    out = capsys.readouterr().out
    assert "nowhere.mp4: give a file, /video FILE" in out
    assert "no file: give a file, /image FILE" in out
    assert "/dance is no command; /help lists them" in out
    assert "/new           forget what was said" in out
    assert len(asked) == 1


def test_lines_of_a_pipe_are_turns_of_one_conversation(model, files, capsys, asked, monkeypatch):
    clip, _ = files
    monkeypatch.setattr(sys, "stdin", io.StringIO("What moves?\n\nWhich way?\n"))
    assert chat.main([str(model), "--video", str(clip), "--device", "cpu"]) == 0
    assert len(asked) == 2
    assert len(asked[1][0]) == 3
    assert capsys.readouterr().out.count("\n") == 2


def test_the_seed_decides_what_is_drawn(model, files):
    clip, _ = files
    said = []
    for seed in (1, 1, 2):
        talk = chat.begin(_args(model, clip, temperature=3.0, seed=seed))
        said.append([talk.ask("What?"), talk.ask("What?")])
    assert said[0] == said[1]
    assert said[0] != said[2]


def _args(model: Path, clip: Path, **more):
    import argparse

    given = {
        "model": str(model),
        "video": [str(clip)],
        "image": [],
        "frames": None,
        "fps": None,
        "most": None,
        "locate": [],
        "out": Path(),
    }
    return argparse.Namespace(**given | {"temperature": 0.0, "seed": 0, "device": "cpu"} | more)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4 is no file: give a video or picture"),
        (["--frames", "0"], "--frames 0: give 1 or more"),
        (["--temperature", "-1"], "--temperature -1: give 0 or more"),
        (["--video", __file__], "is no video that can be read"),
        (["--image", __file__], "is no image that can be read"),
        (["--out", __file__], "test_chat.py is a file: give a folder"),
        (["--locate", "vq.path=."], "is no world model, which alone has parts elsewhere: leave it out"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_2(model, capsys, arguments, said):
    assert chat.main([str(model), *arguments, "--ask", "What?", "--device", "cpu"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1]
    assert "Traceback" not in "".join(err)


def test_a_folder_without_a_model_is_one_sentence(tmp_path, capsys):
    assert chat.main([str(tmp_path), "--ask", "What?", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("clipmill chat: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "broken", ["model.safetensors", "config.json", "clipmill.json", "tokenizer.json", "processor_config.json"]
)
def test_half_a_copy_of_a_model_is_one_sentence(model, tmp_path, capsys, broken):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    (half / broken).write_bytes((half / broken).read_bytes()[:20])
    assert chat.main([str(half), "--ask", "x"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert str(half) in err[0]
