"""What each term and each generator does to an inverted pool: detail, variety, likeness, memory. invcoss.md, section 8 at our scale; claims (b) to (e).

    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0 1 2 --arms invcoss       # the models: packets after gratings and after lattices
    python experiments/invcoss_pools.py DATA/patterns2d runs/small --out runs/pools                      # about a minute a pool on one core
    python experiments/invcoss_pools.py DATA/patterns2d runs/small --out runs/pools --report             # results/invcoss_pools.{json,md,png}

The same on real X-rays, CT and MRI, from the models of `continual_five.py` (results/invcoss_real.{json,md,png}; the picture shows no patient), with the audit where a stage has people enough:

    python experiments/invcoss_pools.py DATA/real runs/real --world real --out runs/pools_real [--report]

Every pool: 75 images, 400 steps of 50 (real: 16, 400 steps of 16; on one core five to ten minutes a pool of X-rays, twelve to eighteen of MRI, one of free voxels), from the packet alone (weights, decoder, statistics). Judged beside held-out real images that the network never saw, by the network
that was inverted and by fixed filters that nothing was optimised against. What is finished is read, not made again; a report keeps the rows of the last one for pools that are not in --out, if the settings are the same.
"""
import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from continual_five import INVERT as FIVE
from continual_small import INVERT
from medssl_nb.audit import Bench, Site, audit_pool, filter_features
from medssl_nb.continual import StageConfig, StageData, region_of
from medssl_nb.core import UserError, read_json, write_json
from medssl_nb.data.cases import read_batch
from medssl_nb.eval.metrics import mean_interval
from medssl_nb.eval.pool import pool_report
from medssl_nb.invert import InvertConfig, invert, made_batch, open_model
from medssl_nb.losses.statistics import load_statistics
from medssl_nb.nets.invunet import build_generator



@dataclass
class World:
    "Stages of one experiment, and what is made of them."
    name: str  # of the results
    what: str
    full: InvertConfig  # everything on
    stages: tuple  # packets
    first: int = 1  # stages by default

    def pools(self):
        "One thing changed at a time; `plain` has the parameters of InvUNet in a decoder without cache and skips."
        f = self.full
        return {
            "task+statistics": replace(f, a_img=0.0, a_rep=0.0),
            "+ TV": replace(f, a_rep=0.0),
            "+ repulsion 0.3": replace(f, a_rep=0.3),
            "+ repulsion 1": f,
            "plain decoder": replace(f, generator="plain"),
            "free voxels": replace(f, generator="voxels"),
        }


WORLDS = {
    "patterns": World("invcoss_pools", "invcoss.md, section 8, at 32 x 32", InvertConfig(n=75, **INVERT), ("01_grating", "02_lattice")),
    "real": World("invcoss_real", "invcoss.md, section 8: real X-rays, CT and MRI", InvertConfig(n=16, **{**FIVE, "save_every": 0}), ("02_xray", "03_ct", "04_mri"), 3),
}
POOLS = tuple(WORLDS["patterns"].pools())


def real_images(data, task, stage, test):
    "Images of a stage as its network reads them, and whose they are."
    d = StageData(StageConfig(stage, Path(data) / stage))
    cases = d.cases(task, d.test if test else d.train, "centre")
    b = read_batch(cases, [(i, 0) for i in range(len(cases))])
    return b["image"].float(), list(b["subject"])


def audited(data, task, stage, made, info):
    "The audit in short; None where fewer than ten people are on a side."
    (x, who), (y, others) = (real_images(data, task, stage, t) for t in (False, True))
    if min(len(set(who)), len(set(others))) < 10:
        return None
    site = Site(torch.cat([x, y]), who + others, np.arange(len(x) + len(y)) < len(x), tuple(info["spacing"]))
    a = audit_pool(made, Bench.of(site))
    return {k: a[k] for k in ("alarm", "decided", "network_leaks", "verdict", "checks")}


