from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import io
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline.faults import Fault, SourceFault, TransientFault, WorkerFault
from pipeline.record import Source
from pipeline.sources import fetch, http, names, network, youtube
from pipeline.sources import scratch as scratch_folder
from pipeline.sources.fetch import localised, release
from pipeline.sources.names import Limits
from tests.fixtures.web import Request, Server

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
QUICK = Limits(timeout_s=0.5, total_s=20, backoff_s=0.01, tries=3)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder of the test's own, and servers on this machine."""
    monkeypatch.setenv(network.ALLOW, "1")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch" / f"clipmill-{os.getuid()}"


def whole(r: Request) -> None:
    r.reply(200, BODY, ETag='"1"')


def ranged(r: Request, body: bytes = BODY, etag: str = '"1"') -> None:
    """An honest file server: whole file, or the range asked for while the file is still that one."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", r.headers.get("Range", ""))
    if asked is None or r.headers.get("If-Range", etag) != etag:
        r.reply(200, body, ETag=etag)
        return
    first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
    if first >= len(body):
        r.reply(416, Content_Range=f"bytes */{len(body)}")
    else:
        place = f"bytes {first}-{last}/{len(body)}"
        r.reply(206, body[first : last + 1], ETag=etag, Content_Range=place)


def broken(after: int, etag: str = '"1"') -> Callable[[Request], None]:
    """The whole length announced, the connection closed after so many bytes."""
    return lambda r: r.reply(200, BODY[:after], Content_Length=str(len(BODY)), ETag=etag)


def status(code: int, **headers: str) -> Callable[[Request], None]:
    return lambda r: r.reply(code, b"no", **headers)


def stalled(r: Request) -> None:
    r.reply(200, BODY[:1000], Content_Length=str(len(BODY)), ETag='"1"')
    time.sleep(1.2)


def got(uri: str, limits: Limits = QUICK) -> bytes:
    with localised(Source(uri, uri), limits=limits) as local:
        data = Path(local.path).read_bytes()
        assert local.sha256 == hashlib.sha256(data).hexdigest()
    return data


def refused(uri: str, limits: Limits = QUICK, kind: type[Fault] = SourceFault) -> str:
    with pytest.raises(kind) as e, localised(Source(uri, uri), limits=limits):
        pass
    assert "\n" not in str(e.value)
    assert e.value.stage == "fetch"
    return str(e.value)


def passing(uri: str, limits: Limits = QUICK) -> str:
    """What the next run tries again."""
    return refused(uri, limits, TransientFault)


# Local files --------------------------------------------------------------------------------------


def test_a_local_file_is_used_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "a b'\"#é.mp4"
    path.write_bytes(BODY)
    with localised(Source(str(path), "a")) as local:
        assert (local.path, local.sha256) == (str(path), SHA)
    with localised(Source(str(path), "a"), hash=False) as local:
        assert (local.path, local.sha256) == (str(path), "")
    release(Source(str(path), "a"))
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    "name",
    [
        b"plain.mp4",
        b"\xff\xfe.mp4",
        b"%41%.mp4",
        b"a#b?c.mp4",
        b"new\nline.mp4",
        "日本.mp4".encode(),
        b"-v.mp4",
    ],
)
def test_any_file_name_survives_the_way_through_a_utf8_uri(tmp_path: Path, name: bytes) -> None:
    path = str(tmp_path / os.fsdecode(name))
    Path(path).write_bytes(name)
    uri = names.uri_of(path)
    assert uri.encode("utf-8")
    assert names.path_of(uri) == path
    assert got(uri) == name


def test_distinct_paths_have_distinct_uris() -> None:
    paths = [os.fsdecode(b"/v/\xff.mp4"), "/v/%FF.mp4", "/v/\\xff.mp4", "/file:///v/%FF.mp4"]
    assert len({names.uri_of(p) for p in paths}) == len(paths)


def test_a_link_to_a_file_is_followed_and_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(BODY)
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    assert got(str(tmp_path / "link.mp4")) == BODY
    assert "circle" in refused(str(tmp_path / "circle.mp4"))


@pytest.mark.parametrize("kind", ["folder", "FIFO", "socket", "device"])
def test_what_is_no_regular_file_is_refused_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "x.mp4"
    with socket.socket(socket.AF_UNIX) as s:
        if kind == "folder":
            path.mkdir()
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)  # the address of a socket is short
            s.bind("x.mp4")
        else:
            path.symlink_to("/dev/zero")
        assert re.fullmatch(f"{path}: not a regular file \\(an? {kind}\\)", refused(str(path)))


def test_a_missing_and_an_unreadable_file_say_so(tmp_path: Path) -> None:
    assert "no such file" in refused(str(tmp_path / "none.mp4"))
    (tmp_path / "file").touch()
    assert "no such file" in refused(str(tmp_path / "file" / "v.mp4"))
    assert "not a path" in refused("/a\0b.mp4")
    if os.getuid():
        (tmp_path / "mine.mp4").touch(mode=0)
        assert "permission denied" in refused(str(tmp_path / "mine.mp4"))


def test_what_listing_found_wrong_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceFault, match="row 3: bad"),
        localised(Source("x", "x", problem="l.csv, row 3: bad")),
    ):
        pass


def test_an_unknown_scheme_is_refused() -> None:
    assert "ftp://h/v.mp4: unknown kind of address" in refused("ftp://h/v.mp4")


# HTTP ---------------------------------------------------------------------------------------------


def test_a_download_is_kept_for_the_next_stage_until_released(server: Server, scratch: Path) -> None:
    server.script = [whole]
    source = Source(f"{server.url}/v.mp4", "v")
    assert got(source.uri) == got(source.uri) == BODY
    assert len(server.asked) == 1
    release(source)
    assert list(scratch.iterdir()) == []
    assert got(source.uri) == BODY
    assert len(server.asked) == 2


def test_an_address_with_spaces_and_letters_of_any_script_is_escaped_once(server: Server) -> None:
    server.script = [whole]
    assert got(f"{server.url}/a b/%C3%A9 é.mp4?q=ü#part") == BODY
    assert server.asked[0]["path"] == "/a%20b/%C3%A9%20%C3%A9.mp4?q=%C3%BC"


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, code: int) -> None:
    server.script = [status(code), status(code), whole]
    assert got(f"{server.url}/v.mp4") == BODY
    assert len(server.asked) == 3


def test_retry_after_is_honoured_and_bounded(server: Server) -> None:
    server.script = [status(429, Retry_After="1"), whole]
    start = time.monotonic()
    assert got(f"{server.url}/v.mp4") == BODY
    assert time.monotonic() - start >= 1
    server.script = [status(429, Retry_After="86400")]
    assert "not before 86400 s" in passing(f"{server.url}/w.mp4")
    assert len(server.asked) == 3


def test_retry_after_as_a_date() -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 27 < (http._retry_after({"Retry-After": soon}) or 0) <= 30
    assert http._retry_after({"Retry-After": "soon"}) is None
    assert http._retry_after({}) is None


def test_tries_are_bounded(server: Server, scratch: Path) -> None:
    server.script = [status(503)]
    assert "HTTP 503" in passing(f"{server.url}/v.mp4")
    assert len(server.asked) == QUICK.tries
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("code", "why"), [(404, "dead"), (410, "dead"), (403, "denied")])
def test_a_dead_link_is_asked_once(server: Server, code: int, why: str) -> None:
    server.script = [status(code)]
    message = refused(f"{server.url}/v.mp4")
    assert f"{server.url}/v.mp4: HTTP {code}" in message
    assert why in message
    assert len(server.asked) == 1


def test_nobody_listening_is_an_error_that_names_the_address() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v.mp4"
        assert passing(url).startswith(f"{url}: ")


def test_a_broken_transfer_goes_on_where_it_broke(server: Server) -> None:
    server.script = [broken(100_000), ranged]
    assert got(f"{server.url}/v.mp4") == BODY
    assert (server.asked[1]["range"], server.asked[1]["if-range"]) == ("bytes=100000-", '"1"')


def test_a_stalled_transfer_goes_on_after_the_timeout(server: Server) -> None:
    server.script = [stalled, ranged]
    assert got(f"{server.url}/v.mp4") == BODY
    assert server.asked[1]["range"] == "bytes=1000-"


def test_a_file_that_changed_meanwhile_is_read_from_the_start(server: Server) -> None:
    other = BODY[::-1]
    server.script = [broken(100_000), functools.partial(ranged, body=other, etag='"2"')]
    assert got(f"{server.url}/v.mp4") == other


@pytest.mark.parametrize(("first", "etag"), [(100_000, '"2"'), (99_999, '"1"'), (100_001, '"1"')])
def test_a_range_of_another_file_or_place_is_not_joined_on(server: Server, first: int, etag: str) -> None:
    def other(r: Request) -> None:
        place = f"bytes {first}-{len(BODY) - 1}/{len(BODY)}"
        r.reply(206, bytes(len(BODY) - 100_000), ETag=etag, Content_Range=place)

    server.script = [broken(100_000), other, whole]
    assert got(f"{server.url}/v.mp4") == BODY


def test_without_ranges_it_starts_over(server: Server) -> None:
    server.script = [broken(100_000), whole]
    assert got(f"{server.url}/v.mp4") == BODY


def test_a_body_that_is_always_cut_off_is_an_error(server: Server, scratch: Path) -> None:
    server.script = [broken(1000)]
    assert f"1000 of {len(BODY)} bytes" in passing(f"{server.url}/v.mp4")
    assert len(server.asked) <= QUICK.tries + 1
    assert list(scratch.iterdir()) == []


def test_progress_starts_the_count_of_tries_anew(server: Server) -> None:
    def hundred(r: Request) -> None:
        first = int((r.headers.get("Range") or "bytes=0-").strip("bytes=-"))
        piece, rest = BODY[first : first + 60_000], len(BODY) - first
        headers = {"Content_Length": str(rest), "ETag": '"1"'}
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(BODY) - 1}/{len(BODY)}"
        r.reply(206 if first else 200, piece, **headers)

    server.script = [hundred]
    assert got(f"{server.url}/v.mp4") == BODY
    assert len(server.asked) == 5 > QUICK.tries


def test_a_body_without_length_is_read_to_its_end(server: Server) -> None:
    def chunked(r: Request) -> None:
        r.protocol_version = "HTTP/1.1"
        r.send_response(200)
        r.send_header("Transfer-Encoding", "chunked")
        r.send_header("Connection", "close")
        r.end_headers()
        for i in range(0, len(BODY), 100_000):
            r.wfile.write(b"%x\r\n" % 100_000 + BODY[i : i + 100_000] + b"\r\n")
        if len(r.server.asked) > 1:  # the first time it breaks off before the last chunk
            r.wfile.write(b"0\r\n\r\n")
        r.close_connection = True

    server.script = [chunked]
    assert got(f"{server.url}/v.mp4") == BODY
    assert len(server.asked) == 2


def test_size_and_time_are_bounded(server: Server) -> None:
    server.script = [whole]
    assert "limit of 1000" in refused(f"{server.url}/v.mp4", Limits(max_bytes=1000))

    def endless(r: Request) -> None:
        r.send_response(200)
        r.end_headers()
        while True:
            r.wfile.write(b"x" * 10)
            time.sleep(0.02)

    server.script = [endless]
    assert "limit of 1000" in refused(f"{server.url}/w.mp4", Limits(max_bytes=1000))
    start = time.monotonic()
    assert "too slow" in passing(f"{server.url}/x.mp4", Limits(total_s=0.5))
    assert time.monotonic() - start < 10


def test_a_redirect_to_http_is_followed(server: Server) -> None:
    server.script = [status(302, Location="/w.mp4"), status(308, Location=f"{server.url}/x.mp4"), whole]
    assert got(f"{server.url}/v.mp4") == BODY
    assert [a["path"] for a in server.asked] == ["/v.mp4", "/w.mp4", "/x.mp4"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "FILE:/etc/passwd"])
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_away_from_http_is_refused(server: Server, target: str, code: int) -> None:
    server.script = [status(code, Location=target)]
    assert "which is not http" in refused(f"{server.url}/v.mp4")


def test_a_redirect_in_a_circle_ends(server: Server) -> None:
    server.script = [status(302, Location="/v.mp4")]
    assert "circle" in refused(f"{server.url}/v.mp4")
    assert len(server.asked) < 20


# Tars ---------------------------------------------------------------------------------------------


@dataclass
class Tar:
    path: Path
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@pytest.fixture
def tar(tmp_path: Path) -> Tar:
    path = tmp_path / "a#b.tar"
    with tarfile.open(path, "w") as t:
        for name, data in (("x#1.mp4", BODY), ("y.mp4", BODY[::-1])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as t:
        return Tar(path, {m.name: (m.offset_data, m.size) for m in t})


def test_a_member_of_a_local_tar(tar: Tar, scratch: Path) -> None:
    for name, data in (("x#1.mp4", BODY), ("y.mp4", BODY[::-1])):
        source = Source(names.member_uri(str(tar.path), name), name, member=tar.members[name])
        with localised(source) as local:
            assert Path(local.path).read_bytes() == data
        release(source)
    assert list(scratch.iterdir()) == []


def test_a_member_of_a_remote_tar_costs_its_own_bytes(tar: Tar, server: Server) -> None:
    sent = []

    def count(r: Request) -> None:
        sent.append(r.headers["Range"])
        ranged(r, tar.path.read_bytes())

    server.script = [count]
    offset, size = tar.members["y.mp4"]
    with localised(Source(f"{server.url}/t.tar#y.mp4", "y", member=(offset, size))) as local:
        assert Path(local.path).read_bytes() == BODY[::-1]
    assert sent == [f"bytes={offset}-{offset + size - 1}"]


def test_a_tar_that_changed_or_whose_server_knows_no_ranges_is_refused(tar: Tar, server: Server) -> None:
    source = Source(names.member_uri(str(tar.path), "y.mp4"), "y", member=(500_000, 500_000))
    with pytest.raises(SourceFault, match="changed"), localised(source):
        pass
    server.script = [whole]
    source = Source(f"{server.url}/t.tar#y.mp4", "y", member=(10, 10))
    with pytest.raises(SourceFault, match="byte ranges"), localised(source, limits=QUICK):
        pass
    server.script = [ranged]
    source = Source(f"{server.url}/t.tar#z.mp4", "z", member=(len(BODY) - 5, 10))
    with pytest.raises(SourceFault, match="changed"), localised(source, limits=QUICK):
        pass


def test_a_remote_file_is_read_at_random(server: Server) -> None:
    server.script = [ranged]
    with fetch.random_access(Source(f"{server.url}/f", "f"), QUICK) as (f, size):
        assert size == len(BODY)
        for at in (250_000, 0, 299_990):
            f.seek(at)
            assert f.read(100) == BODY[at : at + 100]
        assert f.read(10) == b""


# Object stores ------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """s3://bucket served from a folder."""
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    fs = pafs.SubTreeFileSystem(str(tmp_path / "s3"), pafs.LocalFileSystem())
    key = lambda uri, *_: (fs, names.split_options(uri)[0].split("://")[1])  # noqa: E731
    monkeypatch.setattr(fetch, "object_store", key)
    return tmp_path / "s3" / "bucket"


