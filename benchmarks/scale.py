"""A simulated study of up to 100 000 cases: time and memory of reading the manifest, resuming `prepare`, reading the index, building the data set, drawing orders and regions, and loading with worker processes.

    python benchmarks/scale.py                  # writes benchmarks/scale.json and scale.png; needs about 2 GB of disk for a while
    python benchmarks/scale.py --sizes 100 1000 # quicker

Each measurement is a process of its own. `seconds` is processor time of that process (the machine is shared; the clock is kept beside it), `extra` its peak of resident memory above what it had after
imports (Linux only). Goal (DESIGN 6): time linear, memory flat. A case is 3-D with four modalities and a segmentation; its volumes are real files of 2 kB, and its commit mark is a real one.
"""
import contextlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path

from measure import child, command, facts, save, versions, watched

HERE = Path(__file__).parent
SIZES = (100, 1000, 10000, 100000)
PARTS = {
    "manifest": "read the manifest, check every row",
    "resume": "prepare, all but one case finished",
    "index": "read the index of the prepared set",
    "cases": "choose cases, build the data set",
    "epoch": "an epoch of orders and places",
    "load": "1000 regions by 2 worker processes",
}


def simulate(root, n):
    "A manifest of `n` cases, prepared but for one."
    import numpy as np

    from medssl_nb.core import write_jsonl
    from medssl_nb.data.cases import MODALITIES, pack_case, pack_mark
    from medssl_nb.data.prepare import PrepareConfig, about, fingerprint, voxel_settings
    from medssl_nb.data.volume import Grid, probe, write_nifti

    for d in ("scans", "manifest/private", "prepared/volumes"):
        (root / d).mkdir(parents=True)
    rng, grid = np.random.default_rng(0), Grid((8, 8, 8), np.eye(4)[:, [2, 1, 0, 3]])
    files = {}
    for m in ("t1", "t1c", "t2", "flair", "seg"):
        p = root / "scans" / f"{m}.nii.gz"
        write_nifti(p, rng.integers(0, 3 if m == "seg" else 900, (8, 8, 8)).astype(np.int16), grid)
        files[m] = {k: v for k, v in probe(p).items() if k not in ("dims", "look")}

    def row(i):
        f = {m: dict(file=f"f-{i:08x}{k}", **e) for k, (m, e) in enumerate(files.items())}
        return dict(case=f"c-{i:012x}", subject=f"s-{i // 2:012x}", session="", dims=3, images={m: e for m, e in f.items() if m in MODALITIES}, labels={"seg": f["seg"], "class": ["well", "ill"][i % 2]}, group="", split=None)

    write_jsonl(root / "manifest" / "private" / "paths.jsonl", (dict(file=f"f-{i:08x}{k}", root=str(root / "scans"), paths=[f"{m}.nii.gz"]) for i in range(n) for k, m in enumerate(files)))
    write_jsonl(root / "manifest" / "cases.jsonl", map(row, range(n)))
    text = json.dumps(voxel_settings(PrepareConfig()), sort_keys=True)
    like, made = pack_case(dict(case="c", dims=3, channels=["t1", "t1c", "t2", "flair"], spacing=[1.0, 1.0, 1.0]), rng.random((4, 8, 8, 8)), rng.integers(0, 3, (1, 8, 8, 8)))
    info = json.loads(made.pop("json"))  # one volume for all, its mark with the names of each
    info.pop("sum")
    v = root / "prepared" / "volumes"

    def finished(i):
        r = row(i)
        new = dict(like, case=r["case"], **about(r), fingerprint=fingerprint(r, text))
        for k, b in {**made, "json": pack_mark(dict(info, row=new))}.items():
            (v / f"{r['case']}.{k}").write_bytes(b)
        return new

    write_jsonl(root / "prepared" / "index.jsonl", map(finished, range(n - 1)))


def resident(pid="self"):
    "Own memory of a process, bytes: what it alone holds (`Private`), without pages shared with others or with the file cache."
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return sum(int(line.split()[1]) * 1024 for line in f if line.startswith("Private_"))


