"""`transformers serve` answers with an exported model, over the API that everybody's clients speak, as it does here."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from jobs.training.vlm.speaker import load_speaker
from tests.fixtures import tiny_qwen_vl, tiny_speaker

PATIENCE = 60  # seconds


@pytest.fixture(scope="module", params=["llava_onevision", "qwen_vl"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speaker")
    return (
        tiny_speaker.export(folder) if request.param == "llava_onevision" else tiny_qwen_vl.checkpoint(folder)
    )


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    """Of a server that has loaded the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    log = tmp_path_factory.mktemp("log") / "serve.log"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [
        str(program),
        "serve",
        str(model),
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as f, subprocess.Popen(command, stdout=f, stderr=f, env=offline) as server:
        try:
            end = time.monotonic() + PATIENCE
            while not healthy(port):
                assert server.poll() is None, log.read_text()
                if time.monotonic() > end:
                    pytest.skip(f"transformers serve did not start within {PATIENCE} s")
                time.sleep(0.2)
            yield OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE
            )
        finally:
            server.kill()


def test_pictures_and_turns_are_answered_as_the_model_answers_here(model, client):
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(2):  # LLaVA-OneVision's own processor cuts a single picture into tiles, and not several
        held = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(held, "PNG")
        jpegs.append(held.getvalue())
    speaker = load_speaker(model)
    shown = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(x).decode()}"}}
        for x in jpegs
    ]
    visuals = [speaker.image(x) for x in jpegs]
    talk: list[dict] = []
    ours: list[dict] = []
    for turn, question in enumerate(("What is it?", "Which way?")):
        text = {"type": "text", "text": question}
        talk.append({"role": "user", "content": [*shown, text] if turn == 0 else [text]})
        ours.append({"role": "user", "content": question})
        answer = client.chat.completions.create(
            model=str(model), messages=talk, max_tokens=8, temperature=0.0
        )
        said = answer.choices[0].message.content
        (expected,) = speaker.answer([ours], [visuals], most=8)
        assert len(expected) > 3
        assert " ".join(said.split()) == expected
        for messages in (talk, ours):
            messages.append({"role": "assistant", "content": expected})
