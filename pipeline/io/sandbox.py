"""What a program that parses strangers' files may do: read, compute, and answer on the pipes it was given.

Of what the kernel offers, as far as it offers it, without privileges and as root, in this order:

| means | keeps the process from |
|---|---|
| an allow-list of environment variables | secrets in them |
| no-new-privileges, no capabilities | becoming more than it is |
| seccomp | sockets, writing, other programs, other processes (also as a second lock where Landlock holds) |
| Landlock | writing, other programs, looking into processes outside |
| a network namespace, where there is no seccomp | the network |
| RLIMIT_FSIZE, RLIMIT_CORE | files that grow |

What cannot be had is left out: `confine` says what holds. It is a second wall, not the first: libav is kept
from files and protocols by its white lists (`pipeline.io.ffmpeg`) anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Variables that change how a program runs and hold no secrets; a name that ends in '*' stands for all that begin so.
ENVIRONMENT = (
    *("PATH", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *(
        "FONTCONFIG_*",
        "MALLOC_*",
        "GLIBC_TUNABLES",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONHASHSEED",
    ),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE", "PYTHONUTF8", "OMP_*", "OPENBLAS_*", "MKL_NUM_THREADS"),
    *("OPENCV_*", "CUDA_*", "NVIDIA_*", "LIBVA_*", "CLIPMILL_FFMPEG"),
)

_PRIVILEGES, _SECCOMP, _CAPBSET_DROP = 38, 22, 24  # of prctl
_NEWNET, _NEWUSER = 0x40000000, 0x10000000
_READ_ANYTHING = 1 << 2  # CAP_DAC_READ_SEARCH


def environment(full: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables a confined program gets."""
    return {
        name: value
        for name, value in full.items()
        if any(name.startswith(e[:-1]) if e[-1] == "*" else name == e for e in ENVIRONMENT)
    }


# System calls ----------------------------------------------------------------------------------------

# Numbers on x86-64 and on arm64 (None: not there).
CALLS: dict[str, tuple[int | None, int | None]] = {
    # the network, and sockets to whatever runs on this machine
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "socketpair": (53, 199),
    # other programs
    "execve": (59, 221),
    "execveat": (322, 281),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "shmget": (29, 194),
    "shmat": (30, 196),
    # files, but for opening them
    "creat": (85, None),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # the system
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "mount_setattr": (442, 442),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "fanotify_init": (300, 262),
}
# Refused as calls that an old kernel does not know, so that programs fall back on what is looked at here: their
# arguments lie in memory, where a filter does not see them.
UNKNOWN = {"openat2": (437, 437), "io_uring_setup": (425, 425)}
# Allowed with some arguments only, see `_filter`.
_OPEN, _OPENAT, _KILL, _TGKILL, _PRLIMIT = (2, None), (257, 56), (62, 129), (234, 131), (302, 261)
# What a program that writes files and is started from here must be able to do all the same.
FILES = [*CALLS][[*CALLS].index("creat") : [*CALLS].index("mount")]
STARTS = ["execve"]

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_ALLOW, _DENY, _NO_SUCH = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, k)


def _load(offset: int) -> bytes:
    return _op(
        0x20, offset
    )  # BPF_LD | BPF_W | BPF_ABS; of struct seccomp_data: 0 nr, 4 arch, 16 + 8n arguments


def _when(value: int, then: list[bytes]) -> list[bytes]:
    """If the number loaded is `value`, do that and go no further on."""
    return [_op(0x15, value, 0, len(then)), *then]


def _end(verdict: int) -> bytes:
    return _op(0x06, verdict)


def _only_if(argument: int, value: int) -> list[bytes]:
    """Allow a call whose argument (its low half) is `value`, refuse it otherwise."""
    return [_load(16 + 8 * argument), _op(0x15, value, 0, 1), _end(_ALLOW), _end(_DENY)]


@functools.cache
def _filter(machine: str, pid: int, *, writes: bool) -> bytes | None:
    """A seccomp filter (struct sock_filter[]); None for a machine whose call numbers are not known here.

    Args:
        pid: of the process it is for, which may send signals to itself.
        writes: it is a program yet to be started, which may write files and have sockets of this machine.
    """
    if machine not in _ARCHITECTURES:
        return None
    column, audit = _ARCHITECTURES[machine]
    code = [_load(4), _op(0x15, audit, 1, 0), _end(_DENY), _load(0)]
    if column == 0:  # the x32 calls have numbers of their own
        code += [_op(0x35, 0x40000000, 0, 1), _end(_DENY)]
    for numbers in UNKNOWN.values():
        code += _when(numbers[column], [_end(_NO_SUCH)])
    for name, both in CALLS.items():
        number = both[column]
        if number is None or (writes and name in (*FILES, *STARTS)):
            continue
        if writes and name in ("socket", "socketpair"):
            code += _when(number, _only_if(0, socket.AF_UNIX))
        elif not (writes and name in ("connect", "bind", "listen", "accept", "accept4")):
            code += _when(number, [_end(_DENY)])
    if not writes:
        for call, argument in ((_OPEN, 1), (_OPENAT, 2)):
            if (opening := call[column]) is not None:
                looked = [_load(16 + 8 * argument), _op(0x45, _WRITES, 0, 1), _end(_DENY), _end(_ALLOW)]
                code += _when(opening, looked)
        for call in (_KILL, _TGKILL):
            number = call[column]
            assert number is not None
            code += _when(number, _only_if(0, pid))
        number = _PRLIMIT[column]
        assert number is not None
        own = [_load(16), _op(0x15, 0, 1, 0), _op(0x15, pid, 0, 1), _end(_ALLOW), _end(_DENY)]
        code += _when(number, own)
    return b"".join([*code, _end(_ALLOW)])


