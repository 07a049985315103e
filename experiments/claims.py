"""results/claims.jsonl: what the papers claim beside what `results/` holds, with a verdict that follows from the interval.

    python experiments/claims.py            # writes results/claims.jsonl and results/claims.png
    medssl claims                           # prints them

Every number is computed from a committed table; `tests/test_claims.py` makes the file again and compares. Positive speaks for the claim.
"""
from pathlib import Path

import numpy as np

from medssl_nb.core import read_json
from medssl_nb.eval.claims import Claim, claims_text, read_claims, show_claims, write_claims
from medssl_nb.eval.metrics import mean_interval

RESULTS = Path(__file__).parent.parent / "results"
SPEC = {m: f"{m}.md" for m in ("brainmvp", "taco", "pcrlv2", "medcoss", "invcoss", "continual")}
APART = "The inputs of the two differ, so each is measured from the scratch twin with its own input."
HALF = "Zeros stood in for absent sequences; with its templates instead, from the twin that has them too: "
FEW = 10  # people held out; a probe on fewer is left out of a mean
SMALL = "small network, minutes of training; see the file"


def span(v):
    "A stored `[value, low, high]`."
    return dict(ours=v[0], low=v[1], high=v[2])


def over_seeds(v, sign=1):
    "Mean of one number a seed."
    i = mean_interval([sign * x for x in v])
    return dict(ours=i["mean"], low=i["low"], high=i["high"], how=i["how"], seeds=i["n"])


def transfer(results):
    "Few labels: PCRLv2 on X-rays and hippocampus."
    says = "Pre-training helps with few labels."
    paper = "+6.48 / +5.39 / +3.85 Dice over random weights with 1 / 10 / 100 % labels (MSD Liver, by others)"
    out = []
    for name, metric, cls, what in (("hippocampus", "dice", "mean", "Dice, pre-trained minus scratch"), ("xray", "auc", "all", "AUC, pre-trained minus scratch")):
        d = read_json(results / f"{name}.json")
        for r in d["table"]:
            if (r["arm"], r["metric"], r["class"]) == ("pcrlv2", metric, cls):
                data = f"{name}: {r['budget']} labels, {r['patients']} test patients"
                out.append(Claim("pcrlv2.few-labels", "pcrlv2", says, paper, f"{SPEC['pcrlv2']}, section 7", what, data, r["diff"], r["diff_low"], r["diff_high"], r["how"], r["seeds"], compute="25 minutes of two cores", file=f"{name}.json"))
    return out


