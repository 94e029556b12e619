"""The captioner and the judge that ask a server: what is sent, what is kept, what is made of the answer."""

from __future__ import annotations

import base64
import json
import math
import threading
from collections import Counter
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest

from pipeline import recipe
from pipeline.caption import answers
from pipeline.caption.captioner import CaptionStage
from pipeline.caption.judge import JudgeStage
from pipeline.faults import WorkerFault
from pipeline.io.store import Store
from pipeline.record import Caption, Media
from tests.fixtures.chat_server import KEY, ChatServer, Trouble, completion, describe
from tests.fixtures.clips import noise, video


@pytest.fixture
def server():
    with ChatServer() as found:
        yield found


def section(server, **values):
    values = {"kind": "served", "url": server.url, "model": "org/m"} | values
    return recipe.parse({"name": "x", "captions": [values]}, [], "x").captions[0]


def stage(server, store=None, **values):
    made = CaptionStage(section(server, **values), None, store)
    made.setup()
    made.captioner.asks.client.sleep = lambda seconds, stop: None
    return made


def clips(n=3, name="a.mp4"):
    return video(
        [noise(crc32(name.encode()) + i) for i in range(4 * n)],
        [(4 * i, 4 * i + 4) for i in range(n)],
        name=name,
    )


def captions(videos):
    return [c.captions[0] for v in videos for c in v.clips]


def shown(body):
    return [p for p in body["messages"][0]["content"] if p["type"] != "text"]


def words(body):
    return body["messages"][0]["content"][-1]["text"]


# ---------------------------------------------------------------- what is sent


