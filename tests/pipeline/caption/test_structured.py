"""The record of a structured caption: its schema, and its words."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from jobs.training.diffusion.recipe import DiffusionRun
from pipeline.caption import structured
from pipeline.caption.structured import FIELDS, Broken, Record, Subject, measured, parse, sampled, text
from pipeline.shards.captions import caption_of

FULL = Record(
    subjects=[
        Subject(appearance="a woman in a red coat.", action="walking  away", position="in the middle"),
        Subject(appearance="a dog", action="", position="beside her"),
    ],
    action="a woman walks her dog.",
    scene="a beach at low tide",
    style="live action",
    shot="a long shot at eye level",
    lighting="soft evening light!",
    camera="the camera holds still",
)
EMPTY = Record(subjects=[], action="", scene="", style="", shot="", lighting="", camera="")


def test_a_record_in_words():
    assert text(FULL) == (
        "A woman walks her dog. A woman in a red coat, walking away, in the middle. A dog, beside her. A beach at low "
        "tide. Live action. A long shot at eye level. Soft evening light! The camera holds still."
    )
    assert text(EMPTY) == ""
    assert text(EMPTY.model_copy(update={"action": "犬が走る。", "scene": "公園"})) == "犬が走る。 公園."


def test_every_record_is_valid_by_the_schema_and_nothing_else_is():
    validator = jsonschema.Draft202012Validator(structured.schema())
    good = FULL.model_dump()
    validator.validate(good)
    assert parse(json.dumps(good)) == FULL
    wrong = [{k: v for k, v in good.items() if k != name} for name in good]
    wrong += [good | {"mood": "x"}, good | {"action": 3}, good | {"subjects": [{"appearance": "x"}]}, []]
    for value in wrong:
        assert not validator.is_valid(value)
        with pytest.raises(Broken):
            parse(json.dumps(value))


def test_strict_servers_get_every_field_required_and_no_other_allowed():
    def objects(schema):
        if isinstance(schema, dict):
            yield from [schema] if schema.get("type") == "object" else []
            for value in schema.values():
                yield from objects(value)

    found = list(objects(structured.schema()))
    assert len(found) == 2
    for one in found:
        assert one["additionalProperties"] is False
        assert sorted(one["required"]) == sorted(one["properties"])


@pytest.mark.parametrize(
    "around",
    ["{}", "```json\n{}\n```", "Here it is: {} I hope it helps.", "Here is {the} object: {}", "{} }", "{} {}", "[{}]",
     "\ufeff{}", "{}\n\nNote that {braces} are allowed."],
)  # fmt: skip
def test_words_around_the_object_do_no_harm(around):
    assert parse(around.replace("{}", FULL.model_dump_json())) == FULL


@pytest.mark.parametrize("said", ["", "A dog.", '{"action": "a', "}{", "{" * 5000, '{"action": 1}'])
def test_what_is_wrong_is_said_in_a_clause(said):
    with pytest.raises(Broken) as e:
        parse(said)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


def test_the_camera_is_what_was_measured():
    assert measured(FULL, {"pan_x": -0.1, "pan_y": 0.0, "zoom": 0.0}).camera == "the camera pans to the left"
    assert measured(FULL, {}).camera == ""
    assert measured(FULL, {}).action == FULL.action


def test_fields_are_dropped_and_ordered_by_the_seed_alone_and_the_subject_stays():
    sentences = {name: text(FULL, [name]) for name in FIELDS}
    drawn = [sampled(FULL, f"{n}") for n in range(400)]
    assert len(set(drawn)) > 200
    for said in drawn:
        assert sentences["action"] in said or sentences["subjects"] in said
        rest = said
        for one in sentences.values():
            assert said.count(one) <= 1
            rest = rest.replace(one, "")
        assert not rest.strip()  # made of whole fields and of nothing else
    share = {name: sum(one in said for said in drawn) / len(drawn) for name, one in sentences.items()}
    assert all(0.6 < share[name] < 0.8 for name in ("scene", "style", "shot", "lighting", "camera"))
    first = {name for name, said in itertools.product(FIELDS, drawn) if said.startswith(sentences[name])}
    assert first == set(FIELDS)
    assert sampled(FULL, "x", keep=1.0) != sampled(FULL, "y", keep=1.0)
    assert sorted(sampled(FULL, "x", keep=1.0)) == sorted(text(FULL))
    assert sampled(EMPTY, "x") == ""


def test_a_prompt_written_as_a_record_is_what_a_caption_of_it_is():
    assert structured.told(FULL.model_dump_json()) == text(FULL)
    assert structured.told("a dog {runs}") == "a dog {runs}"
    with pytest.raises(Broken, match="the prompt begins as a JSON object and is no structured caption: "):
        structured.told('{"action": "a dog runs"}')
    assert DiffusionRun(prompts=(FULL.model_dump_json(), "a dog")).prompts == (text(FULL), "a dog")


def test_a_reader_draws_fields_of_the_structured_caption_with_the_measured_camera():
    meta = {
        "caption": "chosen",
        "scores": {"pan_x": -0.1, "pan_y": 0.0, "zoom": 0.0, "blur": None},
        "captions": [
            {"text": "A dog.", "raw": "", "scores": "{}"},
            {"text": "A woman …", "raw": f"```json{FULL.model_dump_json()}```", "scores": "{}"},
        ],
    }
    drawn = {caption_of(meta, "fields", np.random.default_rng(n)) for n in range(100)}
    assert len(drawn) > 60
    again = [caption_of(meta, "fields", np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]
    assert any("The camera pans to the left." in d for d in drawn)
    assert not any("holds still" in d for d in drawn)
    plain = meta | {"captions": meta["captions"][:1]}
    assert caption_of(plain, "fields", np.random.default_rng(0)) == "chosen"


def test_the_words_are_the_same_in_every_process():
    code = (
        "import sys; from pipeline.caption.structured import *\n"
        "r = parse(sys.stdin.read()); print(text(r)); print(sampled(r, 'clip:3'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=FULL.model_dump_json(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [text(FULL), sampled(FULL, "clip:3")]
