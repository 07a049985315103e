"""When does a generator pay? Peak memory of an inversion as a function of the size of the pool, at a fixed batch.

    python benchmarks/inversion_memory.py                 # writes benchmarks/inversion_memory.json and .png; about 3 GB of memory
    python benchmarks/inversion_memory.py --sizes 16 64   # quicker

Three arms, each point a process of its own: InvUNet with one code for each image (`joint`), free voxels of the whole pool at once, and free voxels batch by batch (`chunks`). The generator has the widths of
the specification; slabs are 16 x 96 x 96 instead of 16 x 192 x 192, which divides both sides of the comparison by four. The inverted model is a small masked autoencoder, the same in all arms. `extra` is the peak of
resident memory above what the process had before the first step (Linux only); nothing is rendered or written. Goal (DESIGN 6): the crossing is found and shown.
"""
import json
from pathlib import Path

from measure import child, command, facts, save, status, versions

HERE = Path(__file__).parent
SIZE, BATCH, SIZES = (16, 96, 96), 2, (16, 64, 256, 512, 1024)
ARMS = {"invunet": "InvUNet, all images jointly", "voxels": "free voxels, all images at once", "chunks": "free voxels, batch by batch"}


def measure(arm, n, batch):
    "Two steps of an inversion of `n` images."
    import torch

    n, batch = int(n), int(batch)

    from medssl_nb.invert import InvertConfig, Run, invert_step
    from medssl_nb.losses.statistics import calibrate, lent
    from medssl_nb.tasks.mim import MIM, MIMConfig

    torch.manual_seed(0)
    grid = tuple(s // 16 for s in SIZE)
    task = MIM(MIMConfig.small3d(region3d=SIZE, patch3d=16, width=64, depth=2, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2))
    full = torch.tensor(SIZE).expand(batch, -1)
    b = dict(image=torch.rand(batch, 1, *SIZE), present=torch.ones(batch, 1).bool(), valid=torch.stack([torch.zeros_like(full), full], 1), spacing=torch.ones(batch, 3), case=list("ab"[:batch]), subject=list("ab"[:batch]))
    stats = calibrate(task, [b], batch)
    cfg = InvertConfig(n=n, batch=batch, steps=2, generator="invunet" if arm == "invunet" else "voxels", work="chunks" if arm == "chunks" else "joint", chunk=max(batch, 2), bar=False)
    run = Run(task, stats, cfg, {}, batch, 64, torch.device("cpu"), stats.target(), dict(task=0.0, norm=0.0), "")
    before = status("VmRSS")
    with lent(task):
        run.begin()
        for t in range(2):
            invert_step(run.inv, task, stats, run.target, run.floor, cfg, run.opt, t, t, 2, batch)
    return dict(images=n, extra=status("VmHWM") - before, state=sum(x.numel() * x.element_size() for x in (*run.inv.parameters(), *run.inv.buffers())), grid=list(grid))


def crossing(a, b):
    "Where the straight line through the points of `b` meets the mean of `a`."
    import numpy as np

    x, y = [r["images"] for r in b], [r["extra"] for r in b]
    slope, base = np.polyfit(x, y, 1)
    s2, b2 = np.polyfit([r["images"] for r in a], [r["extra"] for r in a], 1)
    return dict(images=float((b2 - base) / (slope - s2)), bytes_an_image=dict(voxels=float(slope), invunet=float(s2)), fixed=dict(voxels=float(base), invunet=float(b2)))


def figure(table, cross, batch, path):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6, 3.4))
    ax = fig.subplots()
    for arm, rows in table.items():
        ax.plot([r["images"] for r in rows], [r["extra"] / 1e6 for r in rows], "o-", label=ARMS[arm])
    ax.axvline(cross["images"], color=".6", lw=0.8)
    ax.annotate(f"{cross['images']:.0f} images, {cross['images'] / batch:.0f} batches", (cross["images"], ax.get_ylim()[1] * 0.55), fontsize=8, xytext=(4, 0), textcoords="offset points")
    ax.set(xlabel=f"images in the pool (batch {batch}, {'x'.join(map(str, SIZE))})", ylabel="peak memory of the steps, MB", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(sizes, batch):
    table = {a: [] for a in ARMS}
    for arm in ARMS:
        for n in sizes:
            table[arm].append(child(__file__, "--measure", arm, n, batch, OMP_NUM_THREADS="1"))
            print(arm, table[arm][-1], flush=True)
    cross = crossing(table["invunet"], table["voxels"])
    row = dict(
        goal="the crossing is found and shown", size=SIZE, batch=batch, arms=ARMS, results=table, crossing=cross, crossing_in_batches=cross["images"] / batch,
        **facts("machine", "cpus", "python"), versions=versions("torch"),
    )
    save(HERE / "inversion_memory.json", row)
    figure(table, cross, batch, HERE / "inversion_memory.png")
    print(json.dumps(cross, indent=1))


if __name__ == "__main__":
    command(__doc__, main, measure, SIZES, batch=dict(type=int, default=BATCH))
