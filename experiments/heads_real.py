"""Does pre-training on real brains together with generated heads help to outline lesions with few labels? BrainMVP against MAE, PCRLv2 and scratch; truth known, because the outlines are of generated heads.

    python experiments/heads_real.py --data ../shared/data/real/brain --out runs/heads_real       # about 8 core minutes a seed; continued where it was stopped
    python experiments/heads_real.py --tables                                                     # the page again, from results/heads_real.json alone

The experiment of heads_missing.py (same network, steps, rates, labels, judges) with all multi-contrast people of the folder (NIfTI and DICOM, brought to the spacing of the generated heads) beside its 96 generated ones
in pre-training. Real people have no outlines here and are in no test. Everything about them goes through the package: ingest, prepare, pretrain.
"""
import argparse
import contextlib
import io
import shutil
from pathlib import Path

import heads_missing as hm
import numpy as np
import torch

from medssl_nb.config import load_yaml
from medssl_nb.core import read_json
from medssl_nb.data.cases import Prepared, write_case, write_index
from medssl_nb.data.ingest import IngestConfig, ingest
from medssl_nb.data.phantom import head_case
from medssl_nb.data.prepare import PrepareConfig, prepare

NAME, COMPARED = "heads_real", ("mae", "pcrlv2", "brainmvp")
RESULTS = Path(__file__).parent.parent / "results"


def data(plan, source, out):
    "The generated set, and the real people in it: pseudonyms, no outline, never in the test."
    done = hm.data(plan, out)
    if any(r["group"] == "real" for r in Prepared(done).rows):
        return
    spacing = head_case(7, (plan.side,) * 3, modalities=plan.sequences[:1], subject=0, background=False)["spacing"]
    work = out / "real"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work / "src")
    with contextlib.redirect_stderr(io.StringIO()):
        ingest(IngestConfig(src=work / "src", out=work / "manifest", progress=False))
        prepare(PrepareConfig(manifest=str(work / "manifest"), out=str(work / "prepared"), spacing=tuple(spacing), margin=1, workers=0, progress=False, modalities=plan.sequences))
    p, n = Prepared(work / "prepared"), 0
    for r in p.rows:
        have = [c for c in plan.sequences if c in r["channels"]]
        if len(have) < 2:
            continue  # a single sequence has no partner
        image = np.asarray(p.read(r, channels=have)[0], np.float32)
        write_case(done, dict(r, channels=have, group="real", split="train", labels={}, fingerprint="", seg=False), image, None)
        n += 1
        print("real:", "+".join(have), image.shape[1:], flush=True)
    write_index(done)
    if not n:
        raise SystemExit(f"{source} holds nobody with two sequences on one grid")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path)
    ap.add_argument("--plan", type=Path, default=hm.HERE / "heads_missing.yaml")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    ap.add_argument("--regimes", nargs="*", default=("whole", "gaps"))
    ap.add_argument("--tables", action="store_true")
    ap.add_argument("--report", action="store_true", help="of what is finished")
    a = ap.parse_args()
    torch.set_num_threads(1)
    hm.ARMS = {k: hm.ARMS[k] for k in COMPARED}
    hm.REGIMES = {k: (hm.REGIMES[k][0], COMPARED) for k in a.regimes}
    if a.tables:
        hm.write_tables(read_json(RESULTS / f"{NAME}.json"), RESULTS, NAME)
        return
    if a.out is None or a.data is None:
        ap.error("--data and --out are needed: the folder with real brains, and where the runs go")
    plan = load_yaml(hm.Plan(), a.plan)
    plan.seeds = tuple(a.seeds)
    data(plan, a.data, a.out)
    for regime in () if a.report else a.regimes:
        for s in a.seeds:
            for name in COMPARED:
                hm.pretrain_arm(plan, a.out, name, s)
            hm.finetune_regime(plan, a.out, "segment", regime, s)
    hm.report(plan, a.out, RESULTS, NAME)


if __name__ == "__main__":
    main()
