"""Conversations: every line once an epoch and as it was written; a bad line is named before anything is trained."""

import json
import pickle
import tracemalloc

import pytest

from pipeline.faults import StoreError
from pipeline.shards import chat
from pipeline.shards.chat import ChatReader


def said(question, answer, **more):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    } | more


def written(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


@pytest.fixture
def talks(tmp_path):
    """41 conversations in three files without a newline at their end, with empty lines and words of other tongues."""
    written(tmp_path / "a.jsonl", [said(f"a{i}", "ä" * i) for i in range(20)])
    lines = [b"", *(said(f"b{i}", "答" * i, video=f"clips/{i}.mp4", id=i) for i in range(20)), b" ", b""]
    written(tmp_path / "more/b.jsonl", lines)
    written(tmp_path / "more/c.jsonl", [said("c", "c", images=["/data/x.jpg", "s3://y/z.jpg", "w.jpg"])])
    return tmp_path


@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_lines_are_read_as_they_were_written_however_the_file_is_read(talks, monkeypatch, block):
    monkeypatch.setattr(chat, "BLOCK", block)
    reader = ChatReader(str(talks), shuffle=False)
    assert reader.samples == 41
    samples = [reader.nth(n) for n in range(41)]
    assert [s["messages"] for s in samples[:20]] == [said(f"a{i}", "ä" * i)["messages"] for i in range(20)]
    assert [s["messages"] for s in samples[20:40]] == [said(f"b{i}", "答" * i)["messages"] for i in range(20)]
    assert [s["key"] for s in samples[19:22]] == ["a.jsonl:20", "more/b.jsonl:2", "more/b.jsonl:3"]
    assert samples[23]["video"] == f"{talks}/more/clips/3.mp4"
    assert samples[23]["meta"] == {"id": 3}
    assert samples[40]["images"] == ["/data/x.jpg", "s3://y/z.jpg", f"{talks}/more/w.jpg"]
    assert samples[0]["video"] is None
    assert samples[0]["images"] == samples[0]["skipped"] == []


def test_an_epoch_has_every_line_once_in_another_order_each_time(talks):
    reader, again = ChatReader(str(talks), seed=3), ChatReader(str(talks), seed=3)
    epochs = [[reader.nth(41 * e + n)["key"] for n in range(41)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 41
    assert epochs[0] != epochs[1]
    assert [again.nth(n)["key"] for n in range(41)] == epochs[0]
    assert [ChatReader(str(talks), seed=4).nth(n)["key"] for n in range(41)] != epochs[0]
    assert pickle.loads(pickle.dumps(reader)).nth(5)["key"] == epochs[0][5]


def test_what_is_kept_does_not_grow_with_the_text(tmp_path):
    short = written(tmp_path / "short.jsonl", [said("q", "a")] * 500)
    long = written(tmp_path / "long.jsonl", [said("q", "a" * 20_000)] * 500)
    held = []
    for path in (short, long):
        tracemalloc.start()
        reader = ChatReader(str(path))
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert reader.samples == 500
    assert held[1] < held[0] + 20_000


def test_other_words_are_another_identity(talks):
    one = ChatReader(str(talks)).identity()
    assert ChatReader(str(talks), seed=1).identity() == one
    written(talks / "more/c.jsonl", [said("c", "d")])
    assert ChatReader(str(talks)).identity() != one


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"messages": [', r"line 2: it is no JSON \("),
        (b"\xff\xfe", "line 2: it is no JSON"),
        (b"[" * 5000, "line 2: it is no JSON"),
        ({"conversations": []}, 'line 2: it has no "messages"'),
        ({"messages": []}, 'it has no "messages"'),
        (["x"], 'it has no "messages"'),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "message 1 has the role 'human', which is none of",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        (
            b'{"messages": [{"role": "assistant", "content": "a \\ud83d"}]}',
            "message 1 has half of a character",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "images": ["z.jpg"]},
            "no message is the user's",
        ),
        (said("x", "y", images="z.jpg"), '"images" is no list'),
        (said("x", "y", video=["z.mp4"]), '"video" is no path'),
        (said("x", "y", video=""), '"video" is no path'),
        (
            said("<image> x", "y", image="z.jpg"),
            'it has "image", which nothing looks at: give "images", a list',
        ),
        (
            said("<video> x", "y", videos=["z.mp4"]),
            'it has "videos", which nothing looks at: give "video", one',
        ),
        (said("x", "y", images=[""]), '"images" is no list'),
        (
            {"messages": [*said("x", "y")["messages"], {"role": "system", "content": "z"}]},
            "message 3 is the system's",
        ),
    ],
)
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, line, told):
    path = written(tmp_path / "talk.jsonl", [said("x", "y"), line, said("x", "y")])
    with pytest.raises(StoreError, match=told) as e:
        ChatReader(str(path))
    assert str(e.value).startswith(f"{path} line 2: ")
    assert str(e.value).endswith("; mend or delete it")


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(StoreError, match=r"there is no \.jsonl file"):
        ChatReader(str(tmp_path))
    with pytest.raises(StoreError, match=r"nowhere\.jsonl: there is no \.jsonl file"):
        ChatReader(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(StoreError, match="holds no conversation"):
        ChatReader(str(written(tmp_path / "empty.jsonl", [b"", b""])))


def test_a_file_that_changed_since_it_was_opened_is_told(tmp_path):
    path = written(tmp_path / "talk.jsonl", [said("x", "y")] * 3)
    reader = ChatReader(str(path))
    path.write_bytes(b"{" * 300)
    with pytest.raises(StoreError, match=r"line [123]: it is no JSON"):
        reader.nth(0)
