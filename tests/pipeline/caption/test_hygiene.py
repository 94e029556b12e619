"""Flags of captions: each named one is found where it is so, and plain captions have none."""

import pytest

from pipeline.caption import hygiene
from pipeline.record import Caption, Clip, Source, Video


def tidied(text: str, outcome: str = "ok", prompt: str = "", **scores: float) -> Caption:
    caption = Caption("m", text, outcome, prompt)
    hygiene.tidy(caption, Video(Source("/a", "a"), "u"), Clip("c", 0, 10, 0.0, 1.0, scores=scores))
    return caption


PANDA = [
    "A person is decorating pumpkin pies on a white tray with a white frosting.",
    "There is a person standing on the edge of a cliff overlooking a mountainous area.",
    "A car driving down a road in a video game.",
    "The columns of the temple of mars ultor in rome, italy are surrounded by trees and buildings.",
    "A baseball player is wearing a New York Yankees cap and is standing in front of a black background.",
    "It is an illustration of the planets of the solar system.",
    "May is a good month for roses in Paris, and Virginia is for lovers.",
    "Will a Tesla Model drive by the Golden Gate Bridge at 12:30 on 2024-05-06?",
    "Two dogs, three cats and 1,000 birds.",
]


@pytest.mark.parametrize("text", PANDA)
def test_plain_captions_have_no_flag_and_stay_as_they_are(text):
    said = tidied(text)
    assert (said.text, said.raw, said.flags) == (text, "", [])


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("refusal", "I'm sorry, but I can't assist with that request."),
        ("refusal", "As an AI language model, I do not see videos."),
        ("refusal", "I am unable to view the video, please describe it."),
        ("opener", "The video shows a dog running."),
        ("opener", "In this clip, a dog runs."),
        ("opener", "This short video clip features a dog."),
        ("loop", "a dog and a dog and a dog and a dog and a dog and a dog"),
        ("loop", "The dog runs fast. The dog runs fast. The dog runs fast."),
        ("loop", "yes yes yes yes yes yes"),
        ("truncated", "A dog is running over the"),
        ("wrong_language", "一只狗在草地上奔跑。"),
        ("wrong_language", "Un perro corre por la hierba."),
        ("wrong_language", "Ein Hund rennt über eine grüne Wiese und sucht dort einen roten Ball"),
        ("leak", "<think>The frames show a dog.</think> A dog."),
        ("leak", "Okay, so the frames show a dog."),
        ("leak", "ASSISTANT: A dog runs."),
        ("broken_json", '{"subjects": ["a dog", '),
        ("broken_json", "```json\n{'a': 1}\n```"),
    ],
)
def test_each_flag_is_found_and_the_text_left_alone(flag, text):
    said = tidied(text)
    assert flag in said.flags
    assert (said.text, said.raw) == (text, "")


def test_json_that_parses_is_not_broken():
    assert tidied('```json\n{"subjects": ["a dog by the sea"]}\n```').flags == []


def test_a_cut_off_answer_is_truncated_whatever_it_says():
    assert tidied("A dog runs by.", "truncated").flags == ["truncated"]


def test_a_sentence_of_the_prompt_is_a_leak_a_few_words_of_it_are_not():
    prompt = "Describe the main subject and what happens in this video. Be brief."
    assert tidied("Describe the main subject and what happens in this video.", prompt=prompt).flags == [
        "leak"
    ]
    assert tidied("The main subject is a dog. Be brief.", prompt=prompt).flags == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("John Smith is walking with his dog.", "A person is walking with his dog."),
        ("A talk by Dr. Okonkwo about the sea.", "A talk by a person about the sea."),
        ("We see Jennifer's car by the road.", "We see a person's car by the road."),
        ("The man named Kwame is cooking.", "A person is cooking."),
        ("An interview with Barbara and Michael Jones is on.", "An interview with people is on."),
    ],
)
def test_people_who_are_named_become_a_person_and_the_raw_text_stays(text, clean):
    said = tidied(text)
    assert (said.text, said.raw, said.flags) == (clean, text, ["name"])


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Write to a.b@example.com for it.", "Write to an e-mail address for it."),
        ("The sign at the door says +49 171 555 1234.", "The sign at the door says a phone number."),
        ("The logo of www.example.com/x is on it", "The logo of a web address is on it"),
    ],
)
def test_addresses_and_numbers_of_people_are_taken_out(text, clean):
    said = tidied(text)
    assert (said.text, said.raw, said.flags) == (clean, text, ["contact"])


@pytest.mark.parametrize(
    ("text", "scores", "wrong"),
    [
        ("The camera is static.", {"pan_x": 0.2, "pan_y": 0.0, "zoom": 0.0}, True),
        ("The camera is static.", {"pan_x": 0.001, "pan_y": 0.0, "zoom": 0.0}, False),
        ("The camera pans slowly to the left.", {"pan_x": 0.1}, True),
        ("The camera pans slowly to the left.", {"pan_x": -0.1}, False),
        ("The camera tilts up.", {"pan_y": 0.1}, True),  # positive: the camera goes down
        ("The camera tilts up.", {"pan_y": -0.1}, False),
        ("It zooms in on a face.", {"zoom": -0.05}, True),
        ("It zooms in on a face.", {"zoom": 0.05}, False),
        ("The camera pans slowly to the left.", {}, False),  # not measured
        ("A dog runs to the left.", {"pan_x": 0.3}, False),  # not about the camera
    ],
)
def test_words_about_the_camera_are_held_against_the_measured_motion(text, scores, wrong):
    assert tidied(text, **scores).flags == (["camera"] if wrong else [])


def test_every_flag_of_the_table_is_one_that_is_given():
    told = set()
    texts = [
        "I'm sorry, I cannot see it.",
        "The video shows it.",
        "no no no no no no",
        "A dog and",
        "日本語の文章です。",
    ]
    texts += ["ASSISTANT: it", "{x", "Mary Jones is at it.", "a@b.com is at it.", "The camera pans left."]
    for text in texts:
        told |= set(tidied(text, pan_x=0.5).flags)
    assert told == set(hygiene.FLAGS)


def test_an_empty_caption_has_no_flags():
    assert tidied("", "empty").flags == []