def heads(results):
    "Generated heads with lesions: BrainMVP and TACO against others, and with sequences missing."
    d = read_json(results / "heads_missing.json")
    p = d["parts"]["segment_gaps"]
    pairs = {(r["a"], r["b"]): r for r in p["pairs"]}
    own = next(r for r in p["tables"]["count"] if (r["arm"], r["n"]) == ("brainmvp", 4))
    data = f"generated heads: 24 x 24 x 24 voxels, {p['pairs'][0].get('budget', 8)} labels, 24 test patients, sequences taken away in training"
    row = lambda id, m, says, paper, what, v, why="": Claim(id, m, says, paper, f"{SPEC[m]}, section 7", what, data, **span(v), how=own["how"], seeds=len(p["seeds"]), compute="240 steps of pre-training, 200 of fine-tuning", file="heads_missing.json", why=why)
    # arms whose inputs differ are measured from a twin each: the plain difference compares normalisations of the input as well
    net = {(r["a"], r["b"]): r for r in p["net"]}
    best = lambda a, b: net.get((a, b)) or pairs[a, b]
    full = lambda a, b: best(a, b)["full"]
    less = lambda a, b: ", each minus its scratch twin" if (a, b) in net else ""
    out = [
        row("brainmvp.pretraining", "brainmvp", "Pre-training beats scratch.", "+4.28 Dice (BraTS2023-PED)", "Dice, all sequences, BrainMVP minus its scratch twin", own["diff"]),
        row("brainmvp.distillation", "brainmvp", "Modality templates add to cross-modal reconstruction.", "+0.71 Dice (BraTS2023-PED)", "Dice, all sequences, + MD minus CMR alone", full("cmr_md", "cmr")),
        row("brainmvp.contrast", "brainmvp", "Modality-aware contrast adds to both.", "+0.93 Dice (BraTS2023-PED)", "Dice, all sequences, + CL minus CMR + MD", full("brainmvp", "cmr_md")),
    ]
    for b, name in (("mae", "MAE"), ("pcrlv2", "PCRLv2")):
        out.append(row("brainmvp.beats-" + b, "brainmvp", f"BrainMVP beats {name}.", "+0.28 to +14.47 Dice over rivals", f"Dice, all sequences, BrainMVP minus {name}{less('brainmvp', b)}", full("brainmvp", b), APART + " " + HALF + "{:+.2f} [{:+.2f}, {:+.2f}].".format(*full("brainmvp_t", b))))
    for b, name in (("rec", "reconstruction alone"), ("mae", "MAE"), ("brainmvp", "BrainMVP"), ("pcrlv2", "PCRLv2")):
        out.append(row("taco.beats-" + b, "taco", f"TACO beats {name} in segmentation.", "+1.1 % (which rival is not known)", f"Dice, all sequences, TACO minus {name}{less('taco', b)}", full("taco", b), APART if less("taco", b) else ""))
        out.append(row("taco.robust-" + b, "taco", f"TACO loses less than {name} when sequences are missing.", "", f"Dice, drop of {name} minus drop of TACO{less('taco', b)}", best("taco", b)["drop"], APART if less("taco", b) else ""))  # drops are negative numbers
    out.append(Claim("brainmvp.few-labels", "brainmvp", "With 40 % of the labels as good as rivals with all.", "", f"{SPEC['brainmvp']}, section 7", why="asks for the full pre-training on 16 022 scans"))
    out.append(Claim("brainmvp.classification", "brainmvp", "Better than rivals in classification.", "+0.65 to +18.07 points of accuracy (four sets of 57 to 238 cases)", f"{SPEC['brainmvp']}, section 7", why="no network of this scale learns the decision of our generated heads from frozen features, so nothing follows (heads_missing.md)"))
    return out


def topology(results):
    "The phantom of taco.md, section 10."
    d = read_json(results / "taco_topology.json")
    of = lambda arm: {r["seed"]: r for r in d["rows"] if r["arm"] == arm}
    data = f"generated anatomy: {d['side']} x {d['side']} x {d['side']} voxels, {d['train']} people"
    out = []
    for id, says, a, b, paper in (
        ("intra", "The triplet within a person adds matches across people and modalities.", "rec + intra", "rec", "+0.153 hits (pilot of the specification)"),
        ("inter", "Alignment across people adds matches across people and modalities.", "rec + inter", "rec", "+0.368 hits (pilot)"),
        ("both", "Both together add matches across people and modalities.", "rec + intra + inter", "rec", "+0.392 hits (pilot)"),
        ("neighbours", "Mutual nearest neighbours are better partners than random ones.", "rec + inter", "random partners", "+0.201 hits (pilot)"),
        ("layout", "Tokens that are places do better than the authors' layout.", "rec + intra + inter", "legacy layout", "+0.413 hits (pilot)"),
    ):
        x, y = of(a), of(b)
        if both := sorted(set(x) & set(y)):
            out.append(Claim(f"taco.{id}", "taco", says, paper, f"{SPEC['taco']}, section 10", f"landmark hits, other person and other modality, {a} minus {b}", data, **over_seeds([x[s]["xs_xm"] - y[s]["xs_xm"] for s in both]), compute="60 steps", file="taco_topology.json"))
    return out


