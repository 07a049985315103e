"""How long `import medssl_nb` and `medssl --help` take, against the bare interpreter. Goal (DESIGN 6): below 1 s.

    python benchmarks/startup.py            # writes benchmarks/startup.json
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

from measure import facts, save, turns

HERE = Path(__file__).parent
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import medssl_nb": [sys.executable, "-c", "import medssl_nb"],
    "medssl --help": [str(Path(sys.executable).parent / "medssl"), "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def run(cmd):
    subprocess.run(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def main(repeats=7):
    took = turns({k: lambda c=c: run(c) for k, c in COMMANDS.items()}, repeats)  # the first round warms the file cache
    runs = {k: [wall for wall, _ in v] for k, v in took.items()}
    out = {k: dict(median_s=round(statistics.median(v), 4), min_s=round(min(v), 4), max_s=round(max(v), 4)) for k, v in runs.items()}
    row = dict(goal_s=1.0, **facts("python", "machine"), repeats=repeats, results=out)
    save(HERE / "startup.json", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