def measure(part, root):
    "One part, in this process."
    root = Path(root)
    import io

    from medssl_nb.data import cases as c, prepare as p  # noqa: F401

    quiet = contextlib.redirect_stdout(io.StringIO())
    out = {}
    prepared = c.Prepared(root / "prepared") if part in ("cases", "epoch", "load") else None
    data = c.Cases(prepared, region=(6, 6, 6), seg=True, target="class") if part in ("epoch", "load") else None
    with watched(out):
        if part == "manifest":
            man = c.Manifest(root / "manifest")
            man.paths("f-00000000" + "0")
            out["files"] = len(man.private()[0])
        elif part == "resume":
            with quiet, contextlib.redirect_stderr(io.StringIO()):
                s = p.prepare(p.PrepareConfig(manifest=str(root / "manifest"), out=str(root / "prepared"), progress=False))
            out["kept"], out["prepared"] = s["kept"], s["prepared"]
        elif part == "index":
            out["rows"] = len(c.Prepared(root / "prepared"))
        elif part == "cases":
            rows = prepared.select(dims=3, channels=["t1", "flair"])
            data = c.Cases(prepared, rows, region=(6, 6, 6), seg=True, target="class")
            out["pickled"] = len(pickle.dumps(data))
        elif part == "epoch":
            import torch

            s, k = c.StepSampler(len(data), 8, seed=1), 0
            for step in range(s.steps_per_epoch):
                for i, seed in s.keys(step):
                    r = data.rows[i]
                    data._start(r, r["shape"], data.region, torch.Generator().manual_seed(seed))
                    k += 1
            out["draws"] = k
        elif part == "load":
            import psutil

            private = []
            for b, _ in enumerate(c.make_loader(data, 10, seed=1, steps=100, workers=2)):
                if b in (5, 95):
                    private.append([resident(q.pid) for q in psutil.Process().children() if "resource_tracker" not in " ".join(q.cmdline())])
            out["worker_private"] = [max(x) for x in private]  # after a few batches, after many
    return out


def slope(x, y):
    "Exponent between neighbours on a log-log plot: 1 is linear, 0 flat."
    import math

    return [round(math.log(max(b, 1e-9) / max(a, 1e-9)) / math.log(q / p), 2) for p, q, a, b in zip(x, x[1:], y, y[1:])]


def figure(sizes, table, parts, path, guides, untimed=(), height=4.8):
    "Time and memory over cases, on logarithmic axes. `guides`: label -> MB for each size, style."
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, height), layout="constrained")
    a, b = fig.subplots(1, 2)
    for part, rows in table.items():
        if part not in untimed:
            a.plot(sizes, [max(r["cpu"], 1e-3) for r in rows], "o-", ms=4, label=f"{parts[part]} ({slope(sizes, [r['cpu'] for r in rows])[-1]:.2f})")
        b.plot(sizes, [max(r["extra"] / 1e6, 0.1) for r in rows], "o-", ms=4, label=parts[part])
        if "own" in rows[0]:
            b.plot(sizes, [max(r["own"] / 1e6, 0.1) for r in rows], "s--", ms=4, color=b.lines[-1].get_color(), label="of it without the file's pages")
    a.plot(sizes, [1e-3 * n for n in sizes], "k:", lw=1, label="1 ms a case")
    for label, (mb, style) in guides.items():
        b.plot(sizes, mb, label=label, **style)
    a.set(xscale="log", yscale="log", xlabel="cases", ylabel="processor seconds", title="time (last slope; 1 is linear)")
    b.set(xscale="log", yscale="log", xlabel="cases", ylabel="MB above imports, at the peak", title="memory")
    for ax in (a, b):
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)


def growth(sizes, table, untimed=()):
    "Exponents of time, and bytes of each further case between the two largest sizes."
    return dict(seconds_slopes={p: slope(sizes, [x["cpu"] for x in r]) for p, r in table.items() if p not in untimed},
                bytes_a_case={p: round((r[-1]["extra"] - r[-2]["extra"]) / (sizes[-1] - sizes[-2])) for p, r in table.items()})


def draw(sizes, table, path):
    guides = {
        "one loader worker, its own pages in all": ([r["worker_private"][-1] / 1e6 for r in table["load"]], dict(ls="--", c="k")),
        "a list of dictionaries, 7 kB a case": ([7e-3 * n for n in sizes], dict(ls=":", c="k", lw=1)),
    }
    figure(sizes, table, PARTS, path, guides, ("load",))


def main(sizes, keep=None):
    table = {p: [] for p in PARTS}
    for n in sizes:
        root = Path(keep) / str(n) if keep else Path(tempfile.mkdtemp(prefix="scale"))
        try:
            if not (root / "prepared" / "index.jsonl").exists():
                simulate(root, n)
            for f in (root / "prepared" / "volumes").glob(f"c-{n - 1:012x}.*"):
                f.unlink()  # the one that is left to do
            for part in PARTS:
                table[part].append(child(__file__, "--measure", part, root))
                print(n, part, table[part][-1], flush=True)
        finally:
            if not keep:
                shutil.rmtree(root)
    assert all(r["kept"] == n - 1 and r["prepared"] == 1 for n, r in zip(sizes, table["resume"]))
    row = dict(
        goal="time linear, memory flat, as cases grow 10x, 100x, 1000x", sizes=list(sizes), **growth(sizes, table, ("load",)), bytes_a_case_between=dict(n0=sizes[-2], n1=sizes[-1]), parts=PARTS, results=table,
        **facts("machine", "cpus", "python"), versions=versions("torch", "numpy", "blosc2"),
    )
    save(HERE / "scale.json", row)
    draw(sizes, table, HERE / "scale.png")
    print(json.dumps({k: row[k] for k in ("seconds_slopes", "bytes_a_case")}, indent=1))


if __name__ == "__main__":
    command(__doc__, main, measure, SIZES, keep=dict(help="folder in which simulated studies stay for the next run"))
