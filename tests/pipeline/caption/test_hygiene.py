"""Flags of captions: each named one is found where it is so, and plain captions have none."""

import signal

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
    # what rules over words take for something else
    "A view of Lake Geneva, of Orlando, Florida and of Chad in Africa.",
    "St. Peter's Basilica in Rome and the St. Louis Arch are where the San Antonio Spurs play.",
    "A Louis Vuitton bag, an Allen wrench and a John Deere tractor stand by a Sherman tank.",
    "A can of Dr Pepper and a pair of Dr. Martens boots.",
    "A blind man who cannot see walks with a dog, the driver can't see the road and cannot provide help.",
    "A man turns the light on",
    "A boy jumps in",
    "People wonder what it is",
    "A very very very big dog.",
    "A singer repeats ha ha ha ha.",
    "The text on screen reads “Женщина идёт по улице”.",
    "The text on screen reads “I'm sorry, I cannot help”.",
    "Text on screen reads “okay, so let me think”.",
    "About 10 000 000 people, 100.000.000 trees and the address 192.168.100.200 in 2019 2020 2021.",
    "A picture of a family hangs on the wall.",
    "The scene is set in a kitchen.",
    "The user is typing on a keyboard.",
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
        ("refusal", "I’m sorry, I can’t help with that."),
        ("refusal", "Unable to identify the person."),
        ("refusal", "I don't have the ability to view images."),
        ("opener", "This is a video of a dog."),
        ("opener", "Sure! Here's a caption: a dog runs."),
        ("opener", "The video shows a dog running."),
        ("opener", "In this clip, a dog runs."),
        ("opener", "This short video clip features a dog."),
        ("loop", "a dog and a dog and a dog and a dog and a dog and a dog"),
        ("loop", "The dog runs fast. The dog runs fast. The dog runs fast."),
        ("loop", "yes yes yes yes yes yes"),
        ("loop", "好好好好好好好好"),
        ("loop", "一个男人走路一个男人走路一个男人走路一个男人走路"),
        ("loop", "犬が走る。犬が走る。犬が走る。"),
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


@pytest.mark.parametrize(
    "prompt",
    [
        "用一句话描述这个视频。",
        "Sag in einem Satz, was das für ein Video ist.",
        "Describe the video in German.",
    ],
)
def test_a_language_that_the_prompt_asks_for_is_not_wrong(prompt):
    said = "Ein Hund rennt über eine grüne Wiese und sucht dort einen roten Ball."
    assert tidied(said, prompt=prompt).flags == []
    assert tidied(said, prompt="Describe it.\nTitle: Ein Hund und sein Ball in der Stadt").flags == [
        "wrong_language"
    ]


@pytest.mark.parametrize(
    "part", ["a", ".", "A. ", "a.", "-", "好", '"', ".)", "{", "1", "Mr. ", "a@", '[{"a":']
)
def test_what_a_model_says_without_end_is_gone_over_once(part):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)  # it takes a fifth of a second; where every start looks on to the end, a minute and more
    try:
        assert tidied(part * 20_000).model == "m"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
        ("See https://x.org/a?b=1, or (example.com).", "See a web address, or (a web address)."),
        ("Call +1 555 123 4567 or +491715551234.", "Call a phone number or a phone number."),
        ("To order call 600 123 456.", "To order call a phone number."),
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
