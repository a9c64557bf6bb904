"""The system-call filter of the code sandbox, as a classic BPF program: what is not listed here fails with EPERM.

A program gets files (which ones is decided elsewhere), memory, threads, clocks and signals to itself. It gets no
process, no exec, no socket but a socketpair, no signal to others, no other process's memory or limits, no mount, no
namespace, no keyring, bpf or io_uring. clone3 and openat2 take their flags in memory, where a filter cannot read them:
they fail with ENOSYS, and libc falls back to clone and openat.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_ALLOWED = """
read 0 63  write 1 64  close 3 57  lseek 8 62  mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214  mremap 25 216
madvise 28 233  mincore 27 232  msync 26 227  rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139
rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133  sigaltstack 131 132  ioctl 16 29
pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  preadv 295 69  pwritev 296 70  preadv2 327 286
pwritev2 328 287  access 21 -  faccessat 269 48  faccessat2 439 439  pipe 22 -  pipe2 293 59  select 23 -
pselect6 270 72  poll 7 -  ppoll 271 73  epoll_create 213 -  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -
epoll_pwait 281 22  eventfd 284 -  eventfd2 290 19  timerfd_create 283 85  timerfd_settime 286 86
timerfd_gettime 287 87  dup 32 23  dup2 33 -  dup3 292 24  fcntl 72 25  flock 73 32  fsync 74 82  fdatasync 75 83
ftruncate 77 46  getdents 78 -  getdents64 217 61  getcwd 79 17  chdir 80 49  fchdir 81 50  rename 82 -
renameat 264 38  renameat2 316 276  mkdir 83 -  mkdirat 258 34  rmdir 84 -  creat 85 -  link 86 -  linkat 265 37
unlink 87 -  unlinkat 263 35  symlink 88 -  symlinkat 266 36  readlink 89 -  readlinkat 267 78  umask 95 166
stat 4 -  fstat 5 80  lstat 6 -  newfstatat 262 79  statx 332 291  statfs 137 43  fstatfs 138 44  sendfile 40 71
copy_file_range 326 285  fadvise64 221 223  sched_yield 24 124  nanosleep 35 101  clock_nanosleep 230 115
clock_gettime 228 113  clock_getres 229 114  gettimeofday 96 169  time 201 -  times 100 153  getrusage 98 165
getitimer 36 102  setitimer 38 103  alarm 37 -  pause 34 -  timer_create 222 107  timer_settime 223 110
timer_gettime 224 108  timer_getoverrun 225 109  timer_delete 226 111  getpid 39 172  getppid 110 173  gettid 186 178
getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177  getgroups 115 158  getresuid 118 148
getresgid 120 150  getpgid 121 155  getpgrp 111 -  getsid 124 156  getpriority 140 141  uname 63 160  sysinfo 99 179
getrlimit 97 163  setrlimit 160 164  sched_getaffinity 204 123  sched_getparam 143 121  sched_getscheduler 145 120
sched_get_priority_max 146 125  sched_get_priority_min 147 126  getcpu 309 168  getrandom 318 278  futex 202 98
set_robust_list 273 99  get_robust_list 274 100  set_tid_address 218 96  rseq 334 293  membarrier 324 283
restart_syscall 219 128  exit 60 93  exit_group 231 94  wait4 61 260  waitid 247 95
"""  # name, number on x86_64, number on aarch64
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # ld abs, jeq, jset, and, ret
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000
_TRUNCATES_READ_ONLY, _MODE_AND_TRUNCATE = 0o1000, 0o1003  # O_RDONLY | O_TRUNC: a write that needs no write access

_CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199),
    "open": (2, None), "openat": (257, 56), "clone3": (435, 435), "openat2": (437, 437)}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def machines() -> tuple[str, ...]:
    return tuple(_AUDIT)


def program(machine: str) -> tuple[bytes, list[int]]:
    """(BPF instructions, byte offsets where the filtered process writes its own pid as uint32); ValueError for a
    machine whose system-call numbers are not known."""
    if machine not in _AUDIT:
        raise ValueError(f"no system-call table for {machine} (there are: {', '.join(_AUDIT)})")
    code = list(_instructions(machine))
    packed = b"".join(struct.pack("=HBBI", *i[:3], max(i[3], 0)) for i in code)
    return packed, [8 * n + 4 for n, i in enumerate(code) if i[3] == _OWN_PID]


_OWN_PID = -1


def _instructions(machine: str) -> Iterator[Instruction]:
    column = list(_AUDIT).index(machine)
    words = _ALLOWED.split()
    numbers = {words[i]: words[i + 1 + column] for i in range(0, len(words), 3)}
    special = {name: pair[column] for name, pair in _CONDITIONAL.items()}
    yield _LOAD, 0, 0, _ARCH
    yield _EQUAL, 1, 0, _AUDIT[machine]
    yield _RETURN, 0, 0, _KILL_PROCESS
    yield _LOAD, 0, 0, _NUMBER
    for number in numbers.values():
        if number != "-":
            yield _EQUAL, 0, 1, int(number)
            yield _RETURN, 0, 0, _ALLOW
    reads = ((_AND, 0, 0, _MODE_AND_TRUNCATE), (_EQUAL, 1, 0, _TRUNCATES_READ_ONLY))
    for name, argument, test in (
            ("clone", 0, [(_SET, 0, 1, _CLONE_THREAD)]), ("kill", 0, [(_EQUAL, 0, 1, _OWN_PID)]),
            ("tgkill", 0, [(_EQUAL, 0, 1, _OWN_PID)]), ("prlimit64", 0, [(_EQUAL, 0, 1, 0)]),
            ("socketpair", 0, [(_EQUAL, 0, 1, 1)]),  # AF_UNIX: asyncio's own wake-up pipe
            ("open", 1, reads), ("openat", 2, reads)):
        if (own := special[name]) is not None:
            yield from _when(own, argument, *test)
    for name in ("clone3", "openat2"):
        yield _EQUAL, 0, 1, special[name] or 0
        yield _RETURN, 0, 0, _ERRNO | _ENOSYS
    yield _RETURN, 0, 0, _ERRNO | _EPERM


def _when(number: int, argument: int, *test: Instruction) -> list[Instruction]:
    """Allow one call if the test on the low 32 bits of an argument falls through to the next instruction."""
    body: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *test, (_RETURN, 0, 0, _ALLOW),
                               (_RETURN, 0, 0, _ERRNO | _EPERM)]
    return [(_EQUAL, 0, len(body), number), *body]
