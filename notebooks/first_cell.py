# Finds Moebius around or beside this notebook, and installs what is missing. In Colab, clone the repository in a cell above this one.
import importlib.util
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
beside = sorted(folder for folder in here.iterdir() if folder.is_dir())
roots = [folder for folder in (here, *here.parents, *beside) if (folder / "notebooks" / "checks.py").is_file()]
if not roots:
    raise SystemExit(f"no clone of Moebius in, above or directly below {here}: clone the repository there and run this cell again")
sys.path.insert(0, str(roots[0]))
missing = [name for name in ("numpy", "matplotlib") if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
