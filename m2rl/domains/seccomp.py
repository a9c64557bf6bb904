"""The system-call filter of the code sandbox, as a classic BPF program: what is not listed here fails with EPERM.

A program gets files (which ones is decided elsewhere), memory, threads, clocks and signals to itself. It gets no
process, no exec, no socket but a socketpair, no signal to others (nor by way of a descriptor's owner: F_SETOWN,
FIOSETOWN), no other process's memory or limits, no mount, no namespace, no keyring, bpf or io_uring. clone3 and openat2
take their flags in memory, where a filter cannot read them: they fail with ENOSYS, and libc falls back to clone and
openat.
"""

from __future__ import annotations

import struct

_ALLOWED = """
read 0 63  write 1 64  close 3 57  lseek 8 62  mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214  mremap 25 216
madvise 28 233  mincore 27 232  msync 26 227  rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139
rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133  sigaltstack 131 132
pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  preadv 295 69  pwritev 296 70  preadv2 327 286
pwritev2 328 287  access 21 -  faccessat 269 48  faccessat2 439 439  pipe 22 -  pipe2 293 59  select 23 -
pselect6 270 72  poll 7 -  ppoll 271 73  epoll_create 213 -  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -
epoll_pwait 281 22  eventfd 284 -  eventfd2 290 19  timerfd_create 283 85  timerfd_settime 286 86
timerfd_gettime 287 87  dup 32 23  dup2 33 -  dup3 292 24  flock 73 32  fsync 74 82  fdatasync 75 83
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
_LOAD, _EQUAL, _AT_LEAST, _SET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # ld abs, jeq, jge, jset, and, ret
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000
_TRUNCATES_READ_ONLY, _MODE_AND_TRUNCATE = 0o1000, 0o1003  # O_RDONLY | O_TRUNC: a write that needs no write access

_OWNERSHIP = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: the kernel would send the owner any signal at all
_TERMINAL_AND_FLAGS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: a terminal? how much to read, blocking, close-on-exec."""

_CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "open": (2, None),
    "openat": (257, 56),
    "clone3": (435, 435),
    "openat2": (437, 437),
}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant
_OWN_PID = -1  # stands for the constant that the filtered process fills in
_PERMIT: Instruction = (_RETURN, 0, 0, _ALLOW)
_REFUSE: Instruction = (_RETURN, 0, 0, _ERRNO | _EPERM)
_UNKNOWN: Instruction = (_RETURN, 0, 0, _ERRNO | _ENOSYS)


def machines() -> tuple[str, ...]:
    return tuple(_AUDIT)


def program(machine: str) -> tuple[bytes, list[int]]:
    """(BPF instructions, byte offsets where the filtered process writes its own pid as uint32); ValueError for a
    machine whose system-call numbers are not known."""
    if machine not in _AUDIT:
        raise ValueError(f"no system-call table for {machine} (there are: {', '.join(_AUDIT)})")
    code = _instructions(machine)
    packed = b"".join(struct.pack("=HBBI", *i[:3], max(i[3], 0)) for i in code)
    return packed, [8 * n + 4 for n, i in enumerate(code) if i[3] == _OWN_PID]


def _instructions(machine: str) -> list[Instruction]:
    """A binary search over the system-call number: the kernel tries the filter on every number when it is installed,
    which with a linear one took 0.6 ms, with this one 0.3, where the whole child takes 2 to 3."""
    column = list(_AUDIT).index(machine)
    words = _ALLOWED.split()
    action: dict[int, list[Instruction]] = {
        int(words[i + 1 + column]): [_PERMIT] for i in range(0, len(words), 3) if words[i + 1 + column] != "-"
    }
    reads = [(_AND, 0, 0, _MODE_AND_TRUNCATE), (_EQUAL, 1, 0, _TRUNCATES_READ_ONLY)]
    for name, body in {
        "clone": _when(0, [(_SET, 0, 1, _CLONE_THREAD)]),
        "kill": _when(0, [(_EQUAL, 0, 1, _OWN_PID)]),
        "tgkill": _when(0, [(_EQUAL, 0, 1, _OWN_PID)]),
        "prlimit64": _when(0, [(_EQUAL, 0, 1, 0)]),
        "socketpair": _when(0, [(_EQUAL, 0, 1, 1)]),  # AF_UNIX: asyncio's own wake-up pipe
        "fcntl": _when(1, [(_EQUAL, len(_OWNERSHIP) - i, 0, c) for i, c in enumerate(_OWNERSHIP)]),
        "ioctl": _when(1, _one_of(_TERMINAL_AND_FLAGS)),
        "open": _when(1, reads),
        "openat": _when(2, reads),
        "clone3": [_UNKNOWN],
        "openat2": [_UNKNOWN],
    }.items():
        if (number := _CONDITIONAL[name][column]) is not None:
            action[number] = body
    segments = [(0, action.get(0, [_REFUSE]))]  # (first number, what to do from it on)
    for number in sorted({n for a in action for n in (a, a + 1)} - {0}):
        body = action.get(number, [_REFUSE])
        if body is not segments[-1][1] and body != segments[-1][1]:
            segments.append((number, body))
    return [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        *_search(segments),
    ]


def _search(segments: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    low, high = _search(segments[:middle]), _search(segments[middle:])
    return [(_AT_LEAST, len(low), 0, segments[middle][0]), *low, *high]


def _one_of(values: tuple[int, ...]) -> list[Instruction]:
    last = len(values) - 1
    return [(_EQUAL, last - i, int(i == last), value) for i, value in enumerate(values)]


def _when(argument: int, test: list[Instruction]) -> list[Instruction]:
    """Allow a call if the test on the low 32 bits of an argument falls through to the next instruction, else EPERM."""
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *test, _PERMIT, _REFUSE]
