"""`prepare` against disks, kills and clocks: real full disks, real read-only ones, real workers that die, a real scheduler. Afterwards every case is whole or absent, and the next run ends as the one that was never disturbed.

What needs no second process and no mount is shown in `17_data.prepare`.
"""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from medssl_nb.core import UserError, read_jsonl


def write(path, x):
    from medssl_nb.data.volume import Grid, write_nifti

    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, x, Grid(x.shape, np.eye(4)[:, [2, 1, 0, 3]]))


def study(root, volumes):
    "Files -> manifest."
    from medssl_nb.data.ingest import IngestConfig, ingest

    for name, x in volumes.items():
        write(root / "scans" / name / "ct.nii.gz", x)
    ingest(IngestConfig(src=root / "scans", out=root / "manifest", modality="ct", verify=False, progress=False))
    return root / "manifest"


def noise(seed, side=24):
    return np.random.default_rng(seed).integers(-900, 900, (side,) * 3).astype(np.int16)


def easy(seed, side=24):
    x = np.full((side,) * 3, -500, np.int16)
    x[0, 0, seed % side] = 300
    return x


def run(manifest, out, **kw):
    from medssl_nb.data.prepare import PrepareConfig, prepare

    return prepare(PrepareConfig(manifest=str(manifest), out=str(out), **{**dict(workers=0, progress=False), **kw}))


def tree(d):
    return {f.relative_to(d).as_posix(): f.read_bytes() for f in Path(d).rglob("*") if f.is_file()}


def check_whole(out):
    "No half of anything: each mark stands beside exactly the bytes it names, and nothing temporary is left."
    from medssl_nb.data.cases import damage

    marks = [p.stem for p in (out / "volumes").glob("[!.]*.json")]
    assert {c: d for c in marks if (d := damage(out, c))} == {}
    assert not list(out.rglob(".*.tmp"))
    return len(marks)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Twelve volumes: those of middle size compress to nothing, so that the estimate (from the one in the middle) is far too low."
    root = tmp_path_factory.mktemp("scans")
    man = study(root, {f"p{i:02d}": easy(i) if i % 2 == 0 else noise(i, 20 if i % 4 == 1 else 28) for i in range(12)})
    run(man, root / "clean")
    return man, root / "clean"


def mount(path, *options):
    path.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    "A disk of its own, as small as one likes; None where mounting is not allowed."
    at = tmp_path / "disk"
    if not (sys.platform == "linux" and mount(at, "-o", "size=1m")):
        yield None
        return
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def resize(disk, option):
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_disk_full(scans, disk, workers):
    man, clean = scans
    if disk is None:
        pytest.skip("NO DISK TO FILL: mounting a tmpfs is not allowed here; see test_file_size_limit")
    need = sum(f.stat().st_size for f in clean.rglob("*") if f.is_file())
    resize(disk, f"size={need // 2}")
    out = disk / "out"
    with pytest.raises(UserError) as e:
        run(man, out, workers=workers)
    said = str(e.value)
    assert "the disk is full" in said and "needed" in said and "free)" in said and "run the same command again: what is prepared stays" in said, said
    done = check_whole(out)
    assert 0 < done < 12 and not (out / "index.jsonl").exists()
    resize(disk, "size=16m")
    s = run(man, out, workers=workers)
    assert s["kept"] == done and s["prepared"] == 12 - done
    assert tree(out) == tree(clean)


def test_disk_too_small_is_said_at_the_door(tmp_path, disk):
    if disk is None:
        pytest.skip("NO DISK TO FILL: mounting a tmpfs is not allowed here")
    man = study(tmp_path, {f"p{i}": noise(i) for i in range(6)})
    resize(disk, "size=64k")
    with pytest.raises(UserError, match=r"about \d+ kB are needed and [\d.]+ kB are free; make room"):
        run(man, disk / "out")
    assert check_whole(disk / "out") == 0


