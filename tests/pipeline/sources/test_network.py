"""Whom a download may talk to, and whose fault it is when nobody answers."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import curate
from pipeline.faults import Fault, SourceFault, TransientFault, WorkerFault, kind_of
from pipeline.record import Source, Video
from pipeline.sources import fetch, names, network
from pipeline.sources.fetch import localised
from pipeline.sources.listing import list_sources
from pipeline.sources.names import Limits, SourceError
from pipeline.stages import fail, patiently
from tests.fixtures.web import Request, Server

QUICK = Limits(timeout_s=0.5, total_s=20, backoff_s=0.01, tries=2)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.delenv(network.ALLOW, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(network, "_reached", set())


def fault(source: Source) -> Fault:
    with pytest.raises(Fault) as e, localised(source, limits=QUICK):
        pass
    assert "\n" not in str(e.value)
    return e.value


def named(monkeypatch: pytest.MonkeyPatch, addresses: Callable[[str], list[str]]) -> None:
    """A DNS of the test's own; `addresses` raises or gives what a name resolves to."""
    real = socket.getaddrinfo

    def lookup(host: str, port: Any, *args: Any, **named: Any) -> Any:
        return [found for ip in addresses(host) for found in real(ip, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


# Private addresses ----------------------------------------------------------------------------------

PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "224.0.0.1"),
    *("255.255.255.255", "240.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%1", "fc00::1"),
    *("fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "::ffff:0:10.0.0.1"),
]
PUBLIC = [
    "8.8.8.8",
    "172.32.0.1",
    "169.253.0.1",
    "1.1.1.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "2002:808:808::1",
]


@pytest.mark.parametrize("ip", PRIVATE)
def test_addresses_that_are_none_of_the_public_internet(ip: str) -> None:
    assert network.is_private(ip)
    assert network.named_private(ip)


@pytest.mark.parametrize("ip", PUBLIC)
def test_addresses_of_the_public_internet(ip: str) -> None:
    assert not network.is_private(ip)
    assert not network.named_private(ip)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "localhost",
            "LOCALHOST",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "127.1",
        ),
        *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0", "[0:0:0:0:0:ffff:127.0.0.1]"),
    ],
)
def test_a_row_cannot_reach_this_machine_in_any_spelling(server: Server, host: str) -> None:
    url = f"http://{host}:{server.server_address[1]}/v.mp4"
    trouble = fault(names.located(url))
    assert isinstance(trouble, SourceFault)
    assert "no public address" in str(trouble)
    assert network.ALLOW in str(trouble)
    assert server.asked == []


