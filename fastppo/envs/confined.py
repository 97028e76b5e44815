"""A script that gives up what it may do, then becomes a Python interpreter that runs the code it was given: `sandbox.py` starts it.

    python -I -S confined.py SECONDS BYTES CODE

It imports the standard library alone, so that a fresh interpreter can run it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import NamedTuple

# linux/prctl.h, linux/seccomp.h, linux/filter.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where they stand in struct seccomp_data
X32 = 0x40000000
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38

MOST_FILE_BYTES = 2**24
MOST_OPEN_FILES = 64


class Calls(NamedTuple):
    """Numbers of system calls."""

    audit: int
    refused: tuple[int, ...]
    """Sockets and io_uring, whose calls no filter sees; fork; signals to other processes; their memory."""
    clone: int
    clone3: int = 435


CALLS = {
    "x86_64": Calls(0xC000003E, (41, 425, 57, 58, 62, 200, 234, 129, 297, 424, 101, 310, 311, 438), clone=56),
    "aarch64": Calls(0xC00000B7, (198, 425, 129, 130, 131, 138, 240, 424, 117, 270, 271, 438), clone=220),
}


def confine(seconds: int, memory: int) -> None:
    """Limits for this process that nothing in it can raise again. Raises OSError where the kernel refuses one."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: MOST_FILE_BYTES,
        resource.RLIMIT_NOFILE: MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    lines = filter_program(CALLS[platform.machine()])
    program = ctypes.create_string_buffer(lines, len(lines))
    header = ctypes.create_string_buffer(struct.pack("HP", len(lines) // 8, ctypes.addressof(program)))
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header))):
        if libc.prctl(*arguments, *[ctypes.c_ulong(0)] * (5 - len(arguments))):
            raise OSError(ctypes.get_errno(), f"the kernel refuses prctl {arguments[0]}")


def filter_program(calls: Calls) -> bytes:
    """For the kernel: none of `calls.refused`, no new processes (threads are allowed), no calls of another architecture."""

    def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    lines = [line(LOAD, ARCHITECTURE), line(EQUAL, calls.audit, 1, 0), line(RETURN, KILL), line(LOAD, NUMBER)]
    lines += [line(AT_LEAST, X32, 0, 1), line(RETURN, KILL)]
    for number in calls.refused:
        lines += [line(EQUAL, number, 0, 1), line(RETURN, REFUSE | EPERM)]
    # Where clone3 is missing libc calls clone, whose flags can be seen.
    lines += [line(EQUAL, calls.clone3, 0, 1), line(RETURN, REFUSE | ENOSYS)]
    lines += [line(EQUAL, calls.clone, 0, 3), line(LOAD, FIRST_ARGUMENT), line(ANY_BIT, CLONE_THREAD, 1, 0)]
    lines += [line(RETURN, REFUSE | EPERM), line(RETURN, ALLOW)]
    return b"".join(lines)


if __name__ == "__main__":
    confine(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", sys.argv[3]])
