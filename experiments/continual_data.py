"""The data of the continual experiments, as prepared folders: one a stage, each with a split by person and a label to probe with.

    python experiments/continual_data.py OUT --real REAL      # REAL: the folder with MANIFEST.csv -> OUT/real/{report,xray,ct,mri,path}
    python experiments/continual_data.py OUT --synthetic 600  # the same five out of our own generators -> OUT/synthetic/...
    python experiments/continual_data.py OUT --patterns 1500  # gratings, lattices, objects of continual.md, section 6 -> OUT/patterns2d/..., OUT/patterns3d/...
    python experiments/continual_data.py OUT ... --pictures DIR   # and a mosaic of each, to look at

The order of the stages is that of MedCoSS: reports, X-rays, CT, MRI, pathology (medcoss.md, section 2.1, in small: 2-D 64 x 64, 3-D slabs of 16 x 48 x 48 voxels). Patterns come in the order of
the pilot: A, C, B. Beside the folders of a study lies `stages.json`: name, kind, channels, size, label and counts of each stage. Real images and texts stay in OUT, which is no place inside the
repository; where the real data are missing that is said, and nothing is made up in their stead.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

from medssl_nb.core import UserError, read_json, write_json, write_jsonl
from medssl_nb.data.cases import Prepared, pack_case, split_by_subject, store, write_index
from medssl_nb.data.ingest import IngestConfig, ingest
from medssl_nb.data.patterns import FAMILIES, SIDES, pattern_case
from medssl_nb.data.phantom import TILE_CLASSES, chest_case, head_case, report_phantom, tile_case, unit, xray_case
from medssl_nb.data.prepare import PrepareConfig, prepare
from medssl_nb.data.stages import report_rows

SIZE, SLAB, TEST = 64, (16, 48, 48), 0.25  # pixels; voxels; share of the people put aside
STAGES = ("report", "xray", "ct", "mri", "path")
SEQUENCES = ("t1", "t1c", "t2", "flair")


def say(*words):
    print(*words, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- writing


def write_stage(out, cases, group=64):
    "A prepared folder out of `(row, image, seg)`; rows hold case, subject, channels, split, labels; images are `(C, D, H, W)`."
    out, todo, names = Path(out), [], []
    for row, image, seg in cases:
        dims = 3 if image.shape[1] > 1 else 2
        row = dict(dict(session="", group="", spacing=[1.0] * 3, fingerprint="", dims=dims), **row)
        todo.append((row["case"], pack_case(row, image, seg)[1]))
        names.append(row["case"])
        if len(todo) == group:
            store(out, todo)
            todo = []
    if todo:
        store(out, todo)
    write_index(out, names)
    return out


def sides(rows, seed=0, stratify=None):
    "subject -> 'train' or 'test'"
    rows = [dict(r, case=r["path"]) for r in rows]
    parts = split_by_subject(rows, dict(train=1 - TEST, test=TEST), seed, stratify)
    return {r["subject"]: name for name, part in parts.items() for r in part}


def describe(root, names, targets):
    "`stages.json`: what the stages are, in their order."
    out = []
    for n in names:
        p = Prepared(root / n)
        rows = p.rows if len(p) else report_rows(p)
        labels = [(r.get("labels") or {}).get(targets[n]) for r in rows]
        one = dict(
            name=n,
            kind="text" if not len(p) else f"{p.rows[0]['dims']}d",
            channels=list(p.channels) if len(p) else ["report"],
            size=p.rows[0]["shape"][-p.rows[0]["dims"] :] if len(p) else None,
            target=targets[n],
        )
        one.update(
            {s: sum(r.get("split") == s for r in rows) for s in ("train", "test")},
            subjects=len({r["subject"] for r in rows}),
            seg=sum(bool(r.get("seg")) for r in rows),
            classes={str(k): labels.count(k) for k in sorted({v for v in labels if v is not None}, key=str)},
        )
        people = {s: {r["subject"] for r in rows if r.get("split") == s} for s in ("train", "test")}
        if people["train"] & people["test"]:
            raise UserError(f"stage {n}: {len(people['train'] & people['test'])} person(s) on both sides", "patients kept apart")
        out.append(one)
    write_json(root / "stages.json", out)
    return out


def stages(root):
    "The stages of a study, with the folder of each."
    return [dict(s, dir=Path(root) / s["name"]) for s in read_json(Path(root) / "stages.json")]


# ------------------------------------------------------------------------------------------- real images


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, list(rows[0]))
        w.writeheader()
        w.writerows(rows)
    return path


def through(root, name, src=None, prepared=None, size=None, spacing=None, crop="auto", test_share=0.0, **kw):
    "The package's own way: ingest, prepare; a prepared folder."
    man, out = root / "private" / f"{name}.manifest", prepared or root / name
    ingest(IngestConfig(src=src, out=man, progress=False, workers=0, **kw))
    prepare(
        PrepareConfig(
            manifest=str(man), out=str(out), size=size, spacing=spacing, crop=crop, test_share=test_share, workers=0, progress=False
        )
    )
    return out


def real_reports(real, root):
    "Indiana: findings and impression of at least three words; class by MeSH. The words stay as they are."
    rows = list(csv.DictReader(open(real / "reports" / "indiana_reports.csv", encoding="utf-8")))
    keep = [r for r in rows if len(f"{r['findings']} {r['impression']}".split()) >= 3]
    t = table(
        root / "private" / "report.csv",
        [
            dict(
                uid=r["uid"],
                label="normal" if r["MeSH"].strip().lower() == "normal" else "abnormal",
                findings=r["findings"],
                impression=r["impression"],
            )
            for r in keep
        ],
    )
    say(f"report: {len(rows) - len(keep)} of {len(rows)} reports have fewer than three words")
    return through(root, "report", t, layout="text", text_columns=("findings", "impression"), label_columns=("label",), test_share=TEST)


def real_xrays(real, root):
    "NIH: 256 x 256 -> 64 x 64; without or with a finding."
    rows = list(csv.DictReader(open(real / "cxr" / "nih" / "labels.csv", encoding="utf-8")))
    rows = [
        dict(
            path=f"cxr/nih/images/{r['file']}",
            subject=r["patient_id"],
            modality="xr",
            role="image",
            label="normal" if r["finding_labels"] == "No Finding" else "abnormal",
            finding=r["finding_labels"],
        )
        for r in rows
    ]
    side = sides([dict(r, labels={"label": r["label"]}) for r in rows])
    t = table(root / "private" / "xray.csv", [dict(r, split=side[r["subject"]]) for r in rows if (real / r["path"]).is_file()])
    return through(root, "xray", real, table=t, label_columns=("label", "finding"), size=SIZE)


def real_tiles(real, root):
    "LC25000: 224 x 224 -> 64 x 64; three classes; the clusters of like tiles stand for patients."
    rows = list(csv.DictReader(open(real / "histology" / "lc25000_lung" / "labels.csv", encoding="utf-8")))
    rows = [
        dict(
            path=f"histology/lc25000_lung/{r['file']}",
            subject=f"{r['class']}-{r['cluster']}",
            modality="he",
            role="image",
            label=r["class"],
            site="lung",
        )
        for r in rows
    ]
    side = sides([dict(r, labels={"label": r["label"]}) for r in rows], stratify="label")
    t = table(root / "private" / "path.csv", [dict(r, split=side[r["subject"]]) for r in rows])
    return through(root, "path", real, table=t, label_columns=("label", "site"), size=SIZE)


def slabs(prepared, channel, stride, trim=0.0, side=SLAB[1], depth=SLAB[0], label=None, split=None):
    "Volumes as slabs, one a channel and place: letterboxed and resized in plane, the last one shifted back to fit."
    p = Prepared(prepared)
    for r in p.rows:
        for c in r["channels"]:
            x = torch.from_numpy(p.read(r, channels=[c])[0])[0]
            cut = int(trim * len(x))
            x = x[cut : len(x) - cut]
            h, w = x.shape[1:]
            n = max(h, w)
            x = torch.nn.functional.pad(x, ((n - w) // 2, n - w - (n - w) // 2, (n - h) // 2, n - h - (n - h) // 2))
            x = torch.nn.functional.interpolate(x[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]
            if len(x) < depth:
                say(f"{r['case']}: {len(x)} slices are fewer than {depth}: left out")
                continue
            starts = sorted({*range(0, len(x) - depth + 1, stride), len(x) - depth})
            for k, z in enumerate(starts):
                slab = x[z : z + depth].numpy()
                if slab.std() < 0.02:
                    continue  # air
                labels = dict(
                    r["labels"],
                    sequence=c,
                    position=("low", "middle", "high")[min(3 * k // len(starts), 2)],
                    **(label(r, c) if label else {}),
                )
                yield (
                    dict(
                        case=f"{r['case']}-{c}-{k:02d}",
                        subject=r["subject"],
                        channels=[channel],
                        split=split(r) if split else r["split"],
                        labels=labels,
                        spacing=[r["spacing"][0], r["spacing"][1] * n / side, r["spacing"][2] * n / side],
                    ),
                    slab[None],
                    None,
                )


def volumes(real, parts, modality=None, roles=("image",), without=()):
    "Rows of MANIFEST.csv as rows of a table."
    rows = [
        r
        for r in csv.DictReader(open(real / "MANIFEST.csv", encoding="utf-8"))
        if r["path"].startswith(parts) and r["role"] in roles and r["kind"] in ("file", "series")
    ]
    kind = lambda m: (
        "ct"
        if m.startswith("CT")
        else {"MR T1": "t1", "MR T1c": "t1c", "MR T2": "t2", "MR FLAIR": "flair"}.get(m, "" if m == "label" else "other")
    )
    rows = [
        dict(
            path=r["path"],
            subject=r["subject"],
            case=r["subject"] + ("" if modality == "mri" else "-ct"),
            modality=kind(r["modality"]),
            role=r["role"],
            part=r["body_part"],
            site=r["path"].split("/")[1],
        )
        for r in rows
    ]
    return [
        r
        for r in rows
        if r["subject"] not in without and (r["modality"] == "ct" if modality == "ct" else r["modality"] in (*SEQUENCES, ""))
    ]


def real_ct(real, root):
    "Six people, chest, abdomen and legs, 2 mm; one abdomen and one leg are put aside."
    test = ("TotalSegmentator-example_ct", "STS_024")
    rows = [dict(r, split="test" if r["subject"] in test else "train") for r in volumes(real, ("ct/", "multimodal/"), "ct")]
    src = through(
        root,
        "ct",
        real,
        root / "private" / "ct.prepared",
        table=table(root / "private" / "ct.csv", rows),
        label_columns=("part", "site"),
        spacing=(2.0, 2.0, 2.0),
    )
    return write_stage(root / "ct", slabs(src, "ct", stride=8))


def real_mri(real, root):
    "Five brains in up to four sequences, 2 mm, and 120 crops of hippocampi with their labels."
    rows = [dict(r, split="test" if r["site"] in ("tcga_lgg", "ms_ljubljana") else "train") for r in volumes(real, ("brain/",), "mri")]
    src = through(
        root,
        "brain",
        real,
        root / "private" / "brain.prepared",
        table=table(root / "private" / "brain.csv", rows),
        label_columns=("part", "site"),
        spacing=(2.0, 2.0, 2.0),
    )
    hip = [r for r in csv.DictReader(open(real / "MANIFEST.csv", encoding="utf-8")) if r["group"] == "small3d_segmentation"]
    side = sides(hip)
    hip = [
        dict(
            path=r["path"],
            subject=r["subject"],
            case=r["coreg_group"],
            modality="t1" if r["role"] == "image" else "",
            role=r["role"],
            split=side[r["subject"]],
            part="hippocampus",
            site="msd",
        )
        for r in hip
    ]
    crops = through(
        root,
        "hippocampus",
        real,
        root / "private" / "hippocampus.prepared",
        table=table(root / "private" / "hippocampus.csv", hip),
        label_columns=("part", "site"),
        spacing=(2.0, 1.0, 1.0),
        crop="off",
    )

    def both():
        yield from slabs(src, "mr", stride=4, trim=0.1)
        p = Prepared(crops)
        for r in p.rows:
            image, seg = (fit(v, SLAB) for v in (p.read(r)[0], p.read_seg(r)))
            yield (
                dict(
                    case=r["case"], subject=r["subject"], channels=["mr"], split=r["split"], labels=dict(r["labels"], sequence="t1"), spacing=r["spacing"]
                ),
                image,
                seg,
            )

    return write_stage(root / "mri", both())


def fit(x, shape):
    "The middle of an array, padded with zeros where it is too small."
    for a, (n, m) in enumerate(zip(x.shape[1:], shape), 1):
        if n > m:
            x = x.take(range((n - m) // 2, (n - m) // 2 + m), a)
        elif n < m:
            x = np.pad(x, [((m - n) // 2, m - n - (m - n) // 2) if i == a else (0, 0) for i in range(x.ndim)])
    return x


REAL_TARGETS = dict(report="label", xray="label", ct="part", mri="sequence", path="label")


def write_real(real, root):
    "All five; a folder that is missing is said, and its stage left out."
    need = dict(
        report="reports/indiana_reports.csv", xray="cxr/nih/labels.csv", ct="ct", mri="brain", path="histology/lc25000_lung/labels.csv"
    )
    make, done = dict(report=real_reports, xray=real_xrays, ct=real_ct, mri=real_mri, path=real_tiles), []
    for n in STAGES:
        if not (real / need[n]).exists():
            say(f"SKIPPED stage {n}: {need[n]} is not in the folder of real data")
            continue
        make[n](real, root)
        done.append(n)
    return describe(root, done, REAL_TARGETS) if done else []


# ------------------------------------------------------------------------------------- our own generators


def sided(i, of):
    return "test" if i >= round(of * (1 - TEST)) else "train"


def synthetic_reports(root, n, seed):
    (root / "report").mkdir(parents=True, exist_ok=True)
    rows = (
        {
            "case": r["case"],
            "subject": f"s-chest{i:05d}",
            "session": None,
            "group": "",
            "split": sided(i, n),
            "labels": {"class": ("normal", "pneumonia")[r["class"]], "heart": ("normal", "enlarged")[r["findings"]["enlarged"]]},
            "text": r["text"],
        }
        for i, r in enumerate(report_phantom(n, seed))
    )
    write_jsonl(root / "report" / "index.jsonl", [])
    write_jsonl(root / "report" / "reports.jsonl", rows)


def synthetic_xrays(root, n, seed):
    def cases():
        for i in range(n):
            c = xray_case(seed, SIZE, i, depth=24, opacity=bool(i % 2))
            yield (
                {
                    "case": f"c-xray{i:05d}",
                    "subject": f"s-chest{i:05d}",
                    "channels": ["xr"],
                    "split": sided(i, n),
                    "labels": {"class": ("normal", "pneumonia")[c["class"]], "heart": ("normal", "enlarged")[c["findings"]["enlarged"]]},
                },
                c["image"][None, None],
                None,
            )

    write_stage(root / "xray", cases())


def synthetic_cts(root, n, seed):
    def cases():
        for i in range(n):
            c = chest_case(seed, SLAB, subject=100_000 + i, opacity=bool(i % 2))
            yield (
                {
                    "case": f"c-ct{i:05d}",
                    "subject": f"s-ct{i:05d}",
                    "channels": ["ct"],
                    "split": sided(i, n),
                    "labels": {"class": ("normal", "pneumonia")[i % 2]},
                    "spacing": list(c["spacing"]),
                },
                np.clip((c["hu"] + 1000) / 2000, 0, 1)[None],
                c["label"][None].astype(int),
            )

    write_stage(root / "ct", cases())


def synthetic_heads(root, n, seed):
    def cases():
        for i in range(n):
            m = SEQUENCES[i % 4]
            c = head_case(seed, SLAB, modalities=(m,), subject=i, background=False)
            yield (
                {
                    "case": f"c-head{i:05d}",
                    "subject": f"s-head{i:05d}",
                    "channels": ["mr"],
                    "split": sided(i, n),
                    "labels": {"class": m, "lesions": len(c["lesions"])},
                    "spacing": list(c["spacing"]),
                },
                unit(c["images"][m], floor=60)[None],
                c["label"][None].astype(int),
            )

    write_stage(root / "mri", cases())


def synthetic_tiles(root, n, seed):
    def cases():
        for i in range(n):
            kind = TILE_CLASSES[i % 3]
            c = tile_case(seed, SIZE, i, kind, slide=i // 3)
            yield (
                {
                    "case": f"c-tile{i:05d}",
                    "subject": f"s-slide{i // 3:05d}",
                    "channels": ["he.r", "he.g", "he.b"],
                    "split": sided(i // 3, (n + 2) // 3),
                    "labels": {"class": kind},
                },
                c["image"].transpose(2, 0, 1)[:, None] / 255,
                None,
            )

    write_stage(root / "path", cases())


def write_synthetic(root, n, seed=0):
    for name, make in zip(STAGES, (synthetic_reports, synthetic_xrays, synthetic_cts, synthetic_heads, synthetic_tiles)):
        say(f"synthetic {name}: {n}")
        make(root, n, seed)
    return describe(root, STAGES, dict.fromkeys(STAGES, "class"))


def write_patterns(root, n, dims=2, test=400, seed=0):
    "Gratings, lattices, objects; labels `class` (4) and `fine` (16)."

    def cases(f):
        for i in range(n + test):
            c = pattern_case(f, seed, i, dims=dims)
            yield (
                {
                    "case": f"c-{f}{i:05d}",
                    "subject": f"s-{f}{i:05d}",
                    "channels": ["mr"],
                    "split": "train" if i < n else "test",
                    "labels": {"class": c["class"], "fine": c["fine"], "detail": round(c["detail"], 4)},
                },
                c["image"][None] if dims == 3 else c["image"][None, None],
                None,
            )

    order = ("grating", "lattice", "object")
    assert set(order) == set(FAMILIES) and dims in SIDES
    for f in order:
        say(f"patterns {f}, {dims}-D: {n} + {test}")
        write_stage(root / f, cases(f))
    return describe(root, order, dict.fromkeys(order, "fine"))


# ---------------------------------------------------------------------------------------------- pictures


def mosaic(dir, rows=6, cols=12, seed=0):
    "Cases by chance; of a volume the middle slice."
    from matplotlib.figure import Figure

    p = Prepared(dir)
    fig = Figure(figsize=(cols * 0.9, rows * 1.0), layout="constrained")
    if not len(p):
        texts = report_rows(p)
        at = np.random.default_rng(seed).permutation(len(texts))[:8]
        fig.text(
            0.01,
            0.98,
            "\n\n".join(f"[{texts[int(i)]['labels']}] {texts[int(i)]['text'][:300]}" for i in at),
            va="top",
            fontsize=6,
            wrap=True,
        )
        return fig
    at = np.random.default_rng(seed).permutation(len(p))[: rows * cols]
    for ax in (axs := fig.subplots(rows, cols).ravel()):
        ax.axis("off")
    for ax, i in zip(axs, at):
        r = p.rows[int(i)]
        x = p.read(r)[0]
        x = x[:, x.shape[1] // 2] if r["dims"] == 3 else x
        ax.imshow(x.transpose(1, 2, 0) if len(x) == 3 else x[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if r.get("seg"):
            s = p.read_seg(r)[0]
            if (m := s[s.shape[0] // 2]).any():
                ax.contour(m > 0, [0.5], colors="r", linewidths=0.5)
        ax.set_title(" ".join(str(v) for v in (r.get("labels") or {}).values())[:22], fontsize=4, pad=1)
    return fig


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out", type=Path)
    a.add_argument("--real", type=Path)
    a.add_argument("--synthetic", type=int)
    a.add_argument("--patterns", type=int)
    a.add_argument("--test", type=int, default=400, help="patterns put aside, each family")
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--pictures", type=Path)
    a = a.parse_args()
    made = {}
    if a.real:
        if not (a.real / "MANIFEST.csv").is_file():
            sys.exit(f"SKIPPED: no MANIFEST.csv in {a.real}, so there are no real images")
        made["real"] = write_real(a.real, a.out / "real")
    if a.synthetic:
        made["synthetic"] = write_synthetic(a.out / "synthetic", a.synthetic, a.seed)
    if a.patterns:
        for d in (2, 3):
            made[f"patterns{d}d"] = write_patterns(a.out / f"patterns{d}d", a.patterns, d, a.test, a.seed)
    for study, rows in made.items():
        for s in rows:
            print(study, json.dumps(s))
            if a.pictures:
                a.pictures.mkdir(parents=True, exist_ok=True)
                mosaic(a.out / study / s["name"]).savefig(a.pictures / f"{study}_{s['name']}.png", dpi=110)
