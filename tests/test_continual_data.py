"""The data of the continual experiments: five stages out of our generators, patterns, and, where they are there, out of real images (`MEDSSL_REAL`, or ../shared/data/real beside the repository)."""
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("MEDSSL_REAL") or ROOT.parent / "shared" / "data" / "real")
sys.path.insert(0, str(ROOT / "experiments"))
from continual_data import STAGES, fit, slabs, stages, write_patterns, write_synthetic  # noqa: E402

from medssl_nb.data.cases import make_loader, write_case, write_index  # noqa: E402
from medssl_nb.data.patterns import pattern_phantom  # noqa: E402
from medssl_nb.data.stages import Mixed, choose_rows, read_provenance, stage_cases, write_buffer  # noqa: E402


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    write_synthetic(out, 12)
    return out


def test_five_stages(study):
    "Each loads, is of the size that is said, has its label in every case, and keeps people apart."
    rows = stages(study)
    assert [(s["name"], s["kind"], s["size"]) for s in rows] == [("report", "text", None), ("xray", "2d", [64, 64]), ("ct", "3d", [16, 48, 48]), ("mri", "3d", [16, 48, 48]), ("path", "2d", [64, 64])]
    for s in rows:
        assert s["train"] + s["test"] == sum(s["classes"].values()) == 12 and len(s["classes"]) > 1
        people = []
        for side in ("train", "test"):
            cases = stage_cases(s["dir"], split=side, target=s["target"])
            b = next(iter(make_loader(cases, s[side], steps=1)))
            assert len(b["case"]) == s[side] == len(b["target"])
            people.append(set(b["subject"]))
            if s["kind"] != "text":
                assert b["image"].shape[1:] == (len(s["channels"]), *s["size"]) and 0 <= b["image"].min() < b["image"].max() <= 1
        assert not people[0] & people[1]


def test_stages_mix_and_leave_buffers(study, tmp_path):
    "From one stage to the next, as the loop goes: reports, then X-rays with a buffer of reports, then CT with both."
    old = {}
    for s in stages(study)[:3]:
        cases = stage_cases(s["dir"], split="train")
        mix = Mixed(cases, old, rule="ratio", ratio=0.5, name=s["name"])
        b = [(x["source"], x["old"], "text" in x) for x in mix.loader(2, seed=1, steps=mix.steps_for(6, 2, 1) if old else 6)]
        n = Counter(b)
        assert n[(s["name"], False, s["kind"] == "text")] == 6 and {k[0] for k in n if k[1]} == set(old)
        rows, facts = choose_rows(len(cases), "random", 25, seed=2)
        p = write_buffer(s["dir"], cases.rows.take(rows), tmp_path / s["name"], s["name"], "random", facts, of=len(cases))
        assert (p["cases"], p["of"]) == (2, 9) and read_provenance(tmp_path / s["name"]) == p
        old[s["name"]] = stage_cases(tmp_path / s["name"])


def test_patterns_on_disk_are_those_in_memory(tmp_path):
    rows = write_patterns(tmp_path, 10, 2, test=4)
    assert [(s["name"], s["train"], s["test"], s["size"]) for s in rows] == [(f, 10, 4, [32, 32]) for f in ("grating", "lattice", "object")]
    for s in stages(tmp_path):
        c = stage_cases(s["dir"], split="test", target="fine", classes=list(range(16)))
        b, want = next(iter(make_loader(c, 4, steps=1, shuffle=False))), pattern_phantom(s["name"], 4, first=10)
        assert torch.equal(b["image"], want["image"].half().float()) and torch.equal(b["target"], want["fine"]) and b["case"] == want["case"]
    assert write_patterns(tmp_path / "3", 4, 3, test=4)[0]["size"] == [16, 16, 16]


