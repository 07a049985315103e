"""TACO on real multi-contrast brains: train, then match points between the contrasts of one person, and between people.

    python experiments/taco_real.py --data ../shared/data/real/brain --seeds 3       # about a quarter of an hour on one free core; writes results/taco_real.json
    python experiments/taco_real.py --data ../shared/data/real/brain --figure F.png  # a figure with real anatomy: for eyes at the site, not for the repository

Every multi-contrast brain of the folder (NIfTI and DICOM) is ingested and prepared by this package, together with generated brains, and an encoder is pre-trained on all of them through `pretrain`
(method taco, preset small3d, one region holds a whole brain). Nothing is trained for the matching: the feature at a point is searched in the other volume by cosine.

One person. The contrasts are registered, so the truth is the same voxel, and copying the coordinate would be right by construction. So each second volume is moved by an amount that the encoder
is not told (15 to 25 mm along each axis), and the answers are moved back. Unmoved, it is reported too.
Between people. Nobody knows the truth. Two things can be judged: a point of the plane between the hemispheres belongs on the other person's plane, and a point of a lateral ventricle
in the other person's lateral ventricle, on the same side. Planes are found as the plane of best mirror symmetry, ventricles as dark on FLAIR and on T1 with contrast medium, deep inside and away from lesion labels;
both are checked on generated heads, where the truth is known (`checks`). Controls: the same coordinate, an encoder without training, reconstruction alone.
"""
import argparse
import contextlib
import functools
import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.spatial import cKDTree

from medssl_nb.data.cases import Manifest, Prepared
from medssl_nb.data.ingest import IngestConfig, ingest
from medssl_nb.data.phantom import TISSUES, brain_parts, head_case, save_nifti
from medssl_nb.data.prepare import PrepareConfig, prepare, prepared_grid
from medssl_nb.pretrain import pretrain, settings
from medssl_nb.tasks.taco import TACO, TACOConfig, match_points
from medssl_nb.train.trainer import TrainConfig

MODS = ("t1", "t1c", "t2", "flair")
SIDE, MM = 40, 5.0  # a region of 200 mm holds a brain
FINE = 2.0  # mm, for ventricles and pictures
GENERATED = 15
TOLERANCE = (10.0, 20.0)  # mm: half a cell of the token grid, and a cell
BRAIN = [TISSUES.index(t) for t in ("csf", "gm", "wm", "deep", "vessel", "core", "oedema", "rim", "caps")]


# ---- data


@functools.cache
def person(i, seed=5):
    return head_case(seed, (66, 78, 66), subject=i, modalities=MODS, background=False)


def generated(root, n, seed=5):
    "Generated brains without skull, as NIfTI."
    for i in range(n):
        c = person(i, seed)
        brain = ndimage.binary_opening(np.isin(c["tissue"], BRAIN))
        for m, x in c["images"].items():
            save_nifti(root / f"person_{i:02d}" / f"{m}.nii.gz", (x * brain).astype(np.float32), c["affine"])


def data(source, work):
    "Ingest and prepare once: `{spacing: Prepared}`, and `{case: number of the generated person, or None}`."
    source, work = Path(source), Path(work)
    if not (work / "man" / "cases.jsonl").exists():
        if not (work / "src").exists():
            if source.is_dir():
                shutil.copytree(source, work / "src" / "real")
            generated(work / "src" / "generated", GENERATED)
        ingest(IngestConfig(src=work / "src", out=work / "man"))
    man = Manifest(work / "man")
    inside = lambda c: Path(man.paths(next(iter(c["images"].values()))["file"])[0]).resolve().relative_to((work / "src").resolve()).parts
    who = {c["case"]: int(inside(c)[1].split("_")[1]) if inside(c)[0] == "generated" else None for c in man.cases}
    out = {}
    for mm in (MM, FINE):
        prepare(PrepareConfig(manifest=str(work / "man"), out=str(work / f"prep_{mm:g}"), spacing=(mm,) * 3, margin=1, workers=0))
        out[mm] = Prepared(work / f"prep_{mm:g}")
    return out, who


