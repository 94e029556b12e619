"""What `prompt:` names, and how what is known of a clip gets into it."""

from __future__ import annotations

import pytest
import yaml

from pipeline import recipe, recipe_prompts
from pipeline.caption import prompts
from pipeline.faults import ClipFault
from pipeline.record import Clip, Source, Video


def clip_of(meta, clip_meta=None, **scores):
    clip = Clip("0" * 20, 0, 10, 0.0, 2.5, scores=scores, text=["SALE  50", "today"], meta=clip_meta or {})
    return Video(Source("a.mp4", "a.mp4", meta), "u", clips=[clip]), clip


def test_a_prompt_is_words_a_bundled_name_or_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("Say what you see.\n")
    assert prompts.text("Say it.") == "Say it."
    assert prompts.text("dense") == (recipe_prompts.FOLDER / "dense.txt").read_text().strip()
    assert prompts.text(str(tmp_path / "mine.txt")) == "Say what you see."
    assert prompts.text("<MORE_DETAILED_CAPTION>") == "<MORE_DETAILED_CAPTION>"
    long = "Describe it. " * 400  # longer than any file's name may be
    assert prompts.text(long) == long.strip()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("structurd", "no prompt 'structurd' .did you mean 'structured'"),
        ("none/such.txt", r"prompt file none/such\.txt cannot be read .No such file"),
        ("  ", "cannot be empty"),
        ("Describe it. Title: {titel}", r"the prompt has \{titel\}, did you mean \{title\}\?"),
        ("It is called {subtitle}.", r"did you mean \{subtitles\}\? It may hold \{title\}, \{descr"),
    ],
)
def test_a_prompt_that_is_not_there_is_one_sentence(prompt, message):
    with pytest.raises(recipe.RecipeError, match=message):
        prompts.text(prompt)


def test_a_file_may_come_from_any_editor(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffSay “it”.\r\nTitle: {title}\r\n".encode())
    assert prompts.text(str(path)) == "Say “it”.\nTitle: {title}"
    path.write_bytes("Say it.".encode("utf-16"))
    with pytest.raises(recipe.RecipeError, match=r"mine\.txt cannot be read \(it is not UTF-8\)"):
        prompts.text(str(path))
    with pytest.raises(recipe.RecipeError, match=r"cannot be read \(Is a directory\)"):
        (tmp_path / "folder.txt").mkdir()
        prompts.text(str(tmp_path / "folder.txt"))


def test_braces_that_are_no_slip_are_the_prompts_own():
    for said in (
        'Answer as {"name": "…"}.',
        "Fill in {name}, {style}, {time} and {action}.",
        "{{title}} and {} { }",
    ):
        assert prompts.text(said) == said


def test_a_recipe_holds_the_words_of_a_file_beside_it(tmp_path):
    (tmp_path / "mine.txt").write_text("Say what you see.")
    section = {"kind": "transformers", "model": "a/b", "prompt": "mine.txt"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"captions": [section]}))
    read = recipe.load(str(tmp_path / "r.yaml"))
    assert read.captions[0].prompt == "Say what you see."
    (tmp_path / "mine.txt").unlink()
    again = recipe.parse(read.model_dump(mode="json"), [], "run.json")  # as a resumed run reads it
    assert again.captions == read.captions
    with pytest.raises(recipe.RecipeError, match=r"prompt.* mine|prompt file .*mine\.txt cannot be read"):
        recipe.load(str(tmp_path / "r.yaml"))
    long = {"kind": "transformers", "model": "a/b", "prompt": "Describe it. " * 400}
    assert recipe.parse({"name": "x", "captions": [long]}, [], "x").captions[0].prompt.endswith("it.")


def test_names_are_replaced_once_and_other_braces_stay():
    said = prompts.render('{"a": {title}} {unknown}', title="{description} \\1", description="x")
    assert said == '{"a": {description} \\1} {unknown}'


def test_a_line_is_left_out_where_all_its_names_say_nothing():
    template = "Say.\nTitle: {title}\n{title}{camera}\nNothing {asked}"
    assert prompts.render(template, title="", camera="still") == "Say.\nstill\nNothing {asked}"


