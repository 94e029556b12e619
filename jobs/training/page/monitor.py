"""What a training run leaves to look at, in OUT:

    metrics.jsonl           a row {"step", "time", …} for every step that was logged
    tensorboard/            the same as event files
    texts/step-00000500.json  what the model said of some clips, and should (`jobs.training.page.said`)
    samples/step-00000500/  every video as mp4, sheet.png of all, samples.json with what they show
    plan.txt                what was announced before the first step
    page.html               one page of it all that opens from disk (`jobs.training.page.page`)

and on Weights & Biases where `run.wandb` is set. `jobs.training.page.measures` has the names that the page knows;
anything else gets a chart, too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.training.page import page, said
from jobs.training.recipe_core import TrainRecipe
from jobs.videos import contact_sheet, write_mp4
from pipeline.faults import one_line
from pipeline.recipe import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.training.task import Evaluation

PAGE_EVERY_S = 300.0  # the page is written anew at least so often, while steps are logged
VIDEO_SIDE = 128  # pixels that the shorter side of an mp4 has at least


class Monitor:
    """Scalars, videos and the page of one run; a monitor that is not enabled (another rank's) does nothing.

    A run that is resumed drops what was logged after the step it resumes from: call `resume` with that step,
    or just go on, and the first step that is logged replaces itself and all after it. So no step is there
    twice, however often a run was killed.

    Raises RecipeError where W&B is asked for and cannot be had, OSError where OUT cannot be written.
    """

    def __init__(self, out: Path, recipe: TrainRecipe, enabled: bool = True):
        self.out, self.recipe, self.enabled = Path(out), recipe, enabled
        self.begun = False
        self.page_time = time.monotonic()
        if not enabled:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.metrics = Metrics(self.out / "metrics.jsonl")
        self.wandb = open_wandb(self.out, recipe) if recipe.run.wandb else None

    def resume(self, step: int) -> None:
        """Forget what was logged after `step`: the run goes on from there."""
        if self.enabled and not self.begun:
            from torch.utils.tensorboard import SummaryWriter

            self.metrics.keep(step)
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
            self.begun = True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step; several calls for one step add to its row."""
        if not self.enabled:
            return
        self.resume(step - 1)
        self.metrics.write(step, values)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values | {"step": step})
        if time.monotonic() - self.page_time > PAGE_EVERY_S:
            self._write_page()

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Keep what a model can do by now; a second call for a step replaces its videos and texts.

        Raises ValueError for videos of another type or shape.
        """
        if found.scalars:
            self.scalars(step, found.scalars)
        if found.videos:
            self._videos(step, found.videos)
        if found.texts and self.enabled:
            self.resume(step - 1)
            self.metrics.write(step, {})  # the run has been here
            said.write(self.out / "texts", step, found.texts)
            for place, told in enumerate(found.texts):
                self.board.add_text(f"told/{place}", f"{told.wanted}\n\n{told.said}", step)
            self.board.flush()
            self._write_page()

    def _videos(self, step: int, videos: dict[str, Tensor]) -> None:
        if not self.enabled:
            return
        self.resume(step - 1)
        self.metrics.write(step, {})  # the run has been here: the page leaves out samples of later steps
        pictures = {name: video.cpu().numpy() for name, video in videos.items()}
        folder = write_samples(self.out / "samples", step, pictures, self.recipe.data.fps or 8.0)
        sheet = np.asarray(contact_sheet(pictures))
        self.board.add_image("samples", sheet, step, dataformats="HWC")
        self.board.flush()
        if self.wandb is not None:
            import wandb

            shown = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
            media = [wandb.Video(str(folder / s["file"]), caption=s["name"], format="mp4") for s in shown]
            sheet_file = wandb.Image(str(folder / "sheet.png"))
            self.wandb.log({"samples": sheet_file, "videos": media, "step": step})
        self._write_page()

    def plan(self, text: str) -> None:
        """Keep what was announced before the first step."""
        if self.enabled:
            said.replace(self.out / "plan.txt", text.encode())
            self._write_page()

    def close(self) -> None:
        """Write the page a last time and let go of all files."""
        if not self.enabled:
            return
        self._write_page()
        if self.begun:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.metrics.close()

    def _write_page(self) -> None:
        page.write(self.out, self.recipe.model_dump(mode="json"))
        self.page_time = time.monotonic()


class Metrics:
    """A file of JSON rows in the order of their steps, whole after a kill at any moment.

    A row is appended in one write, which no signal tears; a row that gets more numbers is replaced in one
    write by a line that is at least as long.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.keep(math.inf)

    def keep(self, until: float) -> None:
        """Cut off the rows after step `until`, and a last line that a full disk cut short."""
        self.start = self.end = 0  # of the last row, bytes
        self.last: dict[str, Any] | None = None
        for line in self.path.read_bytes().splitlines(keepends=True):
            row = page.parse(line)
            if row is None or row["step"] > until:
                break
            self.start, self.end, self.last = self.end, self.end + len(line), row
        os.ftruncate(self.file, self.end)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Raises ValueError for a step before the last."""
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        at = self.end
        if self.last is not None and self.last["step"] >= step:
            if self.last["step"] > step:
                raise ValueError(f"metrics of step {step} after those of step {self.last['step']}")
            row, at = self.last, self.start
        row |= {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        line = json.dumps(row).encode().ljust(self.end - at - 1) + b"\n"
        os.pwrite(self.file, line, at)
        self.start, self.end, self.last = at, at + len(line), row

    def close(self) -> None:
        os.close(self.file)


def open_wandb(out: Path, recipe: TrainRecipe) -> Any:
    """A W&B run that goes on where OUT's earlier one ended; offline with WANDB_MODE=offline."""
    try:
        import wandb
    except ImportError as e:
        raise RecipeError(
            "run.wandb: the package wandb is not installed: pip install wandb, or leave run.wandb false"
        ) from e
    name = out / "wandb.id"
    if not name.exists():
        said.replace(name, uuid.uuid4().hex[:8].encode())
    try:
        run = wandb.init(
            project="clipmill",
            name=recipe.name,
            id=name.read_text(),
            resume="allow",
            dir=str(out),
            config=recipe.model_dump(mode="json"),
        )
    except wandb.errors.Error as e:
        why = one_line(e).rstrip(".")
        raise RecipeError(f"run.wandb: {why}; run 'wandb login', or set WANDB_MODE=offline") from e
    run.define_metric("*", step_metric="step")  # not W&B's own counter, which cannot go back
    return run


# ---------------------------------------------------------------- videos to look at


def write_samples(root: Path, step: int, videos: dict[str, np.ndarray], fps: float) -> Path:
    """Write root/step-… with every video as mp4, sheet.png and samples.json; it appears whole. Returns it."""
    final = root / f"step-{step:08d}"
    aside = root / f".{final.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    listed = []
    for i, (name, video) in enumerate(videos.items()):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-")
        file = f"{i:02d}-{slug or 'video'}.mp4"
        write_mp4(aside / file, video, fps, VIDEO_SIDE)
        listed.append({"name": name, "file": file, "frames": len(video), "fps": fps})
    contact_sheet(videos).save(aside / "sheet.png")
    (aside / "samples.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    aside.replace(final)
    return final
