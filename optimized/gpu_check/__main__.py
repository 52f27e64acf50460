"""`python -m optimized.gpu_check`: needs Python, NumPy, PyTorch and Triton, and nothing else of what the project can use."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OUT = Path("docs/results/gpu-check.json")
PART_SECONDS = 480
SPARE_SECONDS = 90  # a step that has begun may still end
MOST_CALLS = 20
GOOD, NOT_GOOD, BAD_INPUT = 0, 1, 2


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m optimized.gpu_check", description="Everything that only a GPU can tell.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file of results, which a second call completes (default: {OUT})")
    parser.add_argument("--parts", default=None, help="only these, separated by commas")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help=f"after which a part is cut (default: {PART_SECONDS})")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier calls")
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu: tiny sizes in Triton's interpreter, which shows that the check itself works"
    )
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _why_not(device: str) -> str | None:
    """Why the check cannot run on this device here, or None."""
    from importlib.util import find_spec

    for package in ("numpy", "torch", "triton"):
        if find_spec(package) is None:
            return f"there is no {package} for {sys.executable}; choose the Python that has one with PYTHON="
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU; on a machine without one, --device cpu shows that the check itself works"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "--device cpu needs TRITON_INTERPRET=1 in the environment before Python starts"
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 would interpret every kernel; unset it"
    return None


def run_part(name: str, out: Path, device: str, seconds: float) -> int:
    """One part in this process."""
    from . import problems
    from .device import DEVICES
    from .parts import PARTS, Check
    from .results import DONE, Results, work_off

    results = Results(out)
    small = {} if device == "cuda" else {"shapes": problems.TINY, "tokens": problems.TINY_TOKENS, "seconds": 0.01, "cases": ("few-tokens",)}
    check = Check(DEVICES[device](), results, **small)  # type: ignore[arg-type]
    state = work_off(results, name, PARTS[name](check), max(seconds - SPARE_SECONDS, seconds / 2), lambda line: print(line, flush=True))
    return GOOD if state == DONE else NOT_GOOD


def _ended(command: Sequence[str], seconds: float) -> int | None:
    """The exit code of a command, or None where it had to be ended after this time, with every process that it started."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def _in_a_process(name: str, given: argparse.Namespace) -> None:
    """One part in a process of its own, which is ended where it does not end; what it had written stays.

    A step that hangs or dies has that as its result and the part goes on behind it; one that began late begins again.
    """
    from .results import CUT, FAILED, RUNNING, Results

    command = [sys.executable, "-m", "optimized.gpu_check", "--inside", name, "--out", str(given.out), "--device", given.device]
    code = _ended([*command, "--seconds", str(given.seconds)], given.seconds)
    why = f"did not end within {given.seconds:g} s" if code is None else f"its process ended with {code}"
    results = Results(given.out)
    entry = results.part(name)
    step = entry.pop("step", None)
    if step is not None:
        if step["first"] or code is not None:
            entry["results"][step["key"]] = {"error": why}
        entry["state"] = CUT
    elif code not in (GOOD, NOT_GOOD):
        results.data["parts"][name] = entry | {"state": FAILED, "why": why}
    elif entry["state"] == RUNNING:
        entry["state"] = CUT
    results.write()


def main(arguments: Sequence[str] | None = None) -> int:
    """All parts; exit code 0: all is good, 1: something is not or is missing, 2: bad input."""
    given = _arguments(arguments)
    if (why := _why_not(given.device)) is not None:
        print(f"gpu-check: error: {why}", file=sys.stderr)
        return BAD_INPUT
    if given.inside is not None:
        return run_part(given.inside, given.out, given.device, given.seconds)
    from .parts import PARTS
    from .results import CUT, DONE, Results, failures

    chosen = tuple(PARTS) if given.parts is None else tuple(part.strip() for part in given.parts.split(","))
    if unknown := [part for part in chosen if part not in PARTS]:
        print(f"gpu-check: error: --parts holds {unknown[0]!r}; known: {', '.join(PARTS)}", file=sys.stderr)
        return BAD_INPUT
    if given.fresh:
        given.out.unlink(missing_ok=True)
    try:
        Results(given.out).write()
    except (ValueError, OSError) as error:
        print(f"gpu-check: error: {error}", file=sys.stderr)
        return BAD_INPUT
    for name in chosen:
        for _ in range(MOST_CALLS):
            if Results(given.out).state(name) == DONE:
                break
            before = len(Results(given.out).part(name)["results"])
            _in_a_process(name, given)
            after = Results(given.out)
            if after.state(name) != CUT or len(after.part(name)["results"]) == before:
                break
    found = Results(given.out)
    bad = failures(found) + [f"{name}: {found.state(name)}" for name in chosen if found.state(name) != DONE]
    for line in bad:
        print(line)
    print(f"{given.out}: {sum(len(entry['results']) for entry in found.data['parts'].values())} results, {len(bad)} problems")
    return NOT_GOOD if bad else GOOD


if __name__ == "__main__":
    sys.exit(main())
