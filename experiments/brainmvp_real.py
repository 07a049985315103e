"""BrainMVP on real multi-contrast brains (NIfTI and DICOM) together with generated ones: pre-train, export the templates, translate.

    python experiments/brainmvp_real.py --data ../shared/data/real/brain --work runs/brainmvp_real                # numbers and curves: results/brainmvp_real.json, .png
    python experiments/brainmvp_real.py --data ../shared/data/real/brain --work runs/brainmvp_real --eyes DIR     # and pictures of templates and answers: for eyes at the site, not for the repository

Everything goes through the package: ingest (with its DICOM series), prepare, pretrain. The real people are in the training set, so what is reported for them is a fit and no test; generated people nobody trained on stand beside them.
"""
import argparse
import contextlib
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage

from medssl_nb.core import generator, read_jsonl, write_json
from medssl_nb.data.cases import Manifest, Prepared
from medssl_nb.data.ingest import IngestConfig, ingest
from medssl_nb.data.masking import block_mask, cross_fill
from medssl_nb.data.phantom import TISSUES, head_case, save_nifti
from medssl_nb.data.prepare import PrepareConfig, prepare
from medssl_nb.pretrain import pretrain, settings
from medssl_nb.tasks.brainmvp import load_templates
from medssl_nb.tasks.missing import windows

HERE = Path(__file__).parent
MODS = ("t1", "t1c", "t2", "flair")
BRAIN = [TISSUES.index(t) for t in ("csf", "gm", "wm", "deep", "vessel", "core", "oedema", "rim", "caps")]
GENERATED, NEW = 20, 4  # to train with, and nobody's


def data(source, work, mm):
    "Ingested once, prepared at `mm`: the set, and which cases are real, generated, new."
    src = work / "src"
    if not (work / "manifest" / "cases.jsonl").exists():
        shutil.rmtree(src, ignore_errors=True)
        shutil.copytree(source, src / "real")
        for i in range(GENERATED + NEW):
            c = head_case(5, (54, 64, 54), subject=i, modalities=MODS, background=False)
            brain = ndimage.binary_opening(np.isin(c["tissue"], BRAIN))  # without skull, as the real ones
            for m, x in c["images"].items():
                save_nifti(src / ("generated" if i < GENERATED else "new") / f"person_{i:02d}" / f"{m}.nii.gz", (x * brain).astype(np.float32), c["affine"])
        ingest(IngestConfig(src=src, out=work / "manifest", progress=False))
    man = Manifest(work / "manifest")
    kind = {c["case"]: Path(man.paths(next(iter(c["images"].values()))["file"])[0]).resolve().relative_to(src.resolve()).parts[0] for c in man.cases}
    out = work / f"prepared_{mm:g}"
    prepare(PrepareConfig(manifest=str(work / "manifest"), out=str(out), spacing=(mm,) * 3, margin=1, workers=0, progress=False))
    return Prepared(out), kind


class Without:
    "Held-out generated people are marked by their case, not by a split of the table: they are taken out here."

    def __init__(self, prepared, kind, out):
        self.out = out
        if not (out / "index.jsonl").exists():
            from medssl_nb.data.cases import write_case, write_index

            for r in prepared.rows:
                image, _ = prepared.read(r, channels=r["channels"])
                write_case(out, dict(r, group=kind[r["case"]], split="test" if kind[r["case"]] == "new" else "train"), np.asarray(image), None)
            write_index(out)
        self.prepared = Prepared(out)


