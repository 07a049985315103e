"""The file of claims is what `experiments/claims.py` makes of the committed tables, and every verdict is what its interval says."""
import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

from medssl_nb.cli import main
from medssl_nb.core import read_json, write_json
from medssl_nb.eval.claims import VERDICTS, read_claims

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("claims_of_results", ROOT / "experiments" / "claims.py")
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def test_committed_claims_are_those_of_the_tables(builder):
    stored, made = read_claims(RESULTS / "claims.jsonl"), builder.build()
    assert [(c.id, c.data) for c in stored] == [(c.id, c.data) for c in made], "run experiments/claims.py"
    for a, b in zip(stored, made):
        for k, v in asdict(b).items():
            if isinstance(v, float):
                assert getattr(a, k) == pytest.approx(v, rel=1e-9, abs=1e-12), f"{a.id}: {k}; run experiments/claims.py"
            elif k != "verdict":
                assert getattr(a, k) == v, f"{a.id}: {k}; run experiments/claims.py"


def test_every_method_is_judged_and_every_file_is_there():
    rows = read_claims(RESULTS / "claims.jsonl")
    assert {c.method for c in rows} == {"pcrlv2", "brainmvp", "taco", "medcoss", "invcoss"}
    assert all((RESULTS / c.file).is_file() for c in rows if c.ours is not None)
    for c in rows:  # a second reading of the rule, without the library
        if c.ours is None:
            assert c.verdict == VERDICTS[3]
        elif c.low is not None and not c.margin:
            assert (c.verdict == "reproduced") == (c.low > 0) and (c.verdict == "not reproduced") == (c.high < 0)


def test_a_table_that_changes_changes_the_claim(builder, tmp_path):
    "The number comes from the table and its sign is the right way round: ER made to forget nothing beats MedCoSS."
    for f in RESULTS.glob("*.json"):
        (tmp_path / f.name).write_bytes(f.read_bytes())
    d = read_json(tmp_path / "continual_small.json")
    for r in d["table"]:
        if (r["strategy"], r["score"], r["measure"]) == ("er", "linear", "average"):
            r["values"] = {s: 1.0 + 0.01 * i for i, s in enumerate(r["values"])}
    write_json(tmp_path / "continual_small.json", d)
    found = builder.continual(tmp_path, "continual_small", "patterns")
    before = builder.continual(RESULTS, "continual_small", "patterns")
    pick = lambda rows: next(c for c in rows if c.id == "medcoss.beats-er")
    assert pick(before).low > 0 and pick(found).high < 0
    same = lambda rows: [c for c in rows if c.id != "medcoss.beats-er"]
    assert same(found) == same(before)


def test_a_probe_on_two_people_is_no_claim(builder, tmp_path):
    "The CT of the real sequence holds out two people; what a probe says of them moves nothing, what it says of tiles does."
    d = read_json(RESULTS / "continual_real.json")
    assert d["people"]["ct"] < 10 <= min(n for s, n in d["people"].items() if s != "ct")
    before = builder.continual(RESULTS, "continual_real", "real")
    assert any("without ct" in c.what for c in before)
    for stage in ("ct", "path"):
        for v in d["stages"]["linear"]["invcoss"][stage].values():
            v[1] = 1.0
        write_json(tmp_path / "continual_real.json", d)
        after = builder.continual(tmp_path, "continual_real", "real")
        assert (after == before) == (stage == "ct")