def test_an_object_is_fetched_whole_and_by_range(bucket: Path) -> None:
    (bucket / "a b%20c.mp4").write_bytes(BODY)
    assert got("s3://bucket/a b%20c.mp4") == BODY
    with localised(Source("s3://bucket/a b%20c.mp4#m", "m", member=(1000, 500))) as local:
        assert Path(local.path).read_bytes() == BODY[1000:1500]
    assert "limit of 10" in refused("gs://bucket/a b%20c.mp4", Limits(max_bytes=10))
    assert "s3://bucket/none.mp4: not found" in refused("s3://bucket/none.mp4")


def test_options_of_an_object_store_are_told_from_its_keys() -> None:
    assert names.split_options("s3://b/a?.mp4") == ("s3://b/a?.mp4", "")
    assert names.split_options("s3://b/a.mp4?endpoint_override=localhost:9000&scheme=http") == (
        "s3://b/a.mp4",
        "?endpoint_override=localhost:9000&scheme=http",
    )
    fs, key = names.object_store("s3://bucket/a b/%20?.mp4?region=eu-west-1")
    assert (key, fs.region) == ("bucket/a b/%20?.mp4", "eu-west-1")  # type: ignore[attr-defined]


# YouTube ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["https://www.youtube.com/watch?v=x", "http://youtu.be/x", "https://m.youtube.com/shorts/x"]
)
def test_youtube_without_yt_dlp_names_the_extra(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    assert (
        refused(url, kind=WorkerFault)
        == f"{url}: YouTube videos need yt-dlp: pip install -e '.[youtube]' in the clone of clipmill"
    )


def test_a_run_that_needs_yt_dlp_says_so_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(youtube, "find_spec", lambda name: None)
    listed = [Source(u, u) for u in ("https://youtu.be/x", "/a.mp4", "https://www.youtube.com/watch?v=y")]
    with pytest.raises(names.SourceError, match="2 sources from YouTube"):
        youtube.check(listed)
    youtube.check(listed[1:2])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        # as yt-dlp 2025 says it
        ("ERROR: [youtube] x: Video unavailable", SourceFault),
        (
            "ERROR: [youtube] x: Private video. Sign in if you've been granted access to this video",
            SourceFault,
        ),
        ("ERROR: [youtube] x: Sign in to confirm you’re not a bot. Use --cookies", TransientFault),
        ("ERROR: unable to download video data: HTTP Error 503: Service Unavailable", TransientFault),
        ("ERROR: unable to download video data: HTTP Error 403: Forbidden", SourceFault),
        (
            "ERROR: [youtube] x: Unable to download API page: HTTP Error 429: Too Many Requests",
            TransientFault,
        ),
        ("ERROR: [youtube] x: Read timed out. (read timeout=20.0)", TransientFault),
    ],
)
def test_what_yt_dlp_says_has_its_kind(said: str, kind: type[Fault]) -> None:
    fault = youtube._fault(Source("https://youtu.be/x", "x"), said)
    assert type(fault) is kind


