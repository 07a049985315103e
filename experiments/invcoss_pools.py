"""What each term and each generator does to an inverted pool: detail, variety, likeness, memory. invcoss.md, section 8 at our scale; claims (b) to (e).

    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0 1 2 --arms invcoss       # the models: packets after gratings and after lattices
    python experiments/invcoss_pools.py DATA/patterns2d runs/small --out runs/pools                      # about a minute a pool on one core
    python experiments/invcoss_pools.py DATA/patterns2d runs/small --out runs/pools --report             # results/invcoss_pools.{json,md,png}

Every pool: 75 images, 400 steps of 50, from the packet alone (weights, decoder, statistics). Judged beside held-out real images that the network never saw, by the network that was inverted and by
fixed filters that nothing was optimised against. What is finished is read, not made again.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from continual_small import INVERT
from medssl_nb.audit import filter_features
from medssl_nb.core import read_json, write_json
from medssl_nb.data.cases import Prepared
from medssl_nb.eval.metrics import mean_interval
from medssl_nb.eval.pool import pool_report
from medssl_nb.invert import InvertConfig, invert, open_model
from medssl_nb.losses.statistics import load_statistics
from medssl_nb.nets.invunet import build_generator

FULL = InvertConfig(n=75, **INVERT)
# one thing changed at a time; `plain` has the parameters of InvUNet in a decoder without cache and skips
POOLS = {
    "task+statistics": replace(FULL, a_img=0.0, a_rep=0.0),
    "+ TV": replace(FULL, a_rep=0.0),
    "+ repulsion 0.3": replace(FULL, a_rep=0.3),
    "+ repulsion 1": FULL,
    "plain decoder": replace(FULL, generator="plain"),
    "free voxels": replace(FULL, generator="voxels"),
}
STAGES = ("01_grating", "02_lattice")


def real_images(data, stage, split):
    p = Prepared(Path(data) / stage)
    return torch.from_numpy(np.stack([np.asarray(p.read(r)[0], np.float32) for r in p.select(split=split)])).flatten(2).unflatten(2, (32, 32))


def one(data, packet, stage, cfg, seed):
    "A pool and what is to be said of it."
    task, _, folder = open_model(packet)
    stats = load_statistics(folder / f"{stage}.json")
    got = invert(task, stats, replace(cfg, seed=seed), stage=stage)
    made, real = got.volumes.float().cpu(), real_images(data, stage, "test")
    task.eval()
    with torch.no_grad():
        look = lambda x: task.readout(dict(image=x, present=torch.ones(len(x), 1, dtype=torch.bool)), cls=False).numpy()
        features = {"own": (look(real), look(made)), "filters": tuple(filter_features(v) for v in (real, made))}
    report = pool_report(real[:, 0].numpy(), made[:, 0].numpy(), features, (1.0, 1.0), (4, 4), inverted="own")
    generator = build_generator(cfg.generator, (32, 32), 1, cfg.z_channels, cfg.widths, cfg.cache)
    last = {k: v for k, v in got.history[-1].items() if isinstance(v, (int, float))}
    return dict(report=report, last=last, facts={k: v for k, v in got.report.items() if isinstance(v, (int, float, str))}, parameters=sum(p.numel() for p in generator.parameters()), images=made[:8, 0].numpy().round(3).tolist())


def values(cell):
    "Measures by name: of the pool, and of as many real images against others."
    return {f"{r['space']}: {r['measure']}": (r["synthetic"], r["real"]) for r in cell["report"]["rows"]}


# what is shown, with the side that is better: nearer to the real sample beside it, or less, or more
SHOWN = {
    "high_share": ("voxels: high_share", "share of power above the patch frequency"),
    "lsd_high": ("voxels: lsd_high", "distance of the fine spectrum, dB; less is better"),
    "vendi_own": ("own: vendi_2", "variety to the network itself"),
    "vendi_filters": ("filters: vendi_2", "variety to fixed filters"),
    "fid_filters": ("filters: fid", "Frechet distance, fixed filters; less is better"),
    "coverage_own": ("own: coverage", "share of real images with an invented neighbour"),
}
PAIRS = {
    "(b) + TV": ("+ TV", "task+statistics"),
    "(b) + repulsion 1": ("+ repulsion 1", "+ TV"),
    "(c) InvUNet - plain decoder": ("+ repulsion 1", "plain decoder"),
    "(c) InvUNet - free voxels": ("+ repulsion 1", "free voxels"),
    "(d) repulsion 0.3 - 0": ("+ repulsion 0.3", "+ TV"),
    "(d) repulsion 1 - 0.3": ("+ repulsion 1", "+ repulsion 0.3"),
}


def span(v, form="{:.3f}"):
    "Mean and interval over seeds."
    m = mean_interval(v)
    return form.format(m["mean"]) + ("" if m["low"] is None else f" [{form.format(m['low'])}, {form.format(m['high'])}]")


def table(cells, at):
    "Lines of one stage: pools, then paired differences."
    of = lambda name: [values(cells[at, s, name]) for s in seeds_of(cells, at, name)]
    head = f"| pool | {' | '.join(SHOWN)} | s an image | parameters | seeds |"
    lines = [f"## {at[3:]}", "", head, "|---|" + "---|" * (len(SHOWN) + 3)]
    first = of("+ repulsion 1")
    lines.append("| *real, as many* | " + " | ".join(span([v[k][1] for v in first]) for k, _ in SHOWN.values()) + " | | | |")
    for name in POOLS:
        vs, ss = of(name), seeds_of(cells, at, name)
        if not vs:
            continue
        fact = lambda k: np.mean([cells[at, s, name]["facts"][k] for s in ss])
        lines.append(f"| {name} | " + " | ".join(span([v[k][0] for v in vs]) for k, _ in SHOWN.values()) + f" | {fact('seconds_per_image'):.2f} | {cells[at, ss[0], name]['parameters']:,} | {len(ss)} |")
    lines += ["", "Differences, paired by seed:", "", f"| | {' | '.join(SHOWN)} |", "|---|" + "---|" * len(SHOWN)]
    for title, (a, b) in PAIRS.items():
        both = [s for s in seeds_of(cells, at, a) if s in seeds_of(cells, at, b)]
        if both:
            lines.append(f"| {title} | " + " | ".join(span([values(cells[at, s, a])[k][0] - values(cells[at, s, b])[k][0] for s in both], "{:+.3f}") for k, _ in SHOWN.values()) + " |")
    return lines + [""]


def seeds_of(cells, at, name):
    return sorted(s for a, s, n in cells if (a, n) == (at, name))


def picture(cells, data, at, seed):
    "A row of images for each pool, real ones on top."
    from matplotlib.figure import Figure

    rows = {"real": real_images(data, at[3:], "test")[:8, 0].numpy(), **{n: np.array(cells[at, seed, n]["images"]) for n in POOLS if (at, seed, n) in cells}}
    fig = Figure(figsize=(8.4, 1.0 * len(rows)), layout="constrained")
    axes = fig.subplots(len(rows), 8)
    for line, (name, x) in zip(axes, rows.items()):
        for ax, v in zip(line, x):
            ax.imshow(v, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return fig


def storage(runs, seeds):
    "Bytes that travel for replay after the first stage, at our size; the paper's size by the same accounting."
    def size(arm, *parts):
        f = [f["bytes"] for s in seeds if (p := runs / f"{arm}_s{s}" / "packets" / STAGES[0] / "packet.json").is_file() for n, f in read_json(p)["files"].items() if n.startswith(parts)]
        return sum(f) / max(len([s for s in seeds if (runs / f"{arm}_s{s}" / "packets" / STAGES[0]).is_dir()]), 1)
    g = build_generator("invunet", (16, 192, 192), 1)
    weights, code = 4 * sum(p.numel() for p in g.parameters()), 2 * int(np.prod(g.z_shape))
    n, slab = 6250, 16 * 192 * 192
    small = build_generator(FULL.generator, (32, 32), 1, FULL.z_channels, FULL.widths, FULL.cache)
    here = 4 * sum(p.numel() for p in small.parameters()) + 75 * 2 * int(np.prod(small.z_shape))
    return {
        "ours: 75 real images of 32 x 32, compressed": size("medcoss", "replay/grating/volumes"),
        "ours: 75 inverted images, compressed": size("invcoss", "replay/grating/volumes"),
        "ours: generator (float32) and 75 codes (float16)": here,
        "ours: statistics": size("invcoss", "statistics/"),
        "paper, CT: 6 250 slabs of int16 (5 %)": n * slab * 2,
        "paper, CT: inverted slabs, int16": n * slab * 2,
        "paper, CT: generator (float32) and 6 250 codes (float16)": weights + n * code,
        "paper, CT: statistics (26 sites x 768 x mean, variance, float32)": 26 * 768 * 2 * 4,
    }


def report(a):
    "results/invcoss_pools.{json,md,png} from what is finished."
    from medssl_nb.plot.volume import png

    cells = {}
    for at in STAGES:
        for s in a.seeds:
            for n in POOLS:
                if (f := a.out / f"{at}_s{s}_{n.replace(' ', '_')}.json").is_file():
                    cells[at, s, n] = read_json(f)
    results = Path(__file__).parent.parent / "results"
    text = [line for at in STAGES if any(k[0] == at for k in cells) for line in table(cells, at)]
    kept = storage(a.runs, a.seeds)
    real = {"ours": next(iter(kept.values())), "paper": kept["paper, CT: 6 250 slabs of int16 (5 %)"]}
    text += ["## (e) What travels for replay", "", "| | bytes | the real buffer is so many times larger |", "|---|---:|---:|"]
    text += [f"| {k} | {v:,.0f} | {real[k.split(':')[0].split(',')[0]] / v:.3g} |" for k, v in kept.items() if v]
    text += ["", "Memory is in `benchmarks/inversion_memory.json`. Measures: " + "; ".join(f"`{k}`, {w}" for k, (_, w) in SHOWN.items()) + ". Intervals: 95 % t over seeds."]
    note = Path(__file__).parent / "invcoss_pools_verdict.md"  # written by a person who read the tables
    (results / "invcoss_pools.md").write_text("\n".join([note.read_text() if note.exists() else "", "![pools](invcoss_pools.png)", "", *text]) + "\n")
    small = [dict(stage=at, seed=s, pool=n, values=values(c), last=c["last"], facts=c["facts"], parameters=c["parameters"]) for (at, s, n), c in cells.items()]
    write_json(results / "invcoss_pools.json", dict(what="invcoss.md, section 8, at 32 x 32", settings=INVERT, cells=small, storage=kept))
    first = next(iter(cells))
    (results / "invcoss_pools.png").write_bytes(png(picture(cells, a.data, first[0], first[1]), dpi=70))
    print(results / "invcoss_pools.md")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("data", type=Path)
    ap.add_argument("runs", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    ap.add_argument("--pools", nargs="*", default=tuple(POOLS))
    ap.add_argument("--report", action="store_true")
    a = ap.parse_args()
    torch.set_num_threads(1)
    for seed in () if a.report else a.seeds:
        for at in STAGES:
            for name in a.pools:
                f = a.out / f"{at}_s{seed}_{name.replace(' ', '_')}.json"
                if f.is_file():
                    continue
                write_json(f, one(a.data, a.runs / f"invcoss_s{seed}" / "packets" / at, at[3:], POOLS[name], seed))
                print(f.name, flush=True)
    if a.report:
        report(a)


if __name__ == "__main__":
    main()
