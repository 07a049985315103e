"""Full disks, read-only disks, second processes, clocks that run backwards, killed workers, exhausted memory, changed bytes and files from strangers: each test does the damage first, then looks at what is said and what is left.

Runs are those of `test_resume`. After a fault the same call continues, and the run equals one that was never disturbed, bit for bit.
"""
import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_resume import cases, prepared, result, settings, task  # noqa: E402

ROOT = os.geteuid() == 0
QUICK = dict(steps=12, save_every=5, accum=1)


def learn(data, run, **k):
    from medssl_nb.train.trainer import train

    extra, net = k.pop("extra", None), k.pop("net", None)
    with contextlib.redirect_stderr(io.StringIO()):
        return train(net or task(), cases(data), settings(**{**QUICK, **k}), run, method="tiny", extra=extra)


def refused(f, *says):
    from medssl_nb.core import UserError

    with pytest.raises(UserError) as e:
        f()
    for s in says:
        assert s in str(e.value), str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    learn(data, run)
    return result(run)


@contextlib.contextmanager
def disk(at, size):
    "A real file system of its own, that can be filled and made read-only."
    at.mkdir(parents=True, exist_ok=True)
    if not ROOT or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("NO MOUNT: only root may mount a small disk; faults of a real disk were not checked here (test_file_size_limit is)")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(at, leave=0):
    "Use up a disk, but for some bytes."
    f = os.open(at / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(OSError):
        while True:
            os.write(f, b"x" * 4096)
    os.ftruncate(f, max(os.fstat(f).st_size - leave, 0))
    os.close(f)


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("leave, says", [(0, "could not be written"), (8192, "checkpoint step_00000010 could not be written")])
def test_disk_full(data, unbroken, tmp_path, leave, says):
    "Nothing is left for the history; or enough for the history, but not for the checkpoint."
    from medssl_nb.train.checkpoint import latest, verify_checkpoint

    with disk(tmp_path / "small", "400k") as at:
        run = at / "run"

        def plug(step, task):
            if step == 7:
                fill(at, leave)

        said = refused(lambda: learn(data, run, extra=plug, tensorboard=leave == 0), says, "the disk is full (", "free)", "the same command")
        if leave:
            assert "needed, " in said and "step_00000005 is whole" in said
        assert latest(run).name == "step_00000005" and verify_checkpoint(latest(run))
        assert not [f for f in (run / "checkpoints").iterdir() if f.name != "step_00000005"]
        (at / "ballast").unlink()
        learn(data, run)
        assert result(run) == unbroken


def test_disk_full_before_anything(data, tmp_path):
    with disk(tmp_path / "small", "100k") as at:
        fill(at)
        refused(lambda: learn(data, at / "run"), "the disk is full")


def test_read_only_disk(data, unbroken, tmp_path):
    with disk(tmp_path / "small", "4m") as at:
        refused(lambda: _read_only(data, at), "the disk is read-only")
        subprocess.run(["mount", "-o", "remount,rw", str(at)], check=True)
        learn(data, at / "run")
        assert result(at / "run") == unbroken


def _read_only(data, at):
    learn(data, at / "run", max_minutes=0.0)  # one step, saved
    subprocess.run(["mount", "-o", "remount,ro", str(at)], check=True)
    learn(data, at / "run")


def test_finetune_on_a_full_disk(tmp_path):
    import medssl_nb.eval.transfer as t
    from test_kill import content, medssl, setup

    words = setup("finetune", tmp_path)
    assert medssl(words) == 0
    want = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    real, err = t.write_jsonl, io.StringIO()

    def full(*a):
        fill(at)
        real(*a)

    with disk(tmp_path / "out", "3m") as at:
        with patch.object(t, "write_jsonl", full), contextlib.redirect_stderr(err):
            assert medssl(words) == 2
        assert "the disk is full" in err.getvalue() and "finished cells are kept" in err.getvalue(), err.getvalue()
        (at / "ballast").unlink()
        assert medssl(words) == 0
        assert content(at) == want


# ---------------------------------------------------------------- forks of a fresh process: limits and users


def fresh(name, data, run):
    "Run one of the functions below in a process that may be spoilt."
    out = subprocess.run([sys.executable, __file__, name, str(data), str(run)], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:] + out.stdout[-1000:]
    return out.stdout


def file_size_limit(data, run):
    "As `ulimit -f` does: no mount needed."
    learn(data, run, max_minutes=0.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))
    refused(lambda: learn(data, run), "largest allowed file size", "ulimit -f")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def somebody_else(data, run):
    "A user who may read the run, and not write."
    learn(data, run, max_minutes=0.0)
    for d, _, files in os.walk(run):
        os.chmod(d, 0o555)
        [os.chmod(Path(d) / f, 0o444) for f in files]
    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    try:
        refused(lambda: learn(data, run), "no permission to write there", "choose a directory")
        refused(lambda: learn(data, run.parent / "new"), "no permission to write there")
        from medssl_nb.train.checkpoint import load_checkpoint

        assert load_checkpoint(run, task(), method="tiny")["step"] == 1  # reading is allowed
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # a stranger may not clean up


