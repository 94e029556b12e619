"""Shards: exact bytes, full provenance, one plan whatever the order, and no half-done folder ever."""

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.shard import main
from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.layers import clip_files
from pipeline.recipe import parse
from pipeline.shards import pack
from pipeline.shards.pack import shard
from tests.fixtures.run_folder import CAPTIONERS, EMBEDDING, EMBEDDING_SIZE, make_run_folder

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("pack") / "run"
    recipe = make_run_folder(root)
    store = Store(str(root))
    return store, recipe, shard(store, recipe)


def with_shards(recipe, **options):
    data = recipe.model_dump(mode="json")
    return parse(data | {"shards": data["shards"] | options}, [], "test")


def clips_of(store):
    return {row["clip_id"]: row for name in clip_files(store) for row in store.read_table(name).to_pylist()}


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder and what is in it."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def outcome(root: Path) -> dict[str, str]:
    """What a run leaves behind, but for what it started from."""
    return {n: h for n, h in tree(root).items() if n.startswith(("shards", "decisions")) or n == "run.json"}


def members(store):
    """{key: {kind: bytes}} of all tars, read by Python's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for name in store.list("shards", ".tar"):
        with tarfile.open(store.path(name)) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return found


def test_the_shards_hold_exactly_the_kept_clips_with_their_bytes(packed):
    store, _, decisions = packed
    found, clips = members(store), clips_of(store)
    assert sorted(found) == sorted(decisions.filter(decisions["keep"])["clip_id"].to_pylist())
    for key, parts in found.items():
        assert set(parts) == {"mp4", "json", "txt"}
        assert hashlib.sha256(parts["mp4"]).hexdigest() == clips[key]["media_sha256"]


def test_offsets_in_index_and_decisions_point_at_the_mp4(packed):
    store, _, decisions = packed
    ranges, clips = Ranges(store), clips_of(store)
    for row in store.read_table("shards/index.parquet").to_pylist():
        mp4 = ranges.read(f"shards/{row['tar']}", row["offset"], row["size"])
        assert hashlib.sha256(mp4).hexdigest() == clips[row["clip_id"]]["media_sha256"]
        about = json.loads(ranges.read(f"shards/{row['tar']}", row["json_offset"], row["json_size"]))
        assert about["clip_id"] == row["clip_id"]
        assert row["tar"].startswith(row["bucket"] + "/")
        assert row["score_motion"] == clips[row["clip_id"]]["score_motion"]
        assert row["caption"]
    for row in decisions.to_pylist():
        if row["keep"]:
            mp4 = ranges.read(row["shard"], row["offset"], row["size"])
            assert hashlib.sha256(mp4).hexdigest() == clips[row["clip_id"]]["media_sha256"]
        else:
            assert (row["shard"], row["offset"], row["size"]) == (None, None, None)
    assert store.read_table("decisions.parquet").equals(decisions)


def test_every_sample_says_where_it_is_from_and_why_it_was_kept(packed):
    store, recipe, decisions = packed
    clips, run = clips_of(store), json.loads(store.read_bytes("run.json"))
    copies = {r["duplicate_of"]: r["clip_id"] for r in decisions.to_pylist() if r["duplicate_of"]}
    for key, parts in members(store).items():
        about, clip = json.loads(parts["json"]), clips[key]
        for name in (
            "source",
            "source_sha256",
            "start_s",
            "end_s",
            "start_frame",
            "end_frame",
            "width",
            "fps",
        ):
            assert about[name] == clip[name]
        assert about["video"]["sample_aspect_ratio"] == 1.0
        assert [c["model"] for c in about["captions"]] == CAPTIONERS
        assert json.loads(about["captions"][0]["scores"]) == dict(clip["captions"][0]["scores"])
        assert about["caption"] == parts["txt"].decode()
        assert about["scores"]["motion"] == clip["score_motion"]
        assert json.loads(about["meta"]) == dict(clip["meta"])
        assert json.loads(about["kept"]["rules"])["still"] == {
            "column": "score_motion",
            "min": 0.1,
            "max": None,
            "value": clip["score_motion"],
        }
        assert about["kept"]["over_duplicates"] == copies.get(key, "")
        assert about["made_by"]["measure_key"] == recipe.measure_key()
        assert about["made_by"]["versions"] == run["versions"]
        assert "." not in key


def test_embeddings_are_added_where_asked_for(tmp_path):
    recipe = with_shards(make_run_folder(tmp_path), embeddings=True)
    store = Store(str(tmp_path))
    shard(store, recipe)
    clips = clips_of(store)
    for key, parts in members(store).items():
        vector = np.load(io.BytesIO(parts[f"{EMBEDDING}.npy"]))
        assert vector.dtype == np.float32
        assert vector.shape == (EMBEDDING_SIZE,)
        np.testing.assert_array_equal(vector, np.array(clips[key][f"emb_{EMBEDDING}"], np.float32))


def test_the_bytes_depend_on_the_clips_alone_not_on_units_time_or_place(tmp_path):
    outcomes = []
    for name, units in (("a", 1), ("b", 3)):
        recipe = make_run_folder(tmp_path / name, units=units)
        shard(Store(str(tmp_path / name)), recipe)
        outcomes.append(tree(tmp_path / name / "shards"))
    assert outcomes[0] == outcomes[1]


def test_another_seed_shuffles_anew(tmp_path):
    recipe = make_run_folder(tmp_path)
    store = Store(str(tmp_path))
    orders = []
    for seed in (0, 1):
        shard(store, with_shards(recipe, seed=seed, lengths_s=[1000]))
        orders.append(store.read_table("shards/index.parquet")["clip_id"].to_pylist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_tars_keep_to_the_limits(tmp_path):
    recipe = with_shards(make_run_folder(tmp_path), max_bytes=1 << 16, max_clips=2)
    store = Store(str(tmp_path))
    shard(store, recipe)
    index = store.read_table("shards/index.parquet").to_pylist()
    assert max(Counter(r["tar"] for r in index).values()) <= 2
    for name in store.list("shards", ".tar"):
        alone = sum(r["tar"] == name.removeprefix("shards/") for r in index) == 1
        assert store.size(name) <= 1 << 16 or alone


def test_an_unchanged_plan_rewrites_nothing(packed):
    store, recipe, _ = packed
    before = {p: p.stat().st_mtime_ns for p in Path(store.root).rglob("*") if p.is_file()}
    shard(store, recipe)
    assert {p: p.stat().st_mtime_ns for p in Path(store.root).rglob("*") if p.is_file()} == before


def test_a_shard_that_was_lost_is_made_again(tmp_path):
    recipe = make_run_folder(tmp_path)
    store = Store(str(tmp_path))
    shard(store, recipe)
    before = outcome(tmp_path)
    store.delete(store.list("shards", ".tar")[0])
    shard(store, recipe)
    assert outcome(tmp_path) == before


def test_a_changed_threshold_drops_clips_and_nothing_of_the_old_shards_stays(tmp_path):
    make_run_folder(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--set", "decide.rules.too_short.min=5"]) == 0
    store = Store(str(tmp_path))
    kept = store.read_table("shards/index.parquet")
    assert kept["duration_s"].to_numpy().min() >= 5
    assert sorted(members(store)) == sorted(kept["clip_id"].to_pylist())
    assert {p.name for p in tmp_path.iterdir()} - {".lock", "run.log"} == {
        *("clips", "videos", "media", "shards", "decisions.parquet", "run.json")
    }
    saved = json.loads(store.read_bytes("run.json"))["recipe"]
    assert saved["decide"]["rules"]["too_short"]["min"] == 5


KILL = """
import os, signal, sys
from jobs.shard import main