def test_a_name_is_judged_by_the_address_that_is_connected_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when first looked up and private afterwards (DNS rebinding) is no way in."""
    answers = [["8.8.8.8"], ["127.0.0.1"]]
    asked: list[str] = []
    tried: list[Any] = []

    def dns(host: str) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), 2) - 1]

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address[0])
        raise OSError(errno.ETIMEDOUT, "timed out")

    named(monkeypatch, dns)
    monkeypatch.setattr(network.socket.socket, "connect", connect)
    trouble = fault(names.located(f"http://rebind.example:{server.server_address[1]}/v.mp4"))
    assert isinstance(trouble, SourceFault)
    assert tried == ["8.8.8.8"]  # the first look-up's; the second was refused, not connected to
    assert len(asked) == 2


def test_of_a_name_with_private_and_public_addresses_the_private_are_left_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, lambda host: ["127.0.0.1", "8.8.8.8"])
    tried: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address[0])
        raise OSError(errno.ETIMEDOUT, "timed out")

    monkeypatch.setattr(network.socket.socket, "connect", connect)
    assert isinstance(fault(names.located("http://both.example/v.mp4")), TransientFault)
    assert set(tried) == {"8.8.8.8"}


def test_a_redirect_leads_to_no_private_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    server.script = [lambda r: r.reply(302, Location=f"http://localhost:{port}/meta-data/")]
    typed = names.located(
        f"{server.url}/v.mp4", reach=network.HOST
    )  # the person's own address may be private
    assert "localhost (127.0.0.1) is no public address" in str(fault(typed)).replace("::1", "127.0.0.1")
    assert [a["path"] for a in server.asked] == ["/v.mp4"]
    monkeypatch.setenv(network.ALLOW, "1")
    server.script = [server.script[0], lambda r: r.reply(200, b"video")]
    with localised(typed, limits=QUICK) as local:
        assert Path(local.path).read_bytes() == b"video"


def test_what_a_person_types_is_meant_and_what_a_list_names_is_not(server: Server, tmp_path: Path) -> None:
    server.script = [lambda r: r.reply(200, b"path\na.mp4\n" if r.path == "/l.csv" else b"video")]
    (tmp_path / "l.csv").write_text(f"url\n{server.url}/b.mp4\n")
    with localised(list_sources([f"{server.url}/c.mp4"])[0]) as local:
        assert Path(local.path).read_bytes() == b"video"
    [neighbour] = list_sources([f"{server.url}/l.csv"])  # of the typed list, on its own host
    with localised(neighbour):
        pass
    [row] = list_sources([str(tmp_path / "l.csv")])
    assert "no public address" in str(fault(row))


def test_a_list_on_the_web_that_names_other_private_hosts_is_refused(server: Server) -> None:
    rows = f"url\nhttp://169.254.169.254/latest/\n//localhost:{server.server_address[1]}/a.mp4\n"
    server.script = [lambda r: r.reply(200, rows.encode())]
    for row in list_sources([f"{server.url}/l.csv"]):
        assert "no public address" in str(fault(row))
    assert [a["path"] for a in server.asked] == ["/l.csv"]


@pytest.mark.parametrize("row", ["file:///etc/passwd", "FILE://localhost/etc/passwd", "~/x.mp4"])
def test_a_list_from_elsewhere_cannot_name_local_files(server: Server, row: str) -> None:
    server.script = [lambda r: r.reply(200, f"path\n{row}\n".encode())]
    [source] = list_sources([f"{server.url}/l.csv"])
    trouble = fault(source)
    assert "cannot name files of this machine" in str(trouble)
    assert trouble.stage == "list"


def test_an_absolute_path_in_a_list_on_the_web_is_its_servers(server: Server) -> None:
    server.script = [lambda r: r.reply(200, b"path\n/etc/passwd\n")]
    assert list_sources([f"{server.url}/sub/l.csv"])[0].uri == f"{server.url}/etc/passwd"


def test_the_command_line_can_allow_private_addresses_for_workers_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(network.ALLOW, "")  # so that what the command sets is undone
    (tmp_path / "l.csv").write_text(f"url\n{server.url}/b.mp4\n")
    listed: list[Source] = []

    def take(args: list[str], *_: Any, **__: Any) -> None:
        listed.extend(list_sources(args))
        raise SourceError("that is enough")

    monkeypatch.setattr("pipeline.run.job.curate", take)
    curate.main(
        [str(tmp_path / "l.csv"), "--out", str(tmp_path / "out"), "--recipe", "smoke", "--allow-private"]
    )
    monkeypatch.setenv(network.ALLOW, "")  # another machine's environment
    server.script = [lambda r: r.reply(200, b"video")]
    with localised(listed[0]) as local:
        assert Path(local.path).read_bytes() == b"video"


def test_a_row_cannot_choose_a_private_object_store(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    row = names.located(f"s3://a:b@b/v.mp4?scheme=http&endpoint_override=127.1:{port}")
    assert "127.1 is no public address" in str(fault(row))
    assert server.asked == []


def test_through_a_proxy_names_are_judged(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    server.script = [lambda r: r.reply(200, b"video")]
    with localised(names.located("http://public.example/v.mp4")) as local:
        assert Path(local.path).read_bytes() == b"video"
    assert server.asked[0]["path"] == "http://public.example/v.mp4"
    for host in ("169.254.169.254", "metadata.google.internal", "0x7f.1"):
        assert "no public address" in str(fault(names.located(f"http://{host}/v.mp4")))
    assert len(server.asked) == 1


# Whose fault ----------------------------------------------------------------------------------------


def unknown(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def flaky(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize("dns", [unknown, flaky])
def test_where_no_name_is_known_it_is_the_nodes_fault(
    monkeypatch: pytest.MonkeyPatch, dns: Callable[[str], list[str]]
) -> None:
    named(monkeypatch, dns)
    trouble = fault(names.located("http://some.example/v.mp4"))
    assert isinstance(trouble, WorkerFault)
    assert "no network or no DNS" in str(trouble)


@pytest.mark.parametrize(("dns", "kind"), [(unknown, SourceFault), (flaky, TransientFault)])
def test_where_other_names_are_known_it_is_the_hosts(
    monkeypatch: pytest.MonkeyPatch, dns: Callable[[str], list[str]], kind: type[Fault]
) -> None:
    named(monkeypatch, lambda host: ["8.8.8.8"] if host == network.KNOWN[-1] else dns(host))
    assert type(fault(names.located("http://gone.example/v.mp4"))) is kind


def test_a_host_reached_before_proves_the_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [lambda r: r.reply(200, b"video")]
    for host in ("localhost", "127.0.0.1"):
        url = f"http://{host}:{server.server_address[1]}/{host}.mp4"
        with localised(names.located(url, reach=network.HOST)):
            pass
    assert network._reached == {"localhost"}  # an address in digits proves nothing of DNS
    named(monkeypatch, lambda host: ["127.0.0.1"] if host == "localhost" else unknown(host))
    assert type(fault(names.located("http://typo.example/v.mp4"))) is SourceFault


@pytest.mark.parametrize(("routed", "kind"), [(True, TransientFault), (False, WorkerFault)])
def test_without_any_route_it_is_the_nodes_fault(
    monkeypatch: pytest.MonkeyPatch, routed: bool, kind: type[Fault]
) -> None:
    def connect(self: socket.socket, address: Any) -> None:
        if self.type == socket.SOCK_STREAM or not routed:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(network.socket.socket, "connect", connect)
    assert type(fault(names.located("http://8.8.8.8/v.mp4"))) is kind


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces here",
)
def test_a_process_without_network_finds_so_itself(tmp_path: Path) -> None:
    code = (
        "from pipeline.sources import names\n"
        "from pipeline.sources.fetch import localised\n"
        "for host in ('8.8.8.8', 'some.example'):\n"
        "    try:\n"
        "        with localised(names.located(f'http://{host}/v.mp4'), limits=names.Limits(tries=1)): pass\n"
        "    except Exception as e: print(type(e).__name__)\n"
    )
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.stdout.split() == ["WorkerFault", "WorkerFault"], done.stderr


@pytest.mark.parametrize(
    ("code", "kind"),
    [(c, TransientFault) for c in (408, 425, 429, 500, 502, 503, 504, 520)]
    + [(c, SourceFault) for c in (400, 401, 403, 404, 410, 451, 501)],
)
def test_what_a_server_answers_has_its_kind(server: Server, code: int, kind: type[Fault]) -> None:
    server.script = [lambda r: r.reply(code)]
    trouble = fault(names.located(f"{server.url}/v.mp4", reach=network.HOST))
    assert type(trouble) is kind
    assert len(server.asked) == (QUICK.tries if kind is TransientFault else 1)


def test_a_connection_that_is_reset_or_hangs_is_the_moments_fault(server: Server) -> None:
    def reset(r: Request) -> None:
        r.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        r.connection.close()

    def hang(r: Request) -> None:
        import time

        time.sleep(1)

    for answer in (reset, hang):
        server.script = [answer]
        trouble = fault(names.located(f"{server.url}/v.mp4", reach=network.HOST))
        assert isinstance(trouble, TransientFault), trouble


def test_what_was_tried_in_vain_is_not_tried_again_at_once(server: Server) -> None:
    server.script = [lambda r: r.reply(503)]
    source = names.located(f"{server.url}/v.mp4", reach=network.HOST)
    video = Video(source, "u")
    with pytest.raises(TransientFault) as e:
        patiently(lambda: localised(source, limits=QUICK).__enter__())
    assert len(server.asked) == QUICK.tries
    fail(video, "decode", e.value)
    assert video.error is not None
    assert (video.error.stage, video.error.kind) == ("fetch", "transient")


def test_trouble_of_listing_is_its_own_stage_in_the_row(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path\n\na.mp4,b\n")
    for source in list_sources([str(tmp_path / "l.csv")]):
        video = Video(source, "u")
        fail(video, "decode", fault(source))
        assert video.error is not None
        assert (video.error.stage, video.error.kind) == ("list", "source")


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, TransientFault), (errno.ESTALE, TransientFault)])
def test_a_disk_that_cannot_be_read_now_is_the_moments_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Fault]
) -> None:
    (tmp_path / "v.mp4").write_bytes(b"video")
    source = Source(str(tmp_path / "v.mp4"), "v.mp4")

    def broken(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as m:
        m.setattr(fetch, "_digest", broken)
        assert type(fault(source)) is kind
        assert str(tmp_path / "v.mp4") in str(fault(source))
    with monkeypatch.context() as m:
        m.setattr(fetch.os, "open", broken)
        assert type(fault(source)) is kind
    member = Source(names.member_uri(str(tmp_path / "v.mp4"), "m"), "m", member=(0, 5))
    with monkeypatch.context() as m:
        m.setattr(fetch, "_copy_range", broken)
        assert type(fault(member)) is kind


def test_a_list_that_cannot_be_fetched_now_is_said_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "LIMITS", QUICK)
    monkeypatch.setattr("pipeline.sources.lists.localised", lambda s, hash: localised(s, hash, QUICK))
    server.script = [lambda r: r.reply(503)]
    with pytest.raises(SourceError, match="HTTP 503"):
        list_sources([f"{server.url}/l.csv"])


# Object stores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "body", "kind"),
    [
        (503, "<Error><Code>SlowDown</Code><Message>slow down</Message></Error>", TransientFault),
        (403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>", SourceFault),
        (404, "<Error><Code>NoSuchKey</Code><Message>none</Message></Error>", SourceFault),
    ],
)
def test_an_object_stores_answers_have_their_kind(
    server: Server, monkeypatch: pytest.MonkeyPatch, code: int, body: str, kind: type[Fault]
) -> None:
    """pyarrow's own client against a server that refuses."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server.script = [lambda r: r.reply(code, body.encode(), Content_Type="application/xml")]
    port = server.server_address[1]
    options = f"?region=x&scheme=http&endpoint_override=127.0.0.1:{port}"
    trouble = fault(names.located(f"s3://AKIAabcdef:s3cr3tVALUE@b/v.mp4{options}", reach=network.HOST))
    assert type(trouble) is kind, trouble
    assert "s3cr3tVALUE" not in str(trouble)
    assert server.asked


def test_kinds_survive_the_way_between_processes() -> None:
    import pickle

    e = pickle.loads(pickle.dumps(TransientFault("x", stage="fetch", tried=True)))
    assert (str(e), e.stage, e.tried, kind_of(e)) == ("x", "fetch", True, TransientFault)