def test_the_command_prints_them(capsys):
    assert main(["claims", "--method", "invcoss"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("invcoss") and "taco" not in out.splitlines()[0] and out.strip().splitlines()[-1].count(",") == 3
    assert main(["claims", str(RESULTS / "claims.jsonl"), "--verdict", "too large to test here"]) == 0
    assert "0 reproduced" in capsys.readouterr().out
    assert main(["claims", "--method", "invcos"]) == 2 and "did you mean 'invcoss'?" in capsys.readouterr().err


def test_arms_of_different_inputs_are_measured_from_a_twin_each(builder, tmp_path):
    "What lifts BrainMVP and the scratch twin of its input alike says nothing about BrainMVP; and the stored table is what the stored scores give."
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("heads_missing", ROOT / "experiments" / "heads_missing.py")
    m = module_from_spec(spec)
    spec.loader.exec_module(m)
    d = read_json(RESULTS / "heads_missing.json")
    part = d["parts"]["segment_gaps"]
    others = {("brainmvp", "mae"), ("brainmvp", "pcrlv2"), ("brainmvp", "rec"), ("taco", "mae"), ("taco", "brainmvp"), ("taco", "pcrlv2")}  # three inputs: [0, 1], over the head, of the whole crop
    pairs = lambda k: {(p["a"], p["b"]) for p in d["parts"][k]["net"]}
    assert pairs("segment_whole") == pairs("probe_gaps") == pairs("probe_whole") == others and pairs("segment_gaps") == others | {("brainmvp_t", "brainmvp"), ("brainmvp_t", "mae"), ("brainmvp_t", "pcrlv2")}
    close = lambda p, q: (p["a"], p["b"]) == (q["a"], q["b"]) and all(p[k] == pytest.approx(q[k], abs=1e-12) for k in ("full", "fewer", "drop"))
    assert all(map(close, part["net"], m.net_pairs(part)))
    by = {n: {(s, k): float(sum(v) / len(v)) for s, x in part["scores"][n].items() for k, v in x.items()} for n in ("brainmvp", "scratch01", "mae", "scratch")}
    whole = "+".join(d["plan"]["sequences"])
    gain = [by["brainmvp"][s, whole] - by["scratch01"][s, whole] - by["mae"][s, whole] + by["scratch"][s, whole] for s in map(str, range(5))]
    assert next(p for p in part["net"] if (p["a"], p["b"]) == ("brainmvp", "mae"))["full"][0] == pytest.approx(sum(gain) / 5, abs=1e-9)  # by hand
    for arm in ("brainmvp", "scratch01"):
        for by_subset in part["scores"][arm].values():
            for k, v in by_subset.items():
                by_subset[k] = [x + 0.3 for x in v]
    part["net"] = m.net_pairs(part)
    write_json(tmp_path / "heads_missing.json", d)
    pick = lambda rows: {c.id: (c.ours, c.low, c.high) for c in rows if c.id in ("brainmvp.beats-pcrlv2", "brainmvp.beats-mae", "taco.beats-brainmvp", "taco.robust-brainmvp")}
    before, after = pick(builder.heads(RESULTS)), pick(builder.heads(tmp_path))
    assert len(before) == 4 and all(after[k] == pytest.approx(v, abs=1e-9) for k, v in before.items())
    page = "\n".join(m.markdown(read_json(RESULTS / "heads_missing.json")))
    assert page.count("| pair, each minus its twin |") == 6 and "29 of 315 intervals" in page and page in (RESULTS / "heads_missing.md").read_text()


def test_areas_of_arms_of_different_inputs_too():
    "AUC by hand, four arms at once; the same shift of a pair and its twins cancels; the stored rows are what the stored tables say."
    from importlib.util import module_from_spec, spec_from_file_location

    import numpy as np
    from sklearn.metrics import roc_auc_score

    spec = spec_from_file_location("heads_missing", ROOT / "experiments" / "heads_missing.py")
    m = module_from_spec(spec)
    spec.loader.exec_module(m)
    rng, T = np.random.default_rng(0), np.arange(20) % 2
    P = {(a, s, k): T * 0.3 + rng.random(20) for a in ("brainmvp", "scratch01", "mae", "scratch") for s in (0, 1) for k in ("t1+t2", "t1", "t2")}
    rows = {a: [dict(arm=a, seed=s, case=f"c{i:02}", subject=f"s{i:02}", subset=k, n=k.count("+") + 1, target=int(T[i]), prob=[1 - v[i], v[i]]) for (b, s, k), v in P.items() if b == a for i in range(20)] for a in ("brainmvp", "scratch01", "mae", "scratch")}
    (got,) = m.net_areas(rows, [dict(a="brainmvp", b="mae"), dict(a="scratch01", b="scratch"), dict(a="brainmvp", b="cmr")])  # twins are no pair, and arms of one input need none
    auc = lambda a, ks: np.mean([roc_auc_score(T, P[a, s, k]) for s in (0, 1) for k in ks])
    gain = lambda ks: auc("brainmvp", ks) - auc("scratch01", ks) - auc("mae", ks) + auc("scratch", ks)
    assert got["full"][0] == pytest.approx(gain(["t1+t2"]), abs=1e-9) and got["fewer"][0] == pytest.approx(gain(["t1", "t2"]), abs=1e-9)
    assert got["drop"][0] == pytest.approx(gain(["t1", "t2"]) - gain(["t1+t2"]), abs=1e-9) and got["full"][1] < got["full"][0] < got["full"][2]
    rows["scratch01"], rows["scratch"] = ([dict(r, arm=b) for r in rows[a]] for a, b in (("brainmvp", "scratch01"), ("mae", "scratch")))
    assert m.net_areas(rows, [dict(a="brainmvp", b="mae")])[0]["full"] == pytest.approx([0, 0, 0], abs=1e-12)
    for k in ("probe_gaps", "probe_whole", "classify_gaps", "classify_whole"):
        p = read_json(RESULTS / "heads_missing.json")["parts"][k]
        score = {r["arm"]: r["score"][0] for r in p["tables"]["count"] if r["n"] == 4}
        for q in p["net"]:
            assert q["full"][0] == pytest.approx(score[q["a"]] - score[m.TWIN[q["a"]]] - score[q["b"]] + score[m.TWIN[q["b"]]], abs=1e-9), (k, q)


def test_rates_of_the_audit_are_counted_right(tmp_path):
    "Exact intervals by scipy; a patient is his own nearest in every order; the committed page is what the committed numbers say, and the verdict's counts are in them."
    from importlib.util import module_from_spec, spec_from_file_location

    from scipy.stats import binomtest

    spec = spec_from_file_location("audit_rates", ROOT / "experiments" / "audit_rates.py")
    m = module_from_spec(spec)
    spec.loader.exec_module(m)
    for hits, of in ((0, 12), (3, 40), (12, 12)):
        want = binomtest(hits, of).proportion_ci(method="exact")
        got = m.share(hits, of)
        assert (got["low"], got["high"]) == (pytest.approx(want.low), pytest.approx(want.high))
    (train, held, fresh, more), _ = m.people("lattice", 3)
    assert len({v.numpy().tobytes() for x in (train, held, fresh, more) for v in x}) == 2 * m.N + 2 * m.POOL  # nobody is there twice
    assert m.candidates(train[5:8], train, 1.0) == {k: [0, 0, 0] for k in ("correlation", "filters", "pixels")}
    others = m.candidates(fresh[:6], train, 1.0)
    assert all(0 <= r < m.N for v in others.values() for r in v) and any(r > 0 for r in others["filters"])
    d = read_json(RESULTS / "audit_rates.json")
    page = (RESULTS / "audit_rates.md").read_text()
    assert m.in_words(d).replace("# How often the privacy audit alarms\n", "", 1) in page
    honest = [r for r in d["rates"] if r["pool"] in m.HONEST]
    assert f"{sum(r['hits'] for r in honest)} of {sum(r['of'] for r in honest)} pools without a copy" in page


def test_real_and_generated_heads_say_what_the_verdict_says():
    "Numbers of the verdict are those of the table; no interval between arms leaves zero out."
    d = read_json(RESULTS / "heads_real.json")
    page, parts = (RESULTS / "heads_real.md").read_text(), d["parts"]
    intervals = [p[k] for part in parts.values() for which in ("pairs", "net") for p in part[which] for k in ("full", "fewer", "drop")]
    assert len(intervals) == 30 and not [v for v in intervals if v[1] > 0 or v[2] < 0] and "None of 30 intervals" in page
    whole = {l["arm"]: l for l in parts["segment_whole"]["tables"]["count"] if l["n"] == 4}
    assert [round(whole[a]["score"][0], 2) for a in ("mae", "pcrlv2", "brainmvp", "scratch", "scratch01")] == [0.60, 0.54, 0.58, 0.58, 0.64]
    shown = lambda v: f"{v[0]:+.2f} [{v[1]:+.2f}, {v[2]:.2f}]".replace("[+", "[").replace("-", "−")
    for a in ("mae", "pcrlv2", "brainmvp"):
        assert shown(whole[a]["diff"]) in page
    for part in parts.values():
        assert all(shown(p["full"]) in page for p in part["net"])
    ends = [sum(v[s]["t1+t1c+t2+flair"]) / 24 for p in parts.values() for v in p["scores"].values() for s in "012"]
    assert len(ends) == 30 and sum(e < 0.01 for e in ends) == 1


def test_pages_of_pools_are_what_their_numbers_say(monkeypatch):
    "Both tables are made of the committed cells, whose images lie nowhere; the numbers of the verdict on MRI are theirs."
    import sys
    from importlib.util import module_from_spec, spec_from_file_location

    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    for n in ("continual_five", "continual_small"):
        monkeypatch.delitem(sys.modules, n, raising=False)
    spec = spec_from_file_location("invcoss_pools", ROOT / "experiments" / "invcoss_pools.py")
    m = module_from_spec(spec)
    spec.loader.exec_module(m)
    for name in ("invcoss_pools", "invcoss_real"):
        d, page = read_json(RESULTS / f"{name}.json"), (RESULTS / f"{name}.md").read_text()
        cells = {(c["stage"], c["seed"], c["pool"]): c for c in d["cells"]}
        for at in sorted({k[0] for k in cells}):
            assert ("\n".join(m.table(cells, at)) in page) == (f"## {at[3:]}" in page), (name, at)
        assert page.count("\n## ") == dict(invcoss_pools=2, invcoss_real=3)[name]  # stages, and what travels
    mri = {k: c for k, c in cells.items() if k[0] == "04_mri"}
    assert len(mri) == 15 and not any(c["audit"]["alarm"] for c in mri.values()) and "0 of 15 pools alarmed" in page
    assert all("by the 1 of 18 checks that can see a pool with 12% of copies" in c["audit"]["verdict"] for c in mri.values())

    def apart(a, b, measure, at="04_mri"):
        key = m.SHOWN[measure][0]
        i = m.mean_interval([m.values(cells[at, s, a])[key][0] - m.values(cells[at, s, b])[key][0] for s in (0, 1, 2)])
        return [round(v, 1 if measure == "lsd_high" else 3) for v in (i["mean"], i["low"], i["high"])]

    assert apart("plain decoder", "+ repulsion 1", "lsd_high") == [3.8, 1.8, 5.7] and "3.8 dB nearer to real slabs [1.8, 5.7]" in page
    assert apart("+ repulsion 1", "free voxels", "lsd_high") == [3.1, 1.2, 5.0] and "3.1 dB *nearer* [1.2, 5.0]" in page
    assert apart("+ repulsion 1", "+ TV", "vendi_filters") == [0.038, 0.006, 0.069] and "Vendi +0.038 [0.006, 0.069]" in page
    still = [apart("+ TV", "task+statistics", k, at) for k in m.SHOWN for at in ("02_xray", "04_mri")]
    assert all(low <= 0 <= high for _, low, high in still) and page.count("no measure moves") == 2