left = int(sys.argv[2])

def audit(event, args):
    global left
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
    if changes or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
main([sys.argv[1], "--set", "decide.rules.too_short.min=5"])
print(int(sys.argv[2]) - left)
"""


def reshard(folder: Path, kill_before: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILL, str(folder), str(kill_before)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_killed_anywhere_and_run_again_ends_like_an_undisturbed_run(tmp_path):
    """SIGKILL before one of the changes that a re-shard makes to the disk, then the same command again."""
    source, calm = tmp_path / "source", tmp_path / "calm"
    make_run_folder(source)
    assert main([str(source)]) == 0
    shutil.copytree(source, calm)
    changes = int(reshard(calm, 1 << 30).stdout.splitlines()[-1])
    expected = outcome(calm)
    assert expected != outcome(source)
    for n in {
        *range(0, changes, max(1, changes // 6)),
        *range(changes - 5, changes),
    }:  # the swap is at the end
        hurt = tmp_path / f"hurt{n}"
        shutil.copytree(source, hurt)
        assert reshard(hurt, n).returncode == -signal.SIGKILL
        if (hurt / "shards").exists():  # whole at every moment: the old shards or the new ones
            index = pq.read_table(hurt / "shards/index.parquet")
            assert set(members(Store(str(hurt)))) == set(index["clip_id"].to_pylist())
        assert main([str(hurt), "--set", "decide.rules.too_short.min=5"]) == 0
        assert outcome(hurt) == expected, f"killed before change {n} of {changes}"


@pytest.fixture
def blob(object_store, tmp_path, monkeypatch):
    """A fresh copy of a run folder in a bucket of a real S3 server, whenever it is called."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    make_run_folder(tmp_path / "blob")

    def make() -> Store:
        store = Store(f"{object_store.bucket()}/run")
        for path in (tmp_path / "blob").rglob("*"):
            if path.is_file():
                store.write_bytes(str(path.relative_to(tmp_path / "blob")), path.read_bytes())
        return store

    return make