def one(data, packet, stage, cfg, seed):
    "A pool and what is to be said of it."
    task, _, folder = open_model(packet)
    stats = load_statistics(folder / f"{stage}.json")
    got = invert(task, stats, replace(cfg, seed=seed), stage=stage)
    made, real = got.volumes.float().cpu(), real_images(data, task, stage, True)[0]
    size = tuple(made.shape[2:])
    kind = f"{len(size)}d"
    assert size == tuple(region_of(task, kind))
    task.eval()
    with torch.no_grad():
        look = lambda x: torch.cat([task.readout(made_batch(v, stats.info, range(len(v))), cls=False) for v in x.split(32)]).numpy()
        features = {"own": (look(real), look(made)), "filters": tuple(filter_features(v) for v in (real, made))}
    report = pool_report(real, made, features, tuple(stats.info["spacing"]), (getattr(task.cfg, f"patch{kind}"),) * len(size), inverted="own")
    generator = build_generator(cfg.generator, size, made.shape[1], cfg.z_channels, cfg.widths, cfg.cache)
    last = {k: v for k, v in got.history[-1].items() if isinstance(v, (int, float))}
    facts = {k: v for k, v in got.report.items() if isinstance(v, (int, float, str))} | dict(real_task=stats.info["loss_task"], real_norm=stats.info["loss_norm"])
    return dict(
        report=report, last=last, facts=facts, parameters=sum(p.numel() for p in generator.parameters()), size=size, audit=audited(data, task, stage, made, stats.info), images=flat(made[:8]), real=flat(real[:8])
    )