def test_frames_are_sent_in_order_as_they_are_with_their_times_and_the_prompt(server):
    v = clips(2)
    stage(server, prompt="Say it.", parameters={"max_tokens": 9, "seed": 4})([v])
    by_frame = {s.jpeg: s.frame for s in v.frames.samples}
    for body in server.bodies:
        sent = [
            base64.b64decode(p["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
            for p in shown(body)
        ]
        frames = [by_frame[j] for j in sent]
        assert len(frames) == 4
        assert all(b == a + 1 for a, b in pairwise(frames))
        assert (
            words(body)
            == "These 4 frames of one video of 2.0 seconds are shown at 0.0, 0.5, 1.0, 1.5 seconds.\nSay it."
        )
        assert {k: v for k, v in body.items() if k != "messages"} == {
            "model": "org/m",
            "max_tokens": 9,
            "seed": 4,
        }


def test_no_field_is_sent_that_the_recipe_does_not_list(server):
    stage(server)([clips(1)])
    assert set(server.bodies[0]) == {"model", "messages"}
    assert set(server.bodies[0]["messages"][0]) == {"role", "content"}
    assert all(set(p) == {"type", p["type"]} for p in server.bodies[0]["messages"][0]["content"])
    assert set(shown(server.bodies[0])[0]["image_url"]) == {"url"}


def test_jpegs_go_as_a_video_whose_exact_times_are_told_in_a_field(server):
    server.fields.add("media_io_kwargs")
    v = clips(1)
    v.frames.pts += np.array([0, 7, 3, 31])  # variable frame rate: 100 ticks are half a second
    stage(server, input="jpegs", frames=3)([v])
    (part,) = shown(server.bodies[0])
    jpegs = part["video_url"]["url"].removeprefix("data:video/jpeg;base64,").split(",")
    said = server.bodies[0]["media_io_kwargs"]["video"]
    assert len(jpegs) == 3
    by_frame = {s.jpeg: s.frame for s in v.frames.samples}
    times = [i / said["fps"] for i in said["frames_indices"]]
    assert times == pytest.approx(
        [v.time_of(by_frame[base64.b64decode(j)]) - v.clips[0].start_s for j in jpegs], abs=5e-4
    )
    assert said["num_frames"] == -1
    assert said["do_sample_frames"] is False
    assert said["total_num_frames"] > max(said["frames_indices"])


def test_the_mp4_of_the_clip_is_sent_byte_for_byte(server, tmp_path):
    store = Store(str(tmp_path))
    data = bytes(range(256)) * 9
    store.write_bytes("media/u.tar", b"head" + data + b"tail")
    v = clips(1)
    import hashlib

    v.clips[0].media = Media("media/u.tar", 4, len(data), hashlib.sha256(data).hexdigest(), 64, 48)
    stage(server, store, input="video")([v])
    url = shown(server.bodies[0])[0]["video_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:video/mp4;base64,")) == data


def test_what_the_list_says_is_told_where_the_recipe_lets_it(server):
    v = clips(1)
    v.source.meta["title"] = "Harbour"
    stage(server)([v])
    stage(server, context=True, name="with")([v])
    assert ["Harbour" in words(b) for b in server.bodies] == [False, True]


# ---------------------------------------------------------------- what is made of the answer


def test_clips_of_all_sources_are_asked_about_at_once_and_keep_their_places(server):
    six = threading.Barrier(6, timeout=60)  # nobody is answered before six have asked

    def says(body):
        six.wait()
        return describe(body)

    server.says = says
    videos = [clips(1, f"{n}.mp4") for n in range(12)]
    asks = stage(server, concurrency=6)
    asks(videos)
    assert server.most == 6
    together = [c.text for c in captions(videos)]
    assert len(set(together)) == 12
    with ChatServer() as alone:
        one = stage(alone, concurrency=1, batch=1)
        for v in videos:
            one([v])
        assert [c.text for c in captions(videos)] == together
        assert alone.most == 1


@pytest.mark.parametrize(
    ("said", "text", "outcome"),
    [
        ("  A street. ", "A street.", "ok"),
        ("", "", "empty"),
        (None, "", "empty"),
        ("<think>hm, a car?</think>\nA car.", "A car.", "ok"),
        ("hm, a car?</think>A car.", "A car.", "ok"),
        ("<think>I wonder", "", "empty"),
        ([{"type": "text", "text": "A "}, {"type": "text", "text": "car."}], "A car.", "ok"),
        (["A ", {"type": "text", "text": None}, {"type": "image", "text": 5}, None, "car."], "A car.", "ok"),
        (5, "5", "ok"),
        ("half \ud800 a sign", "half ? a sign", "ok"),
    ],
)
def test_answers_become_captions(server, said, text, outcome):
    server.says = lambda body: (
        completion("x", body, reasoning="I think", reasoning_content="so")
        | {
            "choices": [
                {"finish_reason": "stop", "message": {"content": said, "reasoning_content": "thoughts"}}
            ]
        }
    )
    v = clips(1)
    stage(server)([v])
    (c,) = captions([v])
    assert (c.text, c.outcome) == (text, outcome)


def test_an_answer_that_breaks_off_is_truncated_and_a_refusal_is_flagged(server):
    server.says = lambda body: completion("A long", body, finish="length")
    v = clips(1)
    stage(server)([v])
    assert captions([v])[0].outcome == "truncated"
    server.says = lambda body: completion("<think>I wonder", body, finish="length")
    stage(server)([v])
    c = captions([v])[0]
    assert (c.text, c.outcome, c.raw) == ("", "truncated", "<think>I wonder")
    assert c.reason == "it was cut off before it said anything: raise parameters.max_tokens"
    server.says = lambda body: completion("", body, refusal="I cannot do that.")
    stage(server)([v])
    c = captions([v])[0]
    assert (c.text, c.outcome, c.raw) == ("", "empty", "I cannot do that.")
    assert "refusal" in c.flags


def test_a_clip_that_is_refused_is_an_error_of_its_own_with_the_servers_words(server):
    server.troubles = [Trouble(), Trouble(422, {"detail": "too many pixels"}), Trouble()]
    v = clips(3)
    asks = stage(server, concurrency=1)
    asks([v])
    assert [c.outcome for c in captions([v])] == ["ok", "error", "ok"]
    assert captions([v])[1].reason.endswith("HTTP 422: too many pixels")
    assert len(server.bodies) == 3  # the others were not asked again to find the culprit
    assert len(v.warnings) == 1


def test_an_unknown_field_is_refused_once_and_for_all(server):
    v = clips(2)
    stage(server, parameters={"top_k": 3})([v])
    assert {c.reason.partition(": ")[2] for c in captions([v])} == {
        "HTTP 422: Unexpected fields in the request: ['top_k']"
    }
    assert len(server.bodies) == 2


def test_a_server_without_the_model_ends_the_work(server):
    server.troubles = [Trouble(404, {"error": {"message": "The model does not exist"}})]
    with pytest.raises(WorkerFault, match=r"has no 'org/m' for us .*The model does not exist"):
        stage(server, concurrency=1)([clips(2)])


def test_tokens_and_price_are_with_the_caption(server):
    v = clips(2)
    stage(server, usd_in=2.0, usd_out=10.0)([v])
    costs = [c.cost for c in captions([v])]
    assert sum(c["prompt_tokens"] for c in costs) == server.tokens[0] == 2 * 410
    assert sum(c["completion_tokens"] for c in costs) == server.tokens[1]
    for c in costs:
        assert c["usd"] == pytest.approx((c["prompt_tokens"] * 2 + c["completion_tokens"] * 10) / 1e6)
        assert c["requests"] == 1


# ---------------------------------------------------------------- never paid twice


def test_what_is_answered_is_asked_no_more_wherever_the_server_is(server, tmp_path):
    store = Store(str(tmp_path))
    v = clips(5)
    stage(server, store)([v])
    before = captions([v])
    with ChatServer(lambda body: "something else") as other:
        stage(other, store, concurrency=2, timeout_s=5, tries=2)([v])
        assert not other.bodies
    assert captions([v]) == before
    assert len(server.bodies) == 5
    account = answers.account(store, set())
    assert account["requests"] == 5
    assert account["prompt_tokens"] == server.tokens[0]
    assert account["completion_tokens"] == server.tokens[1]
    assert answers.account(store, answers.stored(store))["requests"] == 0


def test_another_prompt_parameter_model_frame_or_clip_is_another_question(server, tmp_path):
    store = Store(str(tmp_path))
    v = clips(1)
    server.fields.add("top_p")
    for more in ({}, {"prompt": "Say it."}, {"parameters": {"seed": 1}}, {"parameters": {"seed": 2}}, {"frames": 2},
                 {"model": "org/m2"}, {"parameters": {"top_p": 1, "seed": 1}}):  # fmt: skip
        stage(server, store, **more)([v])
    assert len(server.bodies) == 7
    v.frames.samples[0].jpeg = v.frames.samples[1].jpeg
    stage(server, store)([v])
    assert len(server.bodies) == 8
    body = server.bodies[-1]
    assert answers.key("a", body) != answers.key("b", body)
    assert answers.key("a", body) == answers.key("a", json.loads(json.dumps(body)))


@pytest.mark.parametrize("harm", ["truncated", "empty", "other", "none"])
def test_a_damaged_answer_is_asked_again(server, tmp_path, harm):
    store = Store(str(tmp_path))
    v = clips(2)
    stage(server, store)([v])
    before = captions([v])
    names = sorted(answers.stored(store))
    path = tmp_path / names[0]
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[:-20], "empty": b"", "other": data.replace(b"street", b"strait"), "none": data}[
            harm
        ]
    )
    stage(server, store)([v])
    assert len(server.bodies) == 2 + (harm != "none")
    assert captions([v]) == before
    assert answers.unsealed(path.read_bytes(), "answer")


