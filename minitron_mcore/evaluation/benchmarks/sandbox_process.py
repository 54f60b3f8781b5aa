"""The process of one program, started by `sandbox.run` with `python -I`: limits, then a seccomp filter, then the program.

Usage: sandbox_process.py CPU_SECONDS MEMORY_BYTES DESCRIPTOR < program. After the program has ended normally, a byte is written to
the descriptor. Imports only the standard library.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

_FILE_BYTES = 1 << 20
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused with EPERM: sockets and io_uring; processes, also existing ones; changes to files and their names.
_DENIED = {
    "x86_64": [
        *(41, 425),  # socket, io_uring_setup
        *(56, 57, 58, 435, 59, 322),  # clone, fork, vfork, clone3, execve, execveat
        *(
            62,
            101,
            129,
            200,
            234,
            297,
            310,
            311,
            424,
        ),  # kill, ptrace, *sigqueueinfo, tkill, tgkill, process_vm_*, pidfd_send_signal
        *(76, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 165, 188, 189, 190, 235),  # truncate to utimes
        *(258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 316, 437, 452),  # the same, relative to a folder; openat2
    ],
    "aarch64": [
        *(198, 425),
        *(220, 435, 221, 281),
        *(117, 129, 130, 131, 138, 240, 270, 271, 424),
        *(5, 6, 7, 33, 34, 35, 36, 37, 38, 40, 45, 52, 53, 54, 55, 88, 276, 437, 452),
    ],
}
_OPEN = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}
"""open and openat: which argument has the flags."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _filter(machine: str) -> bytes:
    """The seccomp filter: instructions of (code, jump if true, jump if false, value)."""
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32
    for number, argument in _OPEN[machine].items():
        program += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        program += [(_ANY_BIT, 0, 1, _WRITES), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, _NUMBER)]
    for number in _DENIED[machine]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, (_RETURN, 0, 0, _ALLOW)])


def _apply_filter() -> None:
    code = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    for arguments in ((no_new_privileges, 1, 0, 0, 0), (seccomp, filter_mode, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    seconds, memory, descriptor = map(int, sys.argv[1:])
    program = sys.stdin.read()
    for name, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", _FILE_BYTES), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    sys.argv = ["program"]
    _apply_filter()
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(descriptor, b"1")


if __name__ == "__main__":
    main()
