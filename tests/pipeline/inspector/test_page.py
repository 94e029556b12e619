"""The page of `clipmill inspect` in a real browser, over a real run and the real server: every interaction it has."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import uvicorn

from pipeline import layers
from pipeline.inspector import session
from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.inspector.server import application
from pipeline.io.store import Store
from pipeline.layers import Layer
from pipeline.record import Caption, Clip
from pipeline.tables import caption_row
from tests.fixtures import inspected_page as inspected

ROOT = Path(__file__).parents[3]


class Server:
    """`clipmill inspect` as a person starts it; it can be killed and started again at the same address."""

    def __init__(self, *args: str, port: int = 0):
        command = [sys.executable, "-m", "jobs.inspect", *args, "--port", str(port or 18765)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.args = args
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+", line)[0]  # type: ignore[index]
        self.port = int(re.search(r":(\d+)/", self.url)[1])  # type: ignore[index]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.kill()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    """The run that is looked at lies in `RUN`, another of the same clips in `OTHER`."""
    global RUN, OTHER
    folder = tmp_path_factory.mktemp("inspected")
    RUN, OTHER = folder / "run", folder / "other"
    inspected.make_inspected(OTHER, change=" It rains.")
    return inspected.make_inspected(RUN)


RUN = OTHER = Path()


@pytest.fixture(scope="module")
def server(clips) -> Iterator[Server]:
    with Server(str(RUN), str(OTHER)) as server:
        yield server


@pytest.fixture
def visit(browser, server) -> Iterator[Callable]:
    """Open the page at an address. Whatever the test, no error and no breach of the page's policy may be logged."""
    contexts, said = [], []

    def open_(address: str = "", expect_errors: bool = False, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("console", lambda m: said.append(m.text) if m.type == "error" and not expect_errors else None)
        page.on("dialog", lambda d: (said.append(f"dialog {d.message}"), d.dismiss()))
        page.goto(address if "://" in address else f"{server.url}#{address}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


def total(page, n: int) -> None:
    page.locator(".total b", has_text=re.compile(f"^{n}$")).wait_for()
    page.locator('.scroller[aria-busy="false"]').wait_for()


def until(page, expression: str) -> None:
    """Wait for it to be true; the page's policy lets no test evaluate a string from inside."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression} did not come true at {page.url}")


def query(page) -> dict[str, list[str]]:
    return parse_qs(page.evaluate("location.hash.slice(1)"))


def row(i: int, clips: list[Clip]) -> str:
    return f"clip={clips[i].clip_id}&at={i}"


# ---------------------------------------------------------------- the grid


def test_grid_loads_only_what_is_seen_and_plays_a_clip_muted_while_the_mouse_is_on_it(visit, clips):
    page = visit()
    total(page, len(clips))
    cards = page.locator(".card")
    assert 0 < cards.count() < len(clips)
    assert page.locator("video").count() == 0
    with page.expect_response(lambda r: "/media/" in r.url) as media:
        cards.first.hover()
    assert media.value.status in (200, 206)
    until(page, "(v => v && v.muted && v.currentTime > 0)(document.querySelector('.card video'))")
    page.mouse.move(5, 5)
    page.locator(".card video").wait_for(state="detached")


def test_filters_set_the_address_and_back_forward_and_reload_follow_it(visit, clips):
    dropped = sum(c.scores["motion"] < 0.2 for c in clips)
    page = visit()
    total(page, len(clips))
    page.get_by_role("group", name="dropped by").get_by_role("button", name="still").click()
    total(page, dropped)
    assert query(page) == {"rule": ["still"]}
    flagged = sum(bool(c.captions[1].flags) for c in clips if c.scores["motion"] < 0.2)
    page.get_by_role("group", name="flag", exact=True).get_by_role("button", name="boilerplate").click()
    total(page, flagged)
    page.go_back()
    total(page, dropped)
    page.go_back()
    total(page, len(clips))
    page.go_forward()
    page.go_forward()
    total(page, flagged)
    page.reload()
    total(page, flagged)
    page.get_by_role("button", name="Remove filter flag boilerplate").click()
    total(page, dropped)
    page.get_by_role("button", name="Remove filter dropped by still").click()
    total(page, len(clips))
    page.get_by_role("group", name="decision").get_by_role("button", name="Dropped").click()
    assert query(page) == {"kept": ["0"]}


def test_of_several_values_of_a_filter_a_clip_has_any(visit, clips):
    dropped = sum(c.scores["motion"] < 0.2 for c in clips)
    page = visit("rule=still")
    total(page, dropped)
    rules = page.get_by_role("group", name="dropped by")
    copies = int(rules.get_by_role("button", name="duplicate").locator(".n").inner_text())
    assert copies > 0  # what else may be chosen keeps its count
    rules.get_by_role("button", name="duplicate").click()
    total(page, dropped + copies)
    assert query(page) == {"rule": ["still", "duplicate"]}
    page.get_by_role("button", name="Remove filter dropped by still").click()
    total(page, copies)
    assert query(page) == {"rule": ["duplicate"]}


def test_words_are_sought_while_they_are_typed(visit, clips):
    page = visit()
    total(page, len(clips))
    page.keyboard.press("/")
    page.keyboard.type("tower")
    total(page, sum("tower" in c.captions[0].text for c in clips))
    assert query(page) == {"q": ["tower"]}
    page.go_back()  # one step for the whole word
    total(page, len(clips))


def test_sorting_puts_the_lowest_agreement_first_and_random_shuffles_by_a_seed(visit, clips):
    page = visit()
    total(page, len(clips))
    page.get_by_label("Sort").select_option("agreement")
    until(page, "location.hash.includes('sort=agreement')")
    total(page, len(clips))
    shown = [float(t) for t in page.locator(".card .facts span:has-text('agree') b").all_inner_texts()]
    assert len(shown) > 3
    assert shown == sorted(shown)
    page.get_by_label("Sort").select_option("random")
    until(page, "location.hash.includes('random')")
    first = query(page)["sort"]
    page.get_by_role("button", name="Shuffle again").click()
    until(page, f"!location.hash.includes({json.dumps(first[0].split(':')[1])})")
    assert query(page)["sort"][0].startswith("random:")


def test_a_histogram_filters_when_it_is_brushed_by_mouse_and_by_keys(visit, clips):
    page = visit()
    total(page, len(clips))
    group = page.get_by_role("group", name="motion: histogram")
    box = group.locator(".brush").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.26, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20, steps=4)
    page.mouse.up()
    until(page, "location.hash.includes('range')")

    def passing() -> int:
        [said] = query(page)["range"]
        _, low, high = said.split(":")
        return sum(float(low or "-inf") <= c.scores["motion"] <= float(high or "inf") for c in clips)

    assert 0 < passing() < len(clips)
    total(page, passing())
    before = query(page)["range"]
    group.get_by_role("slider", name="motion, from").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    until(page, f"decodeURIComponent(location.hash).indexOf({json.dumps(before[0])}) < 0")
    assert float(query(page)["range"][0].split(":")[1]) < float(before[0].split(":")[1])
    total(page, passing())
    page.keyboard.press("Escape")
    total(page, len(clips))
    assert "range" not in query(page)


def test_the_funnel_counts_what_each_rule_takes_and_leads_to_its_clips(visit, clips):
    page = visit("view=funnel")
    page.get_by_role("link", name="still").wait_for()
    cells = page.locator("tr", has_text="still").locator("td").all_inner_texts()
    dropped = sum(c.scores["motion"] < 0.2 for c in clips)
    assert cells[2:5] == [str(dropped), str(dropped), str(len(clips) - dropped)]
    page.get_by_role("link", name="still").click()
    total(page, dropped)


MANY = 1_000_000


def many(route) -> None:
    """Rows of a run of a million clips: what is tested is the page's scrolling."""
    asked = parse_qs(route.request.url.split("?")[1])
    offset, limit = int(asked["offset"][0]), int(asked["limit"][0])
    blank = {
        "source": "s",
        "name": "n",
        "duration_s": 1,
        "kept": True,
        "dropped_by": [],
        "flags": [],
        "model": "m",
    }
    rows = [blank | {"id": f"c{i}", "caption": f"row {i}"} for i in range(offset, min(offset + limit, MANY))]
    route.fulfill(json={"total": MANY, "rows": rows, "ms": 1})


def test_a_million_rows_scroll_row_by_row_and_to_the_very_last(visit):
    page = visit("", expect_errors=True)  # the made-up rows have no pictures
    page.route("**/api/clips?*", many)
    page.reload()
    page.locator(".total b", has_text="1,000,000").wait_for()
    page.get_by_text("row 0", exact=True).wait_for()
    scroller = page.locator(".scroller")
    scroller.hover()
    seen = [0]

    def first() -> int:
        page.wait_for_timeout(350)
        texts = page.locator(".says").all_inner_texts()
        return min(int(t.split()[1]) for t in texts)

    for _ in range(3):
        page.mouse.wheel(0, 700)
        seen.append(first())
    steps = [b - a for a, b in itertools.pairwise(seen)]
    assert all(0 < s < 40 for s in steps)  # the wheel moves by rows, not by thousands of them
    scroller.evaluate("e => e.scrollTop = e.scrollHeight / 2")
    middle = first()
    assert abs(middle - MANY / 2) < MANY / 50
    page.mouse.wheel(0, 700)
    assert 0 < first() - middle < 40
    page.mouse.wheel(0, -1400)
    assert 0 < middle - first() < 40
    page.keyboard.press("End")
    page.get_by_text(f"row {MANY - 1}", exact=True).wait_for()
    assert page.locator(".card").count() < 100
    page.keyboard.press("Home")
    page.get_by_text("row 0", exact=True).wait_for()


def test_keys_lead_through_the_grid_into_a_clip_and_back_to_the_same_card(visit, clips):
    page = visit()
    total(page, len(clips))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    until(page, "document.activeElement.dataset.index === '2'")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="video 0.mp4").wait_for()
    assert query(page)["clip"] == [clips[2].clip_id]
    page.keyboard.press("ArrowRight")
    until(page, f"location.hash.includes('{clips[3].clip_id}')")
    page.keyboard.press("Escape")
    until(page, "document.activeElement.dataset.index === '3'")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    dialog.wait_for()
    assert "next clip" in dialog.inner_text()
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


# ---------------------------------------------------------------- one clip


def test_frames_are_stepped_one_by_one_and_sampled_ones_are_marked(visit, clips):
    page = visit(row(5, clips))
    until(page, "document.querySelector('.stage video')?.readyState >= 2")
    time = "document.querySelector('.stage video').currentTime"
    frame = page.locator("[data-frame]")
    for key, wanted in (".", 1), (".", 2), (",", 1), (".", 2), (".", 3):
        page.keyboard.press(key)
        until(page, f"document.querySelector('[data-frame]').textContent === '{wanted}'")
        assert wanted / inspected.FPS < page.evaluate(time) < (wanted + 1) / inspected.FPS
    marks = page.locator(".marks i")
    assert marks.count() == len(inspected.SAMPLED)
    strip = page.get_by_role("group", name="Frames shown to the models").get_by_role("button")
    assert strip.count() == len(inspected.SAMPLED)
    for k, sampled in enumerate(inspected.SAMPLED):
        strip.nth(k).click()
        until(page, f"document.querySelector('[data-frame]').textContent === '{sampled}'")
        assert strip.nth(k).get_attribute("aria-current") == "true"
    page.keyboard.press("<")
    assert int(frame.inner_text()) == inspected.SAMPLED[-2]
    page.locator("h1").click()  # off the buttons, which keep Space for themselves
    page.keyboard.press(" ")
    until(page, "!document.querySelector('.stage video').paused")


def test_frames_that_are_not_equally_long_are_stepped_by_their_own_times(visit, clips):
    """Every frame of this clip has a brightness of its own: what is seen is the frame that is named."""
    i = inspected.VARIABLE
    page = visit(row(i, clips))
    until(page, "document.querySelector('.stage video')?.readyState >= 2")
    with page.expect_response(lambda r: "/api/frames/" in r.url):
        page.reload()
    until(page, "document.querySelector('.stage video')?.readyState >= 2")
    page.wait_for_timeout(200)
    seen = """() => { const v = document.querySelector('.stage video'), c = document.createElement('canvas');
        c.width = c.height = 1; const g = c.getContext('2d'); g.drawImage(v, 0, 0, 1, 1);
        return g.getImageData(0, 0, 1, 1).data[0]; }"""
    shades = [page.evaluate(seen)]
    for k in range(1, inspected.FRAMES):
        page.keyboard.press(".")
        until(page, f"document.querySelector('[data-frame]').textContent === '{k}'")
        until(page, "!document.querySelector('.stage video').seeking")
        page.wait_for_timeout(30)
        shades.append(page.evaluate(seen))
    steps = [b - a for a, b in itertools.pairwise(shades)]
    assert min(steps) >= 3, shades  # none is skipped (about 7 each), and none shown twice
    assert max(steps) <= 11, shades


def lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_word_differences_give_back_both_texts_and_keep_the_longest_common_subsequence(visit, clips):
    page = visit(row(5, clips))
    article = page.get_by_role("article", name="Caption of teacher-two")
    article.locator("ins").first.wait_for()
    chosen, other = (c.text.split() for c in clips[5].captions[:2])
    without = """e => { const c = e.cloneNode(true); c.querySelectorAll('.sr, %s').forEach(x => x.remove());
        return c.textContent }"""
    text = article.locator(".text")
    assert text.evaluate(without % "del").split() == other
    assert text.evaluate(without % "ins").split() == chosen
    bare = [w.strip(".").lower() for w in chosen], [w.strip(".").lower() for w in other]
    assert len(text.evaluate(without % "ins, del").split()) == lcs(*bare)
    page.keyboard.press("c")  # from the one before
    page.keyboard.press("c")  # from nothing
    until(page, "!document.querySelector('.captions ins')")
    assert query(page)["vs"] == ["none"]


def test_the_sentence_that_nothing_supports_is_marked_and_no_other(visit, clips):
    page = visit(row(5, clips))
    marked = page.locator(".caption .unsupported")
    marked.first.wait_for()
    assert marked.count() == 1
    assert marked.text_content() == "unsupported: A purple elephant sings opera."


def test_hostile_captions_are_shown_word_for_word_and_do_nothing(visit, clips):
    page = visit(row(0, clips))
    for i, said in enumerate(inspected.HOSTILE):
        if i:
            page.keyboard.press("ArrowRight")
        until(page, shows(clips[i]))
        text = page.get_by_role("article", name="Caption of hostile").locator(".text")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert text.evaluate("e => e.textContent") == said
            assert page.evaluate("window.owned") is None
            assert page.evaluate("document.documentElement.scrollWidth") <= width, said[:40]
            assert page.evaluate("document.querySelector('main').scrollWidth") <= width, said[:40]
            heading = page.locator("h1").bounding_box()
            assert heading["x"] + heading["width"] <= width


def shows(clip: Clip) -> str:
    """Whether the clip that is shown is this one."""
    return f"document.querySelector('main.clip video')?.src.includes('{clip.clip_id}')"


def test_why_it_was_dropped_where_it_is_from_and_what_is_beside_it(visit, clips):
    page = visit(row(0, clips))
    failed = page.locator("tr.failed")
    failed.wait_for()
    assert failed.locator("td").all_inner_texts() == ["✕ still", "0.1", "≥ 0.2"]
    details = page.locator(".details")
    assert "SALE <50%>" in details.inner_text()
    assert "<b>title</b>" in details.inner_text()
    page.locator(".strip a", has_text="after").click()
    until(page, f"location.hash.includes('{clips[1].clip_id}')")
    until(page, shows(clips[1]))  # else the key is for the clip before
    page.keyboard.press("]")
    until(page, f"location.hash.includes('{clips[2].clip_id}')")
    until(page, shows(clips[2]))
    page.locator("section", has_text="Looks like it").locator(".strip a").first.wait_for()
    page.get_by_role("link", name="all in the grid").click()
    page.locator(".card .facts", has_text="like").first.wait_for()
    assert query(page) == {"like": [clips[2].clip_id]}


# ---------------------------------------------------------------- votes


def standing(clip: Clip) -> list[dict]:
    """The votes as they lie on the disk, in order."""
    lines = [
        json.loads(line) for f in sorted(RUN.glob("votes/*")) for line in f.read_text().splitlines() if line
    ]
    return sorted((v for v in lines if v["clip"] == clip.clip_id), key=lambda v: v["at"])


def named(page, who: str) -> None:
    page.get_by_role("dialog", name="Who votes").get_by_label("Name").fill(who)
    page.keyboard.press("Enter")


def saved(page) -> None:
    page.locator(".saved", has_text="✓ saved").wait_for()


def test_votes_by_keyboard_ask_the_name_once_and_are_on_the_disk_when_the_page_says_so(visit, clips):
    clip = clips[7]
    page = visit(row(7, clips))
    page.get_by_role("article", name="Caption of teacher-two").wait_for()
    page.keyboard.press("2")
    named(page, "Ana <b>")
    saved(page)
    assert [(v["kind"], v["model"], v["who"]) for v in standing(clip)] == [("best", "teacher-two", "Ana <b>")]
    page.wait_for_selector(".caption.voted h3:has-text('teacher-two')")
    page.keyboard.press("k")
    page.wait_for_selector("button.keep[aria-pressed=true]")
    saved(page)
    page.keyboard.press("e")
    page.get_by_role("textbox", name="Caption").fill("A better caption.")
    page.keyboard.press("Control+Enter")
    page.get_by_text("edited by").wait_for()
    saved(page)
    assert [v["kind"] for v in standing(clip)] == ["best", "keep", "edit"]
    assert standing(clip)[-1]["text"] == "A better caption."
    page.keyboard.press("u")
    page.get_by_text("edited by").wait_for(state="detached")
    page.wait_for_selector(".caption.voted h3:has-text('teacher-two')")  # what stood before stands again
    page.reload()
    page.wait_for_selector("button.keep[aria-pressed=true]")
    page.wait_for_selector(".caption.voted h3:has-text('teacher-two')")
    page.keyboard.press("0")
    page.wait_for_selector("button.bad[aria-pressed=true]")
    page.keyboard.press("d")
    page.wait_for_selector("button.drop[aria-pressed=true]")
    saved(page)
    assert [v["kind"] for v in standing(clip)] == ["best", "keep", "edit", "undo", "bad", "drop"]


def test_two_people_vote_at_once_and_the_panel_counts_and_exports_them(visit, clips):
    pages = []
    for who, key in ("Bo", "1"), ("Cy", "3"):
        page = visit(row(9, clips))
        page.get_by_role("article", name="Caption of teacher/one").wait_for()
        page.keyboard.press(key)
        named(page, who)
        pages.append(page)
    for page in pages:
        saved(page)
    panel = visit("view=votes")
    panel.get_by_role("heading", name="Agreement").wait_for()
    said = panel.locator("main").inner_text()
    assert "Bo" in said
    assert "Cy" in said
    with panel.expect_download() as download:
        panel.get_by_role("link", name="Export the choices").click()
    lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    mine = {r["who"]: r for r in lines if r["clip_id"] == clips[9].clip_id}
    assert {who: r["captions"][r["chosen"]]["model"] for who, r in mine.items()} == {
        "Bo": "teacher/one",
        "Cy": "teacher-three",
    }


def test_after_a_vote_the_next_clip_that_nobody_voted_on_is_shown(visit, clips):
    page = visit(f"voted=none&clip={clips[14].clip_id}&at=0")
    page.get_by_role("article", name="Caption of teacher/one").wait_for()
    first = query(page)["clip"]
    page.keyboard.press("a")
    page.keyboard.press("1")
    named(page, "Di")
    until(page, f"!location.hash.includes('{first[0]}')")
    assert query(page)["at"] == ["0"]  # the one voted on has left the list
    assert [v["who"] for v in standing(clips[14])] == ["Di"]


def test_a_server_that_is_killed_loses_no_vote(visit, clips):
    with Server(str(RUN), port=18801) as server:
        page = visit(f"{server.url}#{row(16, clips)}", expect_errors=True)
        page.get_by_role("article", name="Caption of teacher/one").wait_for()
        page.keyboard.press("1")
        named(page, "Ed")
        saved(page)
        server.kill()
        page.keyboard.press("2")
        page.get_by_text("not saved yet").wait_for()
        assert [v["model"] for v in standing(clips[16])] == ["teacher/one"]
    page.goto("about:blank")  # closed before anything answers: the vote waits in the browser
    with Server(str(RUN), port=server.port) as again:
        assert again.port == server.port
        page.goto(f"{again.url}#{row(17, clips)}")
        saved(page)
        assert [v["model"] for v in standing(clips[16])] == ["teacher/one", "teacher-two"]


@pytest.fixture
def changing(clips, tmp_path, monkeypatch) -> Iterator[tuple[str, Store]]:
    """A run of its own, served from a thread, where changes are looked for at every question."""
    shutil.copytree(OTHER, tmp_path / "run")
    store = Store(str(tmp_path / "run"))
    monkeypatch.setattr(session, "LOOK_S", 0.0)
    inspector = Inspector(Index(store))
    inspector.read()
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application(inspector), log_level="error", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://localhost:{listening.getsockname()[1]}/", store
    server.should_exit = True
    thread.join()


def test_a_layer_that_someone_adds_is_told_and_shown_when_it_is_asked_for(clips, changing, visit):
    url, store = changing
    page = visit(f"{url}#{row(0, clips)}")
    page.get_by_role("article", name="Caption of hostile").wait_for()
    layer = Layer("caption:added", 1)
    layers.create(store, layer)
    caption = caption_row(Caption("added", "Zebras graze."))
    layers.write(store, layer, "000000-inspected", [{"clip_id": clips[0].clip_id, "caption": caption}])
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as when its tab is shown again
    page.get_by_role("button", name="Read it anew").click()
    page.get_by_role("button", name="Show it").click()
    page.get_by_role("article", name="Caption of added").wait_for()
    assert query(page)["clip"] == [clips[0].clip_id]


# ---------------------------------------------------------------- comparisons


def test_a_blind_comparison_hides_the_names_and_counts_every_answer(visit):
    page = visit("view=ab&a=teacher/one&b=teacher-three")
    named(page, "Flo")
    sides = page.locator(".side .text")
    sides.first.wait_for()
    assert not any(m in page.locator(".pair").inner_text() for m in inspected.MODELS)
    shown = sides.all_inner_texts()
    for done, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown"], 1):
        page.keyboard.press(key)
        page.locator(".pair .soft", has_text=re.compile(f"^{done} judged")).wait_for()
    assert sides.all_inner_texts() != shown
    page.get_by_text("Result", exact=True).click()
    page.get_by_text("3 pairs").wait_for()
    assert page.locator(".intervals dt").count() == 2
    lines = [json.loads(line) for f in RUN.glob("votes/*") for line in f.read_text().splitlines()]
    assert [v["answer"] for v in lines if v["who"] == "Flo"] == ["left", "right", "tie"]


def test_two_runs_show_what_changed_in_words(visit, clips):
    page = visit("view=compare")
    changed = page.locator(".changes > li")
    changed.first.wait_for()
    assert changed.count() == sum(i % 3 == 0 for i in range(len(clips)))
    assert changed.first.locator("ins").all_inner_texts() == ["It rains."]
    page.get_by_role("button", name="other caption").click()
    until(page, "location.hash.includes('change=caption')")


def test_a_page_that_is_mailed_filters_and_shows_its_clips_without_a_server(visit, clips, tmp_path):
    file = tmp_path / "sample.html"
    command = [sys.executable, "-m", "jobs.inspect", str(RUN), "--static", str(file)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    page = visit(f"file://{file}")
    total(page, len(clips))
    page.get_by_role("group", name="dropped by").get_by_role("button", name="still").click()
    total(page, sum(c.scores["motion"] < 0.2 for c in clips))
    page.get_by_label("Sort").select_option("-gap")
    page.locator(".card a").first.click()
    page.get_by_role("article", name="Caption of hostile").wait_for()
    assert page.locator(".filmstrip button").count() > 0
    assert page.locator(".votebar").count() == 0
    assert page.evaluate("window.owned") is None


# ---------------------------------------------------------------- for everyone


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgb = (c) => { if (!known.has(c)) known.set(c, drawn(c)); return known.get(c); };
  const drawn = (c) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const lum = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .picture, option, .sr")) continue;
    const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(under(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
}"""


NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, [role=slider]")]
  .filter((e) => e.checkVisibility() && !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
  .map((e) => e.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_and_every_control_a_name(visit, server, clips, scheme):
    page = visit("rule=still", color_scheme=scheme)
    for address, there in (
        ("rule=still", ".card"),
        (row(0, clips), ".caption"),
        ("view=funnel", "tbody"),
        ("view=compare", ".changes > li"),
        ("view=votes", ".pairs"),
    ):
        page.goto(f"{server.url}#{address}")  # only what is behind '#' changes: the page stays
        page.locator(there).first.wait_for()
        page.locator("[aria-busy=true]").first.wait_for(state="detached")
        assert page.evaluate(CONTRAST) == [], address
        assert page.evaluate(NAMELESS) == [], address


def test_light_and_dark_follow_the_system_until_one_is_chosen(visit):
    page = visit("", color_scheme="dark")
    page.locator(".card").first.wait_for()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.keyboard.press("t")
    until(page, f"{background} !== '{dark}'")
    light = page.evaluate(background)
    page.reload()
    until(page, f"{background} === '{light}'")


def test_on_a_phone_the_filters_lie_in_a_drawer_and_nothing_is_wider_than_the_screen(visit, clips):
    page = visit("", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    total(page, len(clips))
    assert page.locator(".filters").is_hidden()
    page.get_by_role("button", name="Filters", exact=True).tap()
    page.get_by_role("group", name="dropped by").get_by_role("button", name="still").tap()
    page.get_by_role("button", name="Close the filters").tap(position={"x": 370, "y": 400})
    total(page, sum(c.scores["motion"] < 0.2 for c in clips))
    page.locator(".card a").first.tap()
    page.locator(".caption").first.wait_for()
    page.get_by_role("button", name="all bad").tap()
    named(page, "Gil")
    saved(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
