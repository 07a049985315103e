"""What our loop costs over the bare forward + backward + optimiser step, and how long it waits for data.

    python benchmarks/loop.py            # writes benchmarks/loop.json; some minutes on one quiet core

Goals (DESIGN 6): the loop at most 1.03x the bare step; data wait at most 5 % with 2 loader workers.

Both sides see the same batches and views. They take turns step by step in one process, so that a slow moment of the machine hits both: the bare step runs inside the trainer's data source, and
"ours" is all the time between receiving a batch and asking for the next one (step, norm of the gradient, checks, history on disk, progress bar, TensorBoard).
Data wait is measured with the real loader on prepared volumes: at the region that PCRLv2-3D reads (128x144x144, with its own views in the main process) for narrow networks, whose steps are short,
and with nothing but reading, which gives the shortest step that two workers can feed. (At the specification's widths a step on a CPU takes ten seconds, and the wait is nothing.)
Wall time on a busy machine says more about the neighbours; the processor time of this process (all its threads) is reported beside it, and the verdict is taken from that.
"""
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from measure import clocked, facts, save  # noqa: E402
from medssl_nb.core import generator  # noqa: E402
from medssl_nb.data.cases import Cases, write_case, write_index  # noqa: E402
from medssl_nb.data.masking import block_mask  # noqa: E402
from medssl_nb.nets.unet import PyramidDecoder, UNetEncoder  # noqa: E402
from medssl_nb.tasks.base import Task  # noqa: E402
from medssl_nb.tasks.pcrlv2 import PCRLv2, PCRLv2Config  # noqa: E402
from medssl_nb.train.checkpoint import save_checkpoint  # noqa: E402
from medssl_nb.train.trainer import TrainConfig, case_loader, train  # noqa: E402

HERE = Path(__file__).parent
REGION = (32, 64, 64)


class Masked(Task):
    "Hide blocks, rebuild them: the plainest task, on the networks of PCRLv2."

    region = REGION

    def __init__(self, widths):
        super().__init__()
        self.encoder = UNetEncoder(1, widths)
        self.decoder = PyramidDecoder(self.encoder)

    def views(self, batch, gen):
        x = batch["image"][:, :1]
        m = block_mask(x, 8, 0.6, gen)
        return dict(target=x, mask=m, seen=x * (1 - m))

    def forward(self, v):
        return dict(pred=self.decoder(self.encoder(v["seen"])[-1])[1])

    def losses(self, out, v):
        return dict(recon=((out["pred"] - v["target"]).square() * v["mask"]).sum() / v["mask"].sum())


def now():
    return time.perf_counter(), time.process_time()


def since(t):
    return tuple(b - a for a, b in zip(t, now()))


class Turns:
    "A data source that does the bare step itself before it hands the batch over."

    def __init__(self, task, batch, lr):
        self.task, self.bare, self.ours = task.train(), [], []  # pairs (wall, processor) of seconds
        self.opt = torch.optim.AdamW(task.parameters(), lr=lr)
        self.x = torch.rand(batch, 1, *REGION, generator=generator(0))

    def loader(self, steps, seed, **_):
        handed = None
        for t in range(steps):
            if handed is not None:
                self.ours.append(since(handed))
            tick = now()
            b = dict(image=self.x)
            views = self.task.views(b, generator(seed, t, 0, "views", 0))
            loss = sum(self.task.losses(self.task(views), views).values())
            loss.backward()
            self.opt.step()
            self.opt.zero_grad(set_to_none=True)
            loss.item()
            self.bare.append(since(tick))
            handed = now()
            yield b
        self.ours.append(since(handed))


