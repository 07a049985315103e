"""TACO as a user runs it: files of people who have different sequences, one of them scanned twice; a run whose history says whether it learns, stopped and continued; some of its sequences; an encoder that is fine-tuned; two processes with people of their own."""
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl_nb.core import UserError, generator, read_json, read_jsonl

SIDE = 16
SEQS = (("t1", "t2", "flair"), ("t1", "flair"), ("t1", "t2", "flair"), ("t2",), ("t1", "t2", "flair"), ("t1", "t2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "NIfTI files -> manifest -> prepared. Six people, the first with two visits; one has a single sequence."
    from medssl_nb.data.cases import Prepared
    from medssl_nb.data.ingest import IngestConfig, ingest
    from medssl_nb.data.phantom import BIDS_NAMES, head_case
    from medssl_nb.data.prepare import PrepareConfig, prepare
    from medssl_nb.data.volume import Grid, write_nifti

    root = tmp_path_factory.mktemp("taco")
    for i, mods in enumerate(SEQS):
        for visit in ("1", "2")[: 2 if i == 0 else 1]:
            h = head_case(5, (SIDE, SIDE + 2, SIDE + 4), modalities=mods, subject=i, background=False, lesions=1)
            sub, grid = f"sub-{i + 1:02d}", Grid(h["label"].shape, h["affine"])
            at = lambda *parts: root.joinpath("bids", *parts, sub, f"ses-{visit}", "anat")
            for where, name, x in [((), f"{BIDS_NAMES[m]}", 100 * h["images"][m] * (1.1 if visit == "2" else 1)) for m in mods] + [(("derivatives", "labels"), "desc-lesion_dseg", h["label"])]:
                at(*where).mkdir(parents=True, exist_ok=True)
                write_nifti(at(*where) / f"{sub}_ses-{visit}_{name}.nii.gz", x.astype(np.int16), grid)
    ingest(IngestConfig(src=root / "bids", out=root / "manifest", layout="bids", progress=False))
    prepare(PrepareConfig(manifest=str(root / "manifest"), out=str(root / "prepared"), workers=0, progress=False))
    p = Prepared(root / "prepared")
    assert len(p.rows) == 7 and len({r["subject"] for r in p.rows}) == 6 and all(r["seg"] for r in p.rows)
    return root / "prepared"


def config(data, out, steps=6, channels=None, **task):
    "The defaults of the command, made small."
    from medssl_nb.pretrain import settings

    c, _ = settings(["--method", "taco", "--preset", "small3d", "--train.steps", str(steps)])
    c.data, c.out, c.channels, c.train.steps = data, out, channels, steps
    c.task.region, c.task.widths, c.task.lateral = (SIDE,) * 3, (8, 16), 8
    for k, v in task.items():
        setattr(c.task, k, v)
    c.train.batch, c.train.workers, c.train.device, c.train.bar, c.train.tensorboard, c.train.save_every, c.train.keep = 3, 0, "cpu", False, False, 3, 0
    return c


def run(cfg):
    from medssl_nb.pretrain import pretrain

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pretrain(cfg)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return run(config(data, tmp_path_factory.mktemp("runs") / "whole"))


def test_an_ordinary_run_says_whether_its_features_collapse(whole):
    "Nobody asked for it: matches, anchors, rank and coding rate stand in the history."
    rows = read_jsonl(whole["out"] / "history.jsonl")
    assert len(rows) == 6 and all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
    assert {"rec", "intra", "inter", "rank", "coding_rate", "matched", "anchors"} <= rows[0].keys() and "rank" not in rows[1]
    assert 1.5 < rows[0]["rank"] < 8 and 0 < rows[0]["anchors"] <= rows[0]["matched"] < 1 and rows[0]["coding_rate"] > 0
    assert whole["task"].health({}, {}) == {}  # nothing is asked of tokens that nobody made


def test_health_is_what_it_says(whole, data):
    "Effective rank, coding rate and anchors of a batch, computed here with numpy; one token everywhere is a collapse, and is called one."
    from medssl_nb.data.cases import Cases, Prepared, collate

    p, task = Prepared(data), whole["task"]
    rows = [r for r in p.rows if len(r["channels"]) > 1][:4]
    v = task.views(collate([Cases(p, rows, region=task.region)[i, 0] for i in range(len(rows))]), generator(0, name="views"))
    with torch.no_grad():
        out = task(v)
    got, z = task.health(out, v), out["z"].flatten(0, 1).double().numpy()
    s = np.linalg.svd(z, compute_uv=False)
    s = s / s.sum()
    assert got["rank"] == pytest.approx(math.exp(-(s * np.log(s)).sum()), rel=1e-4)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    m, d = u.shape
    assert got["coding_rate"] == pytest.approx(0.5 * np.linalg.slogdet(np.eye(d) + d / (m * 0.5) * u.T @ u)[1], rel=1e-4)
    one = torch.ones_like(out["z"])
    with pytest.warns(UserWarning, match="the features may have collapsed"):
        flat = task.health({**out, "z": one}, v)
    assert flat["rank"] == pytest.approx(1, abs=1e-3) and flat["coding_rate"] == pytest.approx(0.5 * math.log(1 + d / 0.5), rel=1e-4)
    assert got["rank"] > 1.5 and got["coding_rate"] > flat["coding_rate"]


def test_without_the_inter_term_the_rank_is_still_there(data, tmp_path):
    row = run(config(data, tmp_path / "r", 1, w_inter=0.0))["history"][0]
    assert 1.5 < row["rank"] < 8 and row["coding_rate"] > 0 and not {"inter", "matched", "anchors"} & row.keys()


def test_two_visits_of_a_person_are_no_pair_of_people(whole, data):
    "From the loader: a batch of them has an inter term of exactly 0, and learns from the rest."
    from medssl_nb.data.cases import Cases, Prepared, collate

    p = Prepared(data)
    names = [r["subject"] for r in p.rows]
    twice = [r for r in p.rows if names.count(r["subject"]) == 2]
    other = next(r for r in p.rows if names.count(r["subject"]) == 1 and len(r["channels"]) > 1)
    task = whole["task"]
    views = lambda rows: task.views(collate([Cases(p, rows, region=task.region)[i, 0] for i in range(len(rows))]), generator(0, name="views"))
    with pytest.warns(UserWarning, match="a batch of one person"):
        v = views(twice)
    assert v["pairs12"].shape == v["pairs21"].shape == (0, 2) and len(v["who"]) == 2
    terms = task.losses(task(v), v)
    assert terms["inter"] == 0 and terms["intra"] > 0 and terms["rec"] > 0
    assert views([*twice, other])["pairs12"].tolist() == [[0, 2], [1, 2], [2, 0], [2, 1]]


def test_a_cut_run_continues_bit_for_bit(whole, data, tmp_path):
    shutil.copytree(whole["out"] / "checkpoints" / "step_00000003", tmp_path / "cut" / "checkpoints" / "step_00000003")
    again = run(config(data, tmp_path / "cut"))
    assert [r["step"] for r in read_jsonl(tmp_path / "cut" / "history.jsonl")][-3:] == [4, 5, 6]
    for (n, a), (_, b) in zip(whole["task"].state_dict().items(), again["task"].state_dict().items()):
        assert torch.equal(a, b), n
    assert [r["loss"] for r in again["history"]][-3:] == [r["loss"] for r in whole["history"]][-3:]


def test_only_the_sequences_that_were_asked_for(data, tmp_path, capsys, monkeypatch):
    from medssl_nb.data.cases import Prepared
    from medssl_nb.tasks.taco import TACO

    with pytest.raises(UserError, match="1 of 7 cases have none of t1, flair"):
        run(config(data, tmp_path / "no", 1, ("t1", "flair")))
    seen, kept = [], TACO.views

    def views(self, batch, gen):
        seen.append((tuple(batch["image"].shape[1:]), dict(zip(batch["case"], batch["present"].tolist()))))
        return kept(self, batch, gen)

    monkeypatch.setattr(TACO, "views", views)
    out = run(config(data, tmp_path / "r", 2, ("t1", "t2")))
    assert "on 7 cases of 6 subjects, channels t1, t2;" in capsys.readouterr().out
    assert read_json(out["out"] / "encoder" / "card.json")["channels_seen"] == ["t1", "t2"] and len(out["history"]) == 2
    assert len(seen) == 2 and {s for s, _ in seen} == {(2, SIDE, SIDE, SIDE)} and all(seen[k][1] for k in (0, 1))
    there = {r["case"]: [c in r["channels"] for c in ("t1", "t2")] for r in Prepared(data).rows}  # what each case has of the two, and in their order
    assert all(have == there[c] for _, cases in seen for c, have in cases.items()) and {True, False} == {h for have in there.values() for h in have}


def test_the_encoder_goes_on(whole, data, tmp_path):
    "The command, as a user types it: the exported encoder and its twin outline the lesion, with gaps."
    card = read_json(whole["out"] / "encoder" / "card.json")
    assert (card["method"], card["input"], card["data"]["subjects"]) == ("taco", "foreground", 6)
    words = [str(Path(sys.executable).parent / "medssl"), "finetune", str(data), "--out", str(tmp_path / "r"), "--arms", "taco", str(whole["out"]), "--channels", "t1", "t2"]
    words += "--missing zero --steps 2 --batch 2 --budgets 2 --seeds 0 --val 0 --test 0.4 --region 16 16 16 --predictions 0 --device cpu --bar False".split()
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(tmp_path / "r" / "rows.jsonl")
    of = {arm: sorted((r["case"], r["class"]) for r in rows if r["arm"] == arm) for arm in ("scratch", "taco")}
    assert {r["arm"] for r in rows} == set(of) and of["scratch"] == of["taco"] and len(of["taco"]) == len(set(of["taco"])) >= 2  # both judged on the same outlines of the same people, each once
    assert not any(math.isnan(r["dice"]) for r in rows)
    assert "100.0% of the encoder parameters" in (tmp_path / "r" / "transfer" / "taco.md").read_text()


GLOO = """
import os, sys, warnings, torch, torch.distributed as dist
warnings.simplefilter('ignore'); torch.set_num_threads(1)
from medssl_nb.core import generator
from medssl_nb.tasks.taco import TACO, TACOConfig
def half(r):
    x = torch.rand(2, 3, 16, 16, 16, generator=generator(1, r)); p = torch.ones(2, 3).bool()
    if r == 1: p[:, 1:] = False; x = x*p.view(2, 3, 1, 1, 1)               # two visits of one person, one sequence each: no topology at all
    return dict(image=x, present=p, case=['a','b'], subject=['p','q'] if r == 0 else ['p','p'], progress=.5)
def task(): torch.manual_seed(0); return TACO(TACOConfig.small3d(region=(16,16,16), widths=(8,16), lateral=8)).double()
def step(model, t, r):
    v = t.views(half(r), generator(2, r)); v = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k,x in v.items()}
    terms = t.losses(model(v), v); sum(terms.values()).backward(); return {k: x.item() for k,x in terms.items()}
if int(os.environ.get('WORLD_SIZE', 1)) > 1:
    dist.init_process_group('gloo'); r = dist.get_rank(); t = task(); terms = step(torch.nn.parallel.DistributedDataParallel(t), t, r); g = {n: p.grad for n,p in t.named_parameters()}
    torch.save(dict(terms=terms, grad=g), f'{sys.argv[1]}_{r}.pt'); dist.barrier(); dist.destroy_process_group()
else:
    out = []
    for r in (0, 1): t = task(); out.append((step(t, t, r), {n: p.grad for n,p in t.named_parameters()}))
    torch.save(dict(terms=[o[0] for o in out], grad={n: (out[0][1][n] + out[1][1][n])/2 for n in out[0][1]}), f'{sys.argv[1]}.pt')
"""


def test_two_processes_compare_their_own_people_and_learn_together(tmp_path):
    "Two people in one process, two visits of one person in the other: terms of each as alone, one gradient, its mean; also for the lateral block, which the second has no use for."
    (tmp_path / "gloo.py").write_text(GLOO)
    root = Path(__file__).resolve().parents[1]
    for cmd in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        out = subprocess.run([sys.executable, *cmd, str(tmp_path / "gloo.py"), str(tmp_path / "g")], capture_output=True, text=True, timeout=300, cwd=root)
        assert out.returncode == 0, out.stderr[-2000:]
    one, *two = (torch.load(tmp_path / f"g{r}.pt", weights_only=True) for r in ("", "_0", "_1"))
    assert one["terms"] == [pytest.approx(t["terms"], rel=1e-9) for t in two]
    assert two[0]["terms"]["inter"] > 0 and two[1]["terms"]["inter"] == two[1]["terms"]["intra"] == 0 < two[1]["terms"]["rec"]
    assert any(n.startswith("lateral") and g.abs().max() > 1e-6 for n, g in one["grad"].items())
    for n, g in one["grad"].items():
        assert torch.equal(two[0]["grad"][n], two[1]["grad"][n]) and torch.allclose(two[0]["grad"][n], g, atol=1e-10), n
