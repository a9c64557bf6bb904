"""Programs that cheat, break out, or hurt the machine: none may score, survive, or leave a file or a process.

`stopped_by` is the weakest level that has to stop it; the levels grow trusted < landlock < namespaces < bwrap. trusted
promises limits and the system-call filter only: it does not hide files.

Each program faces a stdin test whose expected output is a random word that stands nowhere in its input. The same word
lies in the file $SECRET, is served on the TCP port $PORT and on the Unix socket $SOCKET, and is held in memory and
environment by the process $PID: whoever gets at any of these would score. What an attack must not be let do at all, it
follows by printing $SECRET: at the trusted level, where files can be read, it scores if it was let.
"""

from dataclasses import dataclass

LEVELS = ("trusted", "landlock", "namespaces", "bwrap")  # weakest first


@dataclass(frozen=True)
class Attack:
    name: str
    stopped_by: str
    source: str


def attack(name, stopped_by, source):
    return Attack(name, stopped_by, source.strip("\n") + "\n")


RESOURCES = [
    attack(
        "fork bomb",
        "trusted",
        """
import os
while True:
    os.fork()
""",
    ),
    attack(
        "fork bomb that swallows errors",
        "trusted",
        """
import os, time
end = time.time() + 60
while time.time() < end:
    try:
        os.fork()
    except OSError:
        pass
""",
    ),
    attack(
        "thread bomb",
        "trusted",
        """
import threading
def spin():
    while True:
        pass
while True:
    threading.Thread(target=spin, daemon=True).start()
""",
    ),
    attack("memory bomb in one piece", "trusted", "x = bytearray(1 << 40)"),
    attack(
        "memory bomb in pieces",
        "trusted",
        """
x = []
while True:
    x.append(bytearray(1 << 20))
""",
    ),
    attack(
        "memory bomb that catches MemoryError",
        "trusted",
        """
x = []
while True:
    try:
        x.append(bytearray(1 << 24))
    except MemoryError:
        pass
""",
    ),
    attack(
        "memory in anonymous files",
        "trusted",
        """
import os
fds = []
while True:
    fd = os.memfd_create("x")
    os.write(fd, bytes(1 << 24))
""",
    ),
    attack(
        "endless output",
        "trusted",
        """
while True:
    print("x" * 65536)
""",
    ),
    attack(
        "endless output to stderr",
        "trusted",
        """
import sys
while True:
    sys.stderr.write("x" * 65536)
""",
    ),
    attack(
        "endless output behind Python's back",
        "trusted",
        """
import os
while True:
    os.write(1, b"x" * 65536)
""",
    ),
    attack(
        "flood of the report",
        "trusted",
        """
import os
while True:
    os.write(3, b'{"output": 1}\\n' * 4096)
""",
    ),
    attack("endless loop", "trusted", "while True: pass"),
    attack("sleep", "trusted", "import time; time.sleep(10**6)"),
    attack("pause for a signal that never comes", "trusted", "import signal; signal.pause()"),
    attack("one endless C call", "trusted", "9 ** 9 ** 9"),
    attack("catastrophic regular expression", "trusted", "import re; re.match('(a+)+$', 'a' * 64 + 'b')"),
    attack(
        "ignores every signal",
        "trusted",
        """
import signal
for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    ),
    attack(
        "raises its own limits",
        "trusted",
        """
import resource
for which in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    ),
    attack(
        "deep recursion in C",
        "trusted",
        """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6):
    x = [x]
repr(x)
""",
    ),
    attack("source that breaks the compiler", "trusted", "x = " + "(" * 5000 + ")" * 5000),
    attack("source of constant expressions", "trusted", "x = ((('a' * 4000) * 4000) * 4000) * 4000"),
    attack(
        "closes its pipes and works on",
        "trusted",
        """
import os
os.closerange(0, 64)
while True:
    pass
""",
    ),
    attack(
        "fills the disk with one file",
        "trusted",
        """
import os, tempfile
f = tempfile.TemporaryFile()
while True:
    f.write(bytes(1 << 20)); f.flush()
""",
    ),
    attack(
        "a huge sparse file",
        "trusted",
        """
import os
fd = os.open("sparse", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 1 << 44)
os.pwrite(fd, b"x", 1 << 43)
""",
    ),
    attack(
        "folders that nobody may read",
        "landlock",
        """
import os
for i in range(200):
    os.makedirs(f"a{i}/b", mode=0)
""",
    ),
    attack("endless output of one line", "trusted", "import sys\nwhile True: sys.stdout.write('x' * 4096)"),
    attack(
        "fills the disk with many files",
        "landlock",
        """
import os
for i in range(10**6):
    with open(f"f{i}", "wb") as f:
        f.write(bytes(1 << 16))
""",
    ),
    attack(
        "a folder too deep to remove",
        "landlock",
        """
import os
while True:
    os.mkdir("d"); os.chdir("d")
""",
    ),
]

