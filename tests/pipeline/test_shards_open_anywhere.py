"""Every reader of WebDataset shards finds the same samples. Megatron-Energon: see bench/readers.py."""

import hashlib
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
    keys = []
    for sample in wds.WebDataset(tars(shards), shardshuffle=False).decode():
        keys.append(sample["__key__"])
        assert sample["json"]["clip_id"] == sample["__key__"]
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
    assert found == expected
    listed = json.loads((shards / "wids.json").read_text())["shardlist"]
    assert {s["url"]: s["filesize"] for s in listed} == {
        str(Path(t).relative_to(shards)): Path(t).stat().st_size for t in tars(shards)
    }


def test_hugging_face_datasets_streaming(shards, expected, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(
        "webdataset",
        data_files={"train": tars(shards)},
        split="train",
        streaming=True,
        cache_dir=str(tmp_path),
    )
    dataset = dataset.cast_column("mp4", datasets.Video(decode=False))
    found = {s["__key__"]: (digest(s["mp4"]["bytes"]), s["txt"]) for s in dataset}
    assert found == expected
