"""Arrow's nested columns (lists, maps, lists of structs) as flat arrays, with no Python object a value."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def lengths(array: pa.Array) -> np.ndarray:
    """Items of each list or map, int64 [n]; 0 where it is null."""
    offsets = array.offsets.to_numpy()
    there = array.is_valid().to_numpy(zero_copy_only=False)
    return np.where(there, np.diff(offsets), 0).astype(np.int64)


def items(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of each item of lists or maps, in order: whose it is, and where in the child arrays; int64 [m] each."""
    count = lengths(array)
    owner = np.repeat(np.arange(len(array)), count)
    first = np.cumsum(count) - count
    at = array.offsets.to_numpy()[:-1].astype(np.int64)[owner] + np.arange(len(owner)) - first[owner]
    return owner, at


def flat(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Lists [n]: whose each item is, int64 [m], and the items [m]."""
    owner, at = items(array)
    return owner, array.values.take(pa.array(at))


def by_key(array: pa.MapArray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps of numbers [n] by key: whose each value is, int64 [m], and the value, float64 [m]."""
    owner, at = items(array)
    keys = array.keys.take(pa.array(at)).dictionary_encode()
    values = array.items.take(pa.array(at)).cast(pa.float64()).to_numpy(zero_copy_only=False)
    codes = keys.indices.to_numpy(zero_copy_only=False)
    return {
        name: (owner[codes == code], values[codes == code])
        for code, name in enumerate(keys.dictionary.to_pylist())
    }


class Names:
    """A text column that repeats itself.

    codes: int32 [n], of `names`; −1 where there is no text.
    """

    def __init__(self, codes: np.ndarray, names: list[str]):
        self.codes, self.names = codes.astype(np.int32), names

    @staticmethod
    def of(column: pa.ChunkedArray | pa.Array) -> Names:
        """Each chunk may have a dictionary of its own."""
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        array = whole(encoded.unify_dictionaries() if isinstance(encoded, pa.ChunkedArray) else encoded)
        return Names(array.indices.fill_null(-1).to_numpy(zero_copy_only=False), array.dictionary.to_pylist())

    def code(self, name: str) -> int:
        """−2, which no row has, for a name that is not there."""
        return self.names.index(name) if name in self.names else -2

    def __getitem__(self, row: int) -> str | None:
        code = int(self.codes[row])
        return None if code < 0 else self.names[code]

    def take(self, rows: np.ndarray) -> Names:
        """Rows −1 become rows without a text."""
        return Names(np.where(rows < 0, -1, self.codes[rows]), self.names)

    def counts(self, mask: np.ndarray | None = None) -> dict[str, int]:
        """Rows by name, the most frequent first; names that no row has are left out."""
        codes = self.codes if mask is None else self.codes[mask]
        found = np.bincount(codes[codes >= 0], minlength=len(self.names))
        order = np.argsort(-found, kind="stable")
        return {self.names[i]: int(found[i]) for i in order if found[i]}


class Marks:
    """Which of some names each row has: bool [n] a name."""

    def __init__(self, n: int):
        self.n = n
        self.rows: dict[str, np.ndarray] = {}

    def put(self, name: str, rows: np.ndarray) -> None:
        """Mark rows; those marked before stay."""
        if name not in self.rows:
            self.rows[name] = np.zeros(self.n, bool)
        self.rows[name][rows] = True

    def of(self, row: int) -> list[str]:
        return [name for name, marked in self.rows.items() if marked[row]]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[name] if name in self.rows else np.zeros(self.n, bool)

    def counts(self, mask: np.ndarray | None = None) -> dict[str, int]:
        return {n: int(np.count_nonzero(m if mask is None else m & mask)) for n, m in self.rows.items()}