PROCESSES = [
    attack(
        "daemon",
        "trusted",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3600)
""",
    ),
    attack("shell", "trusted", "import os; os.system('sleep 3600 &'); print(os.popen('cat $SECRET').read())"),
    attack(
        "subprocess",
        "trusted",
        """
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "print(open('$SECRET').read())"], capture_output=True, text=True).stdout)
""",
    ),
    attack(
        "multiprocessing",
        "trusted",
        """
import multiprocessing, time
p = multiprocessing.Process(target=time.sleep, args=(3600,))
p.start()
""",
    ),
    attack("exec", "trusted", "import os; os.execv('/bin/cat', ['cat', '$SECRET'])"),
    attack(
        "raw clone",
        "trusted",
        """
import ctypes, time
libc = ctypes.CDLL(None)
while True:
    if libc.syscall(56, 17, 0, 0, 0, 0) == 0:
        time.sleep(3600)
    time.sleep(0.1)
""",
    ),
    attack(
        "kills its parent",
        "trusted",
        """
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
""",
    ),
    attack(
        "kills every process it can name",
        "trusted",
        """
import os, signal
for pid in [-1, 0, 1, os.getppid(), $PID, -os.getppid(), -$PID]:
    try:
        os.kill(pid, 0 if pid in (-1, 0, 1) else signal.SIGKILL)  # harmless should it ever get through
    except OSError:
        pass
""",
    ),
    attack(
        "stops its parent",
        "trusted",
        """