def overhead(widths, batch, steps, tmp, warm=3):
    torch.manual_seed(0)
    turns = Turns(Masked(widths), batch, 1e-3)
    cfg = TrainConfig(steps=steps, batch=batch, workers=0, device="cpu", save_every=0, log_every=10)
    task = Masked(widths)
    train(task, turns, cfg, tmp)
    bare, ours = turns.bare[warm:], turns.ours[warm:]
    paired = statistics.median(o[1] / b[1] for o, b in zip(ours, bare))
    med = lambda xs, k: statistics.median(x[k] for x in xs)
    saving, _, _ = clocked(lambda: save_checkpoint(tmp / "again", task, torch.optim.AdamW(task.parameters()), 1))
    return dict(
        widths=widths, batch=batch, shape=REGION, parameters=sum(p.numel() for p in task.parameters()), steps=len(ours),
        bare_cpu_s=round(med(bare, 1), 4), ours_cpu_s=round(med(ours, 1), 4), ratio_cpu=round(paired, 4), ratio_cpu_of_medians=round(med(ours, 1) / med(bare, 1), 4), ratio_cpu_sums=round(sum(o[1] for o in ours) / sum(b[1] for b in bare), 4),
        bare_wall_s=round(med(bare, 0), 4), ours_wall_s=round(med(ours, 0), 4), ratio_wall=round(med(ours, 0) / med(bare, 0), 4),
        checkpoint_weights_s=round(saving, 3),
    )


def volumes(tmp, n=8, shape=(160, 200, 200)):
    for i in range(n):
        rng = np.random.default_rng(i)
        x = np.kron(rng.random((1, *[-(-s // 10) for s in shape]), dtype=np.float32), np.ones((1, 10, 10, 10), np.float32))[:, : shape[0], : shape[1], : shape[2]] + 0.05 * rng.random((1, *shape), dtype=np.float32)
        write_case(tmp / "data", dict(case=f"c-{i}", subject=f"s-{i}", session="", split=None, group="", dims=3, channels=["ct"], spacing=[1.0] * 3, labels={}, fingerprint=str(i)), x / 1.05)
    write_index(tmp / "data")
    return tmp / "data", shape


def data_wait(name, make, data, batch, steps, tmp, warm=2):
    "Share of a step that the loop waits for its batch; and how fast two workers are when nothing else is done."
    path, shape = data
    cfg = TrainConfig(steps=steps + warm, batch=batch, device="cpu", save_every=0, tensorboard=False)
    out = {}
    for workers in (0, 2):
        torch.manual_seed(0)
        task = make()
        rows = train(task, Cases(path, region=task.region), replace(cfg, workers=workers), tmp / f"{name}-{workers}")[warm:]
        out[f"{workers} workers"] = dict(wait_median=round(statistics.median(r["wait"] for r in rows), 5), wait_mean=round(statistics.mean(r["wait"] for r in rows), 5),
                                         step_s=round(batch / statistics.median(r["volumes_per_s"] for r in rows), 3))
    n, t = 0, None
    for b in case_loader(Cases(path, region=task.region), replace(cfg, workers=2, steps=40 // batch), 0, 1, 0):
        n, t = (n + len(b["image"]), t) if t else (0, time.perf_counter())  # the first batch starts the clock
    alone = (time.perf_counter() - t) / n
    return dict(task=name, batch=batch, region=task.region, volume=shape, steps=steps, warm_up=warm, results=out, reading_alone_s_per_case=round(alone, 4), load=round(os.getloadavg()[0], 1))


def waits(d):
    data, narrow = volumes(d), (8, 16, 32, 64)

    def masked(region):
        task = Masked(narrow)
        task.region = region
        return task

    return [
        data_wait("pcrlv2, widths 8-64, crops of the specification", lambda: PCRLv2(PCRLv2Config(widths=narrow)), data, 2, 6, d),
        data_wait("masked, widths 8-64, 96x96x96", lambda: masked((96, 96, 96)), data, 2, 4, d),
        data_wait("masked, widths 8-64, 32x64x64", lambda: masked(REGION), data, 2, 8, d),
    ]


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        row = dict(
            goal=dict(loop_ratio=1.03, data_wait=0.05), **facts("machine", "threads", "cpus", "load", "torch"),
            overhead=[overhead((16, 32, 64, 128), 2, 28, d / "small"), overhead((64, 128, 256, 512), 1, 7, d / "spec", 1)],
            data_wait=waits(d),
        )
    save(HERE / "loop.json", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