def continual(results, name, data):
    "Forgetting and probes, paired by seed."
    file = results / f"{name}.json"
    if not file.is_file():
        return []
    d = read_json(file)
    table = {(r["strategy"], r["score"], r["measure"]): {int(s): v for s, v in r["values"].items()} for r in d["table"]}
    few = [s for s, n in d["people"].items() if n < FEW]
    for arm, by in d["stages"]["linear"].items() if few else ():  # a probe that is read on two people says nothing about an encoder
        judged = [v for s, v in by.items() if s not in few]
        table[arm, "linear", "average"] = {int(s): sum(v[s][1] for v in judged) / len(judged) for s in judged[0]}

    def pair(a, b, score, measure, sign):
        x, y = table.get((a, score, measure), {}), table.get((b, score, measure), {})
        return over_seeds([x[s] - y[s] for s in sorted(set(x) & set(y))], sign) if set(x) & set(y) else None

    def row(id, m, says, paper, what, got, section, **k):
        return [Claim(id, m, says, paper, section, what, data, **got, compute=SMALL, file=file.name, **k)] if got else []

    out = []
    mixed = "a mean over cross-entropies of reports and squared errors of images, mostly the reports'" if "report" in d["people"] else ""
    lost = table.get(("sequential", "refit", "forgetting"))
    if lost:
        out += row("medcoss.sequential-forgets", "medcoss", "Training one modality after the other forgets.", "", "refitted loss on old stages, risen by", over_seeds(list(lost.values())), f"{SPEC['continual']}, section 6", why=mixed)
    probe = "accuracy of linear probes after the last stage" + (f" (without {' and '.join(few)}: fewer than {FEW} people were held out)" if few else "")
    refit = "rise of the refitted loss on old stages"
    for b, paper in (("er", "+3.58 AVG (89.03 against 85.45)"), ("joint", "+1.38 AVG (89.03 against 87.65)")):
        out += row(f"medcoss.beats-{b}", "medcoss", f"MedCoSS learns better features than {b if b == 'joint' else 'ER'}{' training' if b == 'joint' else ''}.", paper, f"{probe}, MedCoSS minus {b}", pair("medcoss", b, "linear", "average", 1), f"{SPEC['medcoss']}, section 8")
    for a, m in (("medcoss", "MedCoSS"), ("invcoss", "InvCoSS")):
        out += row(f"{a}.forgets-less", a, f"{m} forgets less than sequential training.", "", f"{refit}, sequential minus {m}", pair(a, "sequential", "refit", "forgetting", -1), f"{SPEC['continual']}, section 6", why=mixed)
    out += row("invcoss.as-good-as-replay", "invcoss", "Invented images are as good as real ones.", "+0.14 AVG (89.17 against 89.03)", f"{probe}, InvCoSS minus MedCoSS", pair("invcoss", "medcoss", "linear", "average", 1), f"{SPEC['invcoss']}, section 8", margin=0.02)
    for b, n, paper in (("ewc", "EWC", "+2.90"), ("packnet", "PackNet", "+4.75"), ("cassle", "CaSSLe", "+2.29"), ("lwf", "LwF", "")):
        out += row(f"invcoss.beats-{b}", "invcoss", f"InvCoSS learns better features than {n}, which keeps nobody either.", paper and f"{paper} AVG", f"{probe}, InvCoSS minus {n}", pair("invcoss", b, "linear", "average", 1), f"{SPEC['invcoss']}, section 8")
    for id, a, b, says, paper in (
        ("variation-downstream", "tv", "task_statistics", "Total variation in the inversion makes better features.", "+0.63 AVG"),
        ("repulsion-downstream", "invcoss", "tv", "Repulsion in the inversion makes better features.", "+1.28 AVG"),
    ):
        out += row(f"invcoss.{id}", "invcoss", says, paper, f"{probe}, with minus without", pair(a, b, "linear", "average", 1), f"{SPEC['invcoss']}, section 8")
    return out