def test_file_size_limit(scans, tmp_path):
    "The other way to fill a disk: no file may grow beyond a few kB. Needs no mount."
    man, clean = scans
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from medssl_nb.cli import main; sys.exit(main())"
    r = subprocess.run([sys.executable, "-c", code, "prepare", str(man), "-o", str(tmp_path / "out"), "--workers", "0", "--progress", "False"], capture_output=True, text=True)
    assert r.returncode == 2 and "the largest allowed file size is reached" in r.stderr, r.stderr
    check_whole(tmp_path / "out")
    run(man, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(clean)


def test_read_only(scans, disk, tmp_path):
    man, clean = scans
    if os.geteuid() != 0:
        disk = tmp_path / "closed"
        disk.mkdir(mode=0o555)
    elif disk is None:
        pytest.skip("NO READ-ONLY DISK: root may write everywhere, and mounting is not allowed here")
    else:
        resize(disk, "ro")
    with pytest.raises(UserError, match="could not be written to .*(the disk is read-only|no permission to write there).*choose another --out"):
        run(man, disk / "out")
    # a folder that was finished, and is read-only now: nothing could be noted there, so it is said and not tried
    if os.geteuid() == 0:
        resize(disk, "rw")
        run(man, disk / "out")
        resize(disk, "ro")
        with pytest.raises(UserError, match="the disk is read-only"):
            run(man, disk / "out")
        assert tree(disk / "out") == tree(clean)


def test_clock_goes_backwards(scans, tmp_path, monkeypatch):
    man, clean = scans
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run(man, tmp_path / "out", limit=5)
    for i, f in enumerate(sorted((tmp_path / "out").rglob("*"))):
        os.utime(f, (i * 1e5, 4e9 - i * 1e5))  # marks older than volumes, and all from the future
    s = run(man, tmp_path / "out")
    assert s["kept"] == 5 and tree(tmp_path / "out") == tree(clean)


def test_source_changed(tmp_path, capsys):
    man = study(tmp_path, {f"p{i}": noise(i) for i in range(4)})
    write(tmp_path / "scans" / "p2" / "ct.nii.gz", noise(99))
    s = run(man, tmp_path / "out")
    assert s["cases"] == 3 and s["problems"] == {"changed": 1}
    row, = read_jsonl(tmp_path / "out" / "problems.jsonl")
    assert row["reason"].startswith("the file changed since it was ingested")
    assert "changed since it was ingested" in capsys.readouterr().out


def children():
    "Worker processes of this one."
    return [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def test_killed_worker_costs_nothing_but_time(tmp_path):
    man = study(tmp_path, {f"p{i:02d}": noise(i, 64) for i in range(16)})
    run(man, tmp_path / "clean")
    killed = []

    def kill_one():
        while len(list((tmp_path / "out").glob("volumes/[!.]*.json"))) < 2:
            time.sleep(0.01)
        victim = children()[0]
        killed.append(victim.pid)
        victim.kill()

    t = threading.Thread(target=kill_one, daemon=True)
    t.start()
    s = run(man, tmp_path / "out", workers=2)
    t.join(1)
    assert killed and s["failed"] == 0 and s["cases"] == 16 and s["workers"] == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")
    assert not children()


def test_case_that_needs_too_much_memory(tmp_path):
    "Its worker is ended, every time; the case is a row, the others are done."
    volumes = {f"p{i}": noise(i) for i in range(5)}
    big = np.zeros((360, 360, 360), np.int16)
    big[:180] = 100
    man = study(tmp_path, volumes | {"p2big": big})
    s = run(man, tmp_path / "out", workers=1, memory="600MiB", retries=1)
    assert s["cases"] == 5 and s["problems"] == {"killed": 1}
    row, = read_jsonl(tmp_path / "out" / "problems.jsonl")
    assert "the worker was ended by the system, 2 times" in row["reason"] and check_whole(tmp_path / "out") == 5
    assert run(man, tmp_path / "out", workers=0)["cases"] == 6  # where there is room, the same case is fine


def alive(pids):
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_at_the_keyboard_or_killed(tmp_path, how, monkeypatch):
    "A second process is told who is first; then the first one ends, its workers with it; the next run goes on."
    man = study(tmp_path, {f"p{i:02d}": noise(i, 64) for i in range(16)})
    run(man, tmp_path / "clean")
    import medssl_nb.data.prepare as mod

    monkeypatch.setattr(mod.only_one.__wrapped__, "__defaults__", (0.1,))  # the second process has no patience
    out = tmp_path / "out"
    p = subprocess.Popen([str(Path(sys.executable).parent / "medssl"), "prepare", str(man), "-o", str(out), "--workers", "2", "--progress", "False"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(out.glob("volumes/[!.]*.json"))) < 2:
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.01)
    team = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    with pytest.raises(UserError, match=rf"another process is preparing .* \(process {p.pid} on "):
        run(man, out)
    (os.killpg if how == signal.SIGINT else os.kill)(p.pid, how)  # a terminal sends its signal to everybody
    said = p.communicate(timeout=60)[1]
    assert p.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        assert "are left; the same command goes on" in said and "Traceback" not in said, said
    until = time.monotonic() + 20
    while alive(team) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(team)
    from medssl_nb.data.cases import Prepared

    with pytest.raises(UserError, match="let it finish"):
        Prepared(out)
    s = run(man, out)
    assert 2 <= s["kept"] < 16 and tree(out) == tree(tmp_path / "clean")


def test_scheduler_by_address(scans, tmp_path, monkeypatch):
    "A scheduler and a worker started beside us, as on a cluster; then the worker is taken away."
    import medssl_nb.data.prepare as mod

    man, clean = scans
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    start = lambda what, *a: subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{what}", "--scheduler-file", str(tmp_path / "scheduler.json"), *a], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    procs = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    try:
        while not (tmp_path / "scheduler.json").exists():
            assert procs[0].poll() is None
            time.sleep(0.1)
        import json

        address = json.loads((tmp_path / "scheduler.json").read_text())["address"]
        procs.append(start("worker", "--nthreads", "1", "--no-dashboard", "--no-nanny"))
        s = run(man, tmp_path / "out", workers=None, scheduler=address)
        assert s["cases"] == 12 and tree(tmp_path / "out") == tree(clean)
        procs[1].kill()
        procs[1].wait()
        monkeypatch.setattr(mod.arrived, "__defaults__", None)
        monkeypatch.setattr(mod.farm, "__defaults__", (1.0,))
        with pytest.raises(UserError, match="there has been no Dask worker"):
            run(man, tmp_path / "more", workers=None, scheduler=address)
    finally:
        for p in procs[::-1]:
            p.kill()
            p.wait()
    with pytest.raises(UserError, match="no Dask scheduler answers at tcp://"):
        run(man, tmp_path / "none", workers=None, scheduler=address)


def test_a_worker_elsewhere_logs_no_path(tmp_path):
    "What goes wrong on a worker of somebody's cluster becomes a row: Dask would log the whole job, with the folders and files of patients in it."
    import json

    man = study(tmp_path / "Quistgaard_Zebulon", {f"p{i}": noise(i) for i in range(3)})
    (tmp_path / "broken.py").write_text("import medssl_nb.data.prepare as p\n\n\ndef bad(*a):\n    raise RuntimeError('cannot store Quistgaard_Zebulon')\n\n\np.store = bad\n")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), MEDSSL_SHOW_PATHS="")
    log = open(tmp_path / "worker.txt", "wb")
    start = lambda what, *a: subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{what}", "--scheduler-file", str(tmp_path / "scheduler.json"), *a], env=env, stdout=log, stderr=log, cwd=tmp_path)
    procs = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    try:
        while not (tmp_path / "scheduler.json").exists():
            assert procs[0].poll() is None
            time.sleep(0.1)
        procs.append(start("worker", "--nthreads", "1", "--no-dashboard", "--no-nanny", "--preload", str(tmp_path / "broken.py")))
        s = run(man, tmp_path / "out", workers=None, scheduler=json.loads((tmp_path / "scheduler.json").read_text())["address"])
    finally:
        for p in procs[::-1]:
            p.kill()
            p.wait()
        log.close()
    said = (tmp_path / "worker.txt").read_text()
    assert s["problems"] == {"unexpected": 3} and s["cases"] == 0
    assert "RuntimeError" in said and "in bad" in said and "Quistgaard" not in said.replace(str(tmp_path), ""), said


def test_cases_of_earlier_runs_are_counted(tmp_path, capsys):
    """Fewer cases than last time: the index shrinks, and that is said."""
    from medssl_nb.data.prepare import PrepareConfig, prepare

    man = study(tmp_path, {f"p{i}": noise(i) for i in range(3)})
    for limit, left in ((None, 0), (1, 2), (None, 0)):
        made = prepare(PrepareConfig(manifest=str(man), out=str(tmp_path / "prepared"), workers=0, limit=limit, progress=False))
        assert made["unlisted"] == left
        assert (f"{left} case(s) lie in volumes/ from earlier runs" in capsys.readouterr().out) == (left > 0)