def test_an_answer_is_stored_before_it_is_used(server, tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    asks = stage(server, store)
    there = []
    monkeypatch.setattr(
        answers, "read", lambda said, options: there.append(len(answers.stored(store))) or 1 / 0
    )
    v = clips(1)
    asks([v])
    assert captions([v])[0].outcome == "error"
    assert there[0] == 1


def test_what_one_clip_fails_on_does_not_cost_the_others(server, tmp_path):
    store = Store(str(tmp_path))
    server.troubles = [Trouble(), Trouble(400, "no"), Trouble(), Trouble(400, "no")]
    v = clips(4)
    stage(server, store, concurrency=1)([v])
    stage(server, store, concurrency=1)([v])  # as --retry-errors would
    assert all(c.outcome == "ok" for c in captions([v]))
    assert sum(server.answered.values()) == 4
    assert max(server.answered.values()) == 1


def test_the_key_is_in_no_file(server, tmp_path, monkeypatch):
    server.key = KEY
    server.says = lambda body: f"You are {KEY}."
    monkeypatch.setenv("MY_KEY", KEY)
    v = clips(2)
    stage(server, Store(str(tmp_path)), key_env="MY_KEY")([v])
    assert [c.outcome for c in captions([v])] == ["ok", "ok"]
    assert KEY not in str(captions([v]))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_a_model_called_like_a_way_out_stays_in_the_folder(server, tmp_path):
    store = Store(str(tmp_path / "run"))
    for model in ("../../up", "/etc/x", "..", ".hidden"):
        stage(server, store, model=model, name="x")([clips(1)])
    assert len(answers.stored(store)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- structured


RECORD = {
    "subjects": [{"appearance": "a red tram", "action": "leaving", "position": "on the left"}],
    "action": "a tram leaves the stop",
    "scene": "a wide street",
    "style": "live action",
    "shot": "a long shot",
    "lighting": "overcast",
    "camera": "the camera spins wildly",
}


def said_json(*texts):
    """Each request gets the next of the texts, then the last again."""
    left = list(texts)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_a_structured_caption_is_the_record_in_words_with_the_measured_camera(server):
    server.says = said_json(f"<think>so</think>```json\n{json.dumps(RECORD)}\n```")
    v = clips(1)
    v.clips[0].scores = {"pan_x": 0.1, "pan_y": 0.0, "zoom": 0.0}
    stage(server, structured=True)([v])
    (c,) = captions([v])
    assert c.text == (
        "A tram leaves the stop. A red tram, leaving, on the left. A wide street. Live action. A long shot. Overcast. "
        "The camera pans to the right."
    )
    assert c.outcome == "ok"
    assert json.loads(c.raw.partition("```json")[2].strip("`\n")) == RECORD
    assert '"required"' in words(server.bodies[0])
    assert "response_format" not in server.bodies[0]


def test_the_schema_is_sent_to_servers_that_are_said_to_hold_to_it(server):
    server.fields.add("response_format")
    server.says = said_json(json.dumps(RECORD))
    stage(server, structured=True, enforce=True)([clips(1)])
    sent = server.bodies[0]["response_format"]
    assert sent["type"] == "json_schema"
    import jsonschema

    schema = sent["json_schema"]["schema"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(RECORD, schema)


@pytest.mark.parametrize("broken", ['{"subjects": [', "A tram.", json.dumps(RECORD | {"mood": "x"}), "[1]"])
def test_broken_json_gets_one_try_to_be_mended_and_both_answers_are_paid_once(server, tmp_path, broken):
    store = Store(str(tmp_path))
    server.says = said_json(broken, json.dumps(RECORD))
    v = clips(1)
    stage(server, store, structured=True)([v])
    (c,) = captions([v])
    assert c.outcome == "ok"
    assert c.cost["requests"] == 2
    assert c.cost["completion_tokens"] == server.tokens[1]
    first, second = server.bodies
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1] == {"role": "assistant", "content": broken}
    assert second["messages"][2]["content"].startswith("This is not the JSON object asked for: ")
    stage(server, store, structured=True)([v])
    assert len(server.bodies) == 2
    assert captions([v]) == [c]


def test_json_that_stays_broken_is_flagged_empty_and_not_asked_for_again(server, tmp_path):
    server.says = said_json("no", "never")
    v = clips(1)
    for _ in range(2):
        stage(server, Store(str(tmp_path)), structured=True)([v])
        (c,) = captions([v])
        assert (c.text, c.outcome, c.raw) == ("", "empty", "never")
        assert "broken_json" in c.flags
    assert len(server.bodies) == 2


# ---------------------------------------------------------------- fusion


def told(v, *said):
    for clip in v.clips:
        clip.captions = [Caption(model, text) for model, text in said]
    return v


def fused(server, store=None, **values):
    return stage(server, store, kind="fuse", model="llm", name="fused", **values)


def test_several_captions_become_one_that_says_whose_they_are(server):
    server.says = lambda body: "A red tram leaves."
    v = told(clips(1), ("a", "A tram."), ("b", "Something red."), ("c", ""))
    v.clips[0].scores = {"pan_x": 0.1, "pan_y": 0.0, "zoom": 0.0}
    fused(server)([v])
    c = v.clips[0].captions[-1]
    assert (c.model, c.text, c.made_from) == ("fused", "A red tram leaves.", ["a", "b"])
    asked = server.bodies[0]["messages"][0]["content"]
    assert asked.endswith("1. A tram.\n2. Something red.")
    assert "the camera pans to the right" in asked
    assert "Something red" not in c.prompt
    fused(server)([v])
    assert [c.model for c in v.clips[0].captions] == ["a", "b", "c", "fused"]
    assert v.clips[0].captions[-1].made_from == ["a", "b"]


def test_only_those_named_are_fused_and_what_is_flagged_is_not(server):
    v = told(clips(1), ("a", "A tram."), ("b", "I cannot see."), ("c", "A red one."))
    v.clips[0].captions[1].flags = ["refusal"]
    fused(server, of=["c", "b"])([v])
    assert v.clips[0].captions[-1].made_from == ["c"]
    fused(server, of=["c", "x"])([v])
    failed = v.clips[0].captions[-1]
    assert failed.outcome == "error"
    assert failed.reason.endswith("no caption of 'x'; its captioners so far: a, b, c")


def test_fields_of_a_structured_caption_become_prose(server):
    v = told(clips(1), ("a", "A tram."), ("s", "A tram leaves."))
    v.clips[0].captions[1].raw = json.dumps(RECORD)
    fused(server, fields=True)([v])
    assert v.clips[0].captions[-1].made_from == ["s"]
    assert json.dumps(RECORD) in server.bodies[0]["messages"][0]["content"]


def test_where_nobody_says_anything_nobody_is_asked(server):
    v = told(clips(1), ("a", ""))
    fused(server)([v])
    assert v.clips[0].captions[-1].outcome == "empty"
    assert not server.bodies


def test_a_prompt_without_a_place_for_the_captions_is_refused(server):
    with pytest.raises(recipe.RecipeError, match=r"has no \{captions\}"):
        section(server, kind="fuse", prompt="Fuse it.")


# ---------------------------------------------------------------- the judge


def judge(server, store=None, **values):
    values = {"kind": "served_yes", "url": server.url, "model": "m"} | values
    parsed = recipe.parse(
        {"name": "x", "captions": [], "choose": {"judges": [values]}}, [], "x"
    ).choose.judges[0]
    made = JudgeStage(parsed, store)
    made.setup()
    return made


def logprobs(**tokens):
    """A response that gives each token a probability."""
    listed = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]

    def says(body):
        said = completion(listed[0]["token"], body)
        said["choices"][0]["logprobs"] = {"content": [listed[0] | {"top_logprobs": listed}]}
        return said

    return says


def test_p_yes_is_the_share_of_yes_however_it_is_spelt(server, tmp_path):
    server.fields |= {"logprobs", "top_logprobs"}
    server.says = logprobs(**{"Yes": 0.5, " yes": 0.1, "No": 0.15, "▁NO": 0.05, "Maybe": 0.2})
    v = told(clips(2), ("a", "A tram."), ("b", ""), ("c", "A car."))
    for _ in range(2):
        judge(server, Store(str(tmp_path)))([v])
        for clip in v.clips:
            assert [c.scores.get("served_yes") for c in clip.captions] == [0.75, None, 0.75]
    asked = Counter(words(b).partition("\n")[2] for b in server.bodies)
    question = 'Does this show "{}"? Please answer yes or no.'
    assert asked == {"": 1, question.format("A tram."): 2, question.format("A car."): 2}
    assert {(b["max_tokens"], b["temperature"], b["logprobs"]) for b in server.bodies} == {(1, 0.0, True)}


def test_each_sentence_is_judged_where_that_is_asked_for(server):
    server.fields |= {"logprobs", "top_logprobs"}
    yes, no = logprobs(Yes=0.9, No=0.1), logprobs(No=0.8, Yes=0.2)
    server.says = lambda body: no(body) if '"It flies."' in words(body) else yes(body)
    v = told(clips(1), ("a", "A tram leaves. It flies."))
    judge(server, sentences=True)([v])
    assert v.clips[0].captions[0].support["served_yes"] == pytest.approx([0.9, 0.2])


def test_a_server_without_logprobs_is_told_before_any_work(server):
    server.fields |= {"logprobs", "top_logprobs"}
    with pytest.raises(
        recipe.RecipeError, match=r"gives no logprobs, which this judge reads .*serve the model by vLLM"
    ):
        judge(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "odd", [[5], {"content": [5]}, {"content": [{"token": "Yes"}]}, {"content": [{"token": "Yes", "logprob": None}]},
            {"content": [{"token": None, "logprob": math.nan, "top_logprobs": None}]}],
)  # fmt: skip
def test_odd_logprobs_are_no_score(server, odd):
    server.fields |= {"logprobs", "top_logprobs"}
    fine, asked = logprobs(Yes=1.0), []

    def says(body):
        asked.append(body)
        said = fine(body)
        if len(asked) > 1:
            said["choices"][0]["logprobs"] = odd
        return said

    server.says = says
    v = told(clips(1), ("a", "A tram."))
    judge(server)([v])
    assert v.clips[0].captions[0].scores == {}
    assert v.warnings == []


def test_neither_yes_nor_no_is_no_score(server):
    server.fields |= {"logprobs", "top_logprobs"}
    server.says = logprobs(Well=1.0)
    v = told(clips(1), ("a", "A tram."))
    judge(server)([v])
    assert v.clips[0].captions[0].scores == {}


# ---------------------------------------------------------------- the recipe


def test_where_the_server_is_and_how_fast_it_is_asked_are_free_on_a_resumed_run(server):
    def key(**more):
        one = {"kind": "served", "url": "http://a:1/v1", "model": "m"} | more
        return recipe.parse({"name": "x", "captions": [one]}, [], "x").measure_key()

    free = {
        "url": "https://b/v1",
        "concurrency": 3,
        "per_minute": 5,
        "tries": 2,
        "timeout_s": 9,
        "overall_s": 99,
    }
    free |= {"batch": 7, "key_env": "K", "key_header": "api-key"}
    assert all(key(**{k: v}) == key() for k, v in free.items())
    assert (
        len({key(), key(model="n"), key(prompt="Say it."), key(parameters={"seed": 1}), key(input="video")})
        == 5
    )


@pytest.mark.parametrize("field", ["model", "messages", "stream"])
def test_fields_that_clipmill_writes_are_not_for_the_recipe(server, field):
    with pytest.raises(recipe.RecipeError, match=rf"{field}: not to be set here"):
        section(server, parameters={field: True})


@pytest.mark.parametrize("value", [math.nan, math.inf, {"when": object()}])
def test_parameters_that_no_request_can_hold_are_found_before_any_work(server, value):
    with pytest.raises(recipe.RecipeError, match=r"seed: .* cannot be sent as JSON"):
        section(server, parameters={"seed": value})


def test_the_order_of_a_recipes_keys_makes_no_other_question(server, tmp_path):
    store, v = Store(str(tmp_path)), clips(2)
    stage(server, store, parameters={"seed": 1, "max_tokens": 5})([v])
    stage(server, store, parameters={"max_tokens": 5, "seed": 1})([v])
    assert len(server.bodies) == 2


def test_answers_are_kept_on_an_object_store_too(server, object_store, monkeypatch):
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    store = Store(object_store.bucket() + "/run")
    v = clips(3)
    stage(server, store)([v])
    before = captions([v])
    stage(server, Store(store.uri))([v])
    assert captions([v]) == before
    assert len(server.bodies) == 3
    assert answers.account(store, set())["requests"] == 3