def pools(results, name, world):
    "What terms and generators do to a pool."
    file = results / f"{name}.json"
    if not file.is_file():
        return []
    d = read_json(file)
    out = []
    for at in dict.fromkeys(c["stage"] for c in d["cells"]):
        of = lambda pool: {c["seed"]: c["values"] for c in d["cells"] if (c["stage"], c["pool"]) == (at, pool)}

        def row(id, says, paper, what, a, b, key, sign, why=""):
            x, y = of(a), of(b)
            both = [s for s in sorted(set(x) & set(y)) if key in x[s] and key in y[s]]
            if both:
                out.append(Claim(f"invcoss.{id}", "invcoss", says, paper, f"{SPEC['invcoss']}, section 8", what, f"{at[3:]}: {world}", **over_seeds([x[s][key][0] - y[s][key][0] for s in both], sign), compute="a minute a pool", file=file.name, why=why))

        row("variation", "Total variation makes images better.", "+0.63 AVG downstream", "distance of the fine spectrum to real images, dB, without minus with", "+ TV", "task+statistics", "voxels: lsd_high", -1)
        row("repulsion", "Repulsion makes a pool more varied.", "+1.28 AVG downstream", "Vendi score by fixed filters, with minus without", "+ repulsion 1", "+ TV", "filters: vendi_2", 1, "varied is not yet likely: see coverage and the Frechet distance there")
        row("invunet-detail", "InvUNet restores detail that a plain decoder loses.", "", "distance of the fine spectrum to real images, dB, plain decoder minus InvUNet", "+ repulsion 1", "plain decoder", "voxels: lsd_high", -1)
        row("generator-detail", "A generator gives better images than free voxels.", "without generator: out of memory", "distance of the fine spectrum to real images, dB, voxels minus InvUNet", "+ repulsion 1", "free voxels", "voxels: lsd_high", -1)
    if "paper, CT: generator (float32) and 6 250 codes (float16)" in d["storage"]:
        times = d["storage"]["paper, CT: 6 250 slabs of int16 (5 %)"] / d["storage"]["paper, CT: generator (float32) and 6 250 codes (float16)"]
        gain = float(np.log10(times / 590))
        out.append(Claim("invcoss.storage", "invcoss", "What travels is up to 590 times smaller than real images.", "590 times", f"{SPEC['invcoss']}, sections 6.4 and 8", f"log10 of (times smaller / 590); {times:.0f} times, a generator and codes", "the paper's CT stage: 6 250 slabs, counted", gain, gain, gain, "counted, no spread", file=file.name))
    return out


def memory(results):
    "Free voxels against a generator, at the paper's pool."
    d = read_json(results.parent / "benchmarks" / "inversion_memory.json")["crossing"]
    need = {k: d["fixed"][k] + 6250 * d["bytes_an_image"][k] for k in ("voxels", "invunet")}
    gap = (need["voxels"] - need["invunet"]) / 1e9
    return [Claim("invcoss.memory", "invcoss", "Free voxels, all at once, need more memory than a generator.", "out of memory", f"{SPEC['invcoss']}, sections 6.5 and 8", "GB, free voxels minus generator", "6 250 slabs of 16 x 96 x 96: from a line through 16 to 512", gap, gap, gap, "extrapolated, no spread", file="../benchmarks/inversion_memory.json", why="only when all voxels are one tensor; batch by batch, free voxels need the least of all")]


def build(results=RESULTS):
    "All claims, in the order of the methods."
    results = Path(results)
    rows = [
        *transfer(results), *heads(results), *topology(results),
        *continual(results, "continual_small", "patterns: three stages of 32 x 32 pixels"),
        *continual(results, "continual_synthetic", "generated: reports, X-rays, CT, MRI, tiles"),
        *continual(results, "continual_real", "real: reports, X-rays, CT, MRI, tiles"),
        *pools(results, "invcoss_pools", "75 images of 32 x 32"), *pools(results, "invcoss_real", "real, 16 images"), *memory(results),
    ]
    return sorted(rows, key=lambda c: ("pcrlv2", "brainmvp", "taco", "medcoss", "invcoss").index(c.method))


def main():
    from medssl_nb.plot.volume import png

    path = write_claims(build(), RESULTS / "claims.jsonl")
    rows = read_claims(path)
    (RESULTS / "claims.png").write_bytes(png(show_claims(rows), dpi=80))
    print(claims_text(rows))
    print(path)


if __name__ == "__main__":
    main()
