"""The doctor, shown machines that are really broken: a process is given an old package, no codec, few open files, nowhere to write."""
import functools
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from medssl_nb import doctor as D

ROOT = Path(__file__).parent.parent
CALL = "import sys; from medssl_nb.cli import main; sys.exit(main(['doctor', '--json', '--selftest', 'False', *sys.argv[1:]]))"


def doctor(*words, before="", **env):
    "A new process; its page, its exit code, what it said."
    r = subprocess.run([sys.executable, "-c", before + CALL, *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True)
    page = json.loads(r.stdout) if r.stdout.startswith("{") else None
    return page, r.returncode, r.stdout + r.stderr


def found(page, name):
    return next(f for f in page["findings"] if f["name"] == name)


def test_tested_versions_are_the_lock():
    lock = dict(line.lower().split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line and not line.startswith("#"))
    assert {k: lock[k.lower()] for k in D.TESTED} == D.TESTED


DAMAGE = """
import os, resource, sys, tempfile
for m in ("jpeg_ls", "gdcm", "libjpeg"): sys.modules[m] = None
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
tempfile.tempdir = "/proc"
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""


def test_a_machine_with_five_faults(tmp_path):
    """An old torch, no plugin that knows JPEG-LS (the packages are still installed: asking for versions would not notice), few open files,
    nowhere to write temporary files, more threads than cores. Each is named, with what to do; nothing else is blamed."""
    (tmp_path / "torch-2.1.0.dist-info").mkdir()
    (tmp_path / "torch-2.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    # both names: Dask leaves MKL_NUM_THREADS=1 in the environment of a process that has started a cluster
    page, code, said = doctor(before=DAMAGE, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    assert code == 2 == page["exit"], said
    for name, status, advice in (
        ("torch", "error", "pip install 'torch>=2.6'"),
        ("codec JPEG-LS", "error", "pyjpegls; until then scans compressed this way become rows in problems.jsonl"),
        ("temporary files", "error", "TMPDIR"),
        ("open files", "warning", "ulimit -n 4096"),
        ("threads", "warning", "OMP_NUM_THREADS="),
    ):
        f = found(page, name)
        assert f["status"] == status and advice in f["advice"], f
    assert found(page, "torch")["found"].startswith("2.1.0") and "JPEG 2000" in found(page, "codecs")["found"]
    rest = {"codec JPEG-LS near-lossless", "codec JPEG lossless", "codec JPEG lossless first-order", "load", "memory", "disk here", "disk for temporary files", "shared memory"}
    assert {f["name"] for f in page["findings"] if f["status"] != "ok"} - rest == {"torch", "codec JPEG-LS", "temporary files", "open files", "threads"}


def test_a_container_with_little_shared_memory(monkeypatch, capsys, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(D, "check_limits", functools.partial(D.check_limits, shm=tmp_path, usage=lambda p: usage(64 << 20, 0, 64 << 20), files=4096, memory=1e10))
    r = D.doctor(D.DoctorConfig(selftest=False))
    said = capsys.readouterr().out
    assert r["exit"] >= 1 and "WARNING  shared memory: 67.1 MB\n" in said and "--shm-size" in said and "--train.workers 0" in said


def test_a_stage_that_breaks_is_named(monkeypatch, capsys):
    def lying(s):
        raise RuntimeError("a checkpoint does not come back as it was saved")

    monkeypatch.setattr(D, "STAGES", [("make two heads", D._make), ("save, load, compare", lying)])
    r = D.doctor(D.DoctorConfig())
    assert r["exit"] == 2 and 'failed at "save, load, compare"' in capsys.readouterr().out


def test_the_self_test_notices(monkeypatch, tmp_path):
    "The comparisons inside the self-test: a checkpoint with another weight, a crop from the wrong place."
    import torch

    s = dict(dir=tmp_path)
    for name, f in D.STAGES[:5]:
        f(s)
    D._compare(s)
    with torch.no_grad():
        next(s["task"].parameters()).add_(1e-6)
    with pytest.raises(RuntimeError, match="does not come back"):
        D._compare(s)
    from medssl_nb.data.cases import Prepared

    real = Prepared.read
    monkeypatch.setattr(Prepared, "read", lambda self, r, box=None, channels=None: real(self, r, None if box is None else box + 1, channels))
    with pytest.raises(RuntimeError, match="a crop is not"):
        D._read(s)


def test_nothing_about_the_person(tmp_path):
    "Home, user and machine do not appear in the page."
    home = tmp_path / "homes" / "janedoe"
    home.mkdir(parents=True)
    who = dict(HOME=str(home), USER="janedoe", LOGNAME="janedoe", TMPDIR=str(home))
    page, code, said = doctor(**who)
    assert "janedoe" not in said and "~ can be written to" in found(page, "temporary files")["found"]
    f = D.check_temp(home)[0]  # the same finding before names are taken out of it
    assert "janedoe" in f.found


def test_light_checks_come_before_torch():
    code = "import sys; from medssl_nb.doctor import *; check_versions(); check_clock(); check_git(); check_temp(); check_disk(); check_limits(); print([m for m in ('torch', 'monai', 'matplotlib', 'lightning') if m in sys.modules])"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.stdout.strip() == "[]", r.stdout + r.stderr


def test_the_page_of_a_sound_machine(tmp_path):
    "With its self-test, as one types it; a loaded or small test machine may earn warnings, never an error."
    r = subprocess.run([str(Path(sys.executable).parent / "medssl"), "doctor", "--out", str(tmp_path / "page.json")], capture_output=True, text=True)
    page = json.loads((tmp_path / "page.json").read_text())
    errors = [f for f in page["findings"] if f["status"] == "error" and f["name"] not in ("memory", "disk here", "disk for temporary files")]
    assert not errors and r.returncode == page["exit"], r.stdout + r.stderr
    assert re.search(r"self-test: passed", r.stdout) and "Traceback" not in r.stderr
