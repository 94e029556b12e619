"""Kills at seeded moments, and a result that equals the undisturbed one: bench/chaos.py, a few kills of it."""

import pytest

from bench import chaos


def test_a_local_run_that_is_killed_and_resumed_equals_an_undisturbed_one(tmp_path, capsys):
    args = ["--only", "local", "--kills", "4", "--videos", "2", "--seed", "1", "--work", str(tmp_path)]
    assert chaos.main(args) == 0
    assert "4 kills" in capsys.readouterr().out


def test_a_caption_on_another_clip_is_found(tmp_path):
    import pyarrow as pa

    from pipeline.io.store import Store

    row = {"clip_id": "a", "media_sha256": "0", "captions": [{"text": "b"}]}
    store = Store(str(tmp_path))
    store.write_table("clips/u.parquet", pa.Table.from_pylist([row]))
    with pytest.raises(SystemExit, match="clip a has the caption"):
        chaos.prove_captions(store)
