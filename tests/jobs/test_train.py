"""clipmill train: from shards, resumable bit for bit; what is wrong is one line and exit 2."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from jobs import train
from jobs.training.checkpoint import checkpoints
from jobs.training.distributed import connect
from jobs.training.exported import load_model
from jobs.training.loop import train as run_training
from jobs.training.recipe import load_training
from tests.fixtures.run_folder import make_run_folder
from tests.fixtures.shrunken import TINY_VLM
from tests.fixtures.toy_training import Notes, in_ranks, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).parents[2]
TINY = [
    f"model={TINY_VLM}",
    "frames.frames=2",
    "data.tokens=256",
    "data.lanes=2",
    "data.pool=2",
    "tokenizer=280",
    "held_out=0",
    "optimizer.warmup=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A finished run of a few clips, sharded."""
    folder = tmp_path_factory.mktemp("run")
    make_run_folder(folder)
    from jobs import shard

    assert shard.main([str(folder)]) == 0
    return str(folder)


def command(data, out, *more):
    sets = [x for item in (*TINY, "run.sample_every=0", "data.workers=0") for x in ("--set", item)]
    return ["vlm", data, "--recipe", "small-vlm", "--out", str(out), "--device", "cpu", *sets, *more]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stopping_and_resuming_equals_not_stopping(data, tmp_path):
    """With no worker, and with one on the way."""
    assert train.main(command(data, tmp_path / "whole", "--steps", "7")) == 0
    assert train.main(command(data, tmp_path / "parts", "--steps", "3", "--set", "data.workers=1")) == 0
    assert train.main(command(data, tmp_path / "parts", "--steps", "7")) == 0
    same(weights(tmp_path / "whole", 7), weights(tmp_path / "parts", 7))
    whole, parts = (checkpoints(tmp_path / name)[7] for name in ("whole", "parts"))
    from jobs.training.exported import read_meta

    assert (
        read_meta(whole)["loader"]
        == read_meta(parts)["loader"]
        == {
            **read_meta(parts)["loader"],
            "batches": 7,
        }
    )
    same(load_model(tmp_path / "whole").weights["vlm"], load_model(tmp_path / "parts").weights["vlm"])


def test_other_settings_do_not_overwrite_a_checkpoint(data, tmp_path, capsys):
    assert train.main(command(data, tmp_path, "--steps", "1")) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main(command(data, tmp_path, "--steps", "2", "--set", "optimizer.lr=1")) == 2
    err = capsys.readouterr().err
    assert "optimizer.lr 0.001, this recipe has 1.0" in err
    assert "another --out" in err
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "shards"),
        (
            ["--set", "data.buckets=[{frames: 2, height: 32, width: 64}]"],
            "buckets: a vision–language model's",
        ),
        (["--set", "data.batch=2"], "set packing: false, or tokens"),
        (["--set", "train.language=lora"], "add lora: {rank: 16}"),
        (["--set", "tokenizer=200"], "261"),
        (["--set", "optimizer.learning_rate=1"], "optimizer.learning_rate"),
        (["--set", "model={kind: llava, towr: x}"], "towr"),
        (["--recipe", "nothing"], "'nothing' not found"),
        (["--device", "gpu"], "device 'gpu'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    assert train.main(command(str(tmp_path / "empty"), tmp_path / "out", *arguments)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_and_a_file_are_told_apart_from_one_without_shards(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, says in (("nosuch", "nosuch is not there"), ("file", "file is a file")):
        assert train.main(command(str(tmp_path / name), tmp_path / "out")) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1


def test_a_recipe_of_another_kind_is_refused(tmp_path, capsys):
    arguments = command(str(tmp_path), tmp_path / "out")
    assert train.main(["vae", *arguments[1:]]) == 2
    assert "recipe small-vlm trains vlm" in capsys.readouterr().err


def test_training_imports_no_ray(data, tmp_path):
    code = (
        "import sys\nfrom jobs import train\n"
        f"assert train.main({command(data, tmp_path, '--steps', '1')!r}) == 0\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_is_quick():
    """Half a second on an idle machine; here its processor time, which a busy one does not change."""
    before = os.times()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert min(spent, time.perf_counter() - start) < 0.5
    assert "torchrun" in done.stdout
    assert "--set" in done.stdout


# ---------------------------------------------------------------- several ranks, files


def few_clips_rank(data, out, wanted):
    run_training(load_training("small-vlm", wanted), data, out, device="cpu", monitor=Notes)


def test_more_ranks_than_batches_do_not_wait_for_each_other(data, tmp_path):
    """Few clips in sequences that hold all of them: less than one sequence a lane, two ranks."""
    wanted = [
        *TINY,
        "data.workers=0",
        "data.tokens=512",
        "data.micro_batches=2",
        "run.steps=2",
        "ema.lengths=[]",
    ]
    assert in_ranks(2, few_clips_rank, data, tmp_path, wanted) == [0, 0]
    assert list(checkpoints(tmp_path)) == [2]


def test_a_recipe_file_and_overrides_are_taken(data, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({**load_training("small-vlm", TINY).model_dump(mode="json"), "name": "mine"})
    )
    arguments = command(data, tmp_path / "out", "--steps", "1")
    arguments[3] = str(file)
    assert train.main(arguments) == 0
    assert load_model(tmp_path / "out").recipe["name"] == "mine"
    with connect("cpu") as world:
        assert world.size == 1


# ---------------------------------------------------------------- launchers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_ends_the_step_and_saves(data, tmp_path, number):
    """As a cluster's scheduler or Ctrl-C sends it: to the processes that decode, too."""
    arguments = command(
        data, tmp_path, "--steps", "100000", "--set", "data.workers=2", "--set", "run.log_every=1"
    )
    metrics = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *arguments],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert checkpoints(tmp_path)


@pytest.fixture
def one_thread():
    """As launchers give their workers: with more, sums have another order, which Adam makes visible.

    A bias of attention's keys has a gradient of 0 in theory and of noise in practice, and the step that Adam
    takes along it is as long as any.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_process_that_decodes_is_killed_and_training_ends_with_a_sentence(data, tmp_path):
    arguments = command(
        data, tmp_path, "--steps", "100000", "--set", "data.workers=2", "--set", "run.log_every=1"
    )
    metrics = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [
            int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a process that decodes was ended from outside" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


TWO = ["--steps", "2", "--set", "data.micro_batches=2"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ray_train_workers_train_as_one(data, tmp_path):
    assert train.main(command(data, tmp_path / "one", *TWO)) == 0
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *command(data, tmp_path / "two", *TWO, "--ray", "2")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    a, b = (weights(tmp_path / name, 2) for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-6) for k in a)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_torchrun_starts_ranks_that_train_as_one(data, tmp_path):
    assert train.main(command(data, tmp_path / "one", *TWO)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "jobs.train", *command(data, tmp_path / "two", *TWO)]
    done = subprocess.run(
        launch, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    a, b = (weights(tmp_path / name, 2) for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-6) for k in a)