import os, signal
os.kill(os.getppid(), signal.SIGSTOP)
""",
    ),
    attack(
        "ptrace",
        "trusted",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, $PID, 0, 0) == 0:
    print(open("$SECRET").read())
""",
    ),
    attack(
        "reads the memory of a process",
        "trusted",
        """
import ctypes, re
libc = ctypes.CDLL(None, use_errno=True)
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
here = ctypes.create_string_buffer(1 << 16)
for page in range(0x400000, 0x500000, 1 << 16):
    if libc.process_vm_readv($PID, ctypes.byref(Iovec(ctypes.addressof(here), 1 << 16)), 1,
                             ctypes.byref(Iovec(page, 1 << 16)), 1, 0) > 0:
        print(open("$SECRET").read())
""",
    ),
    attack(
        "reads its parent's memory through /proc",
        "landlock",
        """
import os, re
for pid in (os.getppid(), $PID):
    for line in open(f"/proc/{pid}/maps"):
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        with open(f"/proc/{pid}/mem", "rb") as memory:
            memory.seek(low)
            if found := re.search(rb"word-[0-9a-f]{32}", memory.read(high - low)):
                print(found.group().decode()); raise SystemExit
""",
    ),
    attack(
        "lowers the limits of its parent",
        "trusted",
        """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))
""",
    ),
    attack(
        "signals a process as the owner of a pipe",
        "trusted",
        """
import fcntl, os, signal
for own in (lambda fd: fcntl.fcntl(fd, fcntl.F_SETOWN, $PID),
            lambda fd: fcntl.fcntl(fd, 15, __import__("struct").pack("ii", 1, $PID))):
    read, write = os.pipe()
    try:
        own(read)
        fcntl.fcntl(read, 10, signal.SIGKILL)
    except OSError:
        continue
    fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
    os.write(write, b"x")
""",
    ),
    attack(
        "signals a process as the owner of a socket",
        "trusted",
        """
import fcntl, socket, struct
a, b = socket.socketpair()
for request in (0x8901, 0x8902):
    try:
        fcntl.ioctl(a, request, struct.pack("i", $PID))
        fcntl.ioctl(a, 0x5452, struct.pack("i", 1))
        b.send(b"x")  # SIGIO ends who does not expect it
    except OSError:
        pass
""",
    ),
    attack(
        "signals a thread or a pidfd",
        "trusted",
        """
import ctypes
libc = ctypes.CDLL(None)
libc.syscall(200, $PID, 9)                       # tkill
libc.syscall(234, $PID, $PID, 9)                 # tgkill
libc.syscall(129, $PID, 9, ctypes.create_string_buffer(128))   # rt_sigqueueinfo
fd = libc.syscall(434, $PID, 0)                  # pidfd_open
libc.syscall(424, fd, 9, None, 0)                # pidfd_send_signal
if libc.syscall(438, fd, 1, 0) >= 0:             # pidfd_getfd
    print(open("$SECRET").read())
""",
    ),
    attack(
        "runs a program out of memory",
        "trusted",
        """
import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.syscall(319, b"x", 0)                  # memfd_create
if fd < 0:
    fd = os.open("payload", os.O_RDWR | os.O_CREAT, 0o700)
os.write(fd, b"#!/bin/sh\\ncat $SECRET\\nsleep 3600\\n")
empty = (ctypes.c_char_p * 1)()
libc.syscall(322, fd, b"", empty, empty, 0x1000) # execveat
""",
    ),
    attack(
        "faults, watches and traces through the kernel",
        "trusted",
        """
import ctypes, os
libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(256)
for number, *arguments in (
    (323, 0),                                    # userfaultfd
    (298, buffer, $PID, -1, -1, 0),              # perf_event_open
    (321, 0, buffer, 64),                        # bpf
    (312, $PID, $PID, 0, 0, 0),                  # kcmp
    (303, -100, b"$SECRET", buffer, buffer, 0),  # name_to_handle_at
    (250, 0, -3, 1),                             # keyctl
    (29, 7, 4096, 0o1777),                       # shmget
    (240, b"x", 66, 0o600, 0),                   # mq_open
    (161, b"/"),                                 # chroot
    (272, 0x10000000),                           # unshare
    (135, 0x0040000),                            # personality
):
    if os.uname().machine == "x86_64" and libc.syscall(number, *arguments) >= 0:
        print(open("$SECRET").read())
""",
    ),
    attack(
        "slows a process down",
        "trusted",
        """
import os
for hurt in (lambda: os.setpriority(os.PRIO_PROCESS, $PID, 19), lambda: os.sched_setaffinity($PID, {0}),
             lambda: os.sched_setscheduler($PID, os.SCHED_IDLE, os.sched_param(0))):
    try:
        hurt()
        print(open("$SECRET").read())
    except OSError:
        pass
""",
    ),
    attack("reads the environment of a process", "landlock", "print(open('/proc/$PID/environ').read())"),
    attack(
        "stays after its parent",
        "trusted",
        """
import ctypes, time
ctypes.CDLL(None).prctl(1, 0)
time.sleep(3600)
""",
    ),
]

