"""The notebooks in an environment that holds the built wheel and no checkout, as somebody runs them who has only the notebooks' folder."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_packaging import installed, run, wheel

__all__ = ["installed", "wheel"]

pytest.importorskip("nbclient")

CPU_SECONDS = 300
EXECUTE = """
import asyncio, sys, time
sys.path.insert(0, ".")
import reference
from notebooks import build
assert "INSTALLED" in reference.__file__, reference.__file__

async def one(path, at_once):
    committed, notebook = build.read(path), build.read(path)
    async with at_once:
        start = time.perf_counter()
        await build.execute(notebook, path.parent)
    print(f"{path.name}: {time.perf_counter() - start:.1f} s", flush=True)
    return [f"{path.name}: {line}" for line in build.differences(committed, notebook)]

async def all_of_them():
    at_once = asyncio.Semaphore(build.AT_ONCE)
    return await asyncio.gather(*(one(build.target(source, "exercise"), at_once) for source in build.sources()))

found = [line for lines in asyncio.run(all_of_them()) for line in lines]
print(*found, sep="\\n")
sys.exit(bool(found))
"""


@pytest.mark.slow
def test_notebooks_run_beside_the_installed_wheel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: Path = request.getfixturevalue("installed")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(environment / "venv/bin"), os.environ["PATH"]]))
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("__pycache__", "solutions"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = run(environment / "venv/bin/python", "-c", EXECUTE.replace("INSTALLED", str(environment)), cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sys.stdout.write(printed)
    assert printed.count(".ipynb: ") == len(list((REPOSITORY / "notebooks").glob("[0-9]*.ipynb")))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
