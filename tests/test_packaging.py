"""The packages as a user gets them: the NumPy side without torch, and the wheel alone, outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, needs_tool

IMPORT_NUMPY_SIDE = """
import importlib, pkgutil, sys
import reference
assert "torch" not in sys.modules, "import reference brings torch"
for package in ("reference", "reference.architectures", "reference.proof"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        if not module.ispkg:
            importlib.import_module(module.name)
            assert "torch" not in sys.modules, module.name + " brings torch"
print(reference.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; the test fails with all of its output where the command fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_numpy_side_imports_no_torch() -> None:
    run(sys.executable, "-c", IMPORT_NUMPY_SIDE, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the hatchling of this environment."""
    needs_tool("pip")
    needs_tool("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, REPOSITORY, cwd=out)
    (path,) = out.glob("moebius_moe-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment that holds the wheel and sees this environment's dependencies, but not the checkout."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=home)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A plain line in a .pth file appends a directory without reading the .pth files in it: an editable install stays invisible.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return home


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    tracked = run(needs_tool("git"), "ls-files", "reference", "optimized", cwd=REPOSITORY).split()
    assert tracked, "no file of the packages is tracked"
    assert set(tracked) <= packed, sorted(set(tracked) - packed)
    assert {name.split("/")[0] for name in packed} == {"reference", "optimized"}


@pytest.mark.slow
def test_installed_reference_imports_no_torch(installed: Path) -> None:
    where = run(installed / "venv/bin/python", "-I", "-c", IMPORT_NUMPY_SIDE, cwd=installed).strip()
    assert Path(where).is_relative_to(installed), f"reference was imported from {where}"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["tour", "--smoke"]], ids=" ".join)
def test_installed_command_line(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert run(installed / "venv/bin/moebius", *arguments, cwd=tmp_path).strip(), "printed nothing"
