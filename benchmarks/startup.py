"""How long `import medssl_nb` and `medssl --help` take, against the bare interpreter. Goal (DESIGN 6): below 1 s.

    python benchmarks/startup.py            # writes benchmarks/startup.json
"""
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import medssl_nb": [sys.executable, "-c", "import medssl_nb"],
    "medssl --help": [str(Path(sys.executable).parent / "medssl"), "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def seconds(cmd):
    t = time.perf_counter()
    subprocess.run(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - t


def main(repeats=7):
    runs = {k: [] for k in COMMANDS}
    for k, c in COMMANDS.items():
        seconds(c)  # warm the file cache
    for _ in range(repeats):  # in turn, so that a slow moment hits all of them
        for k, c in COMMANDS.items():
            runs[k].append(seconds(c))
    out = {k: dict(median_s=round(statistics.median(v), 4), min_s=round(min(v), 4), max_s=round(max(v), 4)) for k, v in runs.items()}
    row = dict(goal_s=1.0, python=platform.python_version(), machine=platform.machine(), repeats=repeats, results=out)
    (HERE / "startup.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