# Looked up before any fork: a child that shares its memory with other threads must not load anything.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _install(code: bytes | None) -> bool:
    """Put a filter on this process, all its threads, and what it starts."""
    if _LIBC is None or code is None:
        return False
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    mode, every_thread = 1, 1  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
    if _LIBC.syscall(number, mode, every_thread, ctypes.byref(program)) == 0:
        return True
    return _LIBC.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0


def _landlock() -> int:
    """Forbid this thread and what it starts every change to the file system; returns Landlock's version, 0 for none."""
    if _LIBC is None:
        return 0
    version = _LIBC.syscall(444, None, 0, 1)
    if version < 1:
        return 0
    # EXECUTE, WRITE_FILE, and REMOVE_DIR … MAKE_SYM; REFER, TRUNCATE and IOCTL_DEV came later
    files = (
        0b1
        | 0b10
        | 0x1FF0
        | (1 << 13) * (version >= 2)
        | (1 << 14) * (version >= 3)
        | (1 << 15) * (version >= 5)
    )
    network = 0b11 * (version >= 4)  # BIND_TCP, CONNECT_TCP
    scoped = 0b11 * (version >= 6)  # ABSTRACT_UNIX_SOCKET, SIGNAL
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = ctypes.create_string_buffer(struct.pack("QQQ", files, network, scoped)[:size], size)
    fd = _LIBC.syscall(444, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    if fd < 0:
        return 0
    try:
        return version if _LIBC.syscall(446, fd, 0) == 0 else 0  # no rule was added: nothing is allowed
    finally:
        os.close(fd)


def _drop_capabilities() -> bool:
    """As root: keep but the one to read any file."""
    if _LIBC is None:
        return False
    for capability in range(64):
        if capability != 2:
            _LIBC.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)  # _LINUX_CAPABILITY_VERSION_3
    data = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; then their upper halves
    number = {"x86_64": (125, 126), "aarch64": (90, 91)}.get(platform.machine())
    if number is None or _LIBC.syscall(number[0], ctypes.byref(header), ctypes.byref(data)):
        return False
    effective, permitted, *_ = struct.unpack("6I", data.raw)
    kept = struct.pack("6I", effective & _READ_ANYTHING, permitted & _READ_ANYTHING, 0, 0, 0, 0)
    return _LIBC.syscall(number[1], ctypes.byref(header), ctypes.create_string_buffer(kept, 24)) == 0


def confine() -> list[str]:
    """From here on this process reads, computes and talks on the descriptors it has; returns what holds.

    Call it before threads are started where that can be: Landlock is for the thread that asks.
    """
    held = []
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        held.append("file size")
    if _LIBC is None:
        return held
    if _LIBC.prctl(_PRIVILEGES, 1, 0, 0, 0) == 0:
        held.append("privileges")
    if _install(_filter(platform.machine(), os.getpid(), writes=False)):
        held.append("seccomp")
    elif _LIBC.unshare(_NEWNET) == 0 or _LIBC.unshare(_NEWNET | _NEWUSER) == 0:
        held.append("network namespace")
    if _drop_capabilities():
        held.append("capabilities")
    if version := _landlock():
        held.append(f"landlock {version}")
    return held


def prepare() -> None:
    """Have everything at hand that `confine_program` needs, in the parent."""
    _filter(platform.machine(), 0, writes=True)


def confine_program() -> None:
    """Between fork and exec of a program that writes files: no network, no other processes, no privileges."""
    if _LIBC is not None:
        _LIBC.prctl(_PRIVILEGES, 1, 0, 0, 0)
        _install(_filter(platform.machine(), 0, writes=True))


# What holds, by trying -------------------------------------------------------------------------------


def escapes(parent: int, folder: str, **_: object) -> list[str]:
    """What this process can do that it should not, found by trying; for a confined one to run.

    Args:
        parent: a process to look into.
        folder: where to try and write.
    """
    found = []
    attempts = {
        "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
        "write a file": lambda: Path(folder, f"clipmill-escape-{os.getpid()}").write_bytes(b"x"),
        "start a program": lambda: subprocess.run(["/bin/true"], check=False),
        "read the environment of another process": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "signal another process": lambda: os.kill(parent, 0),
    }
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError):
            attempt()
            found.append(name)
    return found
