"""Secrets in addresses are used to fetch, and are in no name, row, shard, log or sentence."""

from __future__ import annotations

import base64
import logging
import re
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import curate
from pipeline.faults import Fault
from pipeline.record import Source
from pipeline.sources import names, network, signed
from pipeline.sources.fetch import localised
from pipeline.sources.listing import list_sources
from pipeline.sources.names import Limits
from tests.fixtures import videos
from tests.fixtures.web import Request, Server

S = "s3cr3tVALUE"
ONCE = Limits(timeout_s=0.5, backoff_s=0.01, tries=1)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv(network.ALLOW, "1")


@pytest.mark.parametrize(
    ("address", "known_by"),
    [
        # as the vendors' own tools write them
        (
            f"https://b.s3.amazonaws.com/k/v.mp4?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={S}%2F20260101"
            f"&X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature={S}",
            "https://b.s3.amazonaws.com/k/v.mp4",
        ),
        (
            f"https://b.s3.amazonaws.com/v.mp4?versionId=3&AWSAccessKeyId={S}&Expires=1&Signature={S}",
            "https://b.s3.amazonaws.com/v.mp4?versionId=3",
        ),
        (
            f"https://d.cloudfront.net/v.mp4?Policy={S}&Signature={S}&Key-Pair-Id={S}",
            "https://d.cloudfront.net/v.mp4",
        ),
        (
            f"https://storage.googleapis.com/b/v.mp4?x-goog-signature={S}&X-Goog-Date=1&a=1",
            "https://storage.googleapis.com/b/v.mp4?a=1",
        ),
        (
            f"https://a.blob.core.windows.net/c/v.mp4?sv=2022-11-02&ss=b&srt=co&sp=r&se=2026&st=2025&spr=https&sig={S}",
            "https://a.blob.core.windows.net/c/v.mp4",
        ),
        (f"https://h/v.mp4?token={S}", "https://h/v.mp4"),
        (f"https://h/v.mp4?q=1&ACCESS_TOKEN={S}&exp=5&r=2", "https://h/v.mp4?q=1&r=2"),
        (f"https://h/v.mp4?auth={S}", "https://h/v.mp4"),
        (f"https://h/v.mp4?hdnea=st=1~exp=2~acl=/*~hmac={S}", "https://h/v.mp4"),
        (f"https://h/hdnea=exp=2~acl=/*~hmac={S}/v.mp4", "https://h/v.mp4"),
        (f"https://h/exp=2~acl=%2fv%2f~hmac={S}/v/v.mp4", "https://h/v/v.mp4"),
        (f"https://h/v.mp4?md5={S}&expires=9", "https://h/v.mp4"),
        (f"https://user:{S}@h:8/v.mp4", "https://h:8/v.mp4"),
        (f"https://{S}@h/v.mp4#access_token={S}", "https://h/v.mp4"),
        (f"s3://b/k.mp4?access_key={S}&secret_key={S}%2F&region=x", "s3://b/k.mp4?region=x"),
        (f"s3://b/k?.mp4?session_token={S}", "s3://b/k?.mp4"),
        (f"s3://key:{S}@b/k.mp4", "s3://b/k.mp4"),
        (f"ftp://u:{S}@h/v.mp4", "ftp://h/v.mp4"),
        # what looks alike and is not
        ("https://h/v.mp4?sv=1&se=2&st=3&sp=4", "https://h/v.mp4?sv=1&se=2&st=3&sp=4"),
        ("https://h/v.mp4?expires=1&policy=a", "https://h/v.mp4?expires=1&policy=a"),
        ("https://h/v.mp4?md5=abc", "https://h/v.mp4?md5=abc"),
        ("https://h/v.mp4?key=videos/1.mp4&author=x&t=4s", "https://h/v.mp4?key=videos/1.mp4&author=x&t=4s"),
        ("https://www.youtube.com/watch?v=abc&t=1", "https://www.youtube.com/watch?v=abc&t=1"),
        ("s3://b/a?.mp4", "s3://b/a?.mp4"),
        ("https://h/a b?%20=%&&x", "https://h/a b?%20=%&&x"),
        ("/a/token=x?sig=1.mp4", "/a/token=x?sig=1.mp4"),
    ],
)
def test_an_address_is_known_without_its_secrets(address: str, known_by: str) -> None:
    assert signed.clean(address) == known_by
    assert signed.clean(known_by) == known_by
    if S in address:
        assert S not in signed.redacted(f"cannot open {address}: HTTP 403 for {S}", address)
    source = names.located(address)
    assert (source.uri, names.place_of(source)) == (known_by, address)
    assert S not in repr(source)


