"""The journey of a model through several data sets: reports, radiographs and volumes by one command; killed and continued; by two processes; from site to site; and what a packet refuses.

Two processes are compared with one on a task that draws nothing, in which a case counts the same wherever it is computed; what is left between them is the order of sums.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import medssl, refused

HERE = Path(__file__).parent
WORDS = "no effusion seen the heart is large lungs are clear small nodule left right lower lobe fracture of rib unchanged since last film catheter in place".split()


def prepared(root):
    "Reports, 2-D and 3-D cases in the store's own form; a third of each is for testing."
    from medssl_nb.core import write_jsonl
    from medssl_nb.data.cases import write_case, write_index

    split = lambda i: "test" if i % 3 == 0 else "train"
    for kind, dims, n in (("xr", 2, 24), ("he", 2, 24), ("ct", 3, 15)):
        for i in range(n):
            rng = np.random.default_rng(i)
            y, x = np.mgrid[:32, :32]
            wave = 0.5 + 0.4 * np.sin((x if i % 2 else y) * (0.4 if kind == "xr" else 1.1) + rng.random() * 6)
            im = np.clip(wave + 0.05 * rng.standard_normal((32, 32)), 0, 1)
            image = im[None, None] if dims == 2 else np.stack([im[:16, :16]] * 16)[None]
            row = dict(case=f"{kind}-{i:02}", subject=f"{kind}-s{i:02}", session="", group="", split=split(i), dims=dims, channels=[kind], spacing=[1.0, 1.0, 1.0], labels={"class": "ab"[i % 2]}, fingerprint=str(i))
            seg = (image > 0.6).astype(np.uint8) if kind == "xr" else None
            write_case(root / kind, row, image, seg, info=dict(intensity={kind: dict(rule="unit")}))
        write_index(root / kind)
    (root / "report" / "volumes").mkdir(parents=True)
    write_index(root / "report")
    rng = np.random.default_rng(0)
    rows = [dict(case=f"r-{i:02}", subject=f"r-s{i:02}", text=" ".join(rng.choice(WORDS, 12)) + ".", labels={"class": "ab"[i % 2]}, split=split(i)) for i in range(24)]
    write_jsonl(root / "report" / "reports.jsonl", rows)
    return root


TASK = dict(region2d=[32, 32], region3d=[16, 16, 16], patch2d=8, patch3d=8, width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, vocab=200, text_length=24)
LOOP = dict(batch=4, workers=0, bar=False, tensorboard=False, device="cpu", lr=2e-3, save_every=4)


def plan(root, out, stages=("report", "xr", "ct"), strategy="medcoss", settings=None, task=TASK, method="mim", preset="small_unified", name="plan.yaml", **k):
    import yaml

    settings = dict(share=0.25, centres=0.1) if settings is None else settings
    text = dict(method=method, preset=preset, strategy=strategy, settings=settings, task=task, steps=8, train=LOOP, out=str(out), score=dict(refit_steps=3, cases=8, neighbours=3))
    text["stages"] = [dict(name=s, data=str(root / s), target="class") if isinstance(s, str) else s for s in stages]
    text = {n: v for n, v in {**text, **k}.items() if v is not None}
    (root / name).write_text(yaml.safe_dump(text, sort_keys=False))
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("continual"))


@pytest.fixture(scope="module")
def journey(root):
    score = dict(scores=["own", "refit", "linear", "knn", "cka", "segment"], refit_steps=3, cases=8, neighbours=3, labels=4, segment_steps=2)
    code, out, err = medssl("continual", "run", plan(root, root / "three", score=score))
    assert code == 0, err
    assert out.strip().splitlines()[-2:] == ["what was learnt and what was forgotten: three/result.md", str(root / "three")]
    assert "nobody is left out" not in out
    return root / "three"


def model(packet):
    return json.loads((packet / "packet.json").read_text())["files"]["model/model.safetensors"]["sha256"]


def test_three_families_in_one_network(journey):
    import torch

    from medssl_nb.core import read_json, read_jsonl
    from medssl_nb.packet import Packet
    from medssl_nb.train.checkpoint import load_encoder

    a, b, c = (Packet(journey / "packets" / p) for p in ("01_report", "02_xr", "03_ct"))
    assert [s["kind"] for s in c.stages] == ["text", "2d", "3d"] and c.facts["patient_data"]
    # a quarter of 16, 16, 10, in so many clusters as a tenth makes: as many as each cluster gives
    assert set(c.replay()) == {"report", "xr", "ct"} and all(2 <= p["cases"] <= 4 and p["kind"] == "real" for p in c.facts["replay"].values())
    words = [p.model()["encoder.words"] for p in (a, b, c)]
    assert words[0].any() and all(torch.equal(w, words[0]) for w in words)
    # a word table that no image reaches is not moved by it, decay and momentum included; nor is the tokenizer of another family
    first, last = a.model(), b.model()
    rows = read_jsonl(journey / "stages" / "02_xr" / "history.jsonl")
    assert [r["old"] for r in rows].count(0) == 8 and {"mim", "fd"} <= {k for r in rows for k in r}
    assert all(torch.equal(first[k], last[k]) for k in first if k.startswith("encoder.tokenizers.3d"))
    assert any(not torch.equal(first[k], last[k]) for k in first if k.startswith("encoder.tokenizers.text")), "old reports were not looked at"
    R = read_jsonl(journey / "rows.jsonl")
    assert {(r["after"], r["stage"]) for r in R if r["score"] == "own"} == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3) if j <= i}
    assert {(r["after"], r["stage"]) for r in R if r["score"] == "linear"} == {(i, j) for i in range(4) for j in (1, 2, 3)}
    assert {(r["after"], r["stage"]) for r in R if r["score"] == "segment"} == {(i, 2) for i in (1, 2, 3)}  # where there are labels to segment
    assert all(r["held_out"] for r in R)
    assert "forgetting" in {r["measure"] for r in read_json(journey / "result.json")["table"]} and "## refit" in (journey / "result.md").read_text()
    cost = read_json(journey / "stages" / "03_ct" / "cost.json")
    assert cost["new_steps"] == 8 and cost["old_steps"] >= 2 and cost["bytes"]["replay"] > 0 and cost["extra_passes"]["teacher"] == cost["old_steps"]
    enc, card = load_encoder(journey / "stages" / "03_ct")
    assert card["method"] == "mim+medcoss" and card["stages"] == ["report", "xr", "ct"]
    assert all(torch.equal(v, c.model()[f"encoder.{k}"]) for k, v in enc.state_dict().items())


def test_the_buffer_is_what_kmeans_chooses(journey, root, tmp_path):
    "The choice once more, from the packet's network and the rows of the index: features with the class token, clusters, the cases next to the centres. Those and no others travel, and the packet says by which rule."
    import torch

    from medssl_nb.config import cli
    from medssl_nb.continual import Scene, StageConfig, StageData, family_cases, fresh_task, make_buffer, plan_settings, readouts
    from medssl_nb.core import read_jsonl
    from medssl_nb.data.cases import Prepared
    from medssl_nb.data.stages import kmeans_buffer, report_rows
    from medssl_nb.packet import Packet, hand_over

    cfg = cli(*plan_settings(["--config", str(plan(root, root / "again", name="again.yaml"))]))

    def choice(task, name, kind, cls=True):
        prepared = Prepared(root / name)
        every = report_rows(prepared) if kind == "text" else prepared.rows
        train = every.where(lambda r: r["split"] == "train")
        assert train[0]["case"] != every[0]["case"]  # so that a number in one is not the same number in the other
        rows, how = kmeans_buffer(readouts(task, family_cases(task, prepared, kind, train, rule="centre"), 4, "cpu", cls=cls), 25, centres=10, seed=0)
        return [train[int(k)]["case"] for k in rows], how, len(train)

    for i, (name, kind) in enumerate((("report", "text"), ("xr", "2d"), ("ct", "3d"))):
        packet, task = Packet(journey / "packets" / f"{i + 1:02}_{name}"), fresh_task(cfg, i)
        hand_over(packet, task)
        names, how, of = choice(task, name, kind)
        said = packet.facts["replay"][name]
        assert (said["kind"], said["rule"], said["settings"], said["cases"], said["of"]) == ("real", "kmeans", how, len(names), of)
        assert [r["case"] for r in read_jsonl(packet.replay()[name] / ("reports.jsonl" if kind == "text" else "index.jsonl"))] == names
    # a class token that says of each case what its patches do not: it must be heard
    scene = Scene(cfg, StageData(StageConfig("xr", root / "xr")), None, 3)
    task, plain = scene.task.task, scene.task.task.readout
    task.readout = lambda batch, cls=True: plain(batch, cls) + cls * torch.tensor([[int(c[-2:]) ** 2 % 7.0] for c in batch["case"]])
    loud, quiet = (choice(task, "xr", "2d", cls)[0] for cls in (True, False))
    assert loud != quiet and [r["case"] for r in Prepared(make_buffer(scene, task, tmp_path / "buffer", "cpu")[0]).rows] == loud


INVERT = dict(batch=4, steps=2, lr=5e-3, z_channels=4, widths=[8, 8, 8], cache=[4, 4, 4], bar=False, save_every=0)
EACH = dict(sequential={}, joint={}, er=dict(share=0.5, ratio=0.7), derpp=dict(share=0.5), medcoss=dict(share=0.5, centres=0.25, ratio=0.7), invcoss=dict(share=0.25, centres=0.1, ratio=0.7, few=True, invert=INVERT), lwf={}, cassle=dict(hidden=16), ewc=dict(samples=3, lam=1.0), packnet={})
TERMS = dict(sequential=set(), joint=set(), er=set(), derpp={"answer", "again"}, medcoss={"fd"}, invcoss={"fd"}, lwf={"fd"}, cassle={"fd"}, ewc={"ewc"}, packnet=set())  # what is asked beside the task, once there is a past


@pytest.mark.parametrize("strategy", EACH)
def test_three_families_by_each_strategy(root, strategy):
    "Reports, pictures, volumes in one network, two steps each: every way of remembering goes all the way, asks what it says it asks, and leaves what it says it leaves."
    import torch

    from medssl_nb.core import read_jsonl
    from medssl_nb.packet import Packet

    at = root / f"each_{strategy}"
    code, out, err = medssl("continual", "run", plan(root, at, strategy=strategy, settings=EACH[strategy], name=f"each_{strategy}.yaml", steps=2, train=dict(LOOP, save_every=0), score=dict(scores=[])))
    assert code == 0, err
    names, task = ("report", "xr", "ct"), {"mlm", "mim"}
    if strategy == "joint":
        p, rows = Packet(at / "packets" / "joint"), read_jsonl(at / "stages" / "joint" / "history.jsonl")
        assert [s["kind"] for s in p.stages] == ["text", "2d", "3d"] and len(rows) == 6 and not p.facts["replay"] and {k for r in rows for k in r} & task == task
        assert all(p.decoder(n) for n in names)
        return
    packets = [Packet(at / "packets" / f"{i:02}_{n}") for i, n in enumerate(names, 1)]
    assert [s["kind"] for s in packets[-1].stages] == ["text", "2d", "3d"] and packets[-1].settings["strategy"] == strategy
    replays = strategy in ("er", "derpp", "medcoss", "invcoss")
    assert {n: r["kind"] for n, r in packets[-1].facts["replay"].items()} == ({n: "inverted" if strategy == "invcoss" and n != "report" else "real" for n in names} if replays else {})
    stored = dict(ewc={"ewc"}, packnet={"packnet"}, derpp={f"answers_{n}" for n in names}).get(strategy, set())
    assert {f.stem for f in (packets[-1].path / "strategy").glob("*")} == stored
    for i, n in enumerate(names):
        rows = read_jsonl(at / "stages" / f"{i + 1:02}_{n}" / "history.jsonl")
        new, old = ([r for r in rows if r["old"] == k] for k in (0, 1))
        assert len(new) == 2 and bool(old) == (i > 0 and replays and strategy != "derpp") and all(np.isfinite(r["loss"]) for r in rows), n
        assert all(("mlm" if n == "report" else "mim") in r for r in new), n
        assert {k for r in rows for k in r} & {"fd", "ewc", "answer", "again"} == (TERMS[strategy] if i else set()), n
        a, b = packets[i - 1].model() if i else None, packets[i].model()
        own = [k for k in b if k.startswith(f"encoder.tokenizers.{dict(report='text', xr='2d', ct='3d')[n]}.")]
        assert own and (a is None or any(not torch.equal(a[k], b[k]) for k in own)), n


def test_stage_by_stage_at_three_sites_is_the_same(journey, root):
    "Each site has a packet and its own data; planned stages are known from the packet."
    from medssl_nb.core import read_jsonl, write_jsonl

    a, b = journey / "packets" / "01_report", root / "site" / "b"
    rows = [r for r in read_jsonl(root / "xr" / "index.jsonl")]
    write_jsonl(root / "xr" / "site.jsonl", rows)  # a file of rows instead of the folder
    code, out, err = medssl("continual", "stage", "--from", a, "--data", root / "xr" / "site.jsonl", "--name", "xr", "--to", b)
    assert code == 0, err
    assert "PATIENT DATA" in out and model(b) == model(journey / "packets" / "02_xr")
    code, out, err = medssl("continual", "verify", b)
    assert code == 0 and "THIS PACKET HOLDS PATIENT DATA" in out and "xr" in out
    refused("continual", "stage", "--from", b, "--data", root / "xr", "--name", "xr", "--to", root / "x", says="'xr' was already learnt")
    refused("continual", "stage", "--from", b, "--data", root / "ct", "--name", "ct", "--to", root / "x", "--task.width", "64", "--task.heads", "2", says=["holds another network", "width is 32 there and 64 here"])


def test_no_patient_is_named_in_the_vocabulary(root):
    "The reports of one person name her three times, those of two persons name a third; packets of a strategy that keeps no case hold neither name, in whole or in part."
    from medssl_nb.core import read_jsonl, write_jsonl
    from medssl_nb.data.cases import write_index
    from medssl_nb.data.text import unpack_tokenizer
    from medssl_nb.packet import Packet

    named = root / "named"
    (named / "volumes").mkdir(parents=True)
    write_index(named)
    rows = read_jsonl(root / "report" / "reports.jsonl")
    told = [dict(r, case=f"n-{i}", subject=s, split="train", text=f"{w} has a small nodule in the left lower lobe. {r['text']}") for i, (s, w, r) in enumerate([("n-s0", "kowalczykowska", r) for r in rows[:3]] + [(f"n-s{1 + i % 2}", "quistgaard", r) for i, r in enumerate(rows[3:7])])]
    write_jsonl(named / "reports.jsonl", rows + told)
    code, out, err = medssl("continual", "run", plan(root, root / "named_out", stages=[dict(name="report", data=str(named))], strategy="sequential", settings={}, name="named.yaml", score=dict(scores=[])))
    assert code == 0 and "of their words are shared by fewer than 5 persons, and are spelt" in out, out + err
    p = Packet(root / "named_out" / "packets" / "01_report")
    pieces = {w.removeprefix("##") for w in unpack_tokenizer(p.model()["encoder.words"]).t.get_vocab()}
    known = " ".join(WORDS)
    assert "nodule" in pieces and not [w for w in pieces if len(w) > 2 and w in "kowalczykowska quistgaard" and w not in known]
    assert not p.facts["patient_data"] and p.stages[0]["words"]["people"] == 5
    said = "learnt from reports: from words that the reports of at least 5 persons share"
    code, out, err = medssl("continual", "verify", p.path)
    assert code == 0 and said in out and said in (p.path / "README.md").read_text()


def test_a_tokenizer_from_elsewhere(root):
    "Named in the plan by its file; what travels is the words and a digest, not the path."
    from medssl_nb.data.text import train_tokenizer, unpack_tokenizer
    from medssl_nb.packet import Packet

    (root / "words").mkdir()
    tok = train_tokenizer([" ".join(WORDS)] * 3, 150)
    (root / "words" / "tokenizer.json").write_text(tok.to_json())
    score = dict(scores=[])
    code, out, err = medssl("continual", "run", plan(root, root / "given", stages=("report",), strategy="sequential", settings={}, task=dict(TASK, tokenizer=str(root / "words")), name="given.yaml", score=score, steps=2))
    assert code == 0, err
    p = Packet(root / "given" / "packets" / "01_report")
    assert unpack_tokenizer(p.model()["encoder.words"]) == tok and str(root) not in (p.path / "packet.json").read_text()
    name = p.settings["task"]["tokenizer"]
    assert name.startswith("sha256:") and f"was not learnt from these reports: {name}" in (p.path / "README.md").read_text()
    code, out, err = medssl("continual", "stage", "--from", p.path, "--data", root / "xr", "--to", root / "given_next", "--steps", "2", "--train.workers", "0")
    assert code == 0 and "nothing was scored" in out, err
    code, out, err = medssl("continual", "run", plan(root, root / "pictures", stages=("xr",), strategy="sequential", settings={}, task=dict(TASK, tokenizer=str(root / "words")), name="given.yaml", score=score, steps=2))
    late = ["continual", "stage", "--from", root / "pictures" / "packets" / "01_xr", "--data", root / "report", "--to", root / "late", "--steps", "2", "--train.workers", "0"]
    refused(*late, says=["reads with a tokenizer of its own", "--task.tokenizer tokenizer.json"])
    code, out, err = medssl(*late, "--task.tokenizer", root / "words")
    assert code == 0 and Packet(root / "late").stages[-1]["words"]["from"] == name, err
    refused("continual", "run", plan(root, root / "no_words", stages=("report",), task=dict(TASK, tokenizer=str(root / "xr")), name="given.yaml"), says="no tokenizer at")


def test_a_packet_that_was_touched_is_refused(journey, root):
    source = journey / "packets" / "02_xr"

    def verify(spoil):
        bad = root / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(source, bad)
        spoil(bad)
        code, out, err = medssl("continual", "verify", bad)
        with_it, _, said = medssl("continual", "stage", "--from", bad, "--data", root / "ct", "--to", root / "never")
        assert code == 1 and with_it == 2 and not (root / "never").exists(), (code, with_it, err)
        assert "Traceback" not in err + said
        return out

    def flip(name):
        def do(d):
            b = bytearray((d / name).read_bytes())
            b[len(b) // 3] ^= 4
            (d / name).write_bytes(b)

        return do

    volume = sorted((source / "replay" / "xr" / "volumes").glob("*.b2nd"))[0].relative_to(source)
    assert "holds other bytes" in verify(flip(volume)) and "holds other bytes" in verify(flip("model/model.safetensors"))
    assert "REFUSED" in verify(lambda d: (d / "packet.json").write_text((d / "packet.json").read_text().replace('"patient_data": true', '"patient_data": false')))
    assert "is not listed" in verify(lambda d: (d / "replay" / "more.pt").write_bytes(b"x"))

    def link(d):
        (d / "README.md").unlink()
        os.symlink(source / "README.md", d / "README.md")

    assert "is a link" in verify(link)


def test_bad_plans_are_one_sentence(root):
    run = lambda says, **k: refused("continual", "run", plan(root, root / "bad_plan", name="bad.yaml", **k), says=says)
    run("no packet at", start=str(root / "nowhere"))
    run("has no data", stages=[dict(name="ct")])
    run("is 3d, and", stages=[dict(name="ct", data=str(root / "xr"), kind="3d")])
    run("no case to learn from", stages=[dict(name="ct", data=str(root / "ct"), leave_out=["train", "test"])])
    run("did you mean 'medcoss'?", strategy="medcos", settings={})
    run("did you mean 'ewc'", strategy="ewcc", settings={})
    run("share is 2", settings=dict(share=2.0))
    run("MAE does not read reports", stages=["report"], method="mae", preset="small2d", task={})
    run("named twice", stages=["xr", "xr"])
    rows = (root / "report" / "reports.jsonl").read_text().splitlines()
    empty = root / "empty"
    shutil.copytree(root / "report", empty)
    (empty / "reports.jsonl").write_text("\n".join(rows[:3] + [json.dumps({**json.loads(rows[4]), "text": "  "})]) + "\n")
    run("have no words", stages=[dict(name="report", data=str(empty))])
    told = lambda rows: (empty / "reports.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for gone in ("subject", "case", "text"):
        told([json.loads(rows[0]), {k: v for k, v in json.loads(rows[1]).items() if k != gone}])
        run([f"{empty}/reports.jsonl, row 2{'' if gone == 'case' else ' (r-01)'} lacks {gone}", "expected rows as `medssl prepare` writes them, each with case, subject and text"], stages=[dict(name="report", data=str(empty))])
    told([])
    run(["holds nothing", "kind: text, 2d or 3d"], stages=[dict(name="report", data=str(empty))])
    run("is text, and", stages=[dict(name="report", data=str(empty), kind="text")])
    (empty / "reports.jsonl").unlink()
    run("holds no prepared case", stages=[dict(name="report", data=str(empty))])
    refused("continual", "rn", "x", says="did you mean 'run'?")
    refused("continual", "run", says=["a plan without stages", "medssl continual plan DATA -o plan.yaml", "medssl continual run plan.yaml"])
    refused("continual", "run", root / "nowhere.yaml", says="no settings file")
    refused("continual", "verify", root / "xr", says="has no packet.json")
    refused("continual", "stage", "--data", root / "xr", says="--to packets/NEXT")


def test_a_plan_to_begin_with(root, tmp_path):
    "Five stages in the order of MedCoSS; what is not there is a comment. Once it is there and the comments are taken out, the plan runs."
    from medssl_nb.config import read_yaml
    from medssl_nb.packet import Packet

    data, file = tmp_path / "my data", tmp_path / "plan.yaml"
    of = dict(report="report", xray="xr", ct="ct", mri="ct", path="he")
    for n in ("report", "xray", "path"):
        shutil.copytree(root / of[n], data / n)
    code, out, err = medssl("continual", "plan", data, "-o", file, "--preset", "small_unified")
    assert code == 0 and "3 of 5 stages found; ct, mri are not there and stay comments. Next: medssl continual run" in out, err
    assert [(s["name"], s["kind"], s["data"]) for s in read_yaml(file)["stages"]] == [(n, k, str(data / n)) for n, k in (("report", "text"), ("xray", "2d"), ("path", "2d"))]
    assert not any("target" in s for s in read_yaml(file)["stages"])
    refused("continual", "plan", data, "-o", file, says="is there already")
    refused("continual", "plan", data, says="-o plan.yaml")
    refused("continual", "plan", tmp_path / "nowhere", "-o", tmp_path / "b.yaml", says=["there is no folder", "report, xray, ct, mri, path"])
    for n in ("ct", "mri"):
        shutil.copytree(root / of[n], data / n)
    file.write_text(file.read_text().replace("# - {", "- {"))
    few = ["--steps", "1", "--score.scores", "own", "--score.cases", "1", "--train.batch", "2", "--train.workers", "0", "--train.device", "cpu", "--train.bar", "False", "--train.tensorboard", "False"]
    flags = [w for k, v in TASK.items() for w in [f"--task.{k.replace('_', '-')}", *(map(str, v) if isinstance(v, list) else [str(v)])]]
    code, out, err = medssl("continual", "run", file, "-o", tmp_path / "run", *few, *flags)
    assert code == 0, err
    p = Packet(tmp_path / "run" / "packets" / "05_path")
    assert [s["name"] for s in p.stages] == ["report", "xray", "ct", "mri", "path"] and p.settings["strategy"] == "medcoss" and set(p.replay()) == set(of)


def nursery(root, kills):
    "Fork, run the plan, die some time into the second stage; again, until it is through."
    import torch

    import lightning.fabric  # noqa: F401
    from medssl_nb.continual import plan_settings, run
    from medssl_nb.config import cli

    torch.set_num_threads(1)
    root, deaths = Path(root), []
    cfg = cli(*plan_settings(["--config", str(root / "killed.yaml")]))
    history = Path(cfg.out) / "stages" / "02_ct" / "history.jsonl"
    while True:
        pid = os.fork()
        if not pid:
            try:
                sys.stdout = open(os.devnull, "w")
                run(cfg)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        dead = (0, 0)
        want = 3 + 2 * len(deaths)
        while len(deaths) < kills and dead[0] == 0:
            if history.exists() and history.read_text().count("\n") >= want or (len(deaths) == kills - 1 and (Path(cfg.out) / "stages" / "02_ct" / "encoder").exists()):
                os.kill(pid, signal.SIGKILL)
                deaths.append(want)
            time.sleep(0.002)
            dead = os.waitpid(pid, os.WNOHANG)
        if dead[0] == 0:
            dead = os.waitpid(pid, 0)
        if dead[1] == 0:
            break
        assert os.WIFSIGNALED(dead[1]), f"ended with {dead[1]}"
    print(json.dumps(deaths))


def test_killed_in_the_second_stage_equals_unbroken(root):
    for name in ("unbroken", "killed"):
        plan(root, root / name, stages=("xr", "ct"), name=f"{name}.yaml", score=dict(scores=[]))
    code, out, err = medssl("continual", "run", root / "unbroken.yaml")
    assert code == 0, err
    out = subprocess.run([sys.executable, __file__, "nursery", str(root), "3"], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    assert len(json.loads(out.stdout.strip().splitlines()[-1])) == 3
    a, b = (json.loads((root / n / "packets" / "02_ct" / "packet.json").read_text()) for n in ("unbroken", "killed"))
    assert a["files"] == b["files"]  # weights, decoders, buffers, words: every byte
    row = lambda n: [{k: v for k, v in json.loads(r).items() if k not in ("volumes_per_s", "wait")} for r in open(root / n / "stages" / "02_ct" / "history.jsonl")]
    assert row("unbroken") == row("killed")


SHAPES = dict(pcrlv2=dict(net="plain", widths=(4, 8, 8), region=(32, 32), size=(32, 32), local_size=(16, 16)), brainmvp=dict(region=(32, 32)), taco=dict(region=(32, 32)))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    "Three sites with other sequences of the same kind of picture."
    from medssl_nb.data.cases import write_case, write_index

    root = tmp_path_factory.mktemp("sequences")
    for name, channels in dict(a=("t1", "t2"), b=("t1", "t1c", "t2", "flair"), c=("t1c", "flair"), d=("t1", "flair")).items():
        rng = np.random.default_rng(0)
        for i in range(6):
            x = rng.random((len(channels), 1, 32, 32)).astype(np.float32) * 0.1 + 0.2 * (1 + np.array([("t1", "t1c", "t2", "flair").index(c) for c in channels]))[:, None, None, None]
            x[..., :4, :] = 0
            row = dict(case=f"{name}-{i}", subject=f"{name}-s{i}", session="", group="", split="test" if i < 2 else "train", dims=2, channels=list(channels), spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=str(i))
            write_case(root / name, row, x, info=dict(intensity={}))
        write_index(root / name)
    return root


def two_sites(root, method, strategy, stages, settings=None, out="out"):
    from medssl_nb.config import from_dict
    from medssl_nb.continual import ContinualConfig, ScoreConfig, StageConfig, common, run

    base = common(method, "small2d", strategy)
    base["task"] = replace(base["task"], **SHAPES[method])
    base["settings"] = from_dict(base["settings"], settings or {}, "settings")
    base["train"] = replace(base["train"], batch=2, workers=0, bar=False, tensorboard=False, device="cpu", save_every=0)
    plan = ContinualConfig(**{**base, "steps": 3, "stages": tuple(StageConfig(s, root / s) for s in stages), "out": root / out, "score": ScoreConfig(scores=("own", "refit", "cka"), cases=3, refit_steps=1, every=1, inside=3)})
    return run(plan)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", EACH)
@pytest.mark.parametrize("method", SHAPES)
def test_each_method_with_old_cases_of_other_sequences(sequences, method, strategy):
    "Packet and scores of two stages, the second with more sequences than the first, by every strategy; the one pair that cannot be is refused before its first step."
    from medssl_nb.core import UserError

    go = lambda: two_sites(sequences, method, strategy, "ab", EACH[strategy], out=f"{method}_{strategy}")
    if (method, strategy) == ("brainmvp", "packnet"):
        with pytest.raises(UserError, match="is a batch norm; expected a network whose old answers can be kept"):
            go()
        assert not list((sequences / f"{method}_{strategy}").glob("stages/*"))
        return
    got = go()
    assert [s["channels"] for s in got["packet"].stages] == [["t1", "t2"], ["t1", "t1c", "t2", "flair"]]
    assert set(got["packet"].replay()) == ({"a", "b"} if strategy in ("er", "derpp", "medcoss", "invcoss") else set())
    assert {(r["after"], r["stage"]) for r in got["rows"] if r["score"] == "own"} == {(1, 1), (2, 1), (2, 2)} - ({(1, 1)} if strategy == "joint" else set()) and all(np.isfinite(r["value"]) for r in got["rows"])
    assert got["packet"].settings["strategy"] == strategy and got["packet"].settings["method"] == method
    # what was seen inside the second stage begins and ends with what the packets say, for every method and strategy
    inside = [r["value"] for r in got["rows"] if "step" in r]
    own = lambda after: np.mean([r["value"] for r in got["rows"] if r["score"] == "own" and "step" not in r and (r["after"], r["stage"]) == (after, 1)])
    page = (got["out"] / "result.md").read_text()
    assert (len(inside) >= 4 and "## Inside the stages" in page) if strategy != "joint" else (not inside and "joint training has no old stage" in page)
    if inside:
        assert (inside[0], inside[-1]) == pytest.approx((own(1), own(2)), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_templates_and_old_cases_meet_by_name(sequences):
    "BrainMVP has a template for each sequence: an old T2 trains the template of T2, wherever that lies; what cannot meet is refused before the first step."
    from medssl_nb.continual import ContinualConfig, Scene, StageConfig, StageData, common, old_fit
    from medssl_nb.core import UserError
    from medssl_nb.data.cases import read_batch
    from medssl_nb.packet import Packet

    for strategy, settings in dict(er=dict(share=0.5, ratio=0.7), derpp=dict(share=0.5), joint={}).items():
        got = two_sites(sequences, "brainmvp", strategy, "ab", settings, out=f"met_{strategy}")
        assert {(r["after"], r["stage"]) for r in got["rows"] if r["score"] == "own"} >= {(2, 1), (2, 2)}, strategy
    for stages, strategy, says in (("ac", "er", "show t1, t2, and this stage has places for t1c, flair"), ("ad", "derpp", "have answers to t1, t2, and this stage has no place for t2")):
        with pytest.raises(UserError, match=says):
            two_sites(sequences, "brainmvp", strategy, stages, dict(share=0.5), out=f"not_{strategy}")
        assert not list((sequences / f"not_{strategy}").glob("stages/02*"))
    before = Packet(sequences / "met_er" / "packets" / "01_a")
    base = common("brainmvp", "small2d", "er")
    for stage, real in dict(b=["t1", "t2"], d=["t1"]).items():  # equal numbers of sequences, too
        cfg = ContinualConfig(**{**base, "steps": 3, "differ": True, "task": replace(base["task"], **SHAPES["brainmvp"])})
        scene = Scene(cfg, StageData(StageConfig(stage, sequences / stage)), before, 2)
        batch, names = read_batch(scene.old["a"], [(0, 0), (1, 0)]), scene.task.channels
        for i, c in enumerate(names):
            level = batch["image"][:, i, 8:].mean().item()
            assert batch["present"][:, i].tolist() == [c in real] * 2 and abs(level - (0.2 * (1 + ["t1", "t1c", "t2", "flair"].index(c)) + 0.05 if c in real else 0)) < 0.03, (stage, c, level)
    with pytest.raises(UserError, match=r"are as large as \(32, 32\), and the atlas of this stage is \(16, 16\)"):
        from medssl_nb.continual import old_fit

        old_fit(type("T", (), dict(channels=("t1", "t2"), cfg=type("C", (), dict(atlas=(16, 16)))()))(), scene.strategy, before.stages[0], scene.old["a"].rows)


@dataclass
class PlainConfig:
    "A task that draws nothing."

    region: tuple[int, ...] = (32, 32)


def make_plain():
    "Registered under a name, as any method is."
    import torch
    from torch import nn

    from medssl_nb.tasks import registry
    from medssl_nb.tasks.base import Task
    from medssl_nb.tasks.mae import pooled

    class Net(nn.Module):
        dims, in_channels, widths, strides = 2, 1, (4, 8), (1, 4)

        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4, affine=False), nn.Conv2d(4, 8, 4, stride=4)  # a norm that sees one case alone: a site for statistics

        def forward(self, x):
            y = self.norm(self.a(x)).relu()
            return [y, self.b(y)]

        def spec(self):
            return dict(net="plain_test")

    class Plain(Task):
        method = "plain_test"

        def __init__(self, cfg=PlainConfig()):
            super().__init__()
            self.cfg, self.region, self.channels = cfg, tuple(cfg.region), None
            self.encoder, self.decoder = Net(), nn.ConvTranspose2d(8, 1, 4, stride=4)

        def views(self, batch, gen):
            x = batch["image"]
            seen = x.clone()
            seen[:, :, ::2] = 0
            return dict(target=x, seen=seen)

        def forward(self, v):
            return dict(pred=self.decoder(self.encoder(v["seen"])[-1]))

        def losses(self, out, v):
            return dict(recon=(out["pred"] - v["target"]).square().mean())

        def features(self, v):
            return self.encoder(v["seen"])[-1].flatten(2).transpose(1, 2)

        def readout(self, batch, cls=True):
            return pooled(self.encoder, batch, 1)

    PlainConfig.small2d = classmethod(lambda cls: cls())
    module = sys.modules[__name__]
    module.Plain = Plain
    registry.METHODS["plain_test"] = (__name__, "Plain", "PlainConfig")
    return torch


TWO = dict(sequential={}, lwf={}, er=dict(share=0.5, ratio=0.4), medcoss=dict(share=0.5, centres=0.2, ratio=0.4, mixup=False), derpp=dict(share=0.5), cassle=dict(hidden=16), ewc=dict(samples=6, lam=1.0), packnet={}, joint={}, fsdp=dict(share=0.5, centres=0.2, ratio=0.4, mixup=False),
           invcoss=dict(share=0.5, centres=0.2, ratio=0.4, mixup=False, few=True))  # the last for test_invcoss


def two_plans(root, out, batch, names, pools={}):
    "The same two stages for each strategy; `fsdp` is MedCoSS with its weights divided among the processes. `pools`: stage -> ready pool."
    from medssl_nb.continual import ContinualConfig, ScoreConfig, StageConfig, common, run

    make_plain()
    for name in names:
        settings = TWO[name]
        base = common("plain_test", "small2d", "medcoss" if name == "fsdp" else name)
        base["settings"] = replace(base["settings"], **settings)
        base["train"] = replace(base["train"], **{**LOOP, "batch": batch, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "save_every": 0, "strategy": "fsdp" if name == "fsdp" else "ddp"})
        stages = tuple(StageConfig(s, root / s, pool=pools.get(s)) for s in ("xr", "he"))
        run(ContinualConfig(**{**base, "steps": 5, "stages": stages, "out": out / name, "score": ScoreConfig(scores=("own", "cka"), cases=4, every=0 if name == "fsdp" else 2, inside=4)}))


def test_two_processes_equal_one(root):
    torch = make_plain()
    from medssl_nb.core import read_jsonl
    from medssl_nb.packet import Packet

    names = [n for n in TWO if n != "invcoss"]
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "two", str(root), *names], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-4000:]
    two_plans(root, root / "one_process", 8, names)
    for name in names:
        runs = ["joint"] if name == "joint" else ["01_xr", "02_he"]
        for r in runs:
            a, b = (read_jsonl(root / w / name / "stages" / r / "history.jsonl") for w in ("one_process", "two_processes"))
            assert [x.get("old") for x in a] == [x.get("old") for x in b], name
            assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(a, b, strict=True)), (name, r)
            if r == "02_he" and name != "fsdp":  # the first process looked at the weights that both share, not at those of the packet
                a, b = ([x["own:xr"] for x in rs if "own:xr" in x] for rs in (a, b))
                assert len(a) >= 2 and a == pytest.approx(b, abs=1e-5) and (len(set(a)) == 1) == (name == "packnet"), (name, a, b)
        a, b = (Packet(root / w / name / "packets" / runs[-1]) for w in ("one_process", "two_processes"))
        x, y = a.model(), b.model()
        assert all(torch.allclose(x[k], y[k], atol=1e-5) for k in x), name
        assert {k: v for k, v in a.facts["replay"].items()} == {k: v for k, v in b.facts["replay"].items()}, name
        if name != "joint":
            start = Packet(root / "one_process" / name / "packets" / "01_xr").model()
            assert any((x[k] - start[k]).abs().max() > 1e-3 for k in x), "nothing was learnt: the comparison says nothing"


def families(root, out):
    "Reports, pictures, volumes: two steps each by one network, every process on its own cases. After each step all processes must hold the same weights."
    import torch
    import torch.distributed as dist

    from medssl_nb.config import cli
    from medssl_nb.continual import plan_settings, run
    from medssl_nb.strategies import ContinualTask

    real, idle = ContinualTask.after_step, ContinualTask.before_step
    seen = []

    def before(self, step):
        idle(self, step)
        gone = torch.tensor([p.grad is None for p in self.task.parameters()]).double()
        compare(self, step, "what has no gradient", gone)
        seen.append(int(gone.sum()))

    def after(self, step):
        real(self, step)
        compare(self, step, "weights", torch.stack([p.detach().double().sum() for p in self.task.parameters()]))

    def compare(task, step, what, mine):
        if dist.is_initialized():
            both = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(both, mine)
            odd = (both[0] != both[1]).nonzero()[:, 0].tolist()
            assert not odd, f"{what}: the processes differ at step {step} in {[n for n, _ in task.task.named_parameters()][odd[0]]}"

    ContinualTask.before_step, ContinualTask.after_step = before, after
    run(cli(*plan_settings(["--config", str(root / "families.yaml"), "--out", str(out)])))
    assert len(set(seen)) > 1 and min(seen) > 0, seen  # each family leaves other parts untouched
    print(f"agreed {len(seen)}")


def test_two_processes_agree_on_what_no_family_reached(root):
    plan(root, root / "families", stages=("report", "xr", "ct"), settings=dict(share=0.5, centres=0.2, ratio=0.4), name="families.yaml", steps=2, train=dict(LOOP, batch=2, optimizer="adamw", save_every=0), score=dict(scores=[]))
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "families", str(root)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-4000:]
    rows = [[json.loads(r) for r in open(f)] for f in sorted((root / "families" / "stages").glob("*/history.jsonl"))]
    assert [sum(1 - r["old"] for r in rs) for rs in rows] == [2, 2, 2] and sum(r["old"] for rs in rows for r in rs) >= 2
    assert out.stdout.count(f"agreed {sum(map(len, rows))}") == 2 and out.stdout.count("4 cases a step over 2 processes") == 3
    from medssl_nb.packet import Packet

    assert [s["kind"] for s in Packet(root / "families" / "packets" / "03_ct").stages] == ["text", "2d", "3d"]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    if sys.argv[1] == "nursery":
        nursery(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "families":
        families(Path(sys.argv[2]), Path(sys.argv[2]) / "families")
    else:
        sys.modules["test_continual"] = sys.modules["__main__"]
        two_plans(Path(sys.argv[2]), Path(sys.argv[2]) / "two_processes", 4, sys.argv[3:])