def answers(task, prepared, row, asked, shown, seed=0):
    "A whole volume: sequence `asked`, its holes showing `shown` (a sequence, or the template)."
    image, _ = prepared.read(row, channels=row["channels"])
    x = torch.from_numpy(np.asarray(image, np.float32))
    step = task.encoder.strides[-1]
    step = step * task.cfg.block // np.gcd(step, task.cfg.block)
    size = [-(-s // step) * step for s in x.shape[1:]]
    lo = [(b - s) // 2 for b, s in zip(size, x.shape[1:])]
    big = torch.zeros(len(x), *size)
    big[(slice(None), *[slice(l, l + s) for l, s in zip(lo, x.shape[1:])])] = x
    k = row["channels"].index(asked)
    a = big[None, k : k + 1]
    if shown == "template":
        full = torch.tensor([x.shape[1:]])
        b = windows(task.templates.volumes()[task.cfg.sequences.index(asked)][None], -torch.tensor([lo]), full, tuple(size))
    else:
        b = big[None, row["channels"].index(shown)][:, None]
    m = block_mask(a, task.cfg.block, task.cfg.ratio, generator(seed))
    seen = cross_fill(a, b, m)
    task.eval()
    with torch.no_grad():
        y = task.decoder(task.encoder(seen)[-1]).float()
    inside = a > 0
    miss = lambda z: float(((z - a)[inside] ** 2).mean() / a[inside].var())
    return dict(asked=a[0, 0], shown=b[0, 0], seen=seen[0, 0], answer=y[0, 0], missed=miss(y), untouched=miss(seen), inside=float(inside.float().mean()))


def run(a):
    torch.set_num_threads(1)
    work = Path(a.work)
    with contextlib.redirect_stderr(io.StringIO()):
        prepared, kind = data(Path(a.data), work, a.mm)
    prepared = Without(prepared, kind, work / f"set_{a.mm:g}").prepared
    rows = {r["case"]: r for r in prepared.rows}
    count = {k: sum(kind[c] == k for c in rows) for k in ("real", "generated", "new")}
    print(count, {c: r["channels"] + list(r["shape"]) for c, r in rows.items() if kind[c] == "real"}, flush=True)
    c, _ = settings(["--method", "brainmvp", "--preset", "3d" if a.full else "small3d"])
    c.data, c.out = prepared.path if hasattr(prepared, "path") else work / f"set_{a.mm:g}", work / ("run_full" if a.full else "run")
    if a.full:
        c.task = type(c.task).for_3d(sequences=(), atlas=())
    t = c.train
    t.steps, t.batch, t.accum, t.workers, t.tensorboard, t.bar, t.precision, t.save_every, t.warmup = a.steps, 1 if a.full else 4, 1, 0, False, False, "bf16-mixed", 0, min(10, a.steps - 1)
    t.sync_batchnorm, t.clip, t.health_every = False, 10.0, 0 if a.full else 25
    begin = time.process_time()
    got = pretrain(c)
    history, task = read_jsonl(Path(c.out) / "history.jsonl"), got["task"]
    names, T = load_templates(Path(c.out) / "templates")
    terms = [k for k in ("cross", "distill", "contrast") if k in history[0]]
    ends = {k: [round(float(np.mean([h[k] for h in history[s]])), 4) for s in (slice(0, 5), slice(-5, None))] for k in terms}
    mean = {}
    for n in names:  # what a template would be if it were the mean image, in its own place
        have = [r for r in prepared.rows if n in r["channels"] and r["split"] != "test"]
        acc = torch.zeros(T.shape[1:])
        for r in have:
            x = torch.from_numpy(np.asarray(prepared.read(r, channels=[n])[0][0], np.float32))
            lo = [(b - s) // 2 for b, s in zip(acc.shape, x.shape)]
            acc[tuple(slice(l, l + s) for l, s in zip(lo, x.shape))] += x / len(have)
        mean[n] = acc
    slow = lambda x: torch.nn.functional.avg_pool3d(x[None, None], 4)[0, 0].flatten()
    like = {n: round(float(np.corrcoef(slow(t), slow(mean[n]))[0, 1]), 3) if slow(t).std() > 0 else None for n, t in zip(names, T)}  # a template that was never drawn is still black
    out = dict(preset=c.preset, mm=a.mm, cases=count, steps=len(history), batch=t.batch, encoder=sum(p.numel() for p in task.encoder.parameters()), atlas=list(T.shape[1:]), sequences=list(names), first_and_last_five=ends,
               template_range={n: [round(float(t.min()), 4), round(float(t.max()), 4)] for n, t in zip(names, T)}, template_like_mean_image=like, history=[{k: round(h[k], 5) for k in ("step", "loss", *terms)} for h in history[:: max(1, len(history) // 200)]])
    if not a.full:
        table = []
        for case, r in rows.items():
            for asked in r["channels"]:
                for shown in [s for s in r["channels"] if s != asked] + ["template"]:
                    q = answers(task, prepared, r, asked, shown)
                    table.append(dict(kind=kind[case], case=case, asked=asked, shown="template" if shown == "template" else "sequence", missed=q["missed"], untouched=q["untouched"]))
        agg = lambda k, s, what: round(float(np.mean([v[what] for v in table if v["kind"] == k and v["shown"] == s])), 3)
        out["missed_share_of_variance"] = {k: {s: dict(answer=agg(k, s, "missed"), as_shown=agg(k, s, "untouched")) for s in ("sequence", "template")} for k in ("real", "generated", "new")}
        print(json.dumps(out["missed_share_of_variance"], indent=1))
    print(json.dumps({k: v for k, v in out.items() if k != "history"}), f"{time.process_time() - begin:.0f} CPU s", flush=True)
    f = HERE.parent / "results" / "brainmvp_real.json"
    old = json.loads(f.read_text()) if f.exists() else {}
    write_json(f, {**old, "full" if a.full else "small": out})
    if not a.full:
        fig = show_terms(history, terms)
        fig.savefig(HERE.parent / "results" / "brainmvp_real.png")
    if a.eyes:
        pictures(task, prepared, rows, kind, names, T, mean, Path(a.eyes))


def show_terms(history, terms):
    "Restorations and contrast live on different scales: a panel for each."
    fig = Figure(figsize=(6.4, 2.4), dpi=90, layout="constrained")
    parts = [[k for k in terms if k != "contrast"], ["contrast"]]
    for ax, part in zip(fig.subplots(1, 2), parts):
        for k in part:
            ax.plot([h["step"] for h in history], [h[k] for h in history], lw=0.8, label=k, color=f"C{list(terms).index(k)}")
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylim(0, 1.1 * sorted(h[k] for h in history for k in part)[int(0.99 * len(history) * len(part)) - 1])
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    fig.axes[0].set_ylabel("weighted term", fontsize=8)
    return fig


def pictures(task, prepared, rows, kind, names, T, mean, out):
    "Templates beside mean images; every real case translated: asked, shown, seen, answered."
    out.mkdir(parents=True, exist_ok=True)
    fig = Figure(figsize=(2 * len(names), 6), dpi=80, layout="constrained")
    axes = fig.subplots(3, len(names))
    z = T.shape[1] // 2
    for i, n in enumerate(names):
        for ax, x, s in zip(axes[:, i], (T[i], torch.nn.functional.avg_pool3d(T[i][None, None], 2)[0, 0], mean[n]), ("template", "averaged over 2", "mean image")):
            k = z // 2 if s.startswith("aver") else z
            ax.imshow(x[k].flip(0), cmap="gray", vmin=0, vmax=float(x.max()), interpolation="nearest")
            ax.set_title(f"{n}: {s}, up to {x.max():.2f}", fontsize=8)
            ax.axis("off")
    fig.savefig(out / "templates.png")
    for j, (case, r) in enumerate((c, r) for c, r in rows.items() if kind[c] != "generated"):
        pairs = [(r["channels"][0], r["channels"][-1]), (r["channels"][-1], r["channels"][0]), (r["channels"][0], "template")]
        fig = Figure(figsize=(8, 6), dpi=80, layout="constrained")
        for axs, (a, b) in zip(fig.subplots(3, 4), pairs):
            q = answers(task, prepared, r, a, b)
            z = q["asked"].shape[0] // 2
            for ax, k, s in zip(axs, ("asked", "shown", "seen", "answer"), (f"{a}, asked", f"{b}, in the holes", "seen", f"answer, misses {q['missed']:.2f}")):
                ax.imshow(q[k][z].flip(0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                ax.set_title(s, fontsize=8)
                ax.axis("off")
        fig.suptitle(kind[case], fontsize=9)
        fig.savefig(out / f"{kind[case]}_{j}.png")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--mm", type=float, default=4.0)
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--full", action="store_true", help="the UniFormer of the paper on regions of 96^3, for a handful of steps")
    ap.add_argument("--eyes", default="", help="folder for pictures with real anatomy")
    run(ap.parse_args())