def little_memory(data, run):
    "The address space ends a little above what is in use when the second batch of weights is asked for."
    import torch

    hungry = task()
    real = hungry.forward

    def forward(v):
        if hungry.slow.abs().sum() > 0 and len(open(run / "history.jsonl").readlines()) >= 7:
            used = int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            torch.ones(1 << 30)
        return real(v)

    hungry.forward = forward
    said = refused(lambda: learn(data, run, net=hungry), "the memory is full", "--train.batch (now 2", "--train.accum", "--train.precision", "region", "nothing before step_00000005 is lost")
    assert "allocate" in said
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", ["file_size_limit", "little_memory"])
def test_limits_of_the_machine(data, unbroken, tmp_path, name):
    fresh(name, data, tmp_path / "run")
    learn(data, tmp_path / "run")
    assert result(tmp_path / "run") == unbroken


def test_a_folder_of_somebody_else(data, tmp_path):
    d = Path(tempfile.mkdtemp(prefix="medssl-theirs-"))  # pytest's own folders are closed to strangers
    try:
        os.chmod(d, 0o755)
        shutil.copytree(data, d / "data")
        subprocess.run(["chmod", "-R", "a+rX", str(d)], check=True)
        fresh("somebody_else", d / "data", d / "run")
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(d)], check=True)
        shutil.rmtree(d)


# ---------------------------------------------------------------- memory


class Full:
    "A task whose forward meets the end of memory at one step."

    def __new__(cls, error, step):
        t, n = task(), [0]
        real = t.forward

        def forward(v):
            n[0] += 1
            if n[0] == step:
                raise error
            return real(v)

        t.forward = forward
        return t


@pytest.mark.parametrize("error", ["gpu", "cpu", "python", "system"])
def test_out_of_memory(data, unbroken, tmp_path, error):
    import torch

    e = dict(gpu=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), cpu=RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
             python=MemoryError(), system=OSError(errno.ENOMEM, "Cannot allocate memory"))[error]
    refused(lambda: learn(data, tmp_path / "run", net=Full(e, 8)), "the memory is full", "nothing before step_00000005 is lost", "--resume force")
    learn(data, tmp_path / "run")
    assert result(tmp_path / "run") == unbroken


def test_out_of_memory_in_a_loader_worker(data, unbroken, tmp_path):
    from medssl_nb.data.cases import Cases

    class Greedy(Cases):
        def __getitem__(self, key):
            if os.getpid() != me:
                raise MemoryError("Unable to allocate 9 TiB for an array")
            return super().__getitem__(key)

    me = os.getpid()
    from medssl_nb.train.trainer import train

    refused(lambda: train(task(), Greedy(data, region=(8, 8, 8)), settings(**QUICK, workers=1), tmp_path / "run", method="tiny"), "the memory is full", "--train.workers (now 1)")
    learn(data, tmp_path / "run")
    assert result(tmp_path / "run") == unbroken


# ---------------------------------------------------------------- processes and signals


@pytest.mark.parametrize("at", [3, 8])
def test_a_loader_worker_is_killed(data, unbroken, tmp_path, at):
    "By the system, which wants memory: between two steps of the main process, whatever that is doing."
    done = []

    def shoot(step, t):
        done.append(step)
        if step == at:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    refused(lambda: learn(data, tmp_path / "run", workers=2, steps=12, extra=shoot), "a loader worker died", "resume the run")
    assert done[-1] >= at and not multiprocessing.active_children()
    learn(data, tmp_path / "run", workers=2)
    assert result(tmp_path / "run") == unbroken