def test_the_same_object_signed_anew_is_the_same_source(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (f"https://h/v.mp4?X-Amz-Date={i}&X-Amz-Signature={S}{i}" for i in range(2))
    [source] = list_sources([first, second])
    assert source == list_sources([second])[0]
    assert "with another signature or token" in caplog.text
    assert S not in caplog.text


def test_texts_keep_their_addresses_without_secrets() -> None:
    said = f'see https://h/a?token={S}&b=1, and "s3://b/k?access_key={S}" (s. 3)'
    assert names.metadata({"d": said, "l": [f"https://u:{S}@h/"]}) == {
        "d": 'see https://h/a?b=1, and "s3://b/k" (s. 3)',
        "l": '["https://h/"]',
    }


def test_the_whole_address_is_asked_for_and_a_password_goes_to_its_own_host_only(server: Server) -> None:
    def hop(r: Request) -> None:
        r.reply(302, Location="/next.mp4")

    def away(r: Request) -> None:
        r.reply(302, Location=f"{server.url.replace('127.0.0.1', 'localhost')}/v.mp4")

    server.script = [hop, away, lambda r: r.reply(200, b"video")]
    source = names.located(server.url.replace("//", "//ann:pa%20ss@") + f"/v.mp4?x=1&token={S}")
    with localised(source) as local:
        assert Path(local.path).read_bytes() == b"video"
    assert server.asked[0]["path"] == f"/v.mp4?x=1&token={S}"
    login = "Basic " + base64.b64encode(b"ann:pa ss").decode()
    assert [a.get("authorization") for a in server.asked] == [login, login, None]


@pytest.mark.parametrize("code", [302, 401, 403, 404, 500, 503])
def test_no_secret_is_in_what_is_said_of_a_failure(server: Server, code: int) -> None:
    def refuse(r: Request) -> None:
        target = f"ftp://u:{S}@h{r.path}"
        r.send_response(code, f"no {r.path} for {S}")
        r.send_header("Location", target)
        r.end_headers()

    server.script = [refuse]
    address = server.url.replace("//", f"//me:{S}@") + f"/v.mp4?token={S}"
    with pytest.raises(Fault) as e, localised(names.located(address), limits=ONCE):
        pass
    assert S not in str(e.value)
    assert f"{server.url}/v.mp4" in str(e.value)
    if code in (401, 403):
        assert "signature may be too old" in str(e.value)


@pytest.mark.parametrize(
    "address", [f"http://u:{S}@[::1/v.mp4", f"http://u:{S}@h:port/v.mp4", f"s3://{S}:x@"]
)
def test_no_secret_is_in_what_is_said_of_a_bad_address(address: str) -> None:
    with pytest.raises(Fault) as e, localised(names.located(address), limits=ONCE):
        pass
    assert S not in str(e.value)


def test_no_file_of_a_run_holds_a_secret(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Good and bad sources of a list and of the command line; every byte of the output is looked at."""
    body = videos.made(videos.cfr, frames=25).read_bytes()

    def serve(r: Request) -> None:
        assert S in r.path + r.headers.get("Authorization", "")
        if "bad" in r.path:
            r.reply(403, f"{r.path}".encode())
        elif "text" in r.path:
            r.reply(200, b"no video at all")
        else:
            r.reply(200, body)

    server.script = [serve]
    out, signature = tmp_path / "out", f"X-Amz-Credential={S}&X-Amz-Signature={S}"
    (tmp_path / "l.csv").write_text(
        "path,url,title\n"
        f"{server.url}/a.mp4?{signature},https://h/x?token={S},see https://u:{S}@h/\n"
        f"{server.url}/bad.mp4?{signature},,b\n"
        f"{server.url}/text.mp4?{signature},,c\n"
    )
    args = [str(tmp_path / "l.csv"), f"{server.url}/d.mp4?token={S}", "--out", str(out)]
    with caplog.at_level(logging.DEBUG):
        assert curate.main([*args, "--recipe", "smoke", "--runner", "local", "--whole", "--set", QUICK]) == 0
    rows = {r["name"]: r for f in (out / "videos").glob("*.parquet") for r in pq.read_table(f).to_pylist()}
    assert {n.rsplit("/", 1)[1]: r["stage"] for n, r in rows.items()} == {
        "a.mp4": None,
        "d.mp4": None,
        "bad.mp4": "fetch",
        "text.mp4": "decode",
    }
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {".parquet", ".tar", ".json", ".html"} <= {p.suffix for p in files}
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".parquet":  # compressed
            data = repr(pq.read_table(path).to_pylist()).encode()
        assert S.encode() not in data, path
    said = capfd.readouterr()
    assert not re.search(S, caplog.text + said.out + said.err)


QUICK = "captions=[{kind: colour_motion, frames: 1}]"


def test_a_source_without_secrets_has_no_second_address() -> None:
    assert names.located("https://h/v.mp4?a=1") == Source("https://h/v.mp4?a=1", "https://h/v.mp4?a=1")
    assert names.located("https://h/v.mp4").address is None
