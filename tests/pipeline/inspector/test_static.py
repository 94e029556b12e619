"""A sample as one file: it holds all it needs, runs nothing else, and loads nothing."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from pipeline.inspector import static
from pipeline.inspector.answers import Inspector
from pipeline.inspector.query import Filters, Wrong


class Elements(HTMLParser):
    """Every element with its attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        if self.found:
            tag, attrs, text = self.found[-1]
            self.found[-1] = tag, attrs, text + data


@pytest.fixture(scope="module")
def text(inspector: Inspector) -> str:
    return static.page(inspector, most=8)


def data_of(text: str) -> dict:
    (found,) = (t for tag, attrs, t in Elements(text).found if attrs.get("id") == "static-data")
    return json.loads(found)


def test_the_data_are_those_of_the_server(inspector: Inspector, text: str):
    data = data_of(text)
    assert data["run"]["counts"] == inspector.run()["counts"]
    assert len(data["clips"]) == 8
    for clip in data["clips"]:
        row = inspector.row(clip["id"])
        images = clip.pop("images")
        assert clip == json.loads(json.dumps(inspector.clip(row)))
        assert images
        for image in images:
            assert base64.b64decode(image.removeprefix("data:image/jpeg;base64,")).startswith(b"\xff\xd8")


def test_a_view_is_the_first_clips_of_it(inspector: Inspector):
    filters = Filters.of([("kept", "1"), ("sort", "-gap")])
    wanted = [r["id"] for r in inspector.clips(filters, 0, 5)["rows"]]
    assert [c["id"] for c in data_of(static.page(inspector, filters, 5))["clips"]] == wanted
    with pytest.raises(Wrong):
        static.page(inspector, Filters.of([("flag", "nothing")]))


def test_a_caption_ends_no_element(text: str):
    assert "<script>alert(1)" not in text
    captions = [c["text"] for clip in data_of(text)["clips"] for c in clip["captions"]]
    assert any("<script>alert(1)</script>" in c for c in captions)
    kinds = [attrs.get("type") for tag, attrs, _ in Elements(text).found if tag == "script"]
    assert sorted(kinds) == ["application/json", "importmap", "module"]


def test_nothing_is_loaded_from_anywhere(text: str):
    for _tag, attrs, _ in Elements(text).found:
        for name in ("src", "href", "action", "data", "poster"):
            assert attrs.get(name, "data:").startswith("data:")
    (policy,) = (a["content"] for _, a, _ in Elements(text).found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    script = re.search(r"script-src ([^;]*)", policy)
    assert script is not None
    assert "unsafe" not in script[1]
    assert len(re.findall(r"'sha256-", policy)) == 2


def test_it_opens_from_a_disk_in_a_browser_that_is_offline(inspector, text, tmp_path, browser):
    file = tmp_path / "sample.html"
    file.write_text(text, encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.on("dialog", lambda d: said.append(f"dialog {d.message}"))
    page.goto(file.as_uri())
    captions = [c["caption"] for c in data_of(text)["clips"] if c["caption"]]
    page.get_by_text(captions[0], exact=False).first.wait_for(timeout=20_000)
    shown = page.evaluate("document.body.innerText")
    assert sum(" ".join(c.split())[:30] in " ".join(shown.split()) for c in captions) == len(captions)
    assert said == []
    assert [u for u in asked if not u.startswith("data:")] == [file.as_uri()]
    context.close()
