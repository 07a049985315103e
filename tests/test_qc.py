"""The QC page: on the samples, on real scans, in a browser, and with more cases than anybody looks at."""
import contextlib
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medssl_nb.data.cases import Manifest
from medssl_nb.qc import QcConfig, copies, doubts, entries, gather, qc, read_looks

ROOT = Path(__file__).parent.parent
VOID = {"meta", "img", "br", "input", "link"}


def make(src, out, **kw):
    from medssl_nb.data.ingest import IngestConfig, ingest

    with contextlib.redirect_stdout(io.StringIO()):
        ingest(IngestConfig(src, out, workers=0, progress=False, **kw))
    return Manifest(out)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("qc")
    man = make(ROOT / "data_samples", tmp / "m")
    with contextlib.redirect_stdout(io.StringIO()):
        from medssl_nb.data.prepare import PrepareConfig, prepare

        prepare(PrepareConfig(manifest=str(tmp / "m"), out=str(tmp / "p"), limit=12, progress=False))
    return man, qc(QcConfig(manifest=tmp / "m", out=tmp / "qc.html", prepared=tmp / "p", workers=0, progress=False))["out"], tmp


class Checker(HTMLParser):
    "Every tag that opens closes, in order; what a reader of screens needs is there."

    def __init__(self):
        super().__init__()
        self.open, self.bad, self.heads, self.ids, self.captions, self.tables, self.images = [], [], [], [], 0, 0, 0

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids += [a["id"]] if "id" in a else []
        self.heads += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.tables += tag == "table"
        self.captions += tag == "caption"
        if tag == "img":
            self.images += 1
            self.bad += [] if a.get("alt") else ["an image without words"]
        if tag == "th" and "scope" not in a:
            self.bad.append("th without scope")
        for k in ("src", "href", "action"):
            if k in a and not a[k].startswith(("data:", "#")):
                self.bad.append(f"{k}={a[k][:60]}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(f"</{tag}> closes nothing")


def test_the_page_is_whole(samples):
    man, page, tmp = samples
    text = page.read_text()
    c = Checker()
    c.feed(text)
    assert not c.bad and not [t for t in c.open if t not in ("body", "html", "p", "li")], (c.bad[:5], c.open)
    assert c.captions == c.tables >= 5 and c.images == 48 and len(c.ids) == len(set(c.ids))
    assert all(b - a <= 1 for a, b in zip(c.heads, c.heads[1:])) and c.heads[0] == 1
    assert '<html lang="en">' in text and "<main" in text and len(text) < 1_500_000
    # problems first, and what is not looked for before everything
    assert text.index("Text burned into pixels") < text.index('id="problems"') < text.index('id="copies"') < text.index('id="pictures"')
    assert f"<b class=\"\">{len(man):,}</b>cases" in text
    assert "12 of" in text and "were not asked for" in text  # of the prepared folder


def test_no_name_is_on_the_page(samples):
    man, page, tmp = samples
    text = page.read_text()
    for row in map(json.loads, (man.dir / "private" / "paths.jsonl").read_text().splitlines()):
        for p in row["paths"]:
            assert Path(p).name not in text and p not in text
    assert str(tmp) not in text and str(ROOT) not in text


def test_numbers_are_those_of_the_manifest(samples):
    man, page, _ = samples
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S).group(1))
    images = [(c, m) for c in man.cases if c["dims"] > 1 for m in c["images"]]
    assert data["n"] == len(images)
    value = lambda k, i: data["cols"][k]["values"][data["cols"][k]["at"][i]]
    assert [(value(0, i), value(1, i)) for i in range(data["n"])] == [(c["case"], m) for c, m in images]
    from medssl_nb.data.volume import read_volume

    for i in (0, len(images) // 2, len(images) - 1):
        c, m = images[i]
        f = c["images"][m]
        x = read_volume(man.paths(f["file"]), f["format"], f["item"], f["channels"]).data
        x = x.mean(0) if len(x) == 3 else x
        for k, want in ((8, x.min()), (9, np.median(x)), (10, x.max())):
            assert abs(data["cols"][k]["values"][i] - want) <= 1e-3 * max(1, abs(want))


def browser():
    for n in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(n):
            return shutil.which(n)
    pytest.skip("no browser: the script of the page was not run (apt-get install chromium)")


def rendered(page, tmp_path, more=""):
    p = tmp_path / "page.html"
    p.write_text(page.read_text().replace("</body>", f"<script>{more}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom".split()
    r = subprocess.run([browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}", p.as_uri()], capture_output=True, text=True, timeout=120)
    return r.stdout


def test_the_table_sorts_in_a_browser(samples, tmp_path):
    _, page, _ = samples
    cells = lambda dom: [re.findall(r"<td[^>]*>(.*?)</td>", r) for r in re.findall(r"<tr>(.*?)</tr>", re.search(r'<table id="all">.*?<tbody>(.*?)</tbody>', dom, re.S).group(1))]
    rows = cells(rendered(page, tmp_path))
    assert len(rows) == 50 and all(len(r) == 12 for r in rows)
    highest = [float(r[10]) for r in cells(rendered(page, tmp_path, "document.querySelectorAll('#all thead th button')[10].click()"))]
    assert highest == sorted(highest) and highest[0] < highest[-1]
    down = [float(r[10]) for r in cells(rendered(page, tmp_path, "const b=document.querySelectorAll('#all thead th button')[10];b.click();b.click()"))]
    assert down == sorted(down, reverse=True) and down[0] > highest[-1]
    found = cells(rendered(page, tmp_path, "find.value='ct';pick()"))
    assert 0 < len(found) < 50 and all("ct" in " ".join(r) for r in found)


def test_a_broken_case_is_said_and_not_fatal(tmp_path):
    shutil.copytree(ROOT / "data_samples" / "bids" / "sub-01", tmp_path / "s" / "sub-01")
    shutil.copytree(ROOT / "data_samples" / "bids" / "sub-02", tmp_path / "s" / "sub-02")
    man = make(tmp_path / "s", tmp_path / "m")
    f = next(iter(man.cases[0]["images"].values()))
    p = man.paths(f["file"])[0]
    p.write_bytes(p.read_bytes()[:500])  # after ingest
    text = qc(QcConfig(manifest=tmp_path / "m", out=tmp_path / "q.html", workers=0, progress=False))["out"].read_text()
    assert "could not be read (truncated)" in text
    assert [r["error"] for r in read_looks(tmp_path / "m" / "looks.jsonl").values() if "error" in r] == ["truncated"]


def test_a_hostile_word_stays_a_word(tmp_path):
    "A class that is a piece of HTML does not become one; a class that names somebody is hidden even if the manifest holds it."
    shutil.copytree(ROOT / "data_samples" / "bids" / "sub-01", tmp_path / "s" / "sub-01")
    man = make(tmp_path / "s", tmp_path / "m", group="</script><script>alert(1)</script>")
    rows = [dict(r, labels=dict(r["labels"], **{"class": v})) for r, v in zip(man.cases, ["<img src=x onerror=alert(1)>", "Dr. Ottenwald"])]
    rows += [dict(man.cases[0], case="c-other", labels={"class": "Quistgaard^Zebulon"})]
    (tmp_path / "m" / "cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = qc(QcConfig(manifest=tmp_path / "m", out=tmp_path / "q.html", workers=0, progress=False))["out"].read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "Quistgaard" not in text and "(hidden)" in text


def test_real_labels_and_copies(real, tmp_path):
    "An MR whose header says CT is named; true CT are not accused; X-rays that exist in two sizes are found, and no others."
    if not (real / "nasty").is_dir():
        pytest.skip("NO REAL DATA: no nasty part")
    (tmp_path / "s").mkdir()
    for n in ("nasty/series/t1_17slices", "ct", "multimodal/sts", "cxr/nih", "brain/glioma_dicom"):
        (tmp_path / "s" / n.replace("/", "_")).symlink_to(real / n)
    from medssl_nb.data.ingest import IngestConfig, ingest

    rows, found = [], []
    for n in sorted((tmp_path / "s").iterdir()):
        with contextlib.redirect_stdout(io.StringIO()):
            ingest(IngestConfig(n.resolve(), tmp_path / n.name, key=tmp_path / "key", modality="xr" if "cxr" in n.name else "", workers=0, progress=False))
        man = Manifest(tmp_path / n.name)
        here = entries(man, gather(man, QcConfig(manifest=man.dir, workers=0, progress=False)))
        rows += here
        found += [(n.name, d["row"]["modality"], d["seems"]) for d in doubts(here)[0]]
    assert sum(r["modality"] == "ct" for r in rows) >= 5
    assert found == [("nasty_series_t1_17slices", "ct", "not ct in HU")], found
    # exchange T1 and T2 of the real heads: the pair rule notices, and says only 'possible'
    heads = [dict(r, modality=dict(t1="t2", t2="t1").get(r["modality"], r["modality"])) for r in rows if r["modality"] in ("t1", "t2", "flair", "t1c")]
    assert {(d["sure"], d["seems"]) for d in doubts(heads)[0]} >= {("possible", "t1"), ("possible", "t2")}
    twice = copies([r for r in rows if r["modality"] == "xr"])
    pairs = [{r["subject"] for r in c["rows"]} for c in twice]
    assert len(twice) == 4 and all(len(p) == 1 for p in pairs), twice
    assert not copies([r for r in rows if r["dims"] == 3])


def simulated(dir, n):
    "A manifest of `n` cases whose files do not exist, with the looks that a first page would have left."
    rng = np.random.default_rng(0)
    dir.mkdir()
    (dir / "private").mkdir()
    marks = rng.integers(0, 256, (n, 32), dtype=np.uint8)
    marks[n // 2] = marks[3]
    marks[n // 2, 0] ^= 5  # two bits: a copy under another person
    grid = dict(shape=[40, 50, 50], spacing=[4, 4, 4], affine=np.diag([4.0, 4, 4, 1]).tolist(), orientation="RAS", channels=1, dtype="int16", format="nifti", item=None)
    with open(dir / "cases.jsonl", "w") as c, open(dir / "looks.jsonl", "w") as k, open(dir / "private" / "paths.jsonl", "w") as p, open(dir / "problems.jsonl", "w") as w:
        for i in range(n):
            f = dict(grid, file=f"f-{i:012x}", sha256=f"{i:064x}")
            if i == 7:
                f = dict(f, spacing=[20, 4, 4])
            c.write(json.dumps(dict(case=f"c-{i:012x}", subject=f"s-{i // 2:012x}", session="", dims=3, images={"t1": f}, labels={}, group="", split=None)) + "\n")
            k.write(json.dumps(dict(file=f["file"], item=None, sha=f["sha256"][:16], look=1, q=list(range(13)), background=0.3, whole=True, voxels=f"{i:016x}", hist=[31] * 32, core=[0.1 * j for j in range(9)], air=0.0, soft=0.5, mark=marks[i].tobytes().hex())) + "\n")
            p.write(json.dumps(dict(file=f["file"], root="/nowhere", paths=[f"{i}.nii"])) + "\n")
            if i % 10 == 0:
                w.write(json.dumps(dict(file=f["file"], kind="spacing", reason="steps vary", severity="warning")) + "\n")
    return dir


def scale(tmp_path, n):
    d = simulated(tmp_path / f"m{n}", n)
    t = time.perf_counter()
    text = qc(QcConfig(manifest=d, out=tmp_path / "q.html", cases=6, workers=0, progress=False))["out"].read_text()
    return text, time.perf_counter() - t


def test_many_cases_make_a_small_page(tmp_path):
    "Pictures are a stated sample, all the rest is counted over all."
    text, _ = scale(tmp_path, 5000)
    assert len(text) < 5000 * 40 + 60_000 and f"6 of {5000:,} cases" in text
    assert '<b class="bad">1</b>groups of copies' in text and "nearly the same (2 of 256 bits differ)" in text and "c-000000000007" in text[text.index('id="outliers"') :]
    assert json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))["n"] == 5000
    assert "<td class=\"n\" data-v=\"500\">500</td>" in text  # all the warnings, not those of a sample


@pytest.mark.slow
def test_a_hundred_thousand(tmp_path):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text, seconds = scale(tmp_path, 100_000)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(f"\n100,000 cases: {len(text) / 1e6:.1f} MB page, {seconds:.0f} s, {grown:.2f} GB more memory")
    assert len(text) < 10_000_000 and "1</b>groups of copies" in text
