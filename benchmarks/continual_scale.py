"""A simulated stage of up to 100 000 cases: time and memory of opening reports, planning and resuming mixed steps, choosing a buffer by chance and by k-means, and writing it.

    python benchmarks/continual_scale.py                  # writes benchmarks/continual_scale.json and continual_scale.png
    python benchmarks/continual_scale.py --sizes 100 1000 # quicker

Form and measures are those of scale.py: each measurement is a process of its own, `cpu` its processor time, `extra` its peak of resident memory above what it had after imports (Linux only);
of k-means also `own`, the peak without the pages of the features' file, which the system takes back when it needs them.
The new stage has `n` cases, its buffer 5 % of `n`; features are of width 768, as of a ViT-B, in float32 on disk. The volumes of the buffer are real files of 2 kB.
"""
import json
import shutil
import tempfile
import threading
from pathlib import Path

from measure import child, command, facts, save, status, versions, watched
from scale import figure, growth

HERE = Path(__file__).parent
SIZES = (100, 1000, 10000, 100000)
WIDTH, BATCH = 768, 64
PARTS = {
    "text": "open reports, look at each",
    "plan": "an epoch of mixed steps: keys",
    "resume": "the first keys at step 1 000 000",
    "chance": "a buffer by chance, and by reservoir",
    "kmeans": "a buffer by k-means (above 5 000 in pieces)",
    "write": "write a buffer of 5 %",
}


def simulate(root, n):
    "A prepared stage of `n` cases (files for those of its buffer alone), one of reports, and features."
    import numpy as np

    from medssl_nb.core import write_jsonl
    from medssl_nb.data.cases import pack_case, pack_mark
    from medssl_nb.data.phantom import report_phantom
    from medssl_nb.data.stages import part, random_rows

    (root / "stage" / "volumes").mkdir(parents=True)
    (root / "reports").mkdir()
    rng = np.random.default_rng(0)
    like, made = pack_case(dict(case="c", subject="s", session="", split=None, group="", dims=3, channels=["mr"], spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=""), rng.random((1, 8, 8, 8)))
    info = json.loads(made.pop("json"))
    info.pop("sum")

    def row(i):
        return dict(like, case=f"c-{i:012x}", subject=f"s-{i // 2:012x}")

    write_jsonl(root / "stage" / "index.jsonl", map(row, range(n)))
    for i in random_rows(n, part(n)):
        for k, b in {**made, "json": pack_mark(dict(info, row=row(int(i))))}.items():
            (root / "stage" / "volumes" / f"{row(int(i))['case']}.{k}").write_bytes(b)
    words = [r["text"] for r in report_phantom(50)]
    write_jsonl(root / "reports" / "index.jsonl", [])
    write_jsonl(root / "reports" / "reports.jsonl", (dict(case=f"c-{i:012x}", subject=f"s-{i // 2:012x}", session=None, group="", split=None, labels={"class": ["well", "ill"][i % 2]}, text=words[i % 50]) for i in range(n)))
    out = np.lib.format.open_memmap(root / "features.npy", "w+", np.float32, (n, WIDTH))
    mid = rng.standard_normal((64, WIDTH))
    for i in range(0, n, 4096):  # crowds, as encoders make them
        k = min(4096, n - i)
        out[i : i + k] = mid[rng.integers(64, size=k)] + 0.5 * rng.standard_normal((k, WIDTH))


def measure(part, root):
    "One part, in this process."
    import numpy as np
    import sklearn.cluster  # noqa: F401  a part of what is imported

    from medssl_nb.data import cases as c, stages as s

    root, out = Path(root), {}
    prepared = c.Prepared(root / "stage")
    data = c.Cases(prepared, region=(6, 6, 6)) if part in ("plan", "resume") else None
    n = len(prepared)
    if data:
        buffer = c.Cases(prepared, prepared.rows.take(s.random_rows(n, s.part(n))), region=(6, 6, 6))
        mix = s.Mixed(data, dict(old=buffer))
    with watched(out):
        if part == "text":
            out["cases"] = len(s.TextCases(root / "reports", target="class"))
        elif part == "plan":
            steps = mix.items(BATCH, 1).length
            out["steps"], out["share"] = sum(1 for _ in mix.loader(BATCH, 1, steps=steps).sampler), round(mix.share(BATCH), 4)
        elif part == "resume":
            next(iter(mix.loader(BATCH, 1, start=1_000_000, steps=1_000_001).sampler))
        elif part == "chance":
            out["kept"] = [len(f(n, s.part(n), 1)) for f in (s.random_rows, s.reservoir)]
        elif part == "kmeans":
            own, done = [status("RssAnon")], threading.Event()

            def watch():
                while not done.wait(0.02):
                    own.append(status("RssAnon"))

            threading.Thread(target=watch, daemon=True).start()
            rows, out["facts"] = s.kmeans_buffer(np.load(root / "features.npy", mmap_mode="r"))
            done.set()
            out.update(kept=len(rows), own=max(own) - own[0])
        elif part == "write":
            shutil.rmtree(root / "buffer", ignore_errors=True)
            out["kept"] = s.write_buffer(prepared, prepared.rows.take(s.random_rows(n, s.part(n))), root / "buffer", "stage", "random")["cases"]
    return out


def draw(sizes, table, path):
    figure(sizes, table, PARTS, path, {"the features themselves, float32": ([4 * WIDTH * n / 1e6 for n in sizes], dict(ls=":", c="k", lw=1))}, height=4.6)


def main(sizes):
    table = {p: [] for p in PARTS}
    for n in sizes:
        root = Path(tempfile.mkdtemp(prefix="continual"))
        try:
            simulate(root, n)
            for part in PARTS:
                table[part].append(child(__file__, "--measure", part, root))
                print(n, part, table[part][-1], flush=True)
        finally:
            shutil.rmtree(root)
    assert [r["kept"] for r in table["write"]] == [n // 20 for n in sizes]
    row = dict(
        goal="time linear, memory flat, as cases grow 10x, 100x, 1000x", sizes=list(sizes), width=WIDTH, batch=BATCH, **growth(sizes, table), parts=PARTS, results=table,
        **facts("machine", "cpus", "load", "python"), versions=versions("torch", "numpy", sklearn="scikit-learn"),
    )
    save(HERE / "continual_scale.json", row)
    draw(sizes, table, HERE / "continual_scale.png")
    print(json.dumps({k: row[k] for k in ("seconds_slopes", "bytes_a_case")}, indent=1))


if __name__ == "__main__":
    command(__doc__, main, measure, SIZES)
