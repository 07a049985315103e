"""Do topology terms make frozen features of different people in different sequences match anatomically, beyond what reconstruction gives?

    python experiments/taco_topology.py --seeds 3            # all arms, about half an hour on one core; writes results/taco_topology.json
    python experiments/taco_topology.py --why --seeds 3      # why criteria fail: budget, heads, weights, filters, grid, and two ceilings; writes results/taco_topology_why.json

The experiment of the TACO specification, section 10, on our generated heads: 64 people to train, 12 to test, three sequences, 32^3 voxels, true correspondence known.
Nothing is trained for the matching: the feature at a landmark of one volume is searched in another volume by cosine. For the ridge probe (missing modalities) a linear map from token to structure
is fitted in closed form on 24 of the people who were seen, and judged on 24 who were not: on the sequence it was fitted on, on another one (`probe_transfer`), and on the mean over sequences and one of them alone.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from medssl_nb.core import generator
from medssl_nb.data.phantom import as_batch, brain_parts, head_case, unit
from medssl_nb.losses.contrast import effective_rank
from medssl_nb.losses.topology import as_tokens, inter_topology, mutual_matches, nearest_tokens
from medssl_nb.tasks.taco import TACO, TACOConfig, match_points

SIDE, MODS, TRAIN, TEST, PROBE = 32, ("t1", "t2", "flair"), 64, 12, 24  # the last: people on each side of the probe
WARP = 2.0  # people differ twice as much as ordinarily: with 1, the same coordinate in another person is already within 4 voxels for 9 landmarks of 10


class RandomPartners(TACO):
    "Control: partners are drawn, not found."

    def inter(self, out, v):
        z1, z2 = out["z"].chunk(2)
        p, q = v["pairs12"], v["pairs21"]
        a, b = torch.cat([z1[p[:, 0]], z2[q[:, 0]]]), torch.cat([z2[p[:, 1]], z1[q[:, 1]]])
        n, T = a.shape[:2]
        g = torch.Generator().manual_seed(int(v["slots"].sum() * 1e4))  # from what the views drew, so the loss stays a pure function
        half = mutual_matches(a.detach(), b.detach()) >= 0  # as many as would have matched
        who = torch.stack([torch.randperm(T, generator=g) for _ in range(n)])
        each, counts = inter_topology(a, b, self.cfg.k, self.cfg.margin_inter, v["slots"], partner=torch.where(half, who, -1))
        return each[: len(p)].mean() + each[len(p) :].mean(), counts


class SameCell(TACO):
    "Reference: a token and the same cell of the other sequence are a pair, all other cells are wrong (InfoNCE, 0.1)."

    def intra(self, out, v):
        z1, z2 = (F.normalize(z, dim=-1) for z in out["z"].chunk(2))
        s = z1 @ z2.transpose(1, 2) / 0.1
        i = torch.arange(s.shape[1]).expand(len(s), -1)
        return (F.cross_entropy(s.transpose(1, 2), i) + F.cross_entropy(s, i)) / 2


def near_partners(a, b, most=12.0):
    "Mutual nearest cells of two people in canonical space, `(P, T)`, -1 for none within `most` mm."
    d = torch.cdist(a, b)
    best, back = d.min(2), d.argmin(1)
    good = (best.values < most) & (torch.gather(back, 1, best.indices) == torch.arange(a.shape[1]))
    return torch.where(good, best.indices, -1)


class TruePartners(TACO):
    "Ceiling of the hinge: partners are the true ones. Not a method: it is told what TACO must guess."

    where = None  # subject -> canonical place of each cell `(T, 3)`, mm

    def views(self, batch, gen):
        return super().views(batch, gen) | dict(where=torch.stack([self.where[s] for s in batch["subject"]]))

    def sides(self, out, v):
        (z1, z2), w, p, q = out["z"].chunk(2), v["where"], v["pairs12"], v["pairs21"]
        a, b = torch.cat([z1[p[:, 0]], z2[q[:, 0]]]), torch.cat([z2[p[:, 1]], z1[q[:, 1]]])
        return a, b, near_partners(torch.cat([w[p[:, 0]], w[q[:, 0]]]), torch.cat([w[p[:, 1]], w[q[:, 1]]])), len(p)

    def inter(self, out, v):
        a, b, partner, n = self.sides(out, v)
        each, counts = inter_topology(a, b, self.cfg.k, self.cfg.margin_inter, v["slots"], partner=partner)
        return each[:n].mean() + each[n:].mean(), counts


class TrueContrast(TruePartners):
    "Ceiling of the network, grid and budget: each token is told its true partner by InfoNCE."

    def inter(self, out, v):
        a, b, partner, n = self.sides(out, v)
        s = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2) / 0.1
        counts = dict(matched=(partner >= 0).sum(1), anchors=(partner >= 0).sum(1))
        return F.cross_entropy(s.transpose(1, 2), partner, ignore_index=-1), counts


ARMS = {
    "random encoder": None,
    "rec": (TACO, dict(w_intra=0, w_inter=0)),
    "rec + intra": (TACO, dict(w_inter=0)),
    "rec + inter": (TACO, dict(w_intra=0)),
    "rec + intra + inter": (TACO, {}),
    "legacy layout": (TACO, dict(legacy_layout=True)),
    "random partners": (RandomPartners, dict(w_intra=0)),
    "intra, anchor source": (TACO, dict(w_inter=0, anchor="source")),
    "both, anchor source": (TACO, dict(anchor="source")),
    "same-cell InfoNCE": (SameCell, dict(w_inter=0, w_intra=1.0)),
}


WHY = {  # name -> (arm, changes of the setting): what could make criteria fail?
    "true contrast (ceiling)": ((TrueContrast, dict(w_intra=0, w_inter=1.0)), {}),
    "true partners (ceiling)": ((TruePartners, {}), {}),
    "3 steps: full": ("rec + intra + inter", dict(steps=3)),
    "warp 3: rec": ("rec", dict(warp=3.0)),
    "warp 3: full": ("rec + intra + inter", dict(warp=3.0)),
    "weights 1": ((TACO, dict(w_intra=1.0, w_inter=1.0)), {}),
    "partners of ratio 0.9": ((TACO, dict(ratio=0.9)), {}),
    "mirrors and turns: full": ((TACO, dict(flip=(0.2, 0.2, 0.2), turn=0.2)), {}),
    "200 steps: rec": ("rec", dict(steps=200)),
    "200 steps: full": ("rec + intra + inter", dict(steps=200)),
    "200 steps: true contrast (ceiling)": ((TrueContrast, dict(w_intra=0, w_inter=1.0)), dict(steps=200)),
    "12^3 cells: rec": ("rec", dict(side=48)),
    "12^3 cells: full": ("rec + intra + inter", dict(side=48)),
}


def heads(side=SIDE, warp=WARP):
    people = [head_case(11, (side,) * 3, modalities=MODS, subject=i, lesions=0, background=False, warp=warp) for i in range(TRAIN + max(TEST, PROBE))]
    images = np.stack([[unit(p["images"][m], floor=60) for m in MODS] for p in people]).astype(np.float32)
    return people, images


def train(arm, images, seed, steps, where=None):
    torch.manual_seed(seed)
    cls, kw = arm or (TACO, {})
    task = cls(TACOConfig.small3d(region=images.shape[-3:], jitter=1.0, **kw))
    if isinstance(task, TruePartners):
        task.where = {f"s-{i}": w for i, w in enumerate(where)}
    if arm is None:
        return task.eval(), []
    opt = torch.optim.AdamW(task.parameters(), 1e-3)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=steps)
    rows = []
    for s in range(steps):
        i = torch.randperm(TRAIN, generator=generator(seed, s, name="order"))[:4]
        batch = as_batch(images[i.numpy()])
        batch["subject"] = [f"s-{j}" for j in i.tolist()]
        v = task.views(batch, generator(seed, s, name="views"))
        terms = task.losses(task(v), v)
        opt.zero_grad()
        sum(terms.values()).backward()
        opt.step()
        sched.step()
        rows.append({k: round(t.item(), 4) for k, t in terms.items()})
    return task.eval(), rows


def features(task, images):
    "`(people, sequences, C, 8, 8, 8)`"
    x = torch.as_tensor(images).flatten(0, 1)
    m = x != 0
    n = m.flatten(1).sum(1).view(-1, 1, 1, 1)
    mean = x.flatten(1).sum(1).view(-1, 1, 1, 1) / n
    std = ((x - mean).square() * m).flatten(1).sum(1).view(-1, 1, 1, 1).div(n).sqrt()
    with torch.no_grad():
        return task.encoder(((x - mean) / std * m)[:, None])[task.cfg.level].unflatten(0, images.shape[:2])


def cells(x, stride):
    "Mean over each cell of a volume `(D, H, W)`."
    n = x.shape[0] // stride
    return x.reshape(n, stride, n, stride, n, stride).mean((1, 3, 5)).ravel()


def places(people, stride=4):
    "Canonical place (mm) of each cell of each person, `(people, T, 3)`."
    return torch.tensor(np.stack([np.stack([cells(c, stride) for c in p["canonical"]], -1) for p in people]), dtype=torch.float32)


STRUCTURES = ("ventricle", "caudate", "putamen", "thalamus", "stem", "cerebellum", "cortex", "white", "rest")


def structures(where):
    "Structure of each cell from its canonical place `(people, T, 3)`: the first on the list within 3 mm; the outer 14 mm of the cerebrum are `cortex`."
    d = brain_parts(np.moveaxis(np.asarray(where, float), -1, 0))
    d = {**d, "ventricle": np.minimum(d["ventricle"], d["third"])}
    label = np.full(np.asarray(where).shape[:-1], STRUCTURES.index("rest"))
    label[d["cerebrum"] < 0] = STRUCTURES.index("cortex")
    label[d["cerebrum"] < -14] = STRUCTURES.index("white")
    for n in reversed(STRUCTURES[:6]):
        label[d[n] < 3] = STRUCTURES.index(n)
    return label


def ridge(x, y, weight=1.0):
    "Closed form: `(n, C)` tokens and `(n,)` structures to a function that names the structure of other tokens. Classes count alike."
    mean, std = x.mean(0), x.std(0) + 1e-6
    design = lambda v: torch.cat([(v - mean) / std, torch.ones(len(v), 1)], 1).double()
    share = 1 / torch.bincount(y, minlength=len(STRUCTURES)).clamp(min=1)[y].double()
    X, Y = design(x), F.one_hot(y, len(STRUCTURES)).double()
    penalty = weight * torch.eye(X.shape[1]).double() * 1e-3 * share.sum()
    penalty[-1, -1] = 0
    W = torch.linalg.solve((X * share[:, None]).T @ X + penalty, (X * share[:, None]).T @ Y)
    return lambda v: (design(v) @ W).argmax(1)


def probe(z, label, body):
    "Balanced accuracies `z` `(2*PROBE, sequences, T, C)`: fitted on the first half of the people, judged on the second."
    pick = lambda part, s: z[part].mean(1)[body[part]] if s is None else z[part, s][body[part]]
    fit, new = slice(0, PROBE), slice(PROBE, 2 * PROBE)
    score = lambda name, s: float(np.mean([(name(pick(new, s))[label[new][body[new]] == c] == c).float().mean().item() for c in label[new][body[new]].unique().tolist()]))
    one = [ridge(pick(fit, s), label[fit][body[fit]]) for s in range(z.shape[1])]
    mean = ridge(pick(fit, None), label[fit][body[fit]])
    S = range(len(one))
    row = dict(same=np.mean([score(one[a], a) for a in S]), transfer=np.mean([score(one[a], b) for a in S for b in S if a != b]), all=score(mean, None), one=np.mean([score(mean, s) for s in S]))
    return {f"probe_{k}": float(v) for k, v in (row | dict(drop=row["all"] - row["one"])).items()}


def probe_people(task, people, images):
    stride = task.encoder.strides[task.cfg.level]
    who = [*range(PROBE), *range(TRAIN, TRAIN + PROBE)]
    z = as_tokens(features(task, images[who]).flatten(0, 1)).unflatten(0, (len(who), -1))
    label = torch.as_tensor(structures(places([people[i] for i in who], stride)))
    body = torch.as_tensor(np.stack([cells((images[i, 0] != 0).astype(float), stride) > 0.5 for i in who]))
    return probe(z, label, body)


def points_of(z, marks, stride, up=2):
    "Unit features at points `(n, C)`, as in `match_points`."
    size = torch.tensor(z.shape[1:], dtype=torch.float32)
    at = (torch.as_tensor(marks, dtype=torch.float32) + 0.5) / stride - 0.5
    grid = ((2 * at + 1) / size - 1).flip(-1).view(1, -1, 1, 1, 3)
    return F.normalize(F.grid_sample(z[None], grid, align_corners=False, padding_mode="border")[0, :, :, 0, 0], dim=0).T


def found(z, marks, stride, up=2):
    "`match_points` from each landmark of each volume to each volume, maps interpolated once: `(people, sequences, people, sequences, n, 3)`."
    P, M = z.shape[:2]
    f = torch.stack([points_of(z[p, a], marks[p], stride) for p in range(P) for a in range(M)])  # (PM, n, C)
    out = []
    for g in z.flatten(0, 1):
        g = F.interpolate(g[None], scale_factor=up, mode="trilinear", align_corners=False)[0]
        i = torch.stack(torch.unravel_index((f @ F.normalize(g.flatten(1), dim=0)).argmax(2), tuple(g.shape[1:])), -1)
        out.append((i + 0.5) * (stride / up) - 0.5)
    return torch.stack(out, 1).unflatten(0, (P, M)).unflatten(2, (P, M)).numpy()


def measure(task, people, images):
    z, side = features(task, images), images.shape[-1]
    P, M = z.shape[:2]
    stride = task.encoder.strides[task.cfg.level]
    marks = [p["landmarks"]["voxel"] for p in people]
    hit = lambda d: (np.sqrt((d**2).sum(-1)) < 4 * side / 32).mean()  # within 4 voxels of 32, as in the specification
    got, where_to = dict(ss_xm=[], xs_sm=[], xs_xm=[]), found(z, marks, stride)
    assert np.allclose(where_to[0, 0, 1, 1], match_points(z[0, 0], z[1, 1], marks[0], stride)[0].numpy())
    for p in range(P):
        for q in range(P):
            for a in range(M):
                for b in range(M):
                    if a == b and p == q:
                        continue
                    kind = "ss_xm" if p == q else "xs_sm" if a == b else "xs_xm"
                    got[kind].append(hit(where_to[p, a, q, b] - marks[q]))
    row = {k: float(np.mean(v)) for k, v in got.items()}
    tok = as_tokens(z.flatten(0, 1)).unflatten(0, (P, M))
    near = nearest_tokens(tok.flatten(0, 1), 5).unflatten(0, (P, M))
    same = (near[:, 0, :, :, None] == near[:, 1, :, None]).any(-1).float().mean()
    where = places(people, stride).numpy()
    body = [cells((im[0] != 0).astype(float), stride) > 0.5 for im in images]
    right = []
    for p in range(P):
        q = (p + 1) % P
        m = mutual_matches(tok[p, :1], tok[q, 1:2])[0].numpy()
        u = np.flatnonzero((m >= 0) & body[p])
        d = np.linalg.norm(where[p][u] - where[q][m[u]], axis=1)
        right.append((d < 5 * people[p]["spacing"][0] * side / 32).mean() if len(u) else 0.0)
    row.update(knn_overlap=float(same), mnn_precision=float(np.mean(right)), rank=float(np.mean([effective_rank(t).item() for t in tok.flatten(0, 1)])))
    return row


def copied(people):
    "Control: the same voxel coordinate in the other person."
    m = np.stack([p["landmarks"]["voxel"] for p in people])
    d = np.sqrt(((m[:, None] - m[None]) ** 2).sum(-1))
    return float((d < 4 * people[0]["images"]["t1"].shape[0] / 32)[~np.eye(len(m), dtype=bool)].mean())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=60)
    ap.add_argument("--why", action="store_true", help="the arms of WHY instead")
    ap.add_argument("--arms", nargs="*")
    ap.add_argument("--out")
    a = ap.parse_args()
    torch.set_num_threads(1)
    out = Path(a.out or f"results/taco_topology{'_why' if a.why else ''}.json")
    made, rows = {}, []
    for seed in range(a.seeds):
        for name in a.arms or list(WHY if a.why else ARMS):
            arm, set_ = WHY[name] if a.why else (ARMS[name], {})
            arm, side, warp, steps = ARMS[arm] if isinstance(arm, str) else arm, set_.get("side", SIDE), set_.get("warp", WARP), set_.get("steps", a.steps)
            if (side, warp) not in made:
                made[side, warp] = heads(side, warp)
                print(f"side {side}, warp {warp}: coordinate control {copied(made[side, warp][0][TRAIN:TRAIN+TEST]):.3f}", flush=True)
            people, images = made[side, warp]
            t0 = time.process_time()
            task, curve = train(arm, images[:TRAIN], seed, steps, places(people[:TRAIN]) if arm and issubclass(arm[0], TruePartners) else None)
            t1 = time.process_time()
            test = slice(TRAIN, TRAIN + TEST)
            row = dict(arm=name, seed=seed, steps=steps, **measure(task, people[test], images[test]), **probe_people(task, people, images), last=curve[-1] if curve else {})
            rows.append(row | dict(control=copied(people[test]), train_cpu_s=round(t1 - t0, 1), cpu_s=round(time.process_time() - t0, 1)) | set_)
            print(json.dumps(rows[-1]), flush=True)
            out.write_text(json.dumps(dict(coordinate_control=copied(heads_of(made)[test]), train=TRAIN, test=TEST, probe=PROBE, side=SIDE, warp=WARP, sequences=MODS, torch=torch.__version__, rows=rows), indent=1) + "\n")


def heads_of(made):
    return (made[SIDE, WARP] if (SIDE, WARP) in made else next(iter(made.values())))[0]


if __name__ == "__main__":
    main()
