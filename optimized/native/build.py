"""Compile the C source once per machine, and find it again: a shared library in a cache, named by all that it depends on.

Nothing here is locked. A library is built under a name of its own and then moved to its place, so that processes that build at the
same time overwrite a good file with a good file; its name ends in its checksum, so that a truncated or foreign file is never loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
MAIN = "moe.c"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-ffp-contract=fast")
# For the machine it runs on: x86 compilers say -march, some ARM ones -mcpu, and what knows neither gets plain code.
TUNINGS = (("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 300


class UnavailableError(Exception):
    """Why there is no library on this machine, in words."""


def compiler() -> list[str]:
    """The command of the machine's C compiler: $CC, else cc, gcc or clang. Raises UnavailableError where none is found."""
    if chosen := os.environ.get("CC"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise UnavailableError(f"the C compiler of $CC, {chosen!r}, is not found")
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise UnavailableError("there is no C compiler (cc, gcc or clang) on this machine")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, errors="replace", stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the C compiler {command[0]!r} does not run: {error}") from None
    if done.returncode:
        raise UnavailableError(f"the C compiler {command[0]!r} fails: {(done.stderr or done.stdout).strip()[-400:] or done.returncode}")
    return done.stdout


def source_files() -> list[Path]:
    """The C files, sorted by name."""
    return sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])


def cpu_features() -> str:
    """What the processor can do, as far as the system tells: code built for one machine must not run on a lesser one."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))}))
    return " ".join(platform.uname())


def key(command: Sequence[str], flags: Sequence[str]) -> str:
    """Name of the library that this compiler builds with these flags from the present source on this machine, in hexadecimal digits."""
    digest = hashlib.sha256()
    parts = [_run([*command, "--version"]), *flags, cpu_features(), platform.machine(), str(ctypes.sizeof(ctypes.c_void_p))]
    for part in [*command, *parts]:
        digest.update(part.encode() + b"\0")
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _own_temporary() -> Path:
    """A directory in the system's temporary one that only this user can write to: what lies there is going to be executed."""
    directory = Path(tempfile.gettempdir()) / f"moebius-{os.getuid()}"
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if status.st_uid == os.getuid() and status.st_mode & 0o170077 == 0o040000 and os.access(directory, os.W_OK):
            return directory
    return Path(tempfile.mkdtemp(prefix="moebius-"))


def cache_directories() -> Iterator[Path]:
    """Where a library may lie, the preferred place first: $MOEBIUS_CACHE or the user's cache, then the temporary directory."""
    if chosen := os.environ.get("MOEBIUS_CACHE"):
        yield Path(chosen).expanduser()
    else:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "moebius"
    yield _own_temporary()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def find(directory: Path, name: str) -> Path | None:
    """The library of this key in a directory, if one is there whose bytes are those of its name."""
    for path in sorted(directory.glob(f"native-{name}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem.rpartition("-")[2] == _checksum(path):
                return path
    return None


def compile_into(directory: Path, name: str, command: Sequence[str], flags: Sequence[str]) -> Path:
    """Compile and move to the library's place in one step. Raises UnavailableError with the compiler's words, or OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix="building-", suffix=".so", dir=directory)
    os.close(handle)
    try:
        _run([*command, *flags, "-o", temporary, str(SOURCES / MAIN)])
        path = directory / f"native-{name}-{_checksum(Path(temporary))}.so"
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return path


def library_path(flags: Sequence[str]) -> Path:
    """Path of the library for these flags, built if no cache holds it. Raises UnavailableError with the reason."""
    command = compiler()
    name = key(command, flags)
    errors = []
    for directory in cache_directories():
        try:
            return find(directory, name) or compile_into(directory, name, command, flags)
        except OSError as error:
            errors.append(f"{directory}: {error.strerror or error}")
    raise UnavailableError(f"the compiled library can be written nowhere ({'; '.join(errors)})")


def tuned_library_path() -> Path:
    """`library_path` for the processor this runs on. Raises UnavailableError with the reason of the last attempt."""
    reason = None
    for tuning in TUNINGS:
        try:
            return library_path((*FLAGS, *tuning))
        except UnavailableError as error:
            reason = error
    raise reason or UnavailableError("no way to compile is known")