@pytest.mark.parametrize("context", [(), ("title",), ("subtitles", "title"), tuple(prompts.SAID)])
@pytest.mark.parametrize("template", ["Say.", "Say.\nIt is {title}", prompts.text("panda")])
def test_each_thing_that_the_list_says_can_be_told_or_not(template, context):
    video, clip = clip_of({"title": "A  cat", "description": "Of mine", "subtitles": "so it jumps"})
    said = prompts.ask(template, video, clip, context)
    for name, words in {"title": "A cat", "description": "Of mine", "subtitles": "so it jumps"}.items():
        assert said.count(words) == (name in context)
    assert "{" not in said


def test_what_is_said_of_the_clip_itself_goes_before_what_is_said_of_its_source():
    video, clip = clip_of({"title": "All of it", "subtitles": "one two"}, {"subtitles": "two"})
    assert prompts.known(video, clip)["subtitles"] == "two"
    assert prompts.known(video, clip)["title"] == "All of it"


def test_what_is_measured_can_be_told():
    video, clip = clip_of({}, pan_x=0.1, pan_y=0.0, zoom=0.0, motion=0.1, motion_object=0.0)
    said = prompts.ask("{camera}, {on_screen_text}, {duration}", video, clip)
    assert said == "the camera pans to the right, SALE 50; today, 2.5 seconds"
    assert prompts.ask("{schema}", video, clip, more={"schema": "{title}"}) == "{title}"


SECTIONS = [
    {"kind": "transformers", "model": "a/b"},
    {"kind": "served", "model": "m", "url": "http://localhost:1/v1"},
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s["kind"])
@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"prompt": "Describe {title} briefly."}, ("title",)),
        ({"prompt": "panda"}, ("title", "description", "subtitles")),
        ({"prompt": "panda", "context": False}, False),
        ({"prompt": "panda", "context": ["subtitles"]}, ("subtitles",)),
        ({"prompt": "Describe it."}, False),
        ({"prompt": "Describe it.", "context": True}, True),
        ({}, False),
    ],
)
def test_a_captioner_is_told_what_its_prompt_names_unless_its_recipe_says_otherwise(section, values, context):
    read = recipe.parse({"name": "x", "captions": [section | values]}, [], "x")
    assert read.captions[0].context == context
    again = recipe.parse(read.model_dump(mode="json"), [], "run.json")  # as a resumed run reads it
    assert again.captions == read.captions


def test_any_column_of_the_list_can_be_told():
    video, clip = clip_of({"title": "t", "views": "12", "my tag": "a  {camera}"}, {"views": "13"})
    said = prompts.ask("Seen {meta.views} times, {meta.my tag}\nBy {meta.author}\n{views}", video, clip)
    assert said == "Seen 13 times, a {camera}\n{views}"
    cleaned = prompts.ask("{meta.views}", video, clip, clean=lambda v: v.replace("3", ""))
    assert cleaned == "1"


def test_a_prompt_of_which_nothing_is_left_is_not_asked():
    video, clip = clip_of({"title": ""})
    with pytest.raises(ClipFault, match=r"nothing is left of the prompt.*\{title\}"):
        prompts.ask("Describe {title} briefly.", video, clip, ("title",))
    assert prompts.ask("", video, clip) == ""  # a family's that wants no words


def test_context_is_cleaned_and_the_prompt_is_not():
    video, clip = clip_of({"title": "a<|x|>b"})
    said = prompts.ask("<|x|>", video, clip, ("title",), clean=lambda v: v.replace("<|x|>", " "))
    assert said.startswith("<|x|>\n")
    assert said.endswith("Title: a b")


@pytest.mark.parametrize("name", recipe_prompts.bundled())
def test_bundled_prompts_hold_only_names_that_are_given(name):
    video, clip = clip_of({"title": "t"})
    more = {"schema": "S", "captions": "C"}
    assert "{" not in prompts.ask(prompts.text(name), video, clip, tuple(prompts.SAID), more=more)
