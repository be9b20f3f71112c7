"""Runs the program on standard input under limits it cannot lift; started by ``sandbox`` as ``python -I -S -c <this file>``.

Arguments: seconds of CPU, bytes of memory, and the exit status that says that the program ran to its end. Imports only
the standard library: the process sees no packages.
"""

import ctypes
import os
import resource
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 22, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_RIGHTS = 0b1_1111_1111_0010
"""Landlock ABI 1: write a file, remove, and make anything (linux/landlock.h); later ABIs add rename across folders and truncate."""
FORKS = {"x86_64": (56, 57, 58, 435), "aarch64": (220, 435)}
"""Numbers of clone, fork, vfork and clone3."""


def write_only_below(folder: str) -> None:
    """Let this process write nowhere but below ``folder``, where the kernel has Landlock (Linux 5.13)."""
    abi = LIBC.syscall(CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return
    rights = WRITE_RIGHTS | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    scoped = 0b11 if abi >= 6 else 0  # abstract sockets and signals stay inside
    attributes = struct.pack("QQQ", rights, 0, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = LIBC.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    beneath = os.open(folder, os.O_PATH)
    LIBC.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, beneath), 0)
    LIBC.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(beneath)
    os.close(ruleset)


def forbid_processes() -> None:
    """Make every fork and thread fail with EPERM (seccomp); the limit on processes alone does not bind root."""
    numbers = FORKS.get(os.uname().machine)
    if numbers is None:
        return
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    rules = [(load, 0, 0, 0)]
    rules += [(jump_if_equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    rules += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]  # allow, or EPERM
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    LIBC.prctl(SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)), 0, 0)


def main() -> None:
    """Take the limits, run the program, and leave with the status agreed on."""
    seconds, memory, status = (int(argument) for argument in sys.argv[1:])
    program = sys.stdin.read()
    if sys.platform == "linux":
        LIBC.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        write_only_below(".")
        forbid_processes()
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os._exit(status)


main()
