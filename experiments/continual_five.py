"""Five stages in the order of MedCoSS (reports, X-rays, CT, MRI, pathology) through one small network, every strategy, on generated or real data.

    python experiments/continual_data.py DATA --synthetic 600 --real REAL
    python experiments/continual_five.py DATA/real runs/real --seeds 0 1 2                         # all arms; 10 to 15 minutes an arm on one core
    python experiments/continual_five.py DATA/real runs/real --sweep 1e-5 1e-4 1e-3 1e-2 1e-1      # lambda of EWC on the first two stages (continual.md, 1.4); choose, then freeze: LAM below
    python experiments/continual_five.py DATA/real runs/real --seeds 0 1 2 --segment               # few-label segmentation by the packets of finished runs, where a stage has outlines (CT, MRI)
    python experiments/continual_five.py DATA/real runs/real --report continual_real               # results/continual_real.{json,md,png} of what is finished

Plan, sizes and steps: continual.yaml. What is done is not done again. Image stages of `invcoss` are inverted (64 x 64 pixels and slabs of 16 x 48 x 48 voxels), reports are kept; a stage of fewer than
100 people says so (`few`), which a site would have to decide.
"""
import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from continual_small import ARMS, report
from medssl_nb.config import from_dict, read_yaml
from medssl_nb.continual import ContinualConfig, ScoreConfig, StageConfig, common, run
from medssl_nb.core import UserError, atomic_dir, read_json, read_jsonl
from medssl_nb.invert import InvertConfig
from medssl_nb.train.trainer import Stopped

HERE = Path(__file__).parent
FIVE = tuple(a for a in ARMS if a not in ("task_statistics", "tv", "mim"))
LAM = dict(real=1e-2, synthetic=1e-1)  # of EWC, by data set: swept on the first two stages, seed 0, then frozen (see the verdicts)
INVERT = dict(batch=16, steps=400, lr=2e-3, z_lr=0.05, a_img=0.1, a_rep=1.0, bar=False, save_every=100)


def plan(data, out, arm, seed, steps=None, lam=None, stages=None):
    "continual.yaml with another strategy; `lam` of EWC, and the first `stages` alone, for the sweep."
    base = common("mim", "small_unified", arm)
    said = {k: v for k, v in read_yaml(HERE / "continual.yaml").items() if k not in ("settings", "strategy")}  # these are of MedCoSS
    c = from_dict(ContinualConfig[type(base["task"]), type(base["settings"])](**base), said)
    if arm == "invcoss":
        c.settings = replace(c.settings, last=False, few=True, invert=InvertConfig(**INVERT))
    if hasattr(c.settings, "ratio"):
        c.settings = replace(c.settings, ratio=0.25)
    if arm == "ewc" and (lam or LAM.get(Path(data).name)):
        c.settings = replace(c.settings, lam=lam or LAM[Path(data).name])
    target = {s["name"]: s["target"] for s in read_json(Path(data) / "stages.json")}
    stages_ = tuple(StageConfig(s.name, Path(data) / s.name, kind=s.kind, target=target[s.name]) for s in c.stages if s.name in target)[:stages]
    name = f"{arm}_s{seed}" if stages is None else f"sweep/{arm}_{lam:g}_s{seed}"
    return replace(c, strategy=arm, stages=stages_, steps=steps or c.steps, out=Path(out) / name, train=replace(c.train, seed=seed, workers=0, bar=False, tensorboard=False, device="cpu"))


def segment(data, out, arm, seed, steps=None, score=None):
    "A linear decoder on the frozen encoder of each packet of a finished run, eight outlined cases: the same plan, asked for that score alone. The packets are linked; nothing is trained again."
    c = plan(data, out, arm, seed, steps)
    if not (c.out / "result.json").is_file():
        raise UserError(f"{c.out.name} is not finished", "a run with all its packets", f"the same command without --segment, --arms {arm} --seeds {seed}")
    to = Path(out) / "segment" / c.out.name
    if not (to / "packets").exists():
        with atomic_dir(to / "packets") as tmp:  # all or none: a stage whose packet is missing would be trained
            shutil.copytree(c.out / "packets", tmp, copy_function=os.link, dirs_exist_ok=True)
    c.out, c.score = to, score or ScoreConfig(scores=("segment",))
    return run(c)


def swept(out):
    "Own loss after the first two stages by lambda, as the sweep left it; sequential training beside it."
    found = {}
    for f in [*sorted(out.glob("sweep/ewc_*_s*/rows.jsonl"), key=lambda f: float(f.parent.name.split("_")[1])), *sorted(out.glob("sequential_s0/rows.jsonl"))]:
        held = {}
        for r in read_jsonl(f):
            if (r["score"], r["after"], r["held_out"]) == ("own", 2, True):
                held.setdefault(r["name"], []).append(r["value"])
        found[f.parent.name] = {n: round(sum(v) / len(v), 4) for n, v in held.items()}
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--arms", nargs="+", default=FIVE, choices=FIVE)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int)
    p.add_argument("--sweep", nargs="+", type=float, metavar="LAMBDA")
    p.add_argument("--segment", action="store_true", help="few-label segmentation by the packets of finished runs")
    p.add_argument("--report", metavar="NAME")
    a = p.parse_args()
    torch.set_num_threads(1)
    for lam in a.sweep or ():
        run(plan(a.data, a.out, "ewc", a.seeds[0], a.steps, lam, 2))
    for seed in () if a.report or a.sweep else a.seeds:
        for arm in a.arms:
            if not a.segment:
                run(plan(a.data, a.out, arm, seed, a.steps))
            elif arm != "packnet":  # which answers with a part of its network for each stage, and a packet's encoder is the whole
                segment(a.data, a.out, arm, seed, a.steps)
    if a.report:
        report(a.out, a.report, f"Five stages: reports, X-rays, CT, MRI, pathology ({a.data.name} data)", sweep=swept(a.out))


if __name__ == "__main__":
    try:
        main()
    except Stopped as e:
        print(e)