def test_slabs(tmp_path):
    "Slabs cover the volume, the last one ends at its end; in plane a square, whose middle is the volume."
    x = np.zeros((1, 21, 8, 12))
    x[0] = np.linspace(0, 1, 21)[:, None, None]
    write_case(tmp_path, dict(case="c-1", subject="s-1", session="", split="train", group="", dims=3, channels=["t1"], spacing=[2.0, 1.0, 1.0], labels={}, fingerprint=""), x)
    write_index(tmp_path)
    got = list(slabs(tmp_path, "mr", stride=4, side=6, depth=8))
    assert [r["case"][-2:] for r, _, _ in got] == ["00", "01", "02", "03", "04"] and got[0][0]["labels"] == dict(sequence="t1", position="low")
    for (r, image, seg), z in zip(got, (0, 4, 8, 12, 13)):
        assert image.shape == (1, 8, 6, 6) and seg is None and r["channels"] == ["mr"] and r["spacing"] == [2.0, 2.0, 2.0]
        np.testing.assert_allclose(image[0, :, 3, 3], np.linspace(0, 1, 21)[z : z + 8], atol=1e-3)
        assert image[0, :, 0].max() < image[0, :, 3].max()  # padded above and below
    assert fit(np.ones((1, 5, 2)), (3, 4)).tolist() == [[[0, 1, 1, 0]] * 3]


def test_experiments_plan_run_and_report(tmp_path, capsys):
    "Every arm of the experiments has a plan; two of them run, and the report counts forgetting as the rows say."
    from dataclasses import replace

    import continual_five
    import continual_small

    from medssl_nb.continual import run
    from medssl_nb.core import UserError, read_json, read_jsonl, write_jsonl

    write_patterns(tmp_path / "data", 12, 2, test=8)
    data = tmp_path / "data"
    plans = {a: continual_small.plan(data, tmp_path / "runs", a, 0, steps=4, batch=4, cases=8) for a in continual_small.ARMS}
    assert {a for a, p in plans.items() if p.strategy == "invcoss"} == set(continual_small.VARIANTS) and all(p.train.clip == 1 for p in plans.values())
    assert [plans[a].settings.invert.a_rep for a in ("invcoss", "tv", "task_statistics")] == [1, 0, 0] and plans["mim"].settings.objective == "pretext"
    made = plans["invcoss"]
    made.settings.few, made.settings.share = True, 0.5
    made.settings.invert = replace(made.settings.invert, steps=3, batch=4)
    for p in (plans["sequential"], made):
        run(replace(p, warmup=0.25, stages=p.stages[:2], score=replace(p.score, scores=("own", "refit"), refit_steps=2)))
    asked = [dict(strategy="sequential", seed=0, score="segment", held_out=True, stage=1, name="grating", subject="s", after=a, value=v) for a, v in ((1, 0.5), (2, 0.25))]
    (tmp_path / "runs" / "segment" / "sequential_s0").mkdir(parents=True)
    write_jsonl(tmp_path / "runs" / "segment" / "sequential_s0" / "rows.jsonl", asked)  # as continual_five.py --segment leaves them beside the runs
    continual_small.report(tmp_path / "runs", "small", "a test", tmp_path)
    found = read_json(tmp_path / "small.json")
    rows = list(read_jsonl(tmp_path / "runs" / "sequential_s0" / "rows.jsonl"))
    mean = lambda stage, after: np.mean([r["value"] for r in rows if (r["score"], r["stage"], r["after"]) == ("own", stage, after)])
    rise = mean(1, 2) - mean(1, 1)
    assert abs(next(r for r in found["table"] if (r["strategy"], r["score"], r["measure"]) == ("sequential", "own", "forgetting"))["mean"] - rise) < 1e-6
    text = (tmp_path / "small.md").read_text()
    assert "own end\n\n| arm | grating |\n|---|---|\n| sequential | -0.250 |\n" in text
    assert "| invcoss |" in text and "| sequential | 0 | no |" in text and (tmp_path / "small_curves.png").stat().st_size > 1000
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "stages.json").write_text('[{"name": "xray", "target": "label"}, {"name": "ct", "target": null}]')
    five = {a: continual_five.plan(tmp_path / "five", tmp_path / "out", a, 1) for a in continual_five.FIVE}
    assert all([s.name for s in p.stages] == ["xray", "ct"] and p.train.seed == 1 and p.strategy == a for a, p in five.items())
    with pytest.raises(UserError, match="ewc_s1 is not finished"):
        continual_five.segment(tmp_path / "five", tmp_path / "out", "ewc", 1)