FILES = [
    attack("reads the answers", "landlock", "print(open('$SECRET').read())"),
    attack(
        "reads the answers by file descriptor",
        "landlock",
        """
import os
print(os.read(os.open('$SECRET', os.O_RDONLY), 100).decode())
""",
    ),
    attack(
        "reads the answers through a symbolic link",
        "landlock",
        """
import os
os.symlink('$SECRET', 'innocent')
print(open('innocent').read())
""",
    ),
    attack(
        "reads the answers through a hard link",
        "landlock",
        """
import os
os.link('$SECRET', 'innocent')
print(open('innocent').read())
""",
    ),
    attack("reads the answers through /proc/self/root", "landlock", "print(open('/proc/self/root$SECRET').read())"),
    attack(
        "reads the answers of an inherited descriptor",
        "trusted",
        """
import os
for fd in range(4, 256):
    try:
        print(os.read(fd, 1000).decode(), end="")
    except OSError:
        pass
""",
    ),
    attack(
        "reads /etc/passwd",
        "landlock",
        """
text = open('/etc/passwd').read()
print(open('$SECRET').read() if text else '')
""",
    ),
    attack(
        "reads the home",
        "landlock",
        """
import os, pathlib
home = pathlib.Path('$HOME')
if list(home.iterdir()):
    print(open('$SECRET').read())
""",
    ),
    attack(
        "maps the answers into memory",
        "landlock",
        """
import mmap, os
print(mmap.mmap(os.open('$SECRET', os.O_RDONLY), 0, prot=mmap.PROT_READ)[:].decode())
""",
    ),
    attack(
        "imports the project",
        "landlock",
        """
import sys
sys.path.insert(0, '$PROJECT')
import m2rl.domains.code
print(open('$SECRET').read())
""",
    ),
    attack("writes outside", "landlock", "open('$FOLDER/left', 'w').write('x')"),
    attack(
        "empties a file opened for reading",
        "trusted",
        """
import os
os.open('$SECRET', os.O_RDONLY | os.O_TRUNC)
""",
    ),
    attack("truncates a file", "trusted", "import os; os.truncate('$SECRET', 0)"),
    attack("removes a file", "landlock", "import os; os.unlink('$SECRET')"),
    attack("renames a file", "landlock", "import os; os.rename('$SECRET', '$FOLDER/left')"),
    attack("makes a file readable to all", "trusted", "import os; os.chmod('$SECRET', 0o777)"),
    attack("changes the owner of a file", "trusted", "import os; os.chown('$SECRET', 1, 1)"),
    attack("changes the times of a file", "trusted", "import os; os.utime('$SECRET', (1, 1))"),
    attack(
        "makes a folder, a fifo, a device outside",
        "landlock",
        """
import os, stat
for make in (lambda: os.mkfifo('$FOLDER/left'), lambda: os.mknod('$FOLDER/left', stat.S_IFCHR, os.makedev(1, 3)),
             lambda: os.mkdir('$FOLDER/left')):
    try:
        make()
    except OSError:
        pass
""",
    ),
    attack(
        "puts a file among the libraries",
        "landlock",
        """
import site, sys, os
for folder in sys.path + [os.path.dirname(os.__file__)]:
    try:
        open(os.path.join(folder, 'left_by_attack.py'), 'w').write('x')
    except OSError:
        pass
""",
    ),
    attack(
        "mounts",
        "trusted",
        """
import ctypes
libc = ctypes.CDLL(None)
libc.unshare(0x10020000)
libc.mount(b'tmpfs', b'$FOLDER', b'tmpfs', 0, None)
libc.umount2(b'/scratch', 2)
libc.chroot(b'/proc/1/root')
""",
    ),
]

NETWORK = [
    attack(
        "asks a server",
        "trusted",
        """
import socket
print(socket.create_connection(('127.0.0.1', $PORT), 2).makefile().read())
""",
    ),
    attack(
        "asks a server by a raw system call",
        "trusted",
        """
import ctypes, socket, struct
libc = ctypes.CDLL(None)
fd = libc.syscall(41, 2, 1, 0)
address = struct.pack('=H', 2) + struct.pack('!H', $PORT) + socket.inet_aton('127.0.0.1') + bytes(8)
libc.syscall(42, fd, address, 16)
data = ctypes.create_string_buffer(100)
libc.syscall(45, fd, data, 100, 0, 0, 0)
print(data.value.decode())
""",
    ),
    attack(
        "asks a Unix socket",
        "trusted",
        """
import socket
s = socket.socket(socket.AF_UNIX); s.connect('$SOCKET')
print(s.makefile().read())
""",
    ),
    attack(
        "asks a server through asyncio",
        "trusted",
        """
import asyncio
async def ask():
    reader, _ = await asyncio.open_connection('127.0.0.1', $PORT)
    print((await reader.read()).decode())
asyncio.run(ask())
""",
    ),
    attack(
        "asks a Unix socket from a socket pair",
        "trusted",
        """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    for ask in (lambda: a.sendto(b"x", '$SOCKET'), lambda: a.connect('$SOCKET'), lambda: a.bind('$FOLDER/left'),
                lambda: a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))])):
        try:
            ask()
            print(a.recv(100, socket.MSG_DONTWAIT).decode())
        except OSError:
            pass
""",
    ),
    attack(
        "opens a port",
        "trusted",
        """
import socket, time
socket.create_server(('127.0.0.1', 0)); time.sleep(3600)
""",
    ),
    attack(
        "io_uring",
        "trusted",
        """
import ctypes
if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0:
    print(open("$SECRET").read())
""",
    ),
]

