"""Does sequential training forget, and what do nine ways of remembering keep? The one experiment of continual.md, section 6, without inversion.

    python experiments/continual_data.py DATA --patterns 1500                       # gratings, lattices, objects, 32 x 32
    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0      # all arms; 3 to 6 minutes an arm on one core
    python experiments/continual_small.py DATA/patterns2d runs/small --seeds 0 1 2 --arms sequential medcoss er --json results/continual_small.json

A run that was interrupted continues, what is done is not done again. Each arm is a plan of `medssl continual run`; its folder holds packets, rows and a table. The JSON holds, for each arm, score
and measure, the mean over seeds with its interval, the rows themselves staying in the runs.

Model: patches of 4 (64 tokens), width 64, three blocks, no stochastic depth, decoder 48 wide with one block, three quarters hidden. 450 steps of 64 on new data a stage, AdamW, peak 2e-3, 50 steps of
rise, cosine; a quarter of the steps on old data, 75 images (5 %) of each stage kept. EWC: lambda is the largest of its sweep that still learns the second stage (see `--ewc`). Probes read the 16 fine
classes from 400 labelled images.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from medssl_nb.continual import ContinualConfig, ScoreConfig, StageConfig, common, run
from medssl_nb.core import read_json, read_jsonl, write_json
from medssl_nb.eval.forgetting import summarise_runs
from medssl_nb.train.trainer import Stopped

ARMS = ("sequential", "medcoss", "er", "derpp", "lwf", "cassle", "ewc", "packnet", "joint")
TASK = dict(region2d=(32, 32), patch2d=4, channels2d=1, width=64, depth=3, heads=4, decoder_width=48, decoder_depth=1, decoder_heads=4, drop_path=0.0, crop=(1.0, 1.0), flip=0.0)


def plan(data, out, arm, seed, steps=450, batch=64, lam=1e-2, cases=400, device="cpu"):
    "One arm and seed as a plan."
    base = common("mim", "small2d", arm)
    settings = {n: v for n, v in dict(ratio=0.25, lam=lam if arm == "ewc" else None).items() if v is not None and hasattr(base["settings"], n)}
    base["task"] = replace(base["task"], **TASK)
    base["settings"] = replace(base["settings"], **settings)
    base["train"] = replace(base["train"], batch=batch, lr=2e-3, lr_per=0, seed=seed, workers=0, bar=False, tensorboard=False, device=device, save_every=150)
    stages = tuple(StageConfig(s["name"], Path(data) / s["name"], target=s["target"]) for s in read_json(Path(data) / "stages.json"))
    score = ScoreConfig(cases=cases, refit_steps=100, refit_lr=2e-3)
    return ContinualConfig(**{**base, "steps": steps, "warmup": 50 / 450, "stages": stages, "out": Path(out) / f"{arm}_s{seed}", "score": score})


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
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in a.seeds:
        for arm in a.arms:
            run(plan(a.data, a.out, arm, seed, a.steps, lam=a.ewc, cases=a.cases, device=a.device))
    rows = [r for f in sorted(a.out.glob("*_s*/rows.jsonl")) for r in read_jsonl(f)]
    found = summarise_runs(rows)
    for score in ("own", "refit", "cka", "linear", "knn"):
        print(f"\n{score}")
        for r in found["table"]:
            if r["score"] == score and r["measure"] in ("forgetting", "learning", "average"):
                print(f"  {r['strategy']:<11} {r['measure']:<11} {r['mean']:8.3f}" + (f"  [{r['low']:.3f}, {r['high']:.3f}]" if r["low"] is not None else "") + f"  seeds {r['n']}")
    if a.json:
        write_json(a.json, json.loads(json.dumps(dict(what="continual.md, section 6, without inversion", steps=a.steps, seeds=sorted({r["seed"] for r in rows}), **found))))
        print(a.json)


if __name__ == "__main__":
    try:
        main()
    except Stopped as e:
        print(e)