def test_tables_of_the_experiments_by_hand(tmp_path):
    "Two seeds, two stages: what was learnt, how far it rose, one arm minus another by seed, steps of a sequence and of joint training, lambda by lambda."
    import continual_five
    import continual_small
    from medssl_nb.core import write_jsonl

    def rows(arm, seed, learnt, end):  # two cases of the first stage, one of the second
        one = dict(strategy=arm, seed=seed, score="own", held_out=True)
        at = lambda after, stage, v: [dict(one, after=after, stage=stage, name="ab"[stage - 1], value=x, subject=f"s{i}") for i, x in enumerate(v)]
        return [*at(1, 1, [learnt - 0.1, learnt + 0.1]), *at(2, 1, [end - 0.2, end + 0.2]), *at(2, 2, [0.7])]

    every = [*rows("medcoss", 0, 0.5, 0.6), *rows("medcoss", 1, 0.4, 0.7), *rows("er", 0, 0.5, 0.9), *rows("er", 1, 0.5, 0.9), dict(rows("er", 0, 9.0, 9.0)[0], held_out=False)]
    own = continual_small.stage_values(every)["own"]
    assert own["medcoss"] == {"a": {"0": [0.5, 0.6], "1": [0.4, 0.7]}, "b": {"0": [0.7, 0.7], "1": [0.7, 0.7]}}
    assert continual_small.rises(own)[2:] == ["| medcoss | +0.200 [-1.071, +1.471] |", "| er | +0.400 [+0.400, +0.400] |"]  # t over two: 12.706 x 0.1
    assert continual_small.against(own, "medcoss")[2:] == ["| er | -0.200 [-1.471, +1.071] |"]
    assert continual_small.rises(own, ["b"])[2:] == ["| medcoss | +0.000 [+0.000, +0.000] |", "| er | +0.000 [+0.000, +0.000] |"]
    joint = continual_small.stage_values([r for r in rows("joint", 0, 0.5, 0.6) if r["after"] == 2])["own"]
    assert joint["joint"]["a"] == {"0": [None, 0.6]} and continual_small.rises(joint)[2:] == ["| joint |  |"]
    cost = lambda new, old, beside, a, b: dict(cost=dict(new_steps=new, old_steps=old, old_batches_beside=beside, extra_passes=dict(student=a, teacher=b)))
    stages = [cost(10, 0, 0, 0, 0), cost(10, 4, 3, 2, 1)]
    assert continual_small.cost_of(stages, False) == [20, 7, 3] and continual_small.cost_of(stages, True) == [10, 0, 0]
    for lam, v in (("0.1", 0.8), ("1e-05", 0.9)):
        (tmp_path / "sweep" / f"ewc_{lam}_s0").mkdir(parents=True)
        write_jsonl(tmp_path / "sweep" / f"ewc_{lam}_s0" / "rows.jsonl", rows("ewc", 0, 0.5, v))
    assert list(continual_five.swept(tmp_path).items()) == [("ewc_1e-05_s0", {"a": 0.9, "b": 0.7}), ("ewc_0.1_s0", {"a": 0.8, "b": 0.7})]


def test_without_real_data_it_says_so(tmp_path):
    r = subprocess.run([sys.executable, str(ROOT / "experiments" / "continual_data.py"), str(tmp_path / "out"), "--real", str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 1 and "SKIPPED: no MANIFEST.csv" in r.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "MANIFEST.csv").is_file(), reason=f"no real images: {REAL} has no MANIFEST.csv (set MEDSSL_REAL)")
def test_real(tmp_path):
    "Five stages out of the real images; the counts are those of the files."
    from continual_data import write_real

    rows = {s["name"]: s for s in write_real(REAL, tmp_path)}
    assert list(rows) == list(STAGES)
    assert [rows[n]["train"] + rows[n]["test"] for n in ("report", "xray", "path")] == [2644, 120, 240]
    assert rows["ct"]["subjects"] == 6 and rows["mri"]["subjects"] == 82 and rows["mri"]["seg"] == 120
    assert all(s["train"] and s["test"] for s in rows.values())
