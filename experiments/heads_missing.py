"""Which pre-training helps when labels are few, and which when sequences are missing? Generated heads, truth known.

    python experiments/heads_missing.py --out runs/heads_missing            # everything, continued where it was stopped
    python experiments/heads_missing.py --out runs/heads_missing --stage pretrain --seeds 0
    python experiments/heads_missing.py --stage tables                      # the page again, from results/heads_missing.json alone

One encoder (a small U-Net), one data set, the same steps, batch and rate for every method; what differs is the task. For each seed every method is pre-trained anew, then fine-tuned by `medssl finetune --subsets True`
with few labels, for outlines and for a decision, with and without sequences taken away in training; each network is judged on every non-empty subset of the four sequences.
A seed is a seed of everything: pre-training, the labelled cases, first weights and crops.
"""
import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from medssl_nb.config import load_yaml
from medssl_nb.core import read_json, read_jsonl, write_json
from medssl_nb.data.cases import write_case, write_index
from medssl_nb.data.phantom import head_case, unit

HERE = Path(__file__).parent


@dataclass
class Plan:
    "What the YAML file says."
    people: int = 96
    test: int = 48
    side: int = 24
    sequences: tuple[str, ...] = ("t1", "t1c", "t2", "flair")
    widths: tuple[int, ...] = (8, 16, 32, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 80
    batch: int = 8
    lr: float = 3e-3
    seg_labels: int = 8
    seg_steps: int = 60
    seg_batch: int = 2
    cls_labels: int = 16
    cls_steps: int = 40
    cls_batch: int = 8
    tune_lr: float = 1e-2
    probe_labels: int = 32


# what a method is here: its name, and the settings that make the arm
OFF = dict(w_template=0.0, w_contrast=0.0, template_warmup=0.0)
ARMS = {
    "rec": ("taco", dict(level=2, w_intra=0.0, w_inter=0.0)),
    "mae": ("mae", dict(block=4)),
    "pcrlv2": ("pcrlv2", dict(region="side", size=(24, 24, 24), sizes=((20, 24, 20), (24, 24, 24), (20, 20, 20)), local_size=(16, 16, 16), local_sizes=((12, 12, 12), (10, 12, 10)), target="zscore")),
    "cmr": ("brainmvp", OFF),
    "cmr_md": ("brainmvp", dict(w_contrast=0.0)),
    "brainmvp": ("brainmvp", {}),  # + contrast: all of it
    "taco": ("taco", dict(level=2)),
}


def data(plan, out):
    "Heads as a prepared set; who is already there is not drawn again."
    out = out / "prepared"
    if (out / "index.jsonl").is_file():
        return out
    for i in range(plan.people + plan.test):
        sick = i % 2 == 0
        h = head_case(7, (plan.side,) * 3, modalities=plan.sequences, subject=i, lesions=None if sick else 0, background=False)
        image = torch.stack([torch.as_tensor(unit(h["images"][m], floor=60)) for m in plan.sequences]).float().numpy()
        row = dict(case=f"c-{i:03d}", subject=f"s-{i:03d}", session="", split="test" if i >= plan.people else "train", group="lesion" if sick else "none", dims=3, channels=list(plan.sequences), spacing=list(h["spacing"]), labels=dict(finding="lesion" if sick else "none"), fingerprint="")
        write_case(out, row, image, h["label"][None] if sick else None)
    write_index(out)
    return out


def pretrain_arm(plan, out, name, seed):
    "One run; a finished one is read."
    from medssl_nb.pretrain import pretrain, settings

    method, kw = ARMS[name]
    c, _ = settings(["--method", method, "--preset", "small3d"])
    c.data, c.out = out / "prepared", out / "runs" / f"{name}_s{seed}"
    if (c.out / "encoder" / "card.json").is_file():
        return c.out
    kw = {k: (plan.side,) * 3 if v == "side" else v for k, v in kw.items()}
    c.task = type(c.task).small3d(**{"net": "unet", "widths": plan.widths, **({"region": (plan.side,) * 3} if method != "pcrlv2" else {}), **kw})
    t = c.train
    t.steps, t.batch, t.lr, t.warmup, t.seed, t.optimizer, t.weight_decay, t.clip = plan.steps, plan.batch, plan.lr, 10, seed, "adamw", 1e-4, 10.0
    t.precision, t.channels_last, t.workers, t.save_every, t.keep, t.tensorboard, t.bar = "32-true" if method == "pcrlv2" else "bf16-mixed", True, 0, 0, 1, False, False  # in 16 bits a head of 8 channels met a zero vector, whose cosine has no slope
    if getattr(c.task, "w_template", 0.0) == 0.0:
        t.lr_scale = {}  # no templates, no rate of their own
    begin = time.process_time()
    pretrain(c)
    print(f"{name} seed {seed}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return c.out


BASE = ("rec", "mae", "pcrlv2", "brainmvp", "taco")  # the ablation of BrainMVP is judged with gaps alone
REGIMES = {"gaps": (1.0, tuple(ARMS)), "whole": (0.0, BASE)}  # share of training cases that lose sequences, and the arms
FILLED = {"brainmvp": "brainmvp_t", "scratch": "scratch01_t"}  # a third regime, of outlines: as `gaps`, with BrainMVP's templates for what is absent and as the second disguise of a case; the same templates for a fresh network


def finetune_regime(plan, out, kind, regime, seed):
    "One comparison with one seed, through the command's own function; what is finished is read."
    from medssl_nb.eval.transfer import FinetuneConfig, finetune

    replace, arms = REGIMES.get(regime, (1.0, ("brainmvp",)))
    filled = dict(missing="template", templates=out / "runs" / f"brainmvp_s{seed}" / "templates") if regime == "filled" else dict(missing="zero")
    seg = kind == "segment"
    c = FinetuneConfig(
        data=out / "prepared", out=out / f"{kind}_{regime}_s{seed}", arms={a: str(out / "runs" / f"{a}_s{seed}") for a in arms}, kind=kind, **filled, replace=replace, subsets=True, seeds=(seed,),
        group=("lesion",) if seg else (), regions=((1, 2, 3),) if seg else (), target="finding", budgets=(plan.seg_labels if seg else plan.cls_labels,), steps=plan.seg_steps if seg else plan.cls_steps,
        batch=plan.seg_batch if seg else plan.cls_batch, lr=(plan.tune_lr,), warmup=5, val=0.0, predictions=0, precision="bf16-mixed", device="cpu", bar=False,
    )
    begin = time.process_time()
    got = finetune(c)
    print(f"{kind} {regime} seed {seed}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return got["subsets"]


INPUT = dict(scratch="zscore", scratch01="none", scratchfg="foreground")  # of the twins: MAE's and PCRLv2's, BrainMVP's, TACO's


def late_probe(plan, out, seed):
    """The late-fusion probe of the TACO specification, section 6: every sequence through the frozen encoder by itself, pooled, the mean over what is there, a linear head. A missing sequence is left out of the mean.
    `whole`: the head learns from the mean over all; `gaps`: from the means over all subsets. Beside the encoders random ones, one for each kind of input."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from medssl_nb.core import write_jsonl
    from medssl_nb.data.cases import Prepared
    from medssl_nb.eval.transfer import fresh, label_budget
    from medssl_nb.tasks.missing import subsets
    from medssl_nb.tasks.supervised import evaluating, input_norm
    from medssl_nb.train.checkpoint import load_encoder

    if all((out / f"probe_{r}_s{seed}" / "subsets.jsonl").is_file() for r in REGIMES):
        return
    begin = time.process_time()
    prepared = Prepared(out / "prepared")
    test, train = (prepared.select(split=k) for k in ("test", "train"))
    rows = label_budget(train, plan.probe_labels, seed, "finding")
    x = {r["case"]: torch.from_numpy(np.asarray(prepared.read(r, channels=plan.sequences)[0], np.float32)) for r in (*rows, *test)}
    sick = lambda rs: np.array([r["labels"]["finding"] == "lesion" for r in rs], int)
    every = [np.array([m in s for m in plan.sequences], float) for s in subsets(plan.sequences)]
    names = ["+".join(s) for s in subsets(plan.sequences)]
    cells = {k: [] for k in REGIMES}
    first = load_encoder(out / "runs" / f"rec_s{seed}")[0].spec()
    for name in (*INPUT, *ARMS):
        if name in ARMS:
            enc, card = load_encoder(out / "runs" / f"{name}_s{seed}")
            norm = card["input"]
        else:
            enc, norm = fresh(first, seed), INPUT[name]
        pool = {}
        with evaluating(enc):
            for c, v in x.items():  # (sequences, features of all levels)
                pool[c] = torch.cat([f.float().flatten(2).mean(2) for f in enc(input_norm(v[:, None], norm))], 1).numpy()
        some = lambda rs, w: np.stack([(w[:, None] * pool[r["case"]]).sum(0) / w.sum() for r in rs])
        full = some(rows, every[0])
        mean, std = full.mean(0), full.std(0) + 1e-6
        for regime in REGIMES:
            ws = every if regime == "gaps" else every[:1]
            head = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced").fit(np.concatenate([(some(rows, w) - mean) / std for w in ws]), np.tile(sick(rows), len(ws)))
            for w, n in zip(every, names):
                p = head.predict_proba((some(test, w) - mean) / std)
                cells[regime] += [dict(arm=name, budget=plan.probe_labels, seed=seed, case=r["case"], subject=r["subject"], subset=n, n=int(w.sum()), target=int(t), prob=q.tolist()) for r, t, q in zip(test, sick(test), p)]
    for regime, v in cells.items():
        write_jsonl(out / f"probe_{regime}_s{seed}" / "subsets.jsonl", v)
    print(f"probe seed {seed}: {time.process_time() - begin:.0f} CPU s", flush=True)


# what is claimed, as pairs of arms
DRAWS = 100  # of the bootstrap of an AUC
FORMS = dict(segment="segment", classify="classify", probe="classify")
PAIRS = (("brainmvp_t", "brainmvp"), ("scratch01_t", "scratch01"), ("brainmvp_t", "mae"), ("brainmvp_t", "pcrlv2"), ("brainmvp", "mae"), ("brainmvp", "pcrlv2"), ("brainmvp", "rec"), ("cmr_md", "cmr"), ("brainmvp", "cmr_md"), ("taco", "rec"), ("taco", "mae"), ("taco", "brainmvp"), ("taco", "pcrlv2"))
TWIN = {a: {"brainmvp": "scratch01", "taco": "scratchfg"}.get(ARMS[a][0], "scratch") for a in ARMS} | {"brainmvp_t": "scratch01_t"}  # of the same input


def twins(arms):
    "What the command calls the twins (the first one `scratch`, another one after the first arm with its input), and what they are called here."
    first = {}
    for a in arms:
        first.setdefault(TWIN[a], a)
    return {f"scratch-{a}" if i else "scratch": t for i, (t, a) in enumerate(first.items())}


def gather(out, kind, regime, seeds):
    "Rows of the finished seeds; twins under the name of their input. Beside outlines with gaps those with templates, in which both arms have another name."
    name = FILLED if regime == "filled" else twins(REGIMES[regime][1])
    rows, done = [], []
    for s in seeds:
        d = out / f"{kind}_{regime}_s{s}"
        if not (d / "subsets.jsonl").is_file():
            continue
        done.append(s)
        for r in read_jsonl(d / "subsets.jsonl"):
            rows.append(dict(r, arm=name.get(r["arm"], r["arm"]) if kind != "probe" else r["arm"]))
    if (kind, regime) == ("segment", "gaps"):
        rows += gather(out, kind, "filled", done)[0]
    return rows, done


def rows_of(part, arm, minus=None):
    "Rows as of `subsets.jsonl` from the scores kept in the JSON (to a thousandth); with `minus`, the gain over that arm, seed by seed, person by person, subset by subset."
    rows = []
    for seed, by in part["scores"][arm].items():
        for subset, scores in by.items():
            base = part["scores"][minus][seed][subset] if minus else [0.0] * len(scores)
            rows += [{"seed": int(seed), "case": i, "subject": i, "class": "lesion", "subset": subset, "n": subset.count("+") + 1, "dice": x - y} for i, (x, y) in enumerate(zip(scores, base, strict=True))]
    return rows


def net_pairs(part):
    """Pairs of arms whose inputs differ, each measured from its own twin: (a - twin of a) - (b - twin of b), paired by seed and person. The plain difference of such a pair compares input normalisations
    as well: the twins alone differ by what `scratch01 - scratch` says."""
    from medssl_nb.eval.missing import outline_lines

    out = []
    for p in part["pairs"]:
        a, b = p["a"], p["b"]
        if a not in TWIN or b not in TWIN or TWIN[a] == TWIN[b] or not part["scores"]:
            continue
        at = {l["n"]: l for l in outline_lines(rows_of(part, a, TWIN[a]), rows_of(part, b, TWIN[b]))}
        out.append(dict(a=a, b=b, full=at[max(n for n in at if n != "fewer")]["diff"], fewer=at["fewer"]["diff"], drop=at["fewer"]["drop_diff"]))
    return out


def net_areas(mine, pairs):
    "As `net_pairs`, for decisions: AUCs of four arms, resampled together over seeds and people."
    import numpy as np

    from medssl_nb.eval.metrics import bootstrap
    from medssl_nb.eval.missing import _stack, area_of, levels

    out = []
    for p in pairs:
        a, b = p["a"], p["b"]
        if a not in TWIN or b not in TWIN or TWIN[a] == TWIN[b]:
            continue
        signs = {a: 1, TWIN[a]: -1, b: -1, TWIN[b]: 1}
        P, T, who, seeds = {}, *_stack(mine[a])[1:]
        for arm in signs:
            P[arm], *rest = _stack(mine[arm])
            assert (rest[0] == T).all() and rest[1:] == [who, seeds], (arm, "the same people and seeds in every arm")
        names = {n: [*dict.fromkeys(r["subset"] for r in rs)] for n, rs in levels(mine[a])}
        area = {(arm, n, k): area_of(T, P[arm][n][k]) for arm in signs for n in P[arm] for k in range(len(seeds))}

        def gain(level):
            def f(s, c):
                w = np.bincount(c, minlength=len(T))
                return float(sum(g * np.mean([area[arm, n, k](w) for n in names[level] for k in s]) for arm, g in signs.items()))

            return f

        full, fewer = gain(max(n for n in names if n != "fewer")), gain("fewer")
        boot = lambda f: [(q := bootstrap(f, who, len(seeds), DRAWS))["mean"], q["low"], q["high"]]
        out.append(dict(a=a, b=b, full=boot(full), fewer=boot(fewer), drop=boot(lambda s, c: fewer(s, c) - full(s, c))))
    return out


def span(v):
    return "" if v is None else f"{v[0]:+.3f}" + ("" if v[1] is None else f" [{v[1]:+.3f}, {v[2]:+.3f}]")


NAMES = dict(segment="outline of the lesion", classify="lesion or none, fine-tuned", probe="lesion or none, frozen encoder, late fusion")
SHOWN = dict(gaps="sequences taken away in training", whole="never shown a gap")
COLUMNS = dict(full="with all sequences", fewer="with fewer", drop="drops")


def clear_of_zero(facts):
    "Every interval between two arms that leaves zero out, favourable or not, and of how many: lines of Markdown."
    text, total, clear = [], 0, []
    for part, d in facts["parts"].items():
        kind, regime = part.rsplit("_", 1)
        different = {(p["a"], p["b"]) for p in d.get("net", ())}
        for which in ("pairs", "net"):
            for p in d.get(which, ()):
                for key, what in COLUMNS.items():
                    if p[key] is None or p[key][1] is None:
                        continue
                    total += 1
                    if p[key][1] > 0 or p[key][2] < 0:
                        how = "each from its own twin" if which == "net" else "plain, and their inputs differ" if (p["a"], p["b"]) in different else "plain"
                        clear.append(f"| {NAMES[kind]}, {SHOWN[regime]} | {p['a']} − {p['b']} | {how} | {what} | {span(p[key])} |")
    text += ["## Which intervals leave zero out", "", f"{len(clear)} of {total} intervals between two arms, all of them listed. At 95 % one in twenty, here {total / 20:.0f}, leaves zero out by chance alone. "]
    text[-1] += "Nothing is corrected for their number, and the comparisons are not independent (the same networks stand in many, the plain and the twin-corrected rows say the same thing twice): a single row is a hint and no finding. "
    text[-1] += "A drop is negative; a difference of drops above zero says that the first arm loses less."
    return [*text, "", "| where | pair | how | what | difference [95 %] |", "|---|---|---|---|---|", *clear, ""]


def markdown(facts):
    "The tables, from the JSON alone."
    from medssl_nb.eval.missing import subset_md

    text = clear_of_zero(facts)
    for part, d in facts["parts"].items():
        kind, regime = part.rsplit("_", 1)
        head = "| pair | " + " | ".join(f"{c} [95 %]" for c in COLUMNS.values()) + " |"
        lines = lambda pairs: [f"| {p['a']} − {p['b']} | " + " | ".join(span(p[k]) for k in COLUMNS) + " |" for p in pairs]
        text += [f"## {NAMES[kind]}, {SHOWN[regime]}: {len(d['seeds'])} seeds", "", subset_md(d["tables"], FORMS[kind]), head, "|---|---|---|---|", *lines(d["pairs"]), ""]
        if d.get("net"):
            text += ["BrainMVP and its ablations see [0, 1] (`_t`: with templates for what is absent), TACO and reconstruction z-scores over the head, MAE and PCRLv2 z-scores of the whole crop. Pairs of different inputs once more, each arm measured from the scratch twin with its own input, by seed and person:", "", head.replace("pair", "pair, each minus its twin"), "|---|---|---|---|", *lines(d["net"]), ""]
    text += ["## Does it pay to take sequences away in training?", "", "Differences: shown gaps − never shown one.", "", "| | arm | with all [95 %] | with fewer [95 %] | drops [95 %] |", "|---|---|---|---|---|"]
    return text + [f"| {NAMES[g['kind']]} | {g['arm']} | {span(g['full'])} | {span(g['fewer'])} | {span(g['drop'])} |" for g in facts["gain_of_gaps"]]


def write_tables(facts, results, name="heads_missing"):
    "The JSON, the page with its verdict, and the picture."
    from matplotlib.figure import Figure

    from medssl_nb.plot.volume import png

    for d in facts["parts"].values():
        if d["scores"]:  # of decisions there are none in the JSON: theirs was made from the rows
            d["net"] = net_pairs(d)
    write_json(results / f"{name}.json", facts)
    note = HERE / f"{name}_verdict.md"  # written by a person who read the tables
    (results / f"{name}.md").write_text("\n".join([(note.read_text() if note.exists() else ""), f"![score and drop]({name}.png)", "", *markdown(facts)]) + "\n")
    fig = Figure(figsize=(11, 2.9 * len(facts["parts"])), dpi=70, layout="constrained")
    for sub, (part, d) in zip(fig.subfigures(len(facts["parts"]), 1, squeeze=False)[:, 0], facts["parts"].items()):
        kind, regime = part.rsplit("_", 1)
        draw(sub, d["tables"]["count"], FORMS[kind], f"{NAMES[kind]}, {SHOWN[regime]}")
    (results / f"{name}.png").write_bytes(png(fig, dpi=70))


def report(plan, out, results, name="heads_missing"):
    "results/NAME.{json,md,png}, and of heads_missing results/brainmvp_ablation.{json,md}, from what is finished."
    from types import SimpleNamespace

    from medssl_nb.eval.missing import decision_lines, outline_lines, subset_tables

    arms = {a: SimpleNamespace(twin=a) for a in (*INPUT, "scratch01_t")} | {a: SimpleNamespace(twin=TWIN[a]) for a in TWIN}
    facts = dict(plan=vars(plan), parts={})
    for kind, form in FORMS.items():
        lines_of = outline_lines if form == "segment" else decision_lines
        for regime in REGIMES:
            rows, done = gather(out, kind, regime, plan.seeds)
            if not rows:
                continue
            tables = subset_tables(rows, arms, form, DRAWS)
            mine = {a: [r for r in rows if r["arm"] == a] for a in arms}
            pairs = []
            for a, b in (*PAIRS, ("scratch01", "scratch"), ("scratchfg", "scratch")):
                if mine[a] and mine[b]:
                    at = {l["n"]: l for l in (lines_of(mine[a], mine[b]) if form == "segment" else lines_of(mine[a], mine[b], DRAWS))}
                    top = max(n for n in at if n != "fewer")
                    pairs.append(dict(a=a, b=b, full=at[top]["diff"], fewer=at["fewer"]["diff"], drop=at["fewer"]["drop_diff"]))
            say = "dice" if kind == "segment" else "prob"
            compact = {}
            for r in rows if kind == "segment" else ():
                compact.setdefault(r["arm"], {}).setdefault(str(r["seed"]), {}).setdefault(r["subset"], []).append(round(r[say] if kind == "segment" else r[say][1], 3))
            truth = [r["target"] for r in rows if r["arm"] == "scratch" and r["seed"] == done[0] and r["n"] == len(plan.sequences)] if form == "classify" else None
            facts["parts"][f"{kind}_{regime}"] = dict(seeds=done, tables=tables, pairs=pairs, scores=compact, truth=truth, net=net_areas(mine, pairs) if form == "classify" else [])
    # does training with gaps pay?
    gain = []
    for kind, form in (("segment", "segment"),):
        a, b = (gather(out, kind, r, plan.seeds)[0] for r in ("gaps", "whole"))
        for arm in arms:
            x, y = ([r for r in v if r["arm"] == arm] for v in (a, b))
            if x and y:
                at = {l["n"]: l for l in (outline_lines if form == "segment" else decision_lines)(x, y)}
                gain.append(dict(kind=kind, arm=arm, full=at[max(n for n in at if n != "fewer")]["diff"], fewer=at["fewer"]["diff"], drop=at["fewer"]["drop_diff"]))
    facts["gain_of_gaps"] = gain
    facts["pretraining"] = {}
    for arm in ARMS:
        for s in plan.seeds:
            h = out / "runs" / f"{arm}_s{s}" / "history.jsonl"
            if h.is_file():
                rows = read_jsonl(h)
                terms = [k for k in rows[-1] if k not in ("step", "lr", "grad_norm", "volumes_per_s", "wait")]
                facts["pretraining"][f"{arm}_s{s}"] = dict(steps=len(rows), first={k: round(rows[0][k], 4) for k in terms if k in rows[0]}, last={k: round(sum(r[k] for r in rows[-5:]) / 5, 4) for k in terms})
    results.mkdir(exist_ok=True)
    write_tables(facts, results, name)
    if name == "heads_missing":
        ablation(facts, results)
    print(results / f"{name}.md")


COLOURS = {a: f"C{i}" for i, a in enumerate((*ARMS, "brainmvp_t"))} | dict(scratch="0.1", scratch01="0.4", scratchfg="0.6", scratch01_t="0.75")  # of an arm, the same in every part


def draw(fig, count, kind, title):
    "As `show_missing`, into a part of a figure."
    import numpy as np

    axes = fig.subplots(1, 2)
    arms = list(dict.fromkeys(l["arm"] for l in count))
    for ax, key, label in zip(axes, ("score", "drop"), (dict(segment="Dice", classify="AUC")[kind], "drop from all")):
        for i, arm in enumerate(arms):
            ls = [l for l in count if l["arm"] == arm and l["n"] != "fewer" and l.get(key)]
            x = np.array([l["n"] for l in ls]) + (i - (len(arms) - 1) / 2) * 0.6 / len(arms)
            ax.plot(x, [l[key][0] for l in ls], marker="o", ms=3, lw=1, color=COLOURS[arm], label=arm, ls="--" if arm.startswith("scratch") else "-")
            for a, l in zip(x, ls):
                if l[key][1] is not None:
                    ax.plot([a, a], l[key][1:3], "-", lw=0.7, color=COLOURS[arm], alpha=0.4)
        ax.set_xticks(range(1, 5))
        ax.invert_xaxis()
        ax.set(xlabel="sequences present", ylabel=label)
        if kind == "segment":
            ax.set_ylim(*((0, 0.9) if key == "score" else (-0.8, 0.1)))
    axes[1].legend(fontsize=6, frameon=False, ncols=2)
    axes[0].set_title(title, fontsize=9, loc="left")


def ablation(facts, results):
    "Scratch, + CMR, + MD, + CL: the paper's table at our scale."
    order = ("scratch01", "cmr", "cmr_md", "brainmvp")
    out, text = {}, []
    span = lambda v: f"{v[0]:.3f}" + ("" if v[1] is None else f" [{v[1]:.3f}, {v[2]:.3f}]")
    for kind, what in (("segment", "Dice"), ("probe", "AUC of the probe")):
        part = facts["parts"].get(f"{kind}_gaps")
        if not part:
            continue
        for n in (len(facts["plan"]["sequences"]), "fewer"):
            ls = {l["arm"]: l for l in part["tables"]["count"] if l["n"] == n}
            out[f"{what}, {n} sequences"] = {a: dict(score=ls[a]["score"], to_scratch=ls[a].get("diff")) for a in order if a in ls}
            means = [ls[a]["score"][0] for a in order if a in ls]
            text.append(f"| {what}, {'all sequences' if n != 'fewer' else 'fewer'} | " + " | ".join(span(ls[a]["score"]) if a in ls else "" for a in order) + f" | {'yes' if means == sorted(means) else 'no'} |")
    if not out:
        return
    write_json(results / "brainmvp_ablation.json", dict(plan=facts["plan"], seeds=facts["parts"]["segment_gaps"]["seeds"], table=out))
    note = HERE / "brainmvp_ablation_verdict.md"
    head = ["| measure | none | + CMR | + CMR + MD | + CMR + MD + CL | the paper's ordering |", "|---|---|---|---|---|---|"]
    (results / "brainmvp_ablation.md").write_text("\n".join([note.read_text() if note.exists() else "", *head, *text]) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--plan", type=Path, default=HERE / "heads_missing.yaml")
    ap.add_argument("--out", type=Path, default=None)
    ap.add_argument("--seeds", type=int, nargs="*", default=None)
    ap.add_argument("--kinds", nargs="*", default=("segment", "classify", "probe"))
    ap.add_argument("--regimes", nargs="*", default=tuple(REGIMES))
    ap.add_argument("--stage", choices=("data", "pretrain", "finetune", "report", "tables", "all"), default="all")
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.stage == "tables":
        write_tables(read_json(HERE.parent / "results" / "heads_missing.json"), HERE.parent / "results")
        return
    if a.out is None:
        ap.error("--out is needed: where the runs go")
    plan = load_yaml(Plan(), a.plan)
    seeds = plan.seeds if a.seeds is None else a.seeds
    data(plan, a.out)
    for s in seeds:
        if a.stage in ("pretrain", "all"):
            for name in ARMS:
                pretrain_arm(plan, a.out, name, s)
        if a.stage in ("finetune", "all"):
            for kind in a.kinds:
                if kind == "probe":
                    late_probe(plan, a.out, s)
                    continue
                for regime in a.regimes:
                    finetune_regime(plan, a.out, kind, regime, s)
                if kind == "segment" and "gaps" in a.regimes:
                    finetune_regime(plan, a.out, kind, "filled", s)
    if a.stage in ("report", "all"):
        report(plan, a.out, HERE.parent / "results")


if __name__ == "__main__":
    main()