def outcome_there(store: Store) -> dict[str, str]:
    """As `outcome`."""
    names = [n for n in store.list() if n.startswith(("shards", "decisions")) or n == "run.json"]
    return {n: hashlib.sha256(store.read_bytes(n)).hexdigest() for n in names}


def test_an_object_store_gets_the_same_shards(tmp_path, blob):
    recipe = make_run_folder(tmp_path / "disk")
    shard(Store(str(tmp_path / "disk")), recipe)
    store = blob()
    shard(store, with_shards(recipe, seed=7))
    shard(store, recipe)
    assert outcome_there(store) == outcome(tmp_path / "disk")


def test_on_an_object_store_an_interrupted_replacement_is_finished(tmp_path, blob, monkeypatch):
    recipe = make_run_folder(tmp_path / "disk")
    shard(Store(str(tmp_path / "disk")), recipe)
    store = blob()
    for n in range(100):
        shard(store, with_shards(recipe, lengths_s=[1000]))
        copies, copy = 0, store.files.copy

        def broken(a, b, copy=copy, n=n):
            nonlocal copies
            copies += 1
            if copies > n:
                raise KeyboardInterrupt
            copy(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(store.files, "copy", broken)
            try:
                shard(store, recipe)
                break
            except KeyboardInterrupt:
                assert not store.exists("shards/index.parquet")
        shard(store, recipe)
        assert outcome_there(store) == outcome(tmp_path / "disk")
    assert copies > 5


def test_nothing_kept_is_an_empty_index(tmp_path):
    recipe = make_run_folder(tmp_path)
    strict = parse(recipe.model_dump(mode="json"), ["decide.rules.too_short.min=99"], "test")
    store = Store(str(tmp_path))
    shard(store, strict)
    assert len(store.read_table("shards/index.parquet")) == 0
    assert store.list("shards", ".tar") == []
    shard(store, recipe)
    assert len(store.read_table("shards/index.parquet")) > 0


def test_a_damaged_staging_tar_ends_with_a_clear_error_and_the_old_shards(tmp_path, capsys):
    make_run_folder(tmp_path)
    assert main([str(tmp_path)]) == 0
    before = tree(tmp_path / "shards")
    tar = tmp_path / "media/000000-fixture.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    assert main([str(tmp_path), "--set", "shards.lengths_s=[9]"]) == 2
    assert "000000-fixture.tar is shorter than its index says" in capsys.readouterr().err
    assert tree(tmp_path / "shards") == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "holds no clipmill run"),
        (["run", "--set", "cut.crf=3"], "only decide.*, shards.*"),
        (["run", "--set", "shards.max_clip=3"], "unknown key"),
        (["run", "--recipe", "nothing"], "not found"),
        (["run", "--set", "decide.rules.a={column: nope, min: 1}"], "not measured"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, says):
    make_run_folder(tmp_path / "run", sources=2)
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_recipe_whose_measured_part_differs_lends_its_thresholds_only(tmp_path):
    recipe = make_run_folder(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("decode: {sample_fps: 9}\ndecide: {rules: {long: {column: duration_s, min: 5}}}\n")
    assert main([str(tmp_path), "--recipe", str(other)]) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["decode"] == recipe.model_dump(mode="json")["decode"]
    assert list(run["recipe"]["decide"]["rules"]) == ["long"]


def test_shard_needs_a_run(tmp_path):
    with pytest.raises(StoreError, match="clipmill curate"):
        pack.read_run(Store(str(tmp_path)))
