"""A run that is killed with SIGKILL at random moments ends as the run that never was: the same bytes of weights and optimiser, the same rows, the same running statistics.

The lives are forks of one helper process that has imported everything, so that a dozen deaths cost seconds.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 60


def prepared(dir, n=6):
    "A few small volumes in the store's own form; one lacks a channel, one is smaller than the region."
    import numpy as np

    from medssl_nb.data.cases import write_case, write_index

    for i in range(n):
        rng = np.random.default_rng(i)
        chans = ["t1", "t2"] if i != 2 else ["t1"]
        row = dict(case=f"c-{i}", subject=f"s-{i}", session="1", split=None, group="", dims=3, channels=chans, spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=str(i))
        write_case(dir, row, rng.random((len(chans), 6 if i == 3 else 12, 12, 12)))
    write_index(dir)
    return Path(dir)


def cases(dir):
    from medssl_nb.data.cases import Cases

    return Cases(dir, region=(8, 8, 8))


def task(seed=0, plain=False):
    "Hide and rebuild; with everything that could break a resume: drawn views, dropout, batch norm, a moving average. `plain` has none of it."
    import torch
    from torch import nn

    from medssl_nb.tasks.base import Task

    class Net(nn.Module):
        dims, in_channels, widths, strides = 3, 2, (4,), (1,)

        def __init__(self):
            super().__init__()
            norm, drop = (nn.GroupNorm(2, 4), nn.Identity()) if plain else (nn.BatchNorm3d(4), nn.Dropout(0.1))
            self.net = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), norm, nn.ReLU(), drop)

        def forward(self, x):
            return [self.net(x)]

        def spec(self):
            return dict(net="Net")

    class Tiny(Task):
        region = (8, 8, 8)

        def __init__(self):
            super().__init__()
            self.encoder, self.out = Net(), nn.Conv3d(4, 2, 1)
            self.register_buffer("slow", torch.zeros(4))

        def views(self, batch, gen):
            x = batch["image"]
            seen = x if plain else x * (torch.rand(x.shape, generator=gen) < 0.5).to(x)
            # fixed number of values a case: every process divides by the same
            return dict(target=x.clone(), seen=seen)

        def forward(self, v):
            return dict(pred=self.out(self.encoder(v["seen"])[-1]))

        def losses(self, out, v):
            return dict(recon=(out["pred"] - v["target"]).square().mean())

        def after_step(self, step):
            self.slow.lerp_(self.encoder.net[0].bias.detach(), 0.1)

    torch.manual_seed(seed)
    return Tiny()


def settings(**k):
    from medssl_nb.train.trainer import TrainConfig

    return TrainConfig(**{**dict(steps=STEPS, batch=2, accum=2, lr=0.01, save_every=5, keep=2, tensorboard=False, bar=False, device="cpu", workers=0), **k})


def result(run):
    "Everything that must agree; the clock's columns do not."
    from medssl_nb.core import read_json, read_jsonl
    from medssl_nb.train.checkpoint import latest

    path = latest(run)
    rows = [{k: v for k, v in r.items() if k not in ("volumes_per_s", "wait")} for r in read_jsonl(run / "history.jsonl")]
    files = {f.name: f.read_bytes() for f in path.glob("*.safetensors")}
    return read_json(path / "state.json")["step"], files, rows, (run / "encoder" / "encoder.safetensors").read_bytes()


def life(data, run, workers, seed):
    "One fork that trains until it is done or dead."
    pid = os.fork()
    if pid:
        return pid
    try:
        from medssl_nb.losses.statistics import Running
        from medssl_nb.train.trainer import train

        t = task(seed)
        with Running(t, after=0.1):
            train(t, cases(data), settings(workers=workers), run, method="tiny")
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def nursery(root, seed, kills):
    "Start, kill, start again; prints what happened as JSON."
    import torch

    import lightning.fabric  # noqa: F401
    import medssl_nb.losses.statistics  # noqa: F401
    from medssl_nb.train.checkpoint import latest, read_tensors

    torch.set_num_threads(1)
    root, dice, deaths = Path(root), random.Random(seed), []
    data = prepared(root / "data")
    assert os.waitpid(life(data, root / "unbroken", 0, 0), 0)[1] == 0
    run, n = root / "killed", 0
    while True:
        history, n = run / "history.jsonl", n + 1
        have = latest(run)
        start = int(have.name[5:]) if have else 0
        # other weights to begin with, unless there is nothing to restore them from
        pid = life(data, run, dice.choice((0, 2)), n if have else 0)
        if len(deaths) < kills:
            # die some random time after the first sign of life: in a step, in a checkpoint, in a removal
            dead, upto = (0, 0), start + dice.randrange(8)
            while dead[0] == 0 and (not history.exists() or history.read_text().count("\n") <= upto):
                time.sleep(0.002)
                dead = os.waitpid(pid, os.WNOHANG)
            if dead[0] == 0:
                time.sleep(dice.random() * 0.06)
                dead = os.waitpid(pid, os.WNOHANG)
            if dead[0] == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                deaths.append((start, history.read_text().count("\n")))
                continue
            status = dead[1]
        else:
            status = os.waitpid(pid, 0)[1]
        assert status == 0, f"life {n} ended with {status}"
        if json.loads(open(history).readlines()[-1])["step"] == STEPS:
            break
    averaged, first, wanted = read_tensors(latest(run) / "running.safetensors")["counts"].tolist()
    print(json.dumps(dict(deaths=deaths, same=result(root / "unbroken") == result(run), lives=n, averaged=averaged, whole=first == wanted)))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_run_equals_unbroken_run(tmp_path, seed):
    out = subprocess.run([sys.executable, __file__, str(tmp_path), str(seed), "5"], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    said = json.loads(out.stdout.strip().splitlines()[-1])
    assert len(said["deaths"]) >= 3 and said["deaths"][-1][0] > 0, said
    assert said["same"], said
    assert any(start > 0.1 * STEPS for start, _ in said["deaths"]) and (said["averaged"], said["whole"]) == (STEPS - 6, True), said
    left = {p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {f"step_{STEPS - 5:08d}", f"step_{STEPS:08d}"}, left


def test_sigterm_saves_and_the_command_continues(tmp_path):
    "The polite end: one more step, a checkpoint, and an exception that no caller takes for success."
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from test_resume import *; from medssl_nb.train.trainer import Stopped, train\n"
        "root = Path(sys.argv[2]); data = prepared(root/'data')\n"
        "def plug(step, task):\n    if step == 4: os.kill(os.getpid(), signal.SIGINT)\n"
        "try: train(task(), cases(data), settings(workers=2), root/'run', method='tiny', extra=plug)\n"
        "except Stopped: sys.exit(130)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 130, out.stderr[-3000:]
    assert f"stopped at step 5 of {STEPS} (SIGINT)" in out.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_00000005" / "state.json").is_file()


if __name__ == "__main__":
    nursery(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
