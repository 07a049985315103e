"""`prepare`, `pretrain`, `finetune`, `invert` and a stage of `continual` with its inversion are killed with SIGKILL, at random moments and at every single file operation; what is finished in the end equals the unbroken run, byte by byte.

A life is a fork of a process that has imported everything and calls the command line's own `main`, so that a death costs a fraction of a second. A phase of the run and a delay within it are drawn from a recorded seed; the
process group (loader workers, second rank, pool) is killed, or the main process alone. After each death everything that is visible must be whole; after the last life nothing may be left over, and the folder is compared
with that of a run that was never disturbed: weights, optimiser, history (all but the clock's two columns), exported encoder, cards, tables, prepared volumes. All runs lie under the same path one after the other, so not
even a path may differ. `python tests/test_kill.py SCENARIO FOLDER SEED KILLS` runs a scenario by hand and prints its summary.
"""
import contextlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# ---------------------------------------------------------------- what is run

TINY = "--train.steps 9 --train.batch 2 --train.save-every 3 --train.keep 1 --train.warmup 2 --train.tensorboard False --train.bar False --train.device cpu --task.widths 4 4 8".split()
RUN = dict(
    single="--method pcrlv2 --train.workers 0",
    workers="--method pcrlv2 --train.workers 2 --train.save-every 2",
    accum="--method mae --train.workers 0 --train.accum 2",
    ddp="--method mae --train.workers 0",
)
SCENARIOS = (*RUN, "finetune", "prepare", "prepare2", "invert", "invcoss")
PHASES = dict(  # module, function: name of the phase
    train={"data.cases.Loader.__iter__": "data", "train.trainer.Trainer.train_step": "step", "train.trainer.save_checkpoint": "checkpoint", "train.trainer.prune": "prune", "train.trainer.restore": "restore", "train.trainer.export_encoder": "export"},
    finetune={"eval.transfer.resolve": "resolve", "eval.transfer.fit": "fit", "eval.transfer.judge": "judge", "eval.transfer.remove_dir": "tidy", "eval.transfer.write_jsonl": "rows", "eval.transfer.summarise": "table", "train.trainer.save_checkpoint": "checkpoint"},
    prepare={"data.prepare.build_case": "build", "data.prepare.store": "store", "data.prepare.write_index": "index", "data.prepare.estimate": "estimate"},
    invert={"invert.load_statistics": "open", "invert.invert_step": "step", "invert.save_checkpoint": "checkpoint", "invert.prune": "prune", "invert.write_images": "images", "invert.save_codes": "codes", "invert.write_index": "index", "invert.Run.publish": "publish"},
    invcoss={"train.trainer.Trainer.train_step": "train", "train.trainer.export_encoder": "export", "invcoss.calibrate": "statistics", "invcoss.save_statistics": "save", "invert.invert_step": "step", "invert.save_checkpoint": "checkpoint", "invert.write_images": "images", "invert.Run.publish": "publish", "continual.write_packet": "packet"},
)


def kind(scenario):
    return "train" if scenario in RUN else "prepare" if scenario.startswith("prepare") else scenario


def volumes(out, n=8, side=12):
    "A prepared set in the store's own form, with outlines to learn."
    import numpy as np

    from medssl_nb.data.cases import write_case, write_index

    for i in range(n):
        rng = np.random.default_rng(i)
        row = dict(case=f"c-{i}", subject=f"s-{i}", session="1", split=None, group="g", dims=3, channels=["t1"], spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=str(i))
        x = rng.random((1, side, side, side)).astype(np.float32)
        write_case(out, row, x, (x > 0.7).astype(np.uint8), dict(intensity=dict(t1=dict(rule="percentile"))))
    write_index(out)
    return out


def scans(out, n=5):
    "NIfTI files, one of them broken."
    import nibabel as nib
    import numpy as np

    for i in range(n):
        d = out / f"p{i}"
        d.mkdir(parents=True)
        rng = np.random.default_rng(i)
        nib.save(nib.Nifti1Image(rng.random((20, 18, 16)).astype(np.float32), np.eye(4)), d / "t1.nii.gz")
        nib.save(nib.Nifti1Image((rng.random((20, 18, 16)) > 0.8).astype(np.uint8), np.eye(4)), d / "seg.nii.gz")
    f = out / "p3" / "t1.nii.gz"
    f.write_bytes(f.read_bytes()[:5000])
    return out


def medssl(words):
    from medssl_nb.cli import main

    return main([str(w) for w in words])


