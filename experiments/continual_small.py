"""Does sequential training forget, what do nine ways of remembering keep, and where do images made from weights stand? The one experiment of continual.md, section 6.

    python experiments/continual_data.py DATA --patterns 1500                       # gratings, lattices, objects, 32 x 32
    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0      # all arms; 2 to 4 minutes an arm on one core
    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0 1 2 --report   # results/continual_small.{json,md,png} of what is finished

A run that was interrupted continues, what is done is not done again. Each arm is a plan of `medssl continual run`; its folder holds packets, rows and a table. The report holds, for each arm, score
and measure, the mean over seeds with its interval; the rows themselves stay in the runs.

Model: patches of 4 (64 tokens), width 64, three blocks, no stochastic depth, decoder 48 wide with one block, three quarters hidden. 450 steps of 64 on new data a stage, AdamW, peak 8e-3, clipped, 50
steps of rise, cosine; a quarter of the steps on old data, 75 images (5 %) of each stage kept or made. The specification's 2e-3 without clipping and with images in [0, 1] predicts zero for most of the
stage with this implementation (see `47_tasks.mim`, Settings). EWC: lambda is the largest of its sweep that still learns the second stage (see `--ewc`). Probes read the 16 fine classes from 400
labelled images. Inversion: 16 channels of code, 400 steps of 50 images, a code grid of 4 x 4, weights 1, 1, 0.1, 1; the arms `task_statistics` and `tv` leave terms out, `mim` replays by masked modelling instead of distilling.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from medssl_nb.continual import ContinualConfig, ScoreConfig, StageConfig, common, run
from medssl_nb.core import read_json, read_jsonl, write_json
from medssl_nb.eval.forgetting import measures_md, summarise_runs
from medssl_nb.eval.metrics import mean_interval
from medssl_nb.invert import InvertConfig
from medssl_nb.plot.continual import show_curves, show_strategies
from medssl_nb.plot.volume import png
from medssl_nb.train.trainer import Stopped

ARMS = ("sequential", "medcoss", "invcoss", "er", "joint", "lwf", "cassle", "derpp", "ewc", "packnet", "task_statistics", "tv", "mim")
# a_task 1 and a_norm 1 are the defaults; the specification's pilot used repulsion 1 for pools as small as these
INVERT = dict(batch=50, steps=400, lr=2e-3, z_lr=0.05, z_channels=16, widths=(64, 32, 16), cache=(16, 8, 8), a_img=0.1, a_rep=1.0, bar=False, save_every=0)
VARIANTS = dict(invcoss={}, task_statistics=dict(a_img=0.0, a_rep=0.0), tv=dict(a_rep=0.0), mim={})
TASK = dict(region2d=(32, 32), patch2d=4, channels2d=1, width=64, depth=3, heads=4, decoder_width=48, decoder_depth=1, decoder_heads=4, drop_path=0.0, crop=(1.0, 1.0), flip=0.0)


def plan(data, out, arm, seed, steps=450, batch=64, lam=1e-2, cases=400, device="cpu"):
    "One arm and seed as a plan."
    base = common("mim", "small2d", "invcoss" if arm in VARIANTS else arm)
    if arm in VARIANTS:
        base["settings"] = replace(base["settings"], last=False, objective="pretext" if arm == "mim" else "distill", invert=InvertConfig(**{**INVERT, **VARIANTS[arm]}))
    settings = {n: v for n, v in dict(ratio=0.25, lam=lam if arm == "ewc" else None).items() if v is not None and hasattr(base["settings"], n)}
    base["task"] = replace(base["task"], **TASK)
    base["settings"] = replace(base["settings"], **settings)
    base["train"] = replace(base["train"], batch=batch, lr=8e-3, lr_per=0, seed=seed, workers=0, bar=False, tensorboard=False, device=device, save_every=150)
    stages = tuple(StageConfig(s["name"], Path(data) / s["name"], target=s["target"]) for s in read_json(Path(data) / "stages.json"))
    score = ScoreConfig(cases=cases, refit_steps=100, refit_lr=2e-3)
    return ContinualConfig(**{**base, "steps": steps, "warmup": 50 / 450, "stages": stages, "out": Path(out) / f"{arm}_s{seed}", "score": score})


def stage_values(rows):
    "score -> arm -> stage -> seed -> (mean over held-out cases at the end of that stage, at the end of all); None where a stage was not scored then (joint training has one end)."
    held, last = {}, max(r["after"] for r in rows)
    names = {r["stage"]: r.get("name") or str(r["stage"]) for r in rows}
    for r in rows:
        if r["held_out"]:
            held.setdefault((r["score"], r["strategy"], r["seed"], r["stage"], r["after"]), []).append(r["value"])
    mean, out = {k: sum(v) / len(v) for k, v in held.items()}, {}
    for score, arm, seed, stage, after in mean:
        if after == last:
            at = mean.get((score, arm, seed, stage, stage))
            out.setdefault(score, {}).setdefault(arm, {}).setdefault(names[stage], {})[str(seed)] = [None if at is None else round(at, 6), round(mean[score, arm, seed, stage, last], 6)]
    return {score: {arm: {names[s]: by[names[s]] for s in sorted(names) if names[s] in by} for arm, by in arms.items()} for score, arms in out.items()}


def rise(by_seed):
    "seed -> how much the loss rose from the end of the stage to the end of all."
    return {s: end - at for s, (at, end) in by_seed.items() if at is not None}


def span(values):
    i = mean_interval(values) if values else None
    return "" if i is None else f"{i['mean']:+.3f}" + ("" if i["low"] is None else f" [{i['low']:+.3f}, {i['high']:+.3f}]")


def rises(arms, old=None):
    "Markdown: the rise of each stage but the last (or of those named), by arm; mean over seeds with its interval."
    old = old or list(next(iter(arms.values())))[:-1]
    text = [f"| arm | {' | '.join(old)} |", "|---|" + "---|" * len(old)]
    return text + [f"| {arm} | {' | '.join(span(list(rise(by[s]).values())) if s in by else '' for s in old)} |" for arm, by in arms.items()]


def against(arms, one):
    "Markdown: the rises of one arm minus those of every other, paired by seed; below zero: it forgets less."
    old = list(next(iter(arms.values())))[:-1]
    text = [f"| {one} minus | {' | '.join(old)} |", "|---|" + "---|" * len(old)]
    for other, by in arms.items():
        if other in (one, "joint"):
            continue
        mine, theirs = ([rise(x[s]) for s in old] for x in (arms[one], by))
        text.append(f"| {other} | {' | '.join(span([a[k] - b[k] for k in a if k in b]) for a, b in zip(mine, theirs))} |")
    return text


def cost_of(stages, joint):
    "Steps of all stages: on new cases, on old ones or batches of them beside new ones, and forward passes besides. Joint training has one training, which every stage names."
    c = [s["cost"] for s in stages][: 1 if joint else None]
    return [sum(x["new_steps"] for x in c), sum(x["old_steps"] + x.get("old_batches_beside", 0) for x in c), sum(sum(x["extra_passes"].values()) for x in c)]


def report(out, name, what, results=Path(__file__).parent.parent / "results", **more):
    "NAME.{json,md} and two figures: every arm and seed that is finished; `more` goes into the JSON."
    rows, costs = [], {}
    for f in sorted(Path(out).glob("*_s*/result.json")):
        arm = f.parent.name.rsplit("_s", 1)[0]
        besides = Path(out) / "segment" / f.parent.name / "rows.jsonl"  # asked of the packets later: continual_five.py --segment
        rows += [{**r, "strategy": arm} for g in (f.parent / "rows.jsonl", besides) if g.is_file() for r in read_jsonl(g)]  # variants of one strategy are arms of their own
        packet = sorted((f.parent / "packets").iterdir())[-1] / "packet.json"
        facts = read_json(packet)
        costs.setdefault(arm, dict(patient_data=facts["patient_data"], bytes=sum(v["bytes"] for n, v in facts["files"].items() if n.startswith(("replay/", "strategy/", "statistics/"))), steps=cost_of(facts["stages"], arm == "joint")))
    rows.sort(key=lambda r: ARMS.index(r["strategy"]))
    found = summarise_runs(rows)
    names = {r["stage"]: r.get("name") or str(r["stage"]) for r in rows}
    note = Path(__file__).parent / f"{name}_verdict.md"  # written by a person who read the tables
    text = [note.read_text() if note.exists() else f"# {what}\n", f"![forgetting and learning]({name}.png)", "", f"![curves]({name}_curves.png)", ""]
    values = stage_values(rows)
    people = {names[s]: len({r["subject"] for r in rows if r["held_out"] and r["stage"] == s and "subject" in r}) for s in sorted(names)}
    text += ["People who were held out: " + ", ".join(f"{n} of {s}" for s, n in people.items()) + ". Losses of reports are cross-entropies, of images squared errors: a mean over stages is mostly the reports'.", ""]
    for score, how in (("own", "through the decoder of its time"), ("refit", "through a decoder that was refitted")):
        if score in values:
            text += [f"## Rise of the loss of each stage, {how}", "", *rises(values[score]), ""]
            text += [x for one in ("medcoss", "invcoss") if one in values[score] and len(values[score]) > 2 for x in (*against(values[score], one), "")]
    if "segment" in values:
        seen = [s for s in names.values() if any(s in by and any(at is not None for at, _ in by[s].values()) for by in values["segment"].values())]
        text += ["## Few-label segmentation: what the Dice of each stage gained (lost, below zero) since the stage's own end", "", *rises(values["segment"], seen), ""]
    for score in dict.fromkeys(r["score"] for r in found["table"]):
        text += [f"## {score}", "", measures_md(found, score), ""]
    text += ["## What is kept for later stages, and what was computed", "", "| arm | bytes in the last packet beside weights and decoders | patients' data | steps on new cases | steps on old ones, or batches beside | extra forward passes |", "|---|---:|---|---:|---:|---:|"]
    text += [f"| {a} | {c['bytes']:,} | {'yes' if c['patient_data'] else 'no'} | {' | '.join(f'{n:,}' for n in c['steps'])} |" for a in ARMS if (c := costs.get(a))]
    (results / f"{name}.md").write_text("\n".join(text) + "\n")
    write_json(results / f"{name}.json", json.loads(json.dumps(dict(what=what, seeds=sorted({r["seed"] for r in rows}), people=people, costs=costs, stages=values, **more, **found))))
    order = [a for a in ARMS if any(r["strategy"] == a for r in rows)]
    (results / f"{name}.png").write_bytes(png(show_strategies(found["table"], "refit", order=order), dpi=80))
    text_among = "report" in names.values()  # a cross-entropy beside squared errors
    key = [a for a in ("sequential", "medcoss", "invcoss", "lwf", "er") if a in order]
    (results / f"{name}_curves.png").write_bytes(png(show_curves([c for a in key for c in found["curves"] if c["strategy"] == a], "own", names=list(names.values()), ylabel="own loss", sharey=not text_among), dpi=80))
    print(results / f"{name}.md")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, default=450)
    p.add_argument("--cases", type=int, default=400)
    p.add_argument("--ewc", type=float, default=1e-2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--report", action="store_true", help="results/continual_small.{json,md,png} from what is finished; nothing is trained")
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in () if a.report else a.seeds:
        for arm in a.arms:
            run(plan(a.data, a.out, arm, seed, a.steps, lam=a.ewc, cases=a.cases, device=a.device))
    if a.report:
        report(a.out, "continual_small", "continual.md, section 6: gratings, lattices, objects")


if __name__ == "__main__":
    try:
        main()
    except Stopped as e:
        print(e)