def test_only_youtube_goes_through_yt_dlp() -> None:
    for url in ("https://notyoutube.com/v.mp4", "https://h/youtube.com/v.mp4", "https://youtube.com.evil/v"):
        assert not names.YOUTUBE.match(url)


def test_youtube_through_yt_dlp(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    asked = []

    class YoutubeDL:
        def __init__(self, options: dict[str, object]):
            self.options = options

        def __enter__(self) -> YoutubeDL:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def download(self, urls: list[str]) -> None:
            asked.append(urls)
            if "gone" in urls[0]:
                raise Fault("ERROR: [youtube] Video unavailable")
            folder = Path(str(self.options["paths"]["home"]))  # type: ignore[index]
            folder.mkdir()
            (folder / "video.mp4").write_bytes(BODY)

    class Fault(Exception):
        pass

    module = types.SimpleNamespace(YoutubeDL=YoutubeDL, utils=types.SimpleNamespace(YoutubeDLError=Fault))
    monkeypatch.setitem(sys.modules, "yt_dlp", module)
    assert got("https://youtu.be/x") == got("https://youtu.be/x") == BODY
    assert asked == [["https://youtu.be/x"]]
    assert refused("https://youtu.be/gone") == "https://youtu.be/gone: [youtube] Video unavailable"
    assert len([p for p in scratch.iterdir() if p.suffix != ".lock"]) == 1


# Scratch ------------------------------------------------------------------------------------------


def test_workers_share_one_download(server: Server) -> None:
    def slow(r: Request) -> None:
        time.sleep(0.2)
        whole(r)

    server.script = [slow]
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(got(f"{server.url}/v.mp4"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [BODY] * 4
    assert len(server.asked) == 1


def test_who_waited_for_a_removed_lock_takes_the_new_one(tmp_path: Path) -> None:
    path, name = tmp_path / "x", tmp_path / "x.lock"
    same: list[bool] = []

    def wait() -> None:
        with scratch_folder.locked(path, fcntl.LOCK_EX) as lock:
            same.append(name.exists() and os.fstat(lock.fileno()).st_ino == name.stat().st_ino)

    with scratch_folder.locked(path, fcntl.LOCK_EX):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        name.unlink()
    thread.join()
    assert same == [True]


def test_a_file_in_use_is_neither_released_nor_swept(server: Server) -> None:
    server.script = [whole]
    source = Source(f"{server.url}/v.mp4", "v")
    with localised(source) as local:
        release(source)
        scratch_folder.sweep(older_s=-1)
        assert Path(local.path).read_bytes() == BODY
    release(source)
    assert not Path(local.path).exists()


def test_the_sweep_takes_only_what_is_old(server: Server, scratch: Path) -> None:
    server.script = [whole]
    got(f"{server.url}/v.mp4")
    scratch_folder.sweep()
    assert len(list(scratch.iterdir())) == 2
    for p in scratch.iterdir():
        os.utime(p, (0, 0))
    scratch_folder.sweep()
    assert list(scratch.iterdir()) == []


def _fetch_forever(uri: str, folder: str) -> None:
    tempfile.tempdir = folder
    with localised(Source(uri, uri)):
        pass


def test_a_killed_worker_leaves_nothing_that_looks_finished(server: Server, scratch: Path) -> None:
    def half(r: Request) -> None:
        r.reply(200, BODY[:1000], Content_Length=str(len(BODY)))
        time.sleep(10)

    server.script = [half, whole]
    uri = f"{server.url}/v.mp4"
    child = multiprocessing.get_context("spawn").Process(
        target=_fetch_forever, args=(uri, str(scratch.parent)), daemon=True
    )
    child.start()
    deadline = time.monotonic() + 30
    while not (partial := list(scratch.glob("*.partial")) if scratch.exists() else []):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert sorted(p.suffix for p in scratch.iterdir()) == [".lock", ".partial"]
    assert got(uri) == BODY
    assert not partial[0].exists()


def test_a_full_scratch_disk_is_the_workers_fault(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_fetch", full)
    with (
        pytest.raises(WorkerFault, match="No space left on device; free some space"),
        localised(Source(f"{server.url}/v.mp4", "v")),
    ):
        pass


def test_somebody_elses_scratch_folder_is_not_used(scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "bait").mkdir()
    scratch.symlink_to(tmp_path / "bait")
    with (
        pytest.raises(WorkerFault, match="somebody else"),
        localised(Source("http://127.0.0.1:1/v.mp4", "v")),
    ):
        pass
