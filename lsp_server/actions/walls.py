"""The walls around generated tests: Linux namespaces without network, in which the whole file system is read-only but for a project
folder whose changes stay in memory; and no way to sockets in that file system, behind which programs listen that do as they are told.

Owns: the walls and the limits. Run as a program of its own with an order on stdin: it builds the walls around itself, gives up the right
to take them down, and becomes the command it was told to run. Uses the standard library only; nothing of this package imports it.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

CPU_S = 20
MEMORY_BYTES = 4 << 30
FILE_BYTES = 32 << 20
PROCESSES = 256
NOT_BUILT = 97
"""The launcher's status when the walls could not be built: then nothing was run."""
PRIVATE = (".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config", ".netrc", ".git-credentials", ".pypirc", ".npmrc")
"""Below the home folder, not to be seen by tests."""
NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, uts, ipc, user, pid, net (sched.h)
NEW_USER = 0x10000000
MS_REC_PRIVATE = 0x4000 | 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 1, 22, 2
SOCKET_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198), "riscv64": (0xC00000F3, 198)}
"""By machine: how seccomp names it (audit.h), and the number of socket(2)."""
IO_URING_SETUP = 425


def launch() -> None:
    """Reads its order from stdin and never returns."""
    order = json.load(sys.stdin)
    root, scratch = Path(order["root"]), Path(order["scratch"])
    try:
        enclose()
        if child := os.fork():  # the first process of the new process namespace: all others end with it
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        furnish(root, scratch)
        for name, text in order["files"].items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
        for kind, most in (
            (resource.RLIMIT_CPU, CPU_S),
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))
        called(libc().unshare(NEW_USER), "unshare")  # out here, the walls belong to somebody else
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
        called(libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        forbid_local_sockets()
    except OSError as error:
        os.write(1, str(error).encode())
        os._exit(NOT_BUILT)
    os.chdir(root)
    home = str(scratch / "home")
    os.execve(
        order["command"][0],
        order["command"],
        {
            "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
        },
    )  # fmt: skip


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def called(result: int, name: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def enclose() -> None:
    """Into namespaces of our own, as their root."""
    uid, gid = os.getuid(), os.getgid()
    called(libc().unshare(NEW), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def forbid_local_sockets() -> None:
    """From now on socket(AF_UNIX) fails: a socket may be spoken to although its file is read-only, the session's bus and Docker's among
    them. socketpair(2), which event loops need, does not. The filter is BPF over struct seccomp_data: nr at 0, arch at 4, args from 16."""
    if os.uname().machine not in SOCKET_CALLS:
        raise OSError(0, f"local sockets cannot be forbidden on {os.uname().machine}")
    arch, socket = SOCKET_CALLS[os.uname().machine]
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    allowed, refused, killed = 0x7FFF0000, 0x00050000 | 13, 0x80000000
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, killed),
        (load, 0, 0, 0), (above, 5, 0, 0x40000000), (equal, 4, 0, IO_URING_SETUP), (equal, 0, 2, socket),
        (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, allowed), (give, 0, 0, refused),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    called(libc().prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program)), "seccomp")


def mount(source: str, target: Path | str, kind: str | None, flags: int, options: str = "") -> None:
    given = kind.encode() if kind else None
    called(libc().mount(source.encode(), str(target).encode(), given, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def furnish(root: Path, scratch: Path) -> None:
    """Everything read-only; `scratch` in memory; `root` as it is, with changes going to memory; what is private out of sight."""
    mount("none", "/", None, MS_REC_PRIVATE)
    attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0)  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    called(
        libc().syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)), "mount_setattr"
    )
    mount("tmpfs", scratch, "tmpfs", 0, "size=256m")
    for name in ("upper", "work", "home", "empty"):
        (scratch / name).mkdir()
    for name in PRIVATE:
        place = Path.home() / name
        if place.is_dir() and not root.is_relative_to(place) and not sys.prefix.startswith(str(place)):
            mount("tmpfs", place, "tmpfs", 0, "size=1m")
    if set(f"{root}{scratch}") & set(",:\\"):
        raise OSError(0, "a folder's name with a comma, a colon or a backslash cannot be mounted")
    mount("overlay", root, "overlay", 0, f"lowerdir={root},upperdir={scratch}/upper,workdir={scratch}/work,userxattr")


if __name__ == "__main__":
    launch()