def setup(scenario, root):
    "The input of a scenario, made once; the command, and the folder it makes."
    out = root / "out"
    if kind(scenario) == "prepare":
        scans(root / "scans")
        with contextlib.redirect_stdout(io.StringIO()):
            assert medssl(["ingest", root / "scans", "-o", root / "manifest", "--progress", "False"]) == 0
        return ["prepare", root / "manifest", "-o", out, "--progress", "False", "--workers", "2" if scenario == "prepare2" else "0"]
    data = volumes(root / "data")
    if scenario in RUN:
        return ["pretrain", data, "-o", out, "--preset", "small3d", *TINY, *RUN[scenario].split()]
    if scenario == "invcoss":
        plan = dict(method="mae", preset="small3d", strategy="invcoss", settings=dict(share=0.5, few=True, invert=dict(batch=3, steps=12, save_every=4, lr=0.005, z_channels=2, widths=[8, 8], cache=[4, 4], bar=False)),
                    task=dict(region=[8, 8, 8], widths=[4, 4, 8]), steps=6, train=dict(batch=2, save_every=3, workers=0, tensorboard=False, bar=False, device="cpu"), stages=[dict(name="t1", data=str(data))], score=dict(scores=[]))
        (root / "plan.yaml").write_text(json.dumps(plan))  # JSON is YAML
        return ["continual", "run", root / "plan.yaml", "-o", out]
    more = ["--task.region", "8", "8", "8", "--train.accum", "1", "--statistics", "calibrate"] if scenario == "invert" else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert medssl(["pretrain", data, "-o", root / "encoder", "--preset", "small3d", *TINY, *RUN["accum"].split(), *more]) == 0
    if scenario == "invert":  # two generators, one after the other; images and codes
        how = "--how.batch 3 --how.steps 12 --how.save-every 4 --how.lr 0.005 --how.z-channels 2 --how.widths 8 8 --how.cache 4 4 --how.bar False --how.work chunks --how.chunk 3 --how.store both".split()
        return ["invert", root / "encoder", "-o", out / "pool", "--n", "6", "--device", "cpu", *how]
    return ["finetune", data, "-o", out, "--arms", "mine", root / "encoder", "--budgets", "2", "--seeds", "0", "1", "--steps", "4", "--batch", "2", "--region", "8", "8", "8", "--device", "cpu", "--bar", "False",
            "--predictions", "0", "--lr", "0.001", "0.01"]


# ---------------------------------------------------------------- lives

CLOCK = ("volumes_per_s", "wait")  # columns of a history
TOOK = ("seconds", "seconds_per_image", "peak_bytes")  # of the report of a pool


