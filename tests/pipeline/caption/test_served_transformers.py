"""A real `transformers serve` with a tiny checkpoint: what the strict server of our own stands in for elsewhere."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline import recipe
from pipeline.caption import answers
from pipeline.caption.captioner import CaptionStage
from pipeline.caption.judge import JudgeStage
from pipeline.faults import WorkerFault
from pipeline.io.store import Store
from tests.fixtures.clips import noise, video

NEEDS = ("fastapi", "uvicorn", "openai", "accelerate")
missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"transformers serve needs {', '.join(missing)}")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(url, model) of a server that is up."""
    from tests.fixtures import tiny_vlm

    folder = tiny_vlm.qwen2_5_vl(tmp_path_factory.mktemp("served") / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder.parent / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=quiet)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def stage(served, store=None, **values):
    one = {"kind": "served", "url": served[0], "model": served[1], "name": "tiny", "frames": 4} | values
    one = {"parameters": {"max_tokens": 8, "temperature": 0}} | one
    made = CaptionStage(recipe.parse({"name": "x", "captions": [one]}, [], "x").captions[0], None, store)
    made.setup()
    return made


def clips(n):
    return video([noise(i) for i in range(4 * n)], [(4 * i, 4 * i + 4) for i in range(n)])


def said(v):
    return [c.captions[0] for c in v.clips]


def test_clips_are_captioned_and_alone_is_as_together(served, tmp_path):
    v = clips(4)
    stage(served)([v])
    together = said(v)
    tokens = [c.cost["completion_tokens"] for c in together]
    assert "truncated" in [c.outcome for c in together]  # random weights hardly ever end
    assert all(n == 8 if c.outcome == "truncated" else n <= 8 for c, n in zip(together, tokens, strict=True))
    assert len({c.text for c in together}) > 1
    assert len({c.cost["prompt_tokens"] for c in together}) == 1
    store = Store(str(tmp_path))
    stage(served, store, concurrency=1, batch=1)([v])
    assert said(v) == together
    assert answers.account(store, set())["completion_tokens"] == sum(tokens)


def test_pictures_and_their_number_change_what_it_is_charged_for(served):
    v = clips(1)
    counts = []
    for frames in (1, 2, 4):
        stage(served, frames=frames)([v])
        counts.append(said(v)[0].cost["prompt_tokens"])
    assert counts[0] < counts[1] < counts[2]


def test_its_refusals_are_final_and_in_its_words(served):
    v = clips(2)
    stage(served, parameters={"max_tokens": 4, "frobnicate": 1})([v])
    for c in said(v):
        assert c.outcome == "error"
        assert c.reason.endswith("HTTP 422: Unexpected fields in the request: {'frobnicate'}")
    other = stage(served, model="/no/such/model")
    other([v])
    assert "HTTP 400: Server is pinned to" in said(v)[0].reason


def test_a_structured_caption_of_a_model_that_knows_no_json_is_flagged(served):
    v = clips(1)
    stage(served, structured=True)([v])
    (c,) = said(v)
    assert (c.text, c.outcome) == ("", "empty")
    assert "broken_json" in c.flags
    assert c.cost["requests"] == 2


def test_the_judge_is_told_that_it_gives_no_logprobs(served):
    one = {"kind": "served_yes", "url": served[0], "model": served[1]}
    judge = recipe.parse({"name": "x", "captions": [], "choose": {"judges": [one]}}, [], "x").choose.judges[0]
    with pytest.raises((recipe.RecipeError, WorkerFault), match=r"gives no logprobs|Unexpected fields"):
        JudgeStage(judge).setup()
