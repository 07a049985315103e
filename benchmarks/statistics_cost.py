"""What it costs to leave statistics behind: running averages as a share of a training step, and a calibration pass as a share of an epoch.

    python benchmarks/statistics_cost.py      # writes benchmarks/statistics_cost.json; one to two minutes of one core

A bare step and the same step within `Running` (views, forward, losses, backward, AdamW) take turns in pairs, each first in half of them; processor time of this process, so that neighbours cost little. The
verdict is the median of the paired ratios, the quartiles stand beside it. `Running` counts the last 10 of 300 epochs alone: `of_the_training_percent` is the extra time times 1/30. `calibrate` passes over
the batches whose training steps are the epoch it is compared with; nothing is read from a disk on either side.
"""
import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from measure import clocked, facts, save  # noqa: E402
from medssl_nb.core import generator  # noqa: E402
from medssl_nb.losses.statistics import Running, calibrate  # noqa: E402
from medssl_nb.tasks.registry import load_task, task_config  # noqa: E402

ROWS = (("mim", "small2d", 16, 21), ("mae", "small3d", 4, 15), ("pcrlv2", "small3d", 4, 9), ("mim", "2d", 4, 4))  # method, preset, cases a step, pairs; the last is ViT-B, 224 x 224, the specification's


def batches(task, size, n):
    "What a loader would hand out."
    S = task.region
    full = torch.tensor([list(S)] * size)
    for k in range(n):
        yield dict(image=torch.rand(size, 1, *S, generator=generator(1, k)), present=torch.ones(size, 1).bool(), start=torch.zeros_like(full), valid=torch.stack([torch.zeros_like(full), full], 1), full=full, spacing=torch.ones(size, len(S)),
                   case=[f"c-{k}-{i}" for i in range(size)], subject=[f"s-{k}-{i}" for i in range(size)], progress=0.99, step=k)


def measure(name, preset, size, pairs):
    torch.manual_seed(0)
    task = load_task(name, task_config(name, preset)).train()
    opt = torch.optim.AdamW(task.parameters(), 1e-4, fused=True)

    def step(batch, k):
        views = task.views(dict(batch, step=k), generator(0, k, 0, "views"))
        sum(task.losses(task(views), views).values()).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        task.after_step(k)

    def timed(batch, k):
        return clocked(step, batch, k)[1]

    def watched(batch, k):
        with Running(task, after=0.0) as r:
            t = timed(batch, k)
        assert r.k == 1
        return t

    data = list(batches(task, size, 4))
    step(data[0], 0)
    watched(data[0], 1)
    bare, seen = [], []
    for k in range(pairs):
        b = data[k % len(data)]
        for way in (("bare", "seen"), ("seen", "bare"))[k % 2]:
            if way == "bare":
                bare.append(timed(b, 2 * k))
            else:
                seen.append(watched(b, 2 * k + 1))
    ratios = sorted(s / b for s, b in zip(seen, bare))
    _, once, stats = clocked(calibrate, task, data)
    extra = statistics.median(ratios) - 1
    quarter = [round(100 * (ratios[len(ratios) * q // 4] - 1), 2) for q in (1, 3)]
    return dict(row=f"{name} {preset}, {size} cases a step, region {'x'.join(map(str, task.region))}", parameters=sum(p.numel() for p in task.parameters()), sites=len(stats.sites), numbers=stats.numbers(), pairs=pairs, step_s=round(statistics.median(bare), 4),
                running_percent_of_a_step=round(100 * extra, 2), quartiles=quarter, of_the_training_percent=round(100 * extra / 30, 3), calibrate_s=round(once, 3), calibrate_of_an_epoch=round(once / (len(data) * statistics.median(bare)), 3))


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--only", nargs="*", default=None, help="beginnings of rows, e.g. 'mim 2d'")
    a.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    a = a.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, preset, size, pairs in ROWS:
        if a.only is None or f"{name} {preset}".startswith(tuple(a.only)):
            rows.append(measure(name, preset, size, pairs))
            print(rows[-1], flush=True)
    save(a.out, dict(device="cpu", **facts("machine", "threads", "cpus", "torch", "load"), rows=rows))


if __name__ == "__main__":
    main()
