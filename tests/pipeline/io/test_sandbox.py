"""A decoding process has no network, no secrets, and a read-only view; ffmpeg no network and no secrets."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.io import ffmpeg, sandbox
from pipeline.io.isolate import Child

AT = "tests.fixtures.misbehave:"
HERE = sys.platform == "linux"


@pytest.fixture
def child(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "top secret")
    monkeypatch.setenv("HF_TOKEN", "top secret")
    with Child() as c:
        yield c


def attempt(child: Child, what: str, *args: object) -> str:
    """'done', or the name of the OSError that stopped it."""
    return child.call(f"{AT}attempt", what, *args, stall_s=20)


def test_the_environment_holds_no_secrets(child):
    seen = child.call(AT + "environment", stall_s=20)
    assert seen["PATH"] == os.environ["PATH"]
    assert "top secret" not in str(seen)
    assert {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HOME"} & set(seen) == set()


def test_only_listed_variables_pass():
    given = {"PATH": "p", "LC_ALL": "C", "LC": "x", "PATHS": "x", "AWS_PROFILE": "x", "OMP_NUM_THREADS": "1"}
    assert sandbox.environment(given) == {"PATH": "p", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}


needs_seccomp = pytest.mark.skipif(
    not HERE or not Path("/proc/sys/kernel/seccomp").is_dir(), reason="no seccomp"
)


@needs_seccomp
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK])
def test_no_socket_can_be_opened(child, family):
    assert attempt(child, "socket", int(family)) == "PermissionError"


@needs_seccomp
@pytest.mark.parametrize(
    "how", ["write", "append", "update", "truncate", "remove", "rename", "folder", "link", "chmod", "utime"]
)
def test_nothing_can_be_written(child, tmp_path, how):
    there = tmp_path / "there"
    there.write_text("as it was")
    before = there.stat()
    assert attempt(child, how, str(there)) == "PermissionError"
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "as it was"
    assert (there.stat().st_mode, there.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert attempt(child, "read", str(there)) == "done"


@needs_seccomp
def test_no_program_can_be_started(child):
    assert attempt(child, "exec", sys.executable) == "PermissionError"
    assert attempt(child, "run", sys.executable) == "PermissionError"


@needs_seccomp
def test_no_other_process_can_be_reached(child):
    assert attempt(child, "signal", os.getpid()) == "PermissionError"
    assert attempt(child, "limit", os.getpid()) == "PermissionError"
    assert attempt(child, "memory", os.getpid()) == "PermissionError"
    assert attempt(child, "write", f"/proc/{os.getpid()}/comm") == "PermissionError"


@needs_seccomp
def test_trying_finds_no_way_out_but_where_it_is_told(child, tmp_path):
    found = child.call("pipeline.io.sandbox:escapes", os.getpid(), str(tmp_path), stall_s=20)
    assert set(found) <= {"read the environment of another process"}  # without Landlock and not as root
    assert sandbox.escapes(os.getpid(), str(tmp_path))[:4] == [
        "open a socket",
        "write a file",
        "start a program",
        "read the environment of another process",
    ]  # the control: here all of it can be done


@pytest.mark.parametrize("without", ["landlock", "seccomp", "both", "libc"])
def test_it_works_where_the_kernel_offers_less(without):
    """A kernel without the calls: their functions say that there are none."""
    lacks = {
        "landlock": "sandbox._landlock = lambda: 0",
        "seccomp": "sandbox._install = lambda code: False",
        "both": "sandbox._landlock = lambda: 0; sandbox._install = lambda code: False",
        "libc": "sandbox._LIBC = None",
    }[without]
    code = (
        f"from pipeline.io import sandbox; {lacks}; import os, sys\n"
        "if 'av' in sys.argv: import av, numpy, cv2\n"
        "held = sandbox.confine(); import av, numpy, cv2; print(held)\n"
        "print(sandbox.escapes(os.getppid(), sys.argv[1]))"
    )
    root = Path(__file__).parents[3]
    for more in ((), ("av",)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(root), *more],
            capture_output=True,
            text=True,
            cwd=root,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        held, escapes = map(eval, done.stdout.splitlines())
        assert "file size" in held
        assert "write a file" not in escapes
        if without == "landlock":
            assert not {"open a socket", "start a program"} & set(escapes)
    for left in root.glob("clipmill-escape-*"):  # RLIMIT_FSIZE forbids bytes, not names
        left.unlink()


@needs_seccomp
def test_ffmpeg_has_no_network_and_no_secrets_but_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "top secret")
    fake = tmp_path / "ffmpeg"
    fake.write_text(
        f"#!{sys.executable}\nimport os, socket, sys\n"
        "said = [dict(os.environ)]\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):\n"
        "    try: socket.socket(family).close(); said.append('open')\n"
        "    except PermissionError: said.append('refused')\n"
        f"open({str(tmp_path / 'out')!r}, 'w').write(repr(said))\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    ffmpeg.run([str(fake)], stall_s=20)
    environment, *sockets = eval((tmp_path / "out").read_text())
    assert sockets == ["refused", "refused", "open"]
    assert "top secret" not in str(environment)
    assert environment["LC_ALL"] == "C"
