"""Every reader of WebDataset shards finds the same samples. Megatron-Energon: see bench/readers.py."""

import hashlib
import importlib
import json
from pathlib import Path

import pytest

from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.shards.pack import shard
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("anywhere") / "run"
    recipe = make_run_folder(root)
    recipe = parse(recipe.model_dump(mode="json"), ["shards.max_clips=2", "shards.embeddings=true"], "test")
    shard(Store(str(root)), recipe)
    return root / "shards"


@pytest.fixture(scope="module")
def expected(shards):
    """{key: (sha256 of the mp4, caption)} by our own index."""
    reader = ShardReader(str(shards), decode=False, shuffle=False)
    found = {s["key"]: (digest(s["video"]), s["caption"]) for s in reader}
    assert len(found) == Store(str(shards)).read_table("index.parquet").num_rows > 5
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tars(shards: Path) -> list[str]:
    return sorted(str(p) for p in shards.rglob("*.tar"))


def test_webdataset(shards, expected):
    wds = pytest.importorskip("webdataset")
    dataset = wds.WebDataset(tars(shards), shardshuffle=False)
    found = {s["__key__"]: (digest(s["mp4"]), s["txt"].decode()) for s in dataset}
    assert found == expected


def test_webdataset_decodes_json_text_and_embeddings(shards, expected):
    wds = pytest.importorskip("webdataset")
    metas = {s["key"]: s["meta"] for s in ShardReader(str(shards), decode=False, shuffle=False)}
    keys = []
    for sample in wds.WebDataset(tars(shards), shardshuffle=False).decode():
        keys.append(sample["__key__"])
        assert sample["json"] == metas[sample["__key__"]]
        assert sample["efficientnet_lite0.npy"].shape == (32,)
    assert sorted(keys) == sorted(expected)


def test_wids(shards, expected, tmp_path):
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(
        str(shards / "wids.json"), cache_dir=str(tmp_path), keep=True, transformations=[]
    )
    found = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        found[sample["__key__"]] = (digest(sample[".mp4"].read()), sample[".txt"].read().decode())
        assert json.loads(sample[".json"].read())["clip_id"] == sample["__key__"]
    assert found == expected
    listed = json.loads((shards / "wids.json").read_text())["shardlist"]
    assert {s["url"]: s["filesize"] for s in listed} == {
        str(Path(t).relative_to(shards)): Path(t).stat().st_size for t in tars(shards)
    }


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_give_full_rows(tmp_path, streaming, monkeypatch):
    """Every column of every row, where the first rows have no text, metadata or duplicates and later ones have."""
    datasets = pytest.importorskip("datasets")
    loader = importlib.import_module("datasets.packaged_modules.webdataset.webdataset")
    monkeypatch.setattr(loader.WebDataset, "NUM_EXAMPLES_FOR_FEATURES_INFERENCE", 1)
    recipe = make_run_folder(tmp_path / "run")
    rules = ["decide.rules.too_much_text.max=1", "decide.rules.still.min=0", "shards.lengths_s=[100]"]
    shard(Store(str(tmp_path / "run")), parse(recipe.model_dump(mode="json"), rules, "test"))
    folder = tmp_path / "run/shards"
    rows = {s["key"]: s for s in ShardReader(str(folder), decode=False, shuffle=False)}
    texts = [s["meta"]["text"] for s in rows.values()]
    assert "" in texts
    assert any(texts)
    dataset = datasets.load_dataset(
        "webdataset",
        data_files={"train": tars(folder)},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    found = {s["__key__"]: s for s in dataset.cast_column("mp4", datasets.Video(decode=False))}
    assert set(found) == set(rows)
    for key, row in rows.items():
        assert found[key]["json"] == row["meta"]
        assert found[key]["txt"] == row["caption"]
        assert digest(found[key]["mp4"]["bytes"]) == digest(row["video"])