def flat(x):
    "Pictures of a few volumes: the first channel, the middle slice."
    x = x[:, 0]
    return (x if x.ndim == 3 else x[:, x.shape[1] // 2]).numpy().round(3).tolist()


def values(cell):
    "Measures by name: of the pool, and of as many real images against others."
    return cell["values"] if "values" in cell else {f"{r['space']}: {r['measure'].removeprefix('in_plane.')}": (r["synthetic"], r["real"]) for r in cell["report"]["rows"]}  # of slabs: the spectrum in plane


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
    shown = {k: v for k, v in SHOWN.items() if all(v[0] in values(c) for (a, _, _), c in cells.items() if a == at)}
    head = f"| pool | {' | '.join(shown)} | task, statistics | s an image | parameters | audit | seeds |"
    lines = [f"## {at[3:]}", "", head, "|---|" + "---|" * (len(shown) + 5)]
    any_ = next(n for n in ("+ repulsion 1", *POOLS) if seeds_of(cells, at, n))  # real images are the same beside every pool
    first, fact0 = of(any_), [cells[at, s, any_]["facts"] for s in seeds_of(cells, at, any_)]
    cost = f"{np.mean([f['real_task'] for f in fact0]):.2f}, {np.mean([f['real_norm']['pooled'] for f in fact0]):.2f}" if fact0 and "real_task" in fact0[0] else ""
    lines.append("| *real, as many* | " + " | ".join(span([v[k][1] for v in first]) for k, _ in shown.values()) + f" | {cost} | | | | |")
    for name in POOLS:
        vs, ss = of(name), seeds_of(cells, at, name)
        verdicts = [a for s in ss if (a := cells[at, s, name].get("audit"))]
        alarms = f"{sum(a['alarm'] for a in verdicts)} of {len(verdicts)} alarmed" if verdicts else ""
        end = ", ".join(f"{np.mean([cells[at, s, name]['last'][k] for s in ss]):.2f}" for k in ("task", "norm")) if ss else ""
        if not vs:
            continue
        fact = lambda k: np.mean([cells[at, s, name]["facts"][k] for s in ss])
        lines.append(f"| {name} | " + " | ".join(span([v[k][0] for v in vs]) for k, _ in shown.values()) + f" | {end} | {fact('seconds_per_image'):.2f} | {cells[at, ss[0], name]['parameters']:,} | {alarms} | {len(ss)} |")
    lines += ["", "Differences, paired by seed:", "", f"| | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for title, (a, b) in PAIRS.items():
        both = [s for s in seeds_of(cells, at, a) if s in seeds_of(cells, at, b)]
        if both:
            lines.append(f"| {title} | " + " | ".join(span([values(cells[at, s, a])[k][0] - values(cells[at, s, b])[k][0] for s in both], "{:+.3f}") for k, _ in shown.values()) + " |")
    return lines + [""]


def seeds_of(cells, at, name):
    return sorted(s for a, s, n in cells if (a, n) == (at, name))


def picture(cells, stages, seed, real=True):
    "A row of images for each pool; stages side by side. Real ones on top where they are nobody's."
    from matplotlib.figure import Figure

    names, k = [*(["real"] if real else []), *POOLS], 8 if len(stages) == 1 else 4
    fig = Figure(figsize=(1.05 * k * len(stages) + 1.2, 1.0 * len(names)), layout="constrained")
    axes = fig.subplots(len(names), k * len(stages), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for j, at in enumerate(stages):
        first = next(c for (a, s, _), c in cells.items() if (a, s) == (at, seed))
        rows = {"real": first["real"], **{n: cells[at, seed, n]["images"] for n in POOLS if (at, seed, n) in cells}}
        lo, hi = np.percentile(np.array(first["real"]), (1, 99.5))
        for line, name in zip(axes, names):
            for ax, v in zip(line[k * j :], rows.get(name, [])[:k]):
                ax.imshow(v, cmap="gray", vmin=lo, vmax=hi, interpolation="nearest")
        axes[0, k * j].set_title(at[3:], fontsize=9, loc="left")
    for line, name in zip(axes, names):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return fig


def storage(world, runs, seeds):
    "Bytes that travel for replay, at our size and at the paper's."
    def size(arm, at, *parts):
        packets = [p for s in seeds if (p := runs / f"{arm}_s{s}" / "packets" / at / "packet.json").is_file()]
        return sum(f["bytes"] for p in packets for n, f in read_json(p)["files"].items() if n.startswith(parts)) / max(len(packets), 1)

    out = {}
    for at in world.stages[: world.first]:
        name = at[3:]
        out[f"ours, {name}: real images of the buffer, compressed"] = size("medcoss", at, f"replay/{name}/volumes")
        out[f"ours, {name}: inverted images, as many, compressed"] = size("invcoss", at, f"replay/{name}/volumes")
        out[f"ours, {name}: statistics"] = size("invcoss", at, f"statistics/{name}")
    if world.name != "invcoss_pools":
        return out
    f = world.full
    g = build_generator("invunet", (16, 192, 192), 1)
    weights, code = 4 * sum(p.numel() for p in g.parameters()), 2 * int(np.prod(g.z_shape))
    n, slab = 6250, 16 * 192 * 192
    small = build_generator(f.generator, (32, 32), 1, f.z_channels, f.widths, f.cache)
    here = 4 * sum(p.numel() for p in small.parameters()) + 75 * 2 * int(np.prod(small.z_shape))
    return out | {
        "ours, grating: generator (float32) and 75 codes (float16)": here,
        "paper, CT: 6 250 slabs of int16 (5 %)": n * slab * 2,
        "paper, CT: inverted slabs, int16": n * slab * 2,
        "paper, CT: generator (float32) and 6 250 codes (float16)": weights + n * code,
        "paper, CT: statistics (26 sites x 768 x mean, variance, float32)": 26 * 768 * 2 * 4,
    }


def report(a, world):
    "results/NAME.{json,md,png} from what is finished."
    from medssl_nb.plot.volume import png

    results = Path(__file__).parent.parent / "results"
    settings = json.loads(json.dumps(asdict(world.full), default=str))
    old = read_json(f) if (f := results / f"{world.name}.json").is_file() else dict(settings=settings, cells=[], storage={})
    if other := {k: v for k, v in old["settings"].items() if settings.get(k) != v}:  # an older file names fewer of them
        raise UserError(f"{f.name} is of other settings: {other}", f"{ {k: settings.get(k) for k in other} }", "move it away and make all pools anew; pools of two settings are not put in one table")
    cells = {(c["stage"], c["seed"], c["pool"]): c for c in old["cells"]}  # of earlier sessions, whose images are nowhere
    for at in a.stages:
        for s in a.seeds:
            for n in POOLS:
                if (f := a.out / f"{at}_s{s}_{n.replace(' ', '_')}.json").is_file():
                    cells[at, s, n] = read_json(f)
    cells = {k: cells[k] for k in sorted(cells, key=lambda k: (world.stages.index(k[0]), k[1], POOLS.index(k[2])))}
    text = [line for at in a.stages if any(k[0] == at for k in cells) for line in table(cells, at)]
    fresh = storage(world, a.runs, a.seeds)
    kept = fresh if all(fresh.values()) else old["storage"]  # a run that is not there has no bytes
    against = {k.rsplit(":", 1)[0]: v for k, v in reversed(kept.items()) if "real images" in k or "6 250 slabs" in k}
    text += ["## (e) What travels for replay", "", "| | bytes | the real buffer is so many times larger |", "|---|---:|---:|"]
    text += [f"| {k} | {v:,.0f} | {against[k.rsplit(':', 1)[0]] / v:.3g} |" for k, v in kept.items() if v]
    text += ["", "Memory is in `benchmarks/inversion_memory.json`. Measures: " + "; ".join(f"`{k}`, {w}" for k, (_, w) in SHOWN.items()) + ". Task and statistics: losses at the last step. Intervals: 95 % t over seeds."]
    note = Path(__file__).parent / f"{world.name}_verdict.md"  # written by a person who read the tables
    (results / f"{world.name}.md").write_text("\n".join([note.read_text() if note.exists() else f"# {world.what}\n", f"![pools]({world.name}.png)", "", *text]) + "\n")
    small = [dict(stage=at, seed=s, pool=n, values=values(c), last=c["last"], facts=c["facts"], parameters=c["parameters"], audit=c.get("audit")) for (at, s, n), c in cells.items()]
    write_json(results / f"{world.name}.json", dict(what=world.what, settings=settings if any("report" in c for c in cells.values()) else old["settings"], cells=small, storage=kept))
    shown = [at for at in a.stages if any(k[0] == at for k in cells)]
    if all("images" in c for (at, s, _), c in cells.items() if at in shown and s == a.seeds[0]):
        (results / f"{world.name}.png").write_bytes(png(picture(cells, shown, a.seeds[0], real=a.world == "patterns"), dpi=70))
    else:
        print(f"{world.name}.png stays: not all pools of seed {a.seeds[0]} are in {a.out}, and the table keeps no images")
    print(results / f"{world.name}.md")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("data", type=Path)
    ap.add_argument("runs", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    ap.add_argument("--pools", nargs="*", default=tuple(POOLS))
    ap.add_argument("--world", default="patterns", choices=tuple(WORLDS))
    ap.add_argument("--stages", nargs="*")
    ap.add_argument("--report", action="store_true")
    a = ap.parse_args()
    world = WORLDS[a.world]
    a.stages = a.stages or world.stages[: world.first]
    pools = world.pools()
    torch.set_num_threads(1)
    for seed in () if a.report else a.seeds:
        for at in a.stages:
            for name in a.pools:
                f = a.out / f"{at}_s{seed}_{name.replace(' ', '_')}.json"
                if f.is_file():
                    continue
                write_json(f, one(a.data, a.runs / f"invcoss_s{seed}" / "packets" / at, at[3:], pools[name], seed))
                print(f.name, flush=True)
    if a.report:
        report(a, world)


if __name__ == "__main__":
    main()
