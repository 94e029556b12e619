"""The index in memory and mapped from a file of the machine: the same columns, read in parts, made once a version."""

import hashlib
import pickle
import tempfile
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.faults import StoreError
from pipeline.shards import index as index_
from pipeline.shards.index import Texts, bytes_of, digest, from_hex, open_index, read_index
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_sharded_run


@pytest.fixture
def shards(tmp_path):
    make_sharded_run(tmp_path / "run", sources=6)
    return str(tmp_path / "run/shards")


@pytest.fixture
def mapping(monkeypatch, tmp_path):
    """Every index is mapped, from a folder of this test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(index_, "SHARED_FROM", 1)
    return tmp_path / "tmp"


def told(reader):
    places = [reader.place(row) for row in range(len(reader.keys))]
    return list(reader.keys), places, reader.bucket.tolist(), reader.identity(), reader.table


DIFFERENT = [{"captions": "sample"}, {"shapes": [(12, 32, 56)]}, {"where": pc.field("duration_s") > 4}]
OPTIONS = {"fps": 4.0, "shapes": [(1, 32, 32), (12, 32, 56), (30, 32, 32)]}


def test_columns_are_those_of_the_table(shards):
    table, index = read_index(shards), open_index(shards)
    assert list(index.keys) == table["clip_id"].to_pylist()
    assert [index.names["tar"][i] for i in index.columns["tar"]] == table["tar"].to_pylist()
    assert [index.names["bucket"][i] for i in index.columns["bucket"]] == table["bucket"].to_pylist()
    for name in ("offset", "size", "json_offset", "json_size", "width", "height", "duration_s"):
        assert index.columns[name].tolist() == table[name].to_pylist()
    assert [x.tobytes().hex() for x in index.columns["media_sha256"]] == table["media_sha256"].to_pylist()


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["all", "buckets and stills"])
def test_mapped_and_in_row_groups_of_any_size_it_is_the_same(shards, monkeypatch, tmp_path, options):
    whole = told(ShardReader(shards, **options))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(index_, "SHARED_FROM", 1)
    for size in (1, 3, 1000):
        pq.write_table(
            pq.read_table(f"{shards}/index.parquet"), f"{shards}/index.parquet", row_group_size=size
        )
        reader = ShardReader(shards, **options)
        assert isinstance(reader.index.columns["offset"], np.memmap)
        assert told(reader) == whole
        assert (
            len(list((tmp_path / f"clipmill-index-{index_.os.getuid()}").glob("[!.]*-*"))) == 1
        )  # the newest


def test_it_is_made_once_for_all_processes_and_anew_for_another_version(shards, mapping):
    context = get_context("fork")
    with context.Pool(4) as pool:
        assert set(pool.map(opened, [shards] * 8)) == {len(read_index(shards))}
    (made,) = mapping.glob("*/[!.]*-*")
    before = (made / "keys").stat().st_ino
    open_index(shards)
    assert (made / "keys").stat().st_ino == before
    held = open_index(shards)
    keys = list(held.keys)
    table = pq.read_table(f"{shards}/index.parquet")
    pq.write_table(table.slice(2), f"{shards}/index.parquet")
    assert list(open_index(shards).keys) == keys[2:]
    assert list(held.keys) == keys  # whoever has the old one keeps it
    assert not made.exists()


def test_an_identity_is_made_once_for_all_processes_and_anew_where_anything_differs(
    shards, mapping, monkeypatch
):
    first = ShardReader(shards, **OPTIONS).identity()
    others = {ShardReader(shards, **(OPTIONS | more)).identity() for more in DIFFERENT}
    assert len(others | {first}) == 1 + len(DIFFERENT)
    monkeypatch.setattr(ShardReader, "_contents", None)
    assert ShardReader(shards, **OPTIONS).identity() == first
    assert {ShardReader(shards, **(OPTIONS | more)).identity() for more in DIFFERENT} == others
    monkeypatch.undo()
    assert ShardReader(shards, **OPTIONS).identity() == first  # not mapped


def opened(folder):
    return len(open_index(folder).keys)


def test_sent_to_another_process_a_mapped_one_is_its_folder_alone(shards, mapping):
    index = open_index(shards)
    sent = pickle.dumps(index)
    assert len(sent) < 500
    assert list(pickle.loads(sent).keys) == list(index.keys)


def test_no_room_for_the_copy_is_one_sentence(shards, mapping, monkeypatch):
    (mapping / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(mapping / "file"))
    with pytest.raises(
        StoreError, match=r"cannot write .*: Not a directory; .* or set TMPDIR to a folder with room"
    ):
        open_index(shards)
    monkeypatch.setattr(tempfile, "tempdir", str(mapping))
    (mapping / f"clipmill-index-{index_.os.getuid()}").mkdir(mode=0o777)
    (mapping / f"clipmill-index-{index_.os.getuid()}").chmod(0o777)
    with pytest.raises(StoreError, match="belongs to somebody else: set TMPDIR"):
        open_index(shards)


def test_hashes_are_kept_as_bytes_wherever_they_begin():
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(7)]
    whole = pa.chunked_array([texts[:3], texts[3:]])
    for column in (whole, whole.slice(1), whole.slice(4, 2), pa.chunked_array([[None, *texts]])):
        found = [x.tobytes().hex() for x in from_hex(column)]
        assert found == [v or "0" * 64 for v in column.to_pylist()]
    with pytest.raises(StoreError, match="no SHA-256"):
        from_hex(pa.chunked_array([["ab"]]))


def test_texts_are_kept_as_bytes_wherever_they_begin():
    texts = ["", "ä", "b", None, "ccc", "答"]
    whole = pa.chunked_array([texts[:2], [], texts[2:]])
    for column in (whole, whole.slice(1), whole.slice(3, 2), whole.slice(2, 0)):
        assert list(Texts(*bytes_of(column))) == [v or "" for v in column.to_pylist()]
    some = Texts(*bytes_of(whole), rows=np.array([5, 1]))
    assert list(some) == some[:] == ["答", "ä"]


def test_a_digest_does_not_depend_on_how_a_table_comes_in_parts():
    table = pa.table({"a": ["x", "yz", "", "w"], "b": [1, 2, 3, 4]})
    whole = digest([table], np.arange(3))
    assert digest([table.slice(0, 1), table.slice(1)], np.arange(3)) == whole
    others = [table.set_column(0, "a", [["xy", "z", "", "w"]]), table.select(["a"]), table.take([1, 0, 2, 3])]
    assert len({whole, digest([table], np.arange(4)), *(digest([t], np.arange(3)) for t in others)}) == 5