CHEATS = [
    attack(
        "replaces the comparison",
        "trusted",
        """
class Always(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def strip(self, *a): return self
print(Always("x"))
""",
    ),
    attack(
        "patches builtins and json",
        "trusted",
        """
import builtins, json
builtins.all = lambda *a: True
json.dumps = lambda *a, **k: '{"output": true}'
str.__eq__ if False else None
""",
    ),
    attack(
        "patches the modules of the judge",
        "trusted",
        """
import sys
for module in list(sys.modules.values()):
    for name in dir(module):
        if name in ("verify", "same_text", "_judge", "run_program", "watch", "run"):
            try:
                setattr(module, name, lambda *a, **k: True)
            except Exception:
                pass
""",
    ),
    attack(
        "looks for the expected output in memory",
        "trusted",
        """
import gc, re, sys
def texts():
    for o in gc.get_objects():
        try:
            yield repr(o)
        except Exception:
            pass
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals); yield repr(frame.f_globals)
        frame = frame.f_back
for text in texts():
    if found := re.search("word-[0-9a-f]{32}", text):
        print(found.group()); break
""",
    ),
    attack(
        "looks for the expected output in its own pages",
        "trusted",
        """
import re
for line in open('/proc/self/maps'):
    low, high = (int(x, 16) for x in line.split()[0].split('-'))
    try:
        with open('/proc/self/mem', 'rb') as memory:
            memory.seek(low)
            if found := re.search(rb'word-[0-9a-f]{32}', memory.read(high - low)):
                print(found.group().decode()); break
    except (OSError, ValueError):
        continue
""",
    ),
    attack(
        "prints after its end",
        "trusted",
        """
import atexit, os, sys, threading, weakref
class Last:
    def __del__(self):
        os.write(1, b"later")
last = Last()
weakref.finalize(last, print, "finalised")
atexit.register(lambda: (print("at exit"), sys.stdout.flush(), os._exit(0)))
threading.excepthook = sys.excepthook = lambda *a: os._exit(0)
sys.stdout = open(os.dup(1), "w", buffering=1)
raise RuntimeError
""",
    ),
    attack(
        "swaps its descriptors",
        "trusted",
        """
import os
for fd in (0, 1, 2, 3, 4):
    for other in (0, 1, 2, 3, 4):
        try:
            os.dup2(fd, other)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(other, os.read(fd, 1 << 16))
        except OSError:
            pass
""",
    ),
    attack(
        "makes every comparison hold",
        "trusted",
        """
import builtins, ctypes, operator, sys
operator.eq = lambda a, b: True
for kind in (str, int, list, dict):
    try:
        mappings = ctypes.py_object.from_address(id(kind.__dict__) + 16).value
        mappings["__eq__"] = lambda a, b: True
    except Exception:
        pass
for name in ("json", "m2rl", "m2rl.domains", "m2rl.domains.code", "pytest"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].verify = sys.modules[name].dumps = lambda *a, **k: '{"output": true}'
print("anything")
""",
    ),
    attack("ends with success before the tests", "trusted", "import os; os._exit(0)"),
    attack("raises SystemExit(0)", "trusted", "raise SystemExit(0)"),
    attack(
        "writes verdicts to every descriptor",
        "trusted",
        """
import os
for fd in range(256):
    for message in (b'{"end": "exit", "out": 0}', b'{"reward": 1.0, "status": "ok"}', b'{"output": true}\\n'):
        try:
            os.write(fd, message)
        except OSError:
            pass
""",
    ),
    attack(
        "leaves a thread to answer for the next program",
        "trusted",
        """
import threading, time, os
def later():
    time.sleep(1)
    os.write(1, b"x")
threading.Thread(target=later, daemon=True).start()
""",
    ),
    attack(
        "prints every word there is",
        "trusted",
        """
import itertools
for letters in itertools.product("0123456789abcdef", repeat=5):
    print("word-" + "".join(letters))
""",
    ),
    attack(
        "a result that lies when compared",
        "trusted",
        """
class Any:
    def __eq__(self, other): return True
def f(*args):
    return Any()
print(Any())
""",
    ),
    attack("echoes its input", "trusted", "print(open(0).read())"),
]

ATTACKS = [*RESOURCES, *PROCESSES, *FILES, *NETWORK, *CHEATS]
