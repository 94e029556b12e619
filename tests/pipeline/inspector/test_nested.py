"""Flat arrays of nested columns hold what Python objects of them would."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.inspector.nested import Names, by_key, flat, lengths

LISTS = [["a", "b"], None, [], ["c"], ["a", "a", "d"], None, ["e"]]
MAPS = [[("x", 1.0), ("y", 2.0)], None, [], [("y", -1.0)], [("x", None)], [("z", 0.5)], None]
SLICES = [(0, 7), (1, 5), (3, 4), (2, 1), (6, 1), (7, 0)]


@pytest.mark.parametrize(("start", "length"), SLICES)
def test_items_of_lists_are_those_of_python_whatever_slice_they_are_of(start: int, length: int):
    array = pa.array(LISTS, pa.list_(pa.string())).slice(start, length)
    owner, values = flat(array)
    told = [(i, v) for i, some in enumerate(array.to_pylist()) for v in some or []]
    assert list(zip(owner.tolist(), values.to_pylist(), strict=True)) == told
    assert lengths(array).tolist() == [len(some or []) for some in array.to_pylist()]


@pytest.mark.parametrize(("start", "length"), SLICES)
def test_numbers_of_maps_by_key_are_those_of_python(start: int, length: int):
    array = pa.array(MAPS, pa.map_(pa.string(), pa.float32())).slice(start, length)
    found = {
        (int(i), name): float(v)
        for name, (owner, values) in by_key(array).items()
        for i, v in zip(owner, values, strict=True)
    }
    told = {
        (i, k): np.nan if v is None else v for i, some in enumerate(array.to_pylist()) for k, v in some or []
    }
    assert found.keys() == told.keys()
    np.testing.assert_array_equal([found[k] for k in told], list(told.values()))


def test_lists_of_structs_inside_a_null_are_left_out():
    kind = pa.list_(pa.struct([("name", pa.string())]))
    array = pa.array([[{"name": "a"}], None, [{"name": "b"}, None]], kind)
    owner, values = flat(array)
    assert owner.tolist() == [0, 2, 2]
    assert values.field("name").to_pylist()[:2] == ["a", "b"]


def test_names_say_what_the_column_said():
    texts = ["b", None, "a", "b"]
    names = Names.of(pa.chunked_array([texts[:2], texts[2:]], pa.string()))
    assert [names[i] for i in range(4)] == texts
    assert names.counts() == {"b": 2, "a": 1}
    assert names.counts(np.array([False, True, True, False])) == {"a": 1}
    assert [names.take(np.array([2, -1]))[i] for i in range(2)] == ["a", None]
    assert not (names.codes == names.code("nobody")).any()
