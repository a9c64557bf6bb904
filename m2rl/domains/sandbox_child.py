"""The far side of the sandbox: a warm process that closes itself in, then forks one limited child per program.

Runs as `python -s -S -P -c <this file>`, imports the standard library alone, and talks JSON over the socket at fd 0:

    in   {"cpu_s", "wall_s", "preload"} + 4 descriptors: job, stdin, stdout, report      {"kill": why}
    out  {"ready"}, then for every program {"end": exit | error | timeout | killed, or why it was to be killed}

A child is a copy of this process, so this process never holds a program, an input or an output, which the next child
could find in its memory: they are in the descriptors, which go straight to the child.

    job  {"source", "prelude"} runs as a script; with "name" and "arguments" it calls a function, one JSON line per call
"""

import builtins
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time

STACK_BYTES = 256 << 20
OPEN_FILES = 64
IDLE_S = 2.0  # without any processor time: it sleeps, or waits for what will never come
TICK_S = 0.25
WARM = (
    "array",
    "atexit",
    "bisect",
    "cmath",
    "collections",
    "copy",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "io",
    "itertools",
    "math",
    "numbers",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "threading",
    "types",
    "typing",
)

# ---- closing in ------------------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000


def check(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces(scratch):
    """User, mount, network, IPC, host-name and PID namespaces, a small tmpfs on `scratch`; returns in a new pid 1."""
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(NEW_USER | NEW_NS | NEW_NET | NEW_IPC | NEW_UTS | NEW_PID), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount /")
    check(
        LIBC.mount(
            b"tmpfs", scratch.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, b"size=64m,nr_inodes=4096,mode=0700"
        ),
        f"mount tmpfs on {scratch}",
    )
    inner = os.fork()
    if inner:  # stays outside only to end with, and to end, the pid namespace
        os.close(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_capabilities():
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    check(LIBC.capset(header, none), "capset")


def restrict_files(readable, devices, scratch):
    """Landlock: read below `readable`, use `devices`, write below `scratch`; no TCP, no signal to outside."""
    abi = check(LIBC.syscall(444, None, ctypes.c_size_t(0), 1), "landlock")
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1  # + REFER, TRUNCATE, IOCTL_DEV
    ruleset = struct.pack("=Q", files)
    if abi >= 4:
        ruleset += struct.pack("=Q", 3)  # bind, connect
    if abi >= 6:
        ruleset += struct.pack("=Q", 3)  # abstract sockets, signals
    rules = check(LIBC.syscall(444, ruleset, ctypes.c_size_t(len(ruleset)), 0), "landlock_create_ruleset")
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    for access, paths in (
        (execute | read_file | read_dir, readable),
        (read_file | write_file, devices),
        (files & ~execute, [scratch] if scratch else []),
    ):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            only_file = access & (execute | write_file | read_file)
            rule = struct.pack("=Qi", access if os.path.isdir(path) else only_file, fd)
            check(LIBC.syscall(445, rules, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(fd)
    check(LIBC.syscall(446, rules, 0), "landlock_restrict_self")
    os.close(rules)


class SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def filter_calls(program, pid_offsets):
    """Install the BPF program, its own pid filled in; lasts until the process ends."""
    code = bytearray(program)
    for offset in pid_offsets:
        struct.pack_into("=I", code, offset, os.getpid())
    buffer = (ctypes.c_char * len(code)).from_buffer(code)
    fprog = SockFprog(len(code) // 8, ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.byref(fprog), 0, 0), "seccomp")


# ---- the child -------------------------------------------------------------------------------------------------------


def limit(limits, config, parent):
    os.setsid()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    cpu_s = max(1, int(limits["cpu_s"] + 0.999))
    for which, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, config["memory_bytes"]),
        (resource.RLIMIT_FSIZE, config["file_bytes"]),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    if config["filter"]:
        filter_calls(config["filter"], config["pid_offsets"])


def run_program(limits, config, parent):
    """In the child: fds 0 stdin, 1 stdout, 2 null, 3 report, 4 job. Never returns."""
    status = 1
    try:
        os.chdir(config["scratch"] or "/")
        with open(4, "rb") as file:
            job = json.loads(file.read())
        limit(limits, config, parent)
        sys.set_int_max_str_digits(0)
        for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            setattr(sys, name, open(fd, mode, 1 << 16, encoding="utf-8", errors="surrogateescape", closefd=False))  # noqa: SIM115
        vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
        builtins.open = opener(builtins.open)
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as the site module, which is not loaded, provides them
        random.seed(0)  # a fork seeds it anew; here a verdict repeats
        sys.argv = ["program.py"]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        space = main.__dict__
        if job["prelude"]:
            space.update(config["prelude"])
            sys.setrecursionlimit(50_000)
        space.update(__file__="program.py", __builtins__=builtins)
        name = job.get("name")
        try:
            code = compile(job["source"], "program.py", "exec", dont_inherit=True)
            if name is None:
                exec(code, space)
                threading._shutdown()  # type: ignore[attr-defined]
            else:
                call_all(code, space, name, job["arguments"])
        finally:
            if name is None:
                import atexit

                atexit._run_exitfuncs()
        status = 0
    except SystemExit:
        status = 0
    except BaseException as error:
        os.write(3, json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}).encode() + b"\n")
    finally:
        try:
            for name in ("stdout", "__stdout__"):
                getattr(sys, name).flush()
        finally:
            os._exit(status)


def opener(real):
    """`open` that knows /dev/stdin without a /proc to resolve it."""
    streams = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}

    def open(file, *args, **kwargs):
        return real(streams.get(file, file) if isinstance(file, str) else file, *args, **kwargs)

    return open


def call_all(code, space, name, arguments):
    exec(code, space)
    method = hasattr(space.get("Solution"), name)  # first: the prelude has functions of common names, as re.search
    function = getattr(space["Solution"](), name) if method else space[name]
    for args in arguments:
        line = json.dumps({"output": function(*args)}, default=plain).encode() + b"\n"
        while line:
            line = line[os.write(3, line) :]


def plain(value):
    """numpy scalars and arrays as numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result of type {type(value).__name__} is not JSON")


# ---- the warm process ------------------------------------------------------------------------------------------------


def serve(config):
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in WARM:
        __import__(name)
    if config["prelude_source"]:
        space: dict = {}
        exec(config["prelude_source"], space)
        del space["__builtins__"]
        config["prelude"] = space
    compile("0", "warm", "exec")  # makes the types of the syntax tree: 1.1 ms, else in every child
    gc.collect()
    gc.freeze()
    control.send(b'{"ready": true}')
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 4)
        if not message:
            leave(config)
        limits = json.loads(message)
        if "kill" in limits:  # came too late
            continue
        for module in limits["preload"]:
            preload(module)
        end = run(limits, config, fds, control)
        control.send(json.dumps({"end": end}).encode())
        if config["scratch"]:
            sweep(config["scratch"])


def preload(module):
    """Import a slow library once here, so that every program that wants it finds it loaded."""
    if module not in sys.modules:
        try:
            __import__(module)
        except Exception:
            sys.modules[module] = None  # type: ignore[assignment]
        gc.collect()
        gc.freeze()


def run(limits, config, fds, control):
    """Start the child and wait for its end, or end it: at a deadline, when it only waits, or when told to."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            job, feed, out, report = fds
            # they may have the numbers they are to get: move them out of the way first
            ends = (feed, out, os.open(os.devnull, os.O_RDWR), report, job)
            high = [os.dup2(fd, 200 + i) for i, fd in enumerate(ends)]
            for wanted, fd in enumerate(high):
                os.dup2(fd, wanted, inheritable=True)
            os.closerange(5, 256)
            run_program(limits, config, parent)
        finally:
            os._exit(1)
    for fd in fds:
        os.close(fd)
    ended, poll, end = os.pidfd_open(pid), select.poll(), None
    for fd in (ended, control.fileno()):
        poll.register(fd, select.POLLIN)
    clock = (~pid << 3) | 2  # the CPU-time clock of a process, see clock_getcpuclockid(3)
    began = busy = time.monotonic()
    spent = 0.0
    while end is None:
        events = [fd for fd, _ in poll.poll(TICK_S * 1000)]
        now = time.monotonic()
        if ended in events:
            break
        if events:
            message = control.recv(1 << 16)
            if not message:
                kill(pid)
                leave(config)
            end = json.loads(message)["kill"]
            break
        cpu_s = time.clock_gettime(clock)
        if cpu_s > spent + 0.001:
            busy, spent = now, cpu_s
        if spent > limits["cpu_s"] or now - began > limits["wall_s"] or now - busy > IDLE_S:
            end = "timeout"
    os.close(ended)
    kill(pid)
    _, status, usage = os.wait4(pid, 0)
    if end is None and os.WIFSIGNALED(status):
        by_limit = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        end = "timeout" if by_limit and usage.ru_utime + usage.ru_stime >= 0.7 * limits["cpu_s"] else "killed"
    return end or ("exit" if os.WEXITSTATUS(status) == 0 else "error")


def kill(pid):
    for send_signal in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send_signal(pid, signal.SIGKILL)


def leave(config):
    """The owner is gone."""
    if config["level"] == "trusted":
        sweep(config["scratch"])
        os.rmdir(config["scratch"])
    os._exit(0)


def sweep(scratch):
    """Remove what a program left; what cannot be removed ends this process, and the tmpfs with it."""
    if os.listdir(scratch):
        import shutil

        for entry in os.scandir(scratch):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def main():
    config = json.loads(sys.argv[1])
    config["filter"] = bytes.fromhex(config["filter"])
    config["prelude"] = {}
    sys.path += config["packages"]
    if config["level"] != "trusted":  # it tidies up first, when its socket closes
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if config["parent"] and os.getppid() != config["parent"]:
        os._exit(0)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    try:
        if config["namespaces"]:
            enter_namespaces(config["scratch"])
        check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        if config["level"] != "trusted":
            check(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
        if config["landlock"]:
            try:
                restrict_files(config["readable"], config["devices"], config["scratch"])
            except OSError:
                if config["landlock"] == "required":
                    raise
        if config["namespaces"]:
            drop_capabilities()
        if config["scratch"]:
            os.chdir(config["scratch"])
    except OSError as error:
        os.write(0, json.dumps({"ready": False, "error": str(error)}).encode())
        os._exit(1)
    serve(config)


if __name__ == "__main__":
    main()
