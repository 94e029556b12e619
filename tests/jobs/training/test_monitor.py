"""What a run leaves to look at: no step twice, nothing lost to a kill, videos with every frame."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs.training.page import monitor
from jobs.training.page.monitor import Metrics, Monitor, write_samples
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Evaluation
from pipeline.recipe import RecipeError


def recipe(**run) -> TrainRecipe:
    """A recipe whose model need not exist."""
    fields = {
        name: field.get_default(call_default_factory=True) for name, field in TrainRecipe.model_fields.items()
    }
    found = TrainRecipe.model_construct(**fields | {"name": "a test", "model": None})
    return found.model_copy(update={"run": found.run.model_copy(update=run)})


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def video(seed: int = 0, frames: int = 5, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.randint(
        0, 256, (frames, height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# ---------------------------------------------------------------- numbers


def test_numbers_come_back_from_the_rows_and_from_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = Monitor(tmp_path, recipe())
    for step in (10, 20, 30):
        watch.scalars(step, {"loss": 1 / step, "lr": 1e-4})
    watch.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (s, pytest.approx(1 / s)) for s in (10, 20, 30)
    ]


def test_a_resumed_run_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = Monitor(tmp_path, recipe())
    for step in range(1, 8):
        watch.scalars(step, {"loss": float(step), "frechet/x": 1.0})
    del watch  # killed: never closed
    watch = Monitor(tmp_path, recipe())
    watch.scalars(4, {"loss": 40.0})  # goes on after step 3
    watch.scalars(5, {"loss": 50.0})
    watch.close()
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == wanted
    assert ["frechet/x" in r for r in rows(tmp_path)] == [True, True, True, False, False]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == wanted


def test_samples_of_a_later_step_are_not_shown_after_a_resume(tmp_path):
    watch = Monitor(tmp_path, recipe())
    for step in (3, 6, 9):
        watch.evaluation(step, Evaluation(videos={f"seen at {step}": video()}))
    watch = Monitor(tmp_path, recipe())
    watch.evaluation(6, Evaluation(videos={"seen again at 6": video()}))
    watch.close()
    text = (tmp_path / "page.html").read_text()
    assert "seen again at 6" in text
    assert "step 3" in text
    assert "step 9" not in text


def test_resume_names_the_step_where_logging_was_denser(tmp_path):
    watch = Monitor(tmp_path, recipe())
    for step in (5, 10, 12, 14):
        watch.scalars(step, {"loss": 1.0})
    watch = Monitor(tmp_path, recipe())
    watch.resume(10)  # the checkpoint; the next row comes at 20 only
    watch.scalars(20, {"loss": 2.0})
    watch.close()
    assert [r["step"] for r in rows(tmp_path)] == [5, 10, 20]


def test_a_step_that_gets_more_numbers_stays_one_row(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(1, {"a": 1.0})
    metrics.write(2, {"a": 0.123456789012345, "b": 2.0})
    metrics.write(2, {"frechet/x": 3.0})
    metrics.write(2, {"a": 1.0})  # shorter than what it replaces
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]  # and nothing is left of that
    metrics.write(3, {"a": 5.0})
    found = [{k: v for k, v in r.items() if k != "time"} for r in rows(tmp_path)]
    assert found == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 1.0, "b": 2.0, "frechet/x": 3.0},
        {"step": 3, "a": 5.0},
    ]


def test_a_torn_last_row_is_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "time": 0}\n{"step": 2, "time": 0}\n{"step": 3, "ti')
    metrics = Metrics(file)
    metrics.write(3, {"a": 1.0})
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


def test_rows_are_json_for_every_reader_even_of_nan(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (found["a"], found["b"], found["c"]) == (None, None, 1.0)


def test_an_earlier_step_is_a_mistake_of_the_caller(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(5, {"a": 1.0})
    with pytest.raises(ValueError, match="step 4 after those of step 5"):
        metrics.write(4, {"a": 1.0})


def test_a_kill_at_any_moment_leaves_whole_rows(tmp_path):
    """A process that logs as fast as it can, killed with no warning at several moments, goes on each time."""
    code = (
        "import sys; from pathlib import Path; from jobs.training.page.monitor import Metrics\n"
        "m = Metrics(Path(sys.argv[1])); step = m.last['step'] if m.last else 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1; m.write(step, {'loss': step / 7}); m.write(step, {'frechet/x': 1.0, 'loss': 1.0})\n"
    )
    file, last = tmp_path / "metrics.jsonl", 0
    for seed in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + 0.017 * seed)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        steps = [json.loads(line)["step"] for line in file.read_bytes().splitlines(keepends=True)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > last
        last = len(steps)


def test_another_rank_writes_nothing(tmp_path):
    watch = Monitor(tmp_path / "out", recipe(wandb=True), enabled=False)
    watch.plan("x")
    watch.resume(3)
    watch.scalars(1, {"loss": 1.0})
    watch.evaluation(1, Evaluation(videos={"a": video()}))
    watch.close()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- Weights & Biases


def test_without_the_package_wandb_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        RecipeError, match=r"run\.wandb: the package wandb is not installed: pip install wandb"
    ):
        Monitor(tmp_path, recipe(wandb=True))


def test_wandb_gets_numbers_and_videos_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    names = []
    for step in (1, 2):
        watch = Monitor(tmp_path, recipe(wandb=True))
        names.append(watch.wandb.id)
        logged = []
        log = watch.wandb.log
        monkeypatch.setattr(watch.wandb, "log", lambda x, log=log, to=logged: (to.append(x), log(x)))
        watch.scalars(step, {"loss": 0.5})
        watch.evaluation(step, Evaluation(videos={"a dog": video()}))
        watch.close()
        assert logged[0] == {"loss": 0.5, "step": step}
        assert isinstance(logged[1]["videos"][0], wandb.Video)
    assert names[0] == names[1]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


# ---------------------------------------------------------------- videos


def test_samples_appear_whole_and_replace_those_of_the_same_step(tmp_path):
    write_samples(tmp_path, 500, {"old": video().numpy(), "older": video().numpy()}, 8)
    folder = write_samples(
        tmp_path, 500, {"0 A red “dog”/../x": video(1).numpy(), "../": video(2).numpy()}, 8
    )
    assert folder == tmp_path / "step-00000500"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000500"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "00-0-a-red-dog-x.mp4",
        "01-video.mp4",
        "samples.json",
        "sheet.png",
    ]
    listed = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert [s["name"] for s in listed] == ["0 A red “dog”/../x", "../"]
    assert [s["frames"] for s in listed] == [5, 5]


def test_videos_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\]"):
        Monitor(tmp_path, recipe()).evaluation(1, Evaluation(videos={"a": torch.zeros(3, 8, 8, 3)}))


def test_the_page_is_there_after_plan_samples_and_close_and_at_times_between(tmp_path, monkeypatch):
    watch = Monitor(tmp_path, recipe())
    watch.plan("12 parameters")
    assert "12 parameters" in (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").unlink()
    watch.scalars(1, {"loss": 1.0})
    assert not (tmp_path / "page.html").exists()
    monkeypatch.setattr(monitor, "PAGE_EVERY_S", 0.0)
    watch.scalars(2, {"loss": 1.0})
    assert (tmp_path / "page.html").exists()
    watch.evaluation(2, Evaluation(videos={"a dog": video()}))
    assert "a dog" in (tmp_path / "page.html").read_text()
    watch.scalars(3, {"loss": 0.125})
    watch.close()
    assert "step 3" in (tmp_path / "page.html").read_text()
    assert not list(tmp_path.glob(".*"))