class Brain:
    "A case in its region, and what can be judged in it: the plane between the hemispheres and the lateral ventricles, on a fine grid."

    def __init__(self, prep, case):
        row = prep[MM].row(case)
        self.case, self.channels = case, tuple(row["channels"])
        read = lambda mm: {c: np.asarray(v) for c, v in zip(self.channels, prep[mm].read(case, channels=self.channels)[0])}
        x = read(MM)
        self.low = -((SIDE - np.array(x[self.channels[0]].shape)) // 2)  # of the region in the volume
        self.images = {c: place(v, -self.low, (SIDE,) * 3) for c, v in x.items()}
        self.body = np.all([v > 0 for v in self.images.values()], 0)
        self.fine = read(FINE)
        to_world, self.fine_world = (np.array(prepared_grid(prep[mm].info(row["case"])).affine) for mm in (MM, FINE))
        self.to_fine = np.linalg.inv(self.fine_world) @ to_world
        body = np.all([v > 0 for v in self.fine.values()], 0)
        self.plane = symmetry_plane(np.mean(list(self.fine.values()), 0)[::2, ::2, ::2], 2 * FINE)
        seg = np.asarray(prep[FINE].read_seg(case))[0] if row["seg"] else None
        mask = ventricles(self.fine["flair"], self.fine["t1c"], body, self.plane, FINE, seg)
        self.inside = np.argwhere(depth_of(body, FINE) > 12)
        self.ventricle, self.mask = np.argwhere(mask), mask
        self.tree = {s: cKDTree(p * FINE) for s, p in dict(any=self.ventricle, left=self.ventricle[self.side(self.ventricle) < 0], right=self.ventricle[self.side(self.ventricle) > 0]).items() if len(p)}

    def fine_of(self, voxels):
        "`(n, 3)` voxels of the region to voxels of the fine grid."
        return (np.asarray(voxels, float) + self.low) @ self.to_fine[:3, :3].T + self.to_fine[:3, 3]

    def region_of(self, voxels):
        "And back."
        inv = np.linalg.inv(self.to_fine)
        return np.asarray(voxels, float) @ inv[:3, :3].T + inv[:3, 3] - self.low

    def side(self, fine):
        return side_of(fine, self.plane, FINE)

    def near(self, fine, side="any"):
        "Distance to the ventricles, mm."
        return self.tree[side].query(np.asarray(fine) * FINE)[0] if side in self.tree else np.full(len(fine), np.inf)

    def points(self, name, n, rng):
        "`n` voxels of the fine grid: 'midline', 'ventricle' or 'brain'."
        pool = dict(brain=self.inside, ventricle=self.ventricle)
        pool = self.inside[np.abs(self.side(self.inside)) < 2] if name == "midline" else pool[name]
        return pool[rng.integers(0, len(pool), n)]


def depth_of(body, spacing):
    "Distance to the surface, mm."
    return ndimage.distance_transform_edt(np.pad(ndimage.binary_fill_holes(body), 1), sampling=spacing)[1:-1, 1:-1, 1:-1]


def place(x, at, shape):
    "`x` put into zeros of a shape, its first voxel at `at`; what does not fit is cut."
    out = np.zeros(shape, np.float32)
    lo, hi = np.maximum(at, 0), np.minimum(np.array(at) + x.shape, shape)
    src = tuple(slice(a - s, b - s) for a, b, s in zip(lo, hi, at))
    out[tuple(map(slice, lo, hi))] = x[src]
    return out


# ---- what can be judged without a truth


def symmetry_plane(image, spacing=MM):
    "The plane `(normal, offset)` about which a volume `(D, H, W)` mirrors best; voxels times spacing, mm. Normal points along +w (to the right)."
    x = ndimage.gaussian_filter(image, 1)
    idx = np.stack(np.nonzero(image > 0), 1)
    mid, best = idx.mean(0), None
    pick = idx[:: max(1, len(idx) // 6000)]
    val = x[tuple(pick.T)]
    grid = lambda centre, width, n: np.linspace(centre - width, centre + width, n)
    centre, width = np.zeros(3), np.array([4.0, 0.16, 0.16])  # voxels of shift; slopes along d and h
    for _ in range(4):
        for s in grid(centre[0], width[0], 7):
            for a in grid(centre[1], width[1], 5):
                for b in grid(centre[2], width[2], 5):
                    n = np.array([a, b, 1.0])
                    n /= np.linalg.norm(n)
                    c = mid @ n + s
                    other = pick - 2 * ((pick @ n) - c)[:, None] * n
                    got = ndimage.map_coordinates(x, other.T, order=1)
                    r = -np.mean((got - val) ** 2)
                    if best is None or r > best[0]:
                        best = (r, (s, a, b), n, c)
        centre, width = np.array(best[1]), width / 2.5
    return best[2], best[3] * spacing


def side_of(points, plane, spacing=MM):
    "Signed distance `(n,)` of voxels to the plane, mm; positive to the right."
    return np.asarray(points) @ plane[0] * spacing - plane[1]


def ventricles(flair, t1c, body, plane, spacing, lesion=None, rind=16.0, wide=32.0, long=52.0):
    "Lateral ventricles as a mask: dark in both contrasts, `rind` mm inside the head, at most `wide` mm from the plane and `long` mm from the middle front to back, the largest pieces."
    deep = depth_of(body, spacing) > rind
    mid = np.argwhere(body)[:, 1].mean()
    deep[:, np.abs(np.arange(body.shape[1]) - mid) * spacing > long] = False
    d = np.abs(side_of(np.stack(np.nonzero(deep), 1), plane, spacing))
    deep[tuple(np.nonzero(deep))] = d < wide
    if lesion is not None:
        deep &= ~ndimage.binary_dilation(lesion > 0, iterations=max(1, round(4 / spacing)))
    if deep.sum() < 20:
        return np.zeros_like(body)
    low = lambda x: x < np.median(x[deep]) - 1.2 * (np.median(x[deep]) - np.quantile(x[deep], 0.02)) * 0.5
    label, n = ndimage.label(deep & low(flair) & low(t1c))
    if not n:
        return np.zeros_like(body)
    size = ndimage.sum_labels(np.ones_like(label), label, range(1, n + 1))
    return np.isin(label, 1 + np.flatnonzero(size >= 0.15 * size.max()))


# ---- encoders


def train(kind, prep, work, seed, steps):
    "An encoder: 'random', 'rec' or 'full'; trained through the package."
    kw = dict(region=(SIDE,) * 3, jitter=1.0) | (dict(w_intra=0.0, w_inter=0.0) if kind == "rec" else {})
    if kind == "random":
        torch.manual_seed(seed)
        return TACO(TACOConfig.small3d(**kw)).eval()
    cfg, _ = settings(["--method", "taco", "--preset", "small3d"])
    loop = TrainConfig(steps=steps, batch=4, lr=1e-3, warmup=steps // 10, workers=0, seed=seed, save_every=0, tensorboard=False, bar=False, health_every=10 * (kind == "full"))
    cfg = replace(cfg, task=TACOConfig.small3d(**kw), data=prep[MM].dir, out=Path(work) / "runs" / f"{kind}_{steps}_{seed}", train=loop, channels=MODS)
    with contextlib.redirect_stdout(io.StringIO()):
        made = pretrain(cfg)
    return made["task"].eval()


def normal(x):
    "z-score over the foreground, as in the task."
    x = torch.as_tensor(x)
    m = x != 0
    return torch.where(m, (x - x[m].mean()) / x[m].std(), 0.0)


@torch.no_grad()
def features(task, x):
    return task.encoder(normal(x)[None, None])[task.cfg.level][0]


def answers(za, zb, points, body, stride):
    return match_points(za, zb, points, stride, where=torch.as_tensor(body))[0].numpy()


# ---- the questions


def within(task, brain, rng, n=100):
    "Contrasts of one person: errors in mm `(n,)` of each ordered pair, unmoved and moved."
    z, stride, out = {}, task.encoder.strides[task.cfg.level], []
    at = brain.region_of(brain.points("brain", n, rng))
    move = rng.choice([-5, -3, 3, 5], 3)
    moved = {c: place(x, move, x.shape) for c, x in brain.images.items()}
    body = place(brain.body.astype(np.float32), move, brain.body.shape) > 0
    z = {c: features(task, x) for c, x in brain.images.items()}
    w = {c: features(task, x) for c, x in moved.items()}
    stays = ((at + move > 1) & (at + move < SIDE - 2)).all(1)
    for a in brain.channels:
        for b in brain.channels:
            if a == b:
                continue
            plain = answers(z[a], z[b], at, brain.body, stride) - at
            far = answers(z[a], w[b], at, body, stride) - at - move
            out.append((np.linalg.norm(plain, axis=1) * MM, np.where(stays, np.linalg.norm(far, axis=1) * MM, np.nan)))
    return dict(unmoved=np.concatenate([o[0] for o in out]), moved=np.concatenate([o[1] for o in out]), copied=np.full(n, np.linalg.norm(move) * MM))


def between(answer, a, b, points):
    "What can be said of answers for one pair of people: `answer(region points of a) -> region points of b`."
    row = {}
    for name, fine in points.items():
        got, was = b.fine_of(answer(a.region_of(fine))), a.side(fine)
        d = b.side(got)
        if name == "midline":
            row["midline_mm"] = np.abs(d)
        else:
            row["ventricle"] = b.near(got) < TOLERANCE[0]
            same = np.where(was < 0, b.near(got, "left"), b.near(got, "right"))
            row["ventricle_same_side"] = same < TOLERANCE[0]
            sure = np.abs(was) > 4
            row["side"] = np.where(sure, np.sign(d) == np.sign(was), np.nan).astype(float)
    return row


def judged(task, brains, rng_of, n=60):
    "All ordered pairs of people, FLAIR and T1 with contrast medium, same and other contrast; `task`, or 'copy' or 'chance'."
    out = {}
    z = {} if isinstance(task, str) else {(b.case, c): features(task, b.images[c]) for b in brains for c in ("flair", "t1c")}
    for a in brains:
        for b in brains:
            if a is b:
                continue
            rng = rng_of(a, b)
            points = {k: a.points(k, n, rng) for k in ("midline", "ventricle")}
            for c in ("flair", "t1c"):
                for d in ("flair", "t1c"):
                    if isinstance(task, str):
                        answer = (lambda x: x) if task == "copy" else lambda x: b.region_of(b.inside[rng.integers(0, len(b.inside), len(x))])
                    else:
                        answer = lambda x: answers(z[a.case, c], z[b.case, d], x, b.body, task.encoder.strides[task.cfg.level])
                    for k, v in between(answer, a, b, points).items():
                        out.setdefault(("other" if c != d else "same", k), {}).setdefault((a.case, b.case), []).append(v)
    return {k: {p: np.concatenate(v) for p, v in rows.items()} for k, rows in out.items()}


def interval(people, draws=2000, seed=0):
    "Mean of means of people `(values per person)`, and the middle 95 % when people, and points within them, are drawn again."
    rng, people = np.random.default_rng(seed), [np.asarray(v, float)[~np.isnan(np.asarray(v, float))] for v in people]
    mean = float(np.mean([v.mean() for v in people]))
    got = []
    for _ in range(draws):
        pick = rng.integers(0, len(people), len(people))
        got.append(np.mean([rng.normal(people[i].mean(), people[i].std() / max(len(people[i]), 1) ** 0.5) for i in pick]))  # a mean of many points is normal
    return [round(mean, 4), *[round(float(q), 4) for q in np.quantile(got, [0.025, 0.975])]]


def checks(brains, who):
    "The judges themselves, on generated brains: distance of the found plane from the true one, and of found from true ventricles."
    rows = []
    for b in brains:
        if who[b.case] is None:
            continue
        c = person(who[b.case])
        warp, world = c["warp"], lambda fine, b=b: (np.asarray(fine) @ b.fine_world[:3, :3].T + b.fine_world[:3, 3]).T
        mid = b.inside[np.abs(b.side(b.inside)) < 1]
        ven = brain_parts(warp.to_canonical(world(b.ventricle)))
        true = brain_parts(warp.to_canonical(world(b.inside)))["ventricle"] < 0
        rows.append(dict(plane_mm=float(np.abs(warp.to_canonical(world(mid))[0]).mean()), of_found_within_4mm=float((np.minimum(ven["ventricle"], ven["third"]) < 4).mean()), of_true_found=float((b.near(b.inside[true]) < 4).mean())))
    return {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[0]} | dict(people=len(rows))


def true_matches(task, brains, who, rng, n=60):
    "Generated people, where the truth is known: hits of random brain points, another contrast of another person."
    stride = None if isinstance(task, str) else task.encoder.strides[task.cfg.level]
    err = []
    gen = [b for b in brains if who[b.case] is not None]
    warps = {b.case: person(who[b.case])["warp"] for b in gen}
    for a, b in zip(gen, gen[1:] + gen[:1]):
        fine = a.points("brain", n, rng)
        world = (fine @ a.fine_world[:3, :3].T + a.fine_world[:3, 3]).T
        there = warps[b.case].to_subject(warps[a.case].to_canonical(world)).T
        truth = (there - b.fine_world[:3, 3]) @ np.linalg.inv(b.fine_world[:3, :3]).T
        x = a.region_of(fine)
        got = x if isinstance(task, str) else answers(features(task, a.images["t1c"]), features(task, b.images["flair"]), x, b.body, stride)
        err.append(np.linalg.norm(b.fine_of(got) - truth, axis=1) * FINE)
    return err


def picture(task, a, others):
    "Six points of one person's T1 with contrast medium, and where they are found in the FLAIR of others."
    stride, mask = task.encoder.strides[task.cfg.level], a.mask
    level = int(np.argmax(mask.sum((1, 2))))
    v = np.argwhere(mask[level])
    d = a.side(np.c_[np.full(len(v), level), v])
    ends = [v[d < 0][np.argmax(v[d < 0][:, 0])], v[d > 0][np.argmax(v[d > 0][:, 0])], v[d < 0][np.argmin(v[d < 0][:, 0])], v[d > 0][np.argmin(v[d > 0][:, 0])]]
    rows = np.argwhere(np.abs(a.side(np.c_[np.full(a.mask.shape[1], level), np.arange(a.mask.shape[1]), np.full(a.mask.shape[1], a.plane[1] / FINE)])) > -1)[:, 0]
    w = lambda h: (a.plane[1] / FINE - a.plane[0][0] * level - a.plane[0][1] * h) / a.plane[0][2]
    h0, h1 = np.quantile(rows, [0.2, 0.8])
    pts = np.array([[level, *e] for e in ends] + [[level, h, w(h)] for h in (h1, h0)], float)
    names, colours = ["left horn, front", "right horn, front", "left horn, back", "right horn, back", "midline, front", "midline, back"], [f"C{i}" for i in range(6)]
    fig = Figure(figsize=(3 * (1 + len(others)), 3.6), layout="constrained")
    axes = fig.subplots(1, 1 + len(others))
    za = features(task, a.images["t1c"])
    draw = lambda ax, b, c, k: (ax.imshow(b.fine[c][k], cmap="gray", origin="lower"), ax.contour(b.mask[k], [0.5], colors="y", linewidths=0.6) if b.mask[k].any() else None, ax.axis("off"))
    draw(axes[0], a, "t1c", level)
    for p, c, n in zip(pts, colours, names):
        axes[0].plot(p[2], p[1], "+", color=c, ms=12, mew=2, label=n)
    axes[0].set_title("T1 with contrast medium: asked", fontsize=8)
    fig.legend(loc="outside lower center", ncol=6, fontsize=7, frameon=False)
    for ax, b in zip(axes[1:], others):
        got = b.fine_of(answers(za, features(task, b.images["flair"]), a.region_of(pts), b.body, stride))
        k = int(np.clip(np.argmax(b.mask.sum((1, 2))), 0, b.mask.shape[0] - 1))
        draw(ax, b, "flair", k)
        h = np.arange(b.mask.shape[1])
        ax.plot((b.plane[1] / FINE - b.plane[0][0] * k - b.plane[0][1] * h) / b.plane[0][2], h, "c", lw=0.6)
        for g, c in zip(got, colours):
            ax.plot(g[2], g[1], "o", color=c, ms=8, mew=2, mfc=c if abs(g[0] - k) * FINE < 11 else "none")
        ax.set(title="FLAIR of another: found", xlim=(-0.5, b.mask.shape[2] - 0.5), ylim=(-0.5, b.mask.shape[1] - 0.5))
        ax.title.set_size(8)
    return fig


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", default="../shared/data/real/brain")
    ap.add_argument("--work", default="runs/taco_real", help="where volumes and runs go; not for the repository")
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--figure", help="draw it here (real anatomy) instead of measuring")
    ap.add_argument("--out", default="results/taco_real.json")
    a = ap.parse_args()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prep, who = data(a.data, a.work)
    brains = [Brain(prep, c) for c in sorted(who) if who[c] is None or not a.figure]
    real = [b for b in brains if who[b.case] is None]
    if a.figure:
        picture(train("full", prep, a.work, 0, a.steps), real[0], real[1:]).savefig(a.figure, dpi=110)
        return
    print(f"{len(real)} real brains, {len(brains) - len(real)} generated; ventricle voxels {[len(b.ventricle) for b in real]}", flush=True)
    rng_of = lambda x, y: np.random.default_rng([7, sorted(who).index(x.case), sorted(who).index(y.case)])
    res = dict(real=len(real), generated=len(brains) - len(real), side=SIDE, mm=MM, steps=a.steps, seeds=a.seeds, tolerance_mm=TOLERANCE, torch=torch.__version__, checks=checks(brains, who), rows=[])
    pooled = {}
    for kind, seeds in (("copy", 1), ("chance", 1), ("random", a.seeds), ("rec", a.seeds), ("full", a.seeds)):
        for seed in range(seeds):
            t0 = time.process_time()
            task = kind if kind in ("copy", "chance") else train(kind, prep, a.work, seed, a.steps)
            row = dict(encoder=kind, seed=seed)
            for k, pairs in judged(task, real, rng_of).items():
                row[f"{k[1]}, {k[0]} contrast"] = round(float(np.mean([np.nanmean(v) for v in pairs.values()])), 4)
                for (src, dst), v in pairs.items():
                    pooled.setdefault((kind, f"{k[1]}, {k[0]} contrast"), {}).setdefault(dst, []).append(v)
            if kind == "copy" or not isinstance(task, str):
                e = true_matches(task, brains, who, np.random.default_rng(3))
                for t in TOLERANCE:
                    row[f"generated people, other contrast, within {t:g} mm"] = round(float(np.mean(np.concatenate(e) < t)), 4)
            for b in real if not isinstance(task, str) else []:
                got = within(task, b, np.random.default_rng([11, sorted(who).index(b.case)]))
                for where in ("unmoved", "moved"):
                    for t in TOLERANCE:
                        v = np.where(np.isnan(got[where]), np.nan, got[where] < t)
                        pooled.setdefault((kind, f"one person, {where}, within {t:g} mm"), {}).setdefault(b.case, []).append(v)
            row["cpu_s"] = round(time.process_time() - t0, 1)
            res["rows"].append(row)
            print(json.dumps(row), flush=True)
    res["means"] = {}
    for (kind, what), people in pooled.items():
        res["means"].setdefault(what, {})[kind] = interval([np.concatenate(v) for v in people.values()])
    for what, kinds in res["means"].items():  # paired: what full has beyond reconstruction, person by person
        if "full" in kinds and "rec" in kinds:
            f, r = (pooled[k, what] for k in ("full", "rec"))
            kinds["full - rec"] = interval([np.concatenate(f[c]).astype(float) - np.concatenate(r[c]).astype(float) for c in f])
    Path(a.out).write_text(json.dumps(res, indent=1) + "\n")
    print(json.dumps(res["means"], indent=1))


if __name__ == "__main__":
    main()