class Watch:
    "Memory shared by the generations: the phase that is on now, how often each was entered, seconds spent in each."

    def __init__(self, names):
        self.names, self.mem = ["start", *names], mmap.mmap(-1, 4096)

    def get(self):
        return struct.unpack_from("i", self.mem, 0)[0]

    def count(self, i):
        return struct.unpack_from("i", self.mem, 8 + 16 * i)[0]

    def seconds(self, i):
        return struct.unpack_from("d", self.mem, 16 + 16 * i)[0]

    def clear(self):
        self.mem[:] = bytes(4096)

    def put(self, i):
        struct.pack_into("i", self.mem, 0, i)

    @contextlib.contextmanager
    def phase(self, i):
        before, t = self.get(), time.perf_counter()
        self.put(i)
        struct.pack_into("i", self.mem, 8 + 16 * i, self.count(i) + 1)
        try:
            yield
        finally:
            struct.pack_into("d", self.mem, 16 + 16 * i, self.seconds(i) + time.perf_counter() - t)
            self.put(before)

    def wrap(self, table):
        "Put marks around the functions of the table; only in a life."
        import importlib

        for where, name in table.items():
            mod, _, attr = where.rpartition(".")
            try:
                owner = importlib.import_module("medssl_nb." + mod)
            except ImportError:
                mod, _, cls = mod.rpartition(".")
                owner = getattr(importlib.import_module("medssl_nb." + mod), cls)
            i, real = self.names.index(name), getattr(owner, attr)
            if attr == "__iter__":

                def marked(s, real=real, i=i):
                    it = real(s)
                    while True:
                        with self.phase(i):
                            try:
                                b = next(it)
                            except StopIteration:
                                return
                        yield b
            else:

                def marked(*a, real=real, i=i, **k):
                    with self.phase(i):
                        return real(*a, **k)

            setattr(owner, attr, marked)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def born(words, log, watch=None, table=None, before=None, ranks=1):
    "Fork one process (or two that find each other): the group's number and all process ids."
    port, pids = free_port() if ranks > 1 else 0, []
    for r in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            with contextlib.suppress(OSError):
                os.setpgid(pid, pids[0])
            continue
        try:
            os.setpgid(0, pids[0] if pids else 0)
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            if ranks > 1:
                os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kill",
                                  TORCHELASTIC_RESTART_COUNT="0")
            if watch and r == 0:
                watch.wrap(table)
            if before and r == 0:
                before()
            code = medssl(words)
            sys.stdout.flush()
            os._exit(code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return pids


def ended(pids, timeout=120.0):
    "Wait for all; what is left after the first failure is killed. Exit statuses."
    out, until = {}, time.monotonic() + timeout
    while len(out) < len(pids):
        for p in pids:
            if p not in out and (got := os.waitpid(p, os.WNOHANG))[0]:
                out[p] = got[1]
                if got[1]:
                    until = min(until, time.monotonic() + 5)
        if time.monotonic() > until:
            slay(pids[0])
            until += 60
        time.sleep(0.001)
    return [out[p] for p in pids]


def slay(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


# ---------------------------------------------------------------- what must hold


def whole(out):
    "After a death: everything visible is complete."
    from medssl_nb.core import read_json, read_jsonl
    from medssl_nb.data.cases import Prepared, read_array
    from medssl_nb.train.checkpoint import read_tensors, sha256_file, verify_checkpoint

    for f in out.rglob("*"):
        hidden = any(p.startswith(".") for p in f.relative_to(out).parts) or ".work/pool/" in str(f)  # where a pool is put together before it appears
        if hidden or not f.is_file():
            continue
        if f.name == "history.jsonl":
            *rows, last = f.read_text().split("\n")  # the last row may be torn: it belongs to a step that is done again
            for r in rows:
                json.loads(r)
        elif f.suffix == ".json":
            read_json(f)
        elif f.suffix == ".jsonl":
            read_jsonl(f)
        elif f.suffix == ".safetensors":
            read_tensors(f)
        elif f.suffix == ".b2nd":
            read_array(f)
        if f.name == "state.json":
            verify_checkpoint(f.parent)
        if f.name == "card.json":
            assert sha256_file(f.parent / "encoder.safetensors") == read_json(f)["sha256"], f
    if (out / "index.jsonl").exists() and (out / "volumes").exists():
        p = Prepared(out)
        for r in p.rows:
            p.read(r), p.read_seg(r)


def content(out):
    "Every file and its bytes; of histories and reports all but what the clock says, and of packets all but the hash of such a report."
    tree = {}
    for f in sorted(out.rglob("*")):
        name = str(f.relative_to(out))
        if f.is_dir() or f.name == ".lock":
            continue
        if f.name == "history.jsonl":
            tree[name] = [{k: v for k, v in json.loads(r).items() if k not in CLOCK} for r in f.read_text().splitlines()]
        elif f.name == "report.json":
            tree[name] = {k: v for k, v in json.loads(f.read_text()).items() if k not in TOOK}
        elif f.name in ("packet.json", "cost.json"):
            d = json.loads(f.read_text())
            tree[name] = {**d, "sha256": None, "files": {k: v for k, v in d.get("files", {}).items() if not k.endswith("report.json")}, "bytes": {k: v for k, v in d.get("bytes", {}).items() if k != "replay"}}
        else:
            tree[name] = f.read_bytes()
    return tree


def same(a, b):
    odd = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    return odd


def nursery(scenario, root, seed, kills):
    "Lives and deaths; prints a summary as JSON."
    preload()
    root, dice, tally, summary = Path(root), random.Random(f"{scenario} {seed}"), Counter(), dict(alone=0, chains=0, lives=0)
    root.mkdir(parents=True, exist_ok=True)
    words, out, log, ranks = setup(scenario, root), root / "out", root / "log.txt", 2 if scenario == "ddp" else 1
    table = PHASES[kind(scenario)]
    watch = Watch(dict.fromkeys(table.values()))
    t = time.perf_counter()
    assert ended(born(words, log, watch, table, ranks=ranks)) == [0] * ranks, log.read_text()[-3000:]
    total = time.perf_counter() - t
    count = {i: watch.count(i) for i in range(1, len(watch.names)) if watch.count(i)}
    mean = {i: watch.seconds(i) / n for i, n in count.items()}
    want = content(out)
    assert len(want) > 3 and (scenario == "prepare2" or len(count) == len(watch.names) - 1), (sorted(want), count)  # Dask's workers are not marked
    left = []
    while sum(tally.values()) < kills:
        shutil.rmtree(out)
        summary["chains"] += 1
        for _ in range(dice.randint(2, 5)):
            if sum(tally.values()) >= kills:
                break
            target = dice.choice([0, *count])
            watch.clear()
            pids = born(words, log, watch, table, ranks=ranks)
            summary["lives"] += 1
            # phase 0 is any moment at all, the start and the end included; else the n-th time of a phase, and a moment within it
            nth, delay = (0, dice.random() * total) if target == 0 else (dice.randint(1, max(count[target] // 2, 1)), dice.random() * 1.2 * mean[target])
            while target and watch.count(target) < nth and not dead(pids):
                time.sleep(0.0003)
            until = time.perf_counter() + delay
            while time.perf_counter() < until and not dead(pids):
                time.sleep(0.0003)
            if not dead(pids):
                tally[watch.names[watch.get()]] += 1
                if dice.random() < 0.25:  # as the system's memory killer does: the main process, and nobody else
                    summary["alone"] += 1
                    os.kill(pids[0], signal.SIGKILL)
                    left.append(pids[0])
                else:
                    slay(pids[0])
                killed = True
            else:
                killed = False
            status = ended(pids)
            whole(out) if out.exists() else None
            if not killed:
                assert status == [0] * ranks, log.read_text()[-3000:]
                break
        assert ended(born(words, log, ranks=ranks)) == [0] * ranks, log.read_text()[-3000:]
        summary["lives"] += 1
        assert not (odd := same(want, content(out))), f"differs from the unbroken run: {odd}"
    time.sleep(1.5 if left else 0)
    summary["orphans"] = sum(alive_in(g) for g in left if scenario != "workers")  # PyTorch's loader workers look every five seconds
    for g in left:
        slay(g)
    print(json.dumps(dict(scenario=scenario, seed=seed, kills=sum(tally.values()), phases=dict(tally), seconds=round(total, 2), **summary)))


def dead(pids):
    "Whether one of them has ended (it stays to be waited for)."
    return any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None for p in pids)


def alive_in(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def preload():
    import torch

    torch.set_num_threads(1)
    import importlib

    import lightning.fabric  # noqa: F401
    import monai.inferers
    import monai.networks.nets  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch.distributed  # noqa: F401

    for m in ("cli", "pretrain", "eval.transfer", "data.prepare", "data.ingest", "train.trainer", "tasks.mae", "tasks.pcrlv2", "invert", "continual", "invcoss"):
        importlib.import_module("medssl_nb." + m)


# ---------------------------------------------------------------- every file operation


def enumerate_operations(scenario, root, first, stride):
    "Die at the first, the (first+stride)-th, … operation on files, in a life of its own each; then live on, and compare."
    preload()
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    words, out, log = setup(scenario, root), root / "out", root / "log.txt"
    mem = mmap.mmap(-1, 64)

    def count_to(n):
        def begin():
            import safetensors.torch as st

            mine = str(out)

            def tick(torn=None):
                i = struct.unpack("i", mem[:4])[0] + 1
                mem[:4] = struct.pack("i", i)
                if i == n:
                    if torn:
                        torn()
                    os.kill(os.getpid(), signal.SIGKILL)

            events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.truncate")

            def hook(event, args):
                if event not in events or not isinstance(args[0], (str, os.PathLike)):
                    return
                path = str(args[0])
                if event in ("os.remove", "os.rmdir") and args[1] not in (-1, None):  # as rmtree does: a name inside an open folder
                    path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
                if path.startswith(mine) and not (event == "open" and isinstance(args[2], int) and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                    tick()

            sys.addaudithook(hook)
            sync, save, text, data = os.fsync, st.save_file, Path.write_text, Path.write_bytes

            def fsync(fd):
                tick()
                return sync(fd)

            def save_file(tensors, path, *a, **k):
                def torn():
                    b = st.save(tensors)
                    data(Path(path), b[: len(b) // 2])

                tick(torn)
                return save(tensors, path, *a, **k)

            def write_text(self, t, *a, **k):
                if str(self).startswith(mine):
                    tick(lambda: data(self, t.encode()[: len(t) // 2]))
                return text(self, t, *a, **k)

            def write_bytes(self, b):
                if str(self).startswith(mine):
                    tick(lambda: data(self, bytes(b)[: len(b) // 2]))
                return data(self, b)

            os.fsync, st.save_file, Path.write_text, Path.write_bytes = fsync, save_file, write_text, write_bytes

        return begin

    assert ended(born(words, log, before=count_to(0))) == [0], log.read_text()[-3000:]
    total, want, died = struct.unpack("i", mem[:4])[0], content(out), 0
    for n in range(first, total + 1, stride):
        shutil.rmtree(out)
        mem[:4] = bytes(4)
        status = ended(born(words, log, before=count_to(n)))
        assert status == [signal.SIGKILL], (n, total, status)
        died += 1
        whole(out) if out.exists() else None
        assert ended(born(words, log)) == [0], f"after death at operation {n} of {total}: " + log.read_text()[-3000:]
        assert not (odd := same(want, content(out))), f"after death at operation {n} of {total}: {odd}"
    print(json.dumps(dict(scenario=scenario, operations=total, died=died)))


# ---------------------------------------------------------------- tests


def call(*words, timeout=900):
    out = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    assert out.returncode == 0, out.stderr[-4000:] + out.stdout[-1000:]
    said = json.loads(out.stdout.strip().splitlines()[-1])
    print(json.dumps(said))
    return said


FEW = dict(single=2, workers=2, accum=1, ddp=1, finetune=2, prepare=2, invert=2, invcoss=1)  # thirteen in `make test`
MANY = dict(single=45, workers=45, accum=30, ddp=25, finetune=30, prepare=25, prepare2=5, invert=30, invcoss=20)  # 255 in `make test-all`


@pytest.mark.parametrize("scenario", FEW)
def test_killed_at_random(tmp_path, scenario):
    said = call(scenario, tmp_path, 0, FEW[scenario])
    assert said["kills"] == FEW[scenario] and said["orphans"] == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("scenario", MANY)
def test_killed_at_random_many_times(tmp_path, scenario):
    said = call(scenario, tmp_path, int(os.environ.get("MEDSSL_KILL_SEED", 1)), MANY[scenario], timeout=3600)
    assert said["kills"] == MANY[scenario] and said["orphans"] == 0, said


@pytest.mark.parametrize("scenario, first, stride", [("accum", 3, 9), ("finetune", 5, 40), ("prepare", 2, 11)])
def test_killed_at_file_operations(tmp_path, scenario, first, stride):
    said = call(scenario, tmp_path, "operations", first, stride)
    assert said["died"] >= 5, said


@pytest.mark.slow
@pytest.mark.parametrize("scenario, stride", [("accum", 1), ("finetune", 6), ("prepare", 1), ("invert", 1)])  # fine-tuning repeats the operations of its cells: every sixth of 600
def test_killed_at_every_file_operation(tmp_path, scenario, stride):
    said = call(scenario, tmp_path, "operations", 1, stride, timeout=3600)
    assert said["died"] > 60 and said["died"] == len(range(1, said["operations"] + 1, stride)), said


COMMAND = dict(pretrain="workers", torchrun="ddp", finetune="finetune", prepare="prepare2")


def at_the_command_line(command, root, kills, seed=0):
    "The installed program in processes of its own, killed at any moment from its first instruction to its last."
    scenario, dice, log = COMMAND[command], random.Random(seed), root / "log.txt"
    words, out = [str(w) for w in setup(scenario, root)], root / "out"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "medssl_nb.cli"] if command == "torchrun" else [str(Path(sys.executable).parent / "medssl")]

    def life(until=None):
        with open(log, "a") as f:
            p = subprocess.Popen([*start, *words], stdout=f, stderr=f, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            return p.wait(until)
        except subprocess.TimeoutExpired:
            return None
        finally:
            slay(p.pid)
            p.wait()

    t = time.monotonic()
    assert life() == 0, log.read_text()[-3000:]
    total, want, died = time.monotonic() - t, content(out), 0
    shutil.rmtree(out)
    while died < kills:
        status = life(total * dice.random())
        died += status is None
        assert status in (None, 0), log.read_text()[-3000:]
        whole(out) if out.exists() else None
        if status == 0 and died < kills:
            shutil.rmtree(out)
    assert life() == 0, log.read_text()[-3000:]
    assert not (odd := same(want, content(out))), odd


def test_the_installed_program_is_killed(tmp_path):
    at_the_command_line("pretrain", tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMAND)
def test_the_installed_program_is_killed_more_often(tmp_path, command):
    at_the_command_line(command, tmp_path, 4, seed=1)


if __name__ == "__main__":
    enumerate_operations(sys.argv[1], sys.argv[2], int(sys.argv[4]), int(sys.argv[5])) if sys.argv[3] == "operations" else nursery(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