def slow_life(data, run):
    "A run that waits a little in each step, so that signals find it at work."
    from medssl_nb.train.trainer import Stopped

    try:
        learn(Path(data), Path(run), workers=2, extra=lambda s, t: time.sleep(0.2))
    except Stopped:
        sys.exit(130)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_scheduler_signals_every_process(data, unbroken, tmp_path, sig):
    "SLURM's pre-emption, and a terminal's Ctrl-C, reach the loader workers too: the step is finished and saved all the same."
    run = tmp_path / "run"
    p = subprocess.Popen([sys.executable, __file__, "slow_life", str(data), str(run)], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while not (run / "history.jsonl").exists() or (run / "history.jsonl").read_text().count("\n") < 2:
            assert p.poll() is None and time.monotonic() < until, p.stderr.read()
            time.sleep(0.01)
        os.killpg(p.pid, sig)
        out, err = p.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode == 130, err
    n = len((run / "history.jsonl").read_text().splitlines())
    assert 2 <= n < 12 and [f.name for f in (run / "checkpoints").iterdir() if f.name.endswith(f"{n:08d}")], n
    learn(data, run, workers=0)
    assert result(run) == unbroken


def test_two_processes_on_one_run(data, tmp_path):
    "The second is told who the first is; when the first is killed, its lock does not stay."
    run = tmp_path / "run"
    p = subprocess.Popen([sys.executable, __file__, "slow_life", str(data), str(run)], start_new_session=True, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while not (run / "history.jsonl").exists():
            assert p.poll() is None and time.monotonic() < until, p.stderr.read()
            time.sleep(0.01)
        before = (run / ".lock").read_text()
        refused(lambda: learn(data, run), f"in use by process {p.pid} on {socket.gethostname()}")
        assert (run / ".lock").read_text() == before == f"process {p.pid} on {socket.gethostname()}"
    finally:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    learn(data, run)
    (run / ".lock").write_text(f"process {p.pid} on {socket.gethostname()}")  # what a dead process wrote blocks nobody
    assert len(learn(data, run)) == 12


def test_the_clock_runs_backwards(data, unbroken, tmp_path):
    run, t = tmp_path / "run", [1.9e9]

    def back():
        t[0] -= 3600
        return t[0]

    with patch("time.time", back):
        learn(data, run, max_minutes=0.0)
        learn(data, run)
    for i, f in enumerate(sorted((run / "checkpoints").iterdir())):
        for g in (f, *f.iterdir()):
            os.utime(g, (1e9 - i * 1e6, 1e9 - i * 1e6))
    from medssl_nb.train.checkpoint import latest

    assert latest(run).name == "step_00000012" and result(run) == unbroken
    os.utime(run / "checkpoints" / "step_00000010", (4e9, 4e9))  # from the future
    assert latest(run).name == "step_00000012" and len(learn(data, run)) == 12


# ---------------------------------------------------------------- changed bytes


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    learn(data, run)
    return run


def test_every_changed_byte_is_noticed(finished, tmp_path):
    "Each file, at its beginning, in its header, in the middle, at its end; and cut short, and longer."
    from medssl_nb.train.checkpoint import load_checkpoint

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ck, n = run / "checkpoints" / "step_00000012", 0
    for f in sorted(ck.iterdir()):
        keep = f.read_bytes()
        at = {0, 1, 7, 8, 9, 20, len(keep) // 3, len(keep) // 2, len(keep) - 2, len(keep) - 1}
        spoilt = [keep[:i] + bytes([keep[i] ^ 1]) + keep[i + 1 :] for i in sorted(at)] + [keep[:-1], keep[: len(keep) // 2], b"", keep + b"\0"]
        for s in spoilt:
            f.write_bytes(s)
            if f.name == "state.json" and s.strip() == keep.strip():
                continue  # the last line feed
            refused(lambda: load_checkpoint(run, task(), method="tiny"), "step_00000012", f.name)
            n += 1
        f.write_bytes(keep)
    assert n > 35
    assert load_checkpoint(run, task(), method="tiny")["step"] == 12
    shutil.rmtree(ck / "nothing", ignore_errors=True)
    (ck / "optimizer.safetensors").unlink()
    refused(lambda: load_checkpoint(run, task(), method="tiny"), "optimizer.safetensors is missing", "step_00000010 beside it is whole")


def test_what_the_message_says_works(finished, data, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    f = run / "checkpoints" / "step_00000012" / "model.safetensors"
    f.write_bytes(f.read_bytes()[:-1] + b"?")
    said = refused(lambda: learn(data, run), "move step_00000012 away")
    assert "step_00000010" in said
    shutil.move(run / "checkpoints" / "step_00000012", tmp_path / "away")
    learn(data, run)
    assert result(run) == unbroken


# ---------------------------------------------------------------- files from strangers


def header(d, body=b"", size=None):
    h = d if isinstance(d, bytes) else json.dumps(d).encode()
    return struct.pack("<Q", len(h) if size is None else size) + h + body


F32 = dict(dtype="F32", shape=[2])
BOMBS = dict(
    empty=b"",
    short=b"\1\2\3",
    endless=header(b"{}", size=2**63),
    gigantic=header(b"{}", size=2**40),
    beyond=header(b"{}", size=100),
    words=header(b"not json at all"),
    bytes=header(b"\xff\xfe\x00"),
    deep=header(b"[" * 200_000),
    overlap=header({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    same=header({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [0, 8]}}, bytes(8)),
    negative=header({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
    backwards=header({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    outside=header({"a": {**F32, "data_offsets": [0, 2**40]}}, bytes(8)),
    hole=header({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
    tail=header({"a": {**F32, "data_offsets": [0, 8]}}, bytes(99)),
    huge=header({"a": dict(dtype="F32", shape=[2**40, 2**40], data_offsets=[0, 8])}, bytes(8)),
    overflow=header({"a": dict(dtype="F32", shape=[2**62, 4, 2], data_offsets=[0, 8])}, bytes(8)),
    minus=header({"a": dict(dtype="F32", shape=[-2], data_offsets=[0, 8])}, bytes(8)),
    type=header({"a": dict(dtype="PYOBJECT", shape=[2], data_offsets=[0, 8])}, bytes(8)),
    pickle=pickle.dumps(print),
    zip=b"PK\3\4" + bytes(100),
)


@pytest.mark.parametrize("name", BOMBS)
def test_safetensors_that_are_none(tmp_path, name):
    from medssl_nb.train.checkpoint import read_tensors

    f = tmp_path / "model.safetensors"
    f.write_bytes(BOMBS[name])
    t = time.monotonic()
    refused(lambda: read_tensors(f), "model.safetensors is not a safetensors file")
    assert time.monotonic() - t < 5


def test_a_proper_safetensors_file_by_hand(tmp_path):
    "The files above fail for what they hold, not for how they are put together."
    from medssl_nb.train.checkpoint import read_tensors

    f = tmp_path / "model.safetensors"
    f.write_bytes(header({"a": {**F32, "data_offsets": [0, 8]}}, struct.pack("<2f", 1, 2)))
    assert read_tensors(f)["a"].tolist() == [1.0, 2.0]


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def test_poisoned_pickles_at_every_door(tmp_path, capsys):
    "A pickle in the place of every file that a command reads: refused with a sentence, and never executed."
    import torch
    from test_kill import RUN, TINY, medssl, volumes

    canary, root = tmp_path / "canary", tmp_path / "r"
    data = volumes(root / "data")
    words = ["pretrain", data, "-o", root / "run", "--preset", "small3d", *TINY, *RUN["accum"].split()]
    tune = ["finetune", data, "-o", root / "ft", "--arms", "a", root / "sent", "--budgets", "2", "--seeds", "0", "--steps", "1", "--bar", "False"]
    assert medssl(words) == 0
    pickled = pickle.dumps(Evil(canary))
    torch.save(dict(a=Evil(canary)), tmp_path / "zip.pth")
    poisons = [pickled, (tmp_path / "zip.pth").read_bytes(), b"!!python/object/apply:os.system ['touch " + str(canary).encode() + b"']\n"]
    doors = [(root / "run" / "checkpoints" / "step_00000009" / n, words) for n in ("model.safetensors", "optimizer.safetensors", "state.json")]
    doors += [(root / "sent" / n, tune) for n in ("encoder.safetensors", "card.json")] + [(data / "index.jsonl", words), (root / "run" / "history.jsonl", words)]
    shutil.copytree(root / "run" / "encoder", root / "sent")
    capsys.readouterr()
    for door, call in doors:
        keep = door.read_bytes()
        for poison in poisons:
            door.write_bytes(poison)
            if door.name == "history.jsonl":
                door.write_bytes(poison + b"\n{}\n")
            assert medssl(call) == 2, (door.name, capsys.readouterr())
            err = capsys.readouterr().err
            assert "Traceback" not in err and re.search(r"checksum|not readable JSON|is not JSON|not text|does not match|is missing", err), (door.name, err)
        door.write_bytes(keep)
    for name in ("zip.pth", "plain.pt", "config.yaml"):
        f = tmp_path / name
        if name != "zip.pth":
            f.write_bytes(poisons[0] if name == "plain.pt" else poisons[2])
        call = [*words, "--config", f] if name == "config.yaml" else [str(f) if w == root / "sent" else w for w in tune]
        assert medssl(call) == 2
        assert re.search("pickles|not readable YAML", capsys.readouterr().err)
    from medssl_nb.nets.unet import read_weights

    for f in ("zip.pth", "plain.pt"):
        refused(lambda: read_weights(tmp_path / f), "cannot be read safely")
    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists()  # it would have worked


@pytest.mark.parametrize("text", ['{"format": NaN}', '{"format": 1, "step": Infinity}', "[" * 100000, "9" * 5000, '{"format": 1}', "[]", "null", '{"format": 1, "sha256": 5}', "\x00"])
def test_json_that_is_none(finished, tmp_path, text):
    from medssl_nb.train.checkpoint import load_checkpoint, load_encoder

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step_00000012" / "state.json").write_text(text)
    refused(lambda: load_checkpoint(run, task(), method="tiny"), "state.json")
    (run / "encoder").mkdir(exist_ok=True)
    (run / "encoder" / "encoder.safetensors").touch()
    (run / "encoder" / "card.json").write_text(text)
    refused(lambda: load_encoder(run))


@pytest.mark.parametrize("what", ["encoder", "checkpoints", "tb", ".lock", "checkpoints/step_00000012", "checkpoints/step_00000012/model.safetensors", "checkpoints/step_00000012/state.json"])
def test_links_that_lead_out(finished, data, tmp_path, what):
    "A run that somebody sent, with a link in the place of something: refused before anything is read through it or written through it."
    run, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(finished, run)
    p = run / what
    if p.exists():
        shutil.move(p, away)
    else:
        away.mkdir()
    p.symlink_to(away)
    before = {f: f.read_bytes() for f in away.rglob("*") if f.is_file()} if away.is_dir() else away.read_bytes()
    refused(lambda: learn(data, run, steps=12), "link")
    assert before == ({f: f.read_bytes() for f in away.rglob("*") if f.is_file()} if away.is_dir() else away.read_bytes())
    mine = tmp_path / "mine"
    mine.symlink_to(finished)  # a link that one gives oneself is fine
    assert len(learn(data, mine)) == 12


def test_names_that_lead_out(finished, data, tmp_path):
    from medssl_nb.train.checkpoint import _digest, load_checkpoint

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    f = run / "checkpoints" / "step_00000012" / "state.json"
    (run / "secret").write_text("x")
    for name in ("../../secret", str(run / "secret"), "..", "a/../../../secret"):
        s = json.loads((finished / "checkpoints" / "step_00000012" / "state.json").read_text())
        s.pop("sha256")
        s["files"][name] = "0" * 64
        f.write_text(json.dumps({**s, "sha256": _digest(s)}))
        refused(lambda: load_checkpoint(run, task(), method="tiny"), "a plain name")


def test_a_rank_whose_torchrun_ended_before_it_looked(tmp_path):
    "torchrun is killed while a rank still imports: the rank's parent is then somebody else, for good, and the store that it would wait for is gone."

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="gone", TORCHELASTIC_USE_AGENT_STORE="True")
    code = "from medssl_nb.train.trainer import TrainConfig, make_fabric; make_fabric(TrainConfig(device='cpu', devices=2))"
    r = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert r.returncode == 1 and "torchrun does not answer" in r.stderr, r.stderr[-2000:]


def test_older_checkpoints_go_also_when_a_kill_came_after_the_last_save(data, tmp_path):
    "The run was finished and only the removal of what `keep` does not want was missing: the same command makes up for it."
    learn(data, tmp_path / "run", keep=2)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    learn(data, tmp_path / "run", keep=1)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
