# Finds Moebius around or beside this
# notebook, and installs what is missing.
# In Colab it is not there: put a cell above
# this one that says !git clone and the
# address of the repository; run it first.
import importlib.util
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
beside = sorted(folder for folder in here.iterdir() if folder.is_dir())
near = (here, *here.parents, *beside)
roots = [folder for folder in near if (folder / "notebooks" / "checks.py").is_file()]
if not roots:
    where = f"in, above or directly below {here}"
    raise SystemExit(f"no clone of Moebius {where}: clone it there and run this cell again")
sys.path.insert(0, str(roots[0]))
needed = ("numpy", "matplotlib")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
