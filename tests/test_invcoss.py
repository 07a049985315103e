"""Old images from weights, by the command line: reports and two kinds of pictures in one network, without a patient's picture in any packet.

The pool is made where the data are; whoever has the packet, and no data, makes the same one.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import medssl, refused
from test_continual import LOOP, plan, prepared

INVERT = dict(batch=4, steps=6, lr=5e-3, z_channels=4, widths=[8, 8, 8], cache=[4, 4, 4], bar=False, save_every=2)
SETTINGS = dict(share=0.25, centres=0.1, ratio=0.4, few=True, invert=INVERT)
GUARD = """
import sys
roots = sys.argv.pop(1).split(":")
def hook(event, args):
    if event in ("open", "os.listdir", "os.scandir") and args and any(str(args[0]).startswith(r) for r in roots):
        raise SystemExit(9)
sys.addaudithook(hook)
from medssl_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("invcoss"))


def go(root, name, stages=("report", "xr", "he"), **k):
    k = {"score": dict(scores=[]), "strategy": "invcoss", "settings": SETTINGS, **k}
    return medssl("continual", "run", plan(root, root / name, stages=stages, name=f"{name}.yaml", **k))


@pytest.fixture(scope="module")
def journey(root):
    code, out, err = go(root, "journey")
    assert code == 0, err
    assert "images made instead of keeping xr" in out and "images made instead of keeping he" in out
    return root / "journey"


def facts(packet):
    return json.loads((packet / "packet.json").read_text())


def files(packet, *parts):
    return {n: f for n, f in facts(packet)["files"].items() if n.startswith(parts)}


def made(packet):
    "Every file and its hash, but for the report of a pool, which says how long it took."
    return {n: f for n, f in facts(packet)["files"].items() if not (n.startswith("replay/") and n.endswith("/report.json"))}


def test_pictures_are_made_and_reports_are_declared(journey):
    from medssl_nb.core import read_jsonl

    a, b, c = (journey / "packets" / n for n in ("01_report", "02_xr", "03_he"))
    kinds = {s: (p["kind"], p["cases"]) for s, p in facts(c)["replay"].items()}
    assert kinds["xr"] == kinds["he"] == ("inverted", 4) and kinds["report"][0] == "real"
    f = facts(c)
    assert f["patient_data"] is True and "stage report" in f["patient_data_words"] and "xr" not in f["patient_data_words"]
    assert f["audited"] is False and "NOT AUDITED" in (c / "README.md").read_text()
    assert sorted(files(c, "statistics/")) == [f"statistics/{s}.{e}" for s in ("he", "xr") for e in ("json", "safetensors")]
    assert files(c, "replay/xr/", "statistics/xr.") == files(b, "replay/xr/", "statistics/xr.") and len(files(b, "replay/xr/volumes/")) == 8
    assert files(c, "replay/report/") == files(a, "replay/report/")
    rows = read_jsonl(journey / "stages" / "03_he" / "history.jsonl")
    assert [r["old"] for r in rows].count(0) == 8 and sum(r["old"] for r in rows) >= 4
    # no patient's picture is in the packet, under whatever name
    real = {p.read_bytes() for s in ("xr", "he") for p in (journey.parent / s / "volumes").glob("*.b2nd")}
    assert real and not real & {p.read_bytes() for p in c.rglob("*.b2nd")}


def test_verify_and_one_byte(journey, root):
    c = journey / "packets" / "03_he"
    code, out, err = medssl("continual", "verify", c)
    assert code == 0 and "PATIENT DATA" in out and "NOT AUDITED" in out, err
    code, out, err = medssl("continual", "verify", c, "--audited", "True")
    assert code == 1 and "REFUSED: NOT AUDITED" in out and "medssl audit" in out
    for name in ("statistics/xr.json", next(n for n in facts(c)["files"] if n.startswith("replay/he/volumes/"))):
        bad = root / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(c, bad)
        b = bytearray((bad / name).read_bytes())
        b[len(b) // 2] ^= 1
        (bad / name).write_bytes(b)
        code, out, err = medssl("continual", "verify", bad)
        assert code == 1 and f"{name} holds other bytes" in out, out + err


def test_without_data_the_same_pool(journey, root):
    "Weights, decoder and statistics are in the packet; a process that touches the data ends with 9."
    c, out = journey / "packets" / "03_he", root / "again"
    how = [w for k in ("batch", "steps", "lr", "z_channels", "save_every") for w in (f"--how.{k.replace('_', '-')}", INVERT[k])]
    how += ["--how.widths", *INVERT["widths"], "--how.cache", *INVERT["cache"], "--how.bar", "False", "--device", "cpu"]
    walled = lambda *w: subprocess.run([sys.executable, "-c", GUARD, ":".join(str(root / s) for s in ("report", "xr", "he")), *map(str, w)], capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    r = walled("invert", c, "-o", out, "--n", 4, *how)
    assert r.returncode == 0, r.stderr
    bytes_of = lambda d: {p.name: p.read_bytes() for p in (d / "volumes").glob("*.b2nd")}
    assert bytes_of(out) == bytes_of(c / "replay" / "he") and len(bytes_of(out)) == 4
    assert walled("continual", "stage", "--from", c, "--data", root / "xr", "--name", "x", "--to", root / "never").returncode == 9


def test_statistics_of_a_stage_afterwards(journey, root):
    "A run folder of the loop is a run: its statistics are those that the loop recorded, and a pool can be made of it."
    from medssl_nb.losses.statistics import load_statistics

    stage, at = journey / "stages" / "02_xr", root / "afterwards"
    code, out, err = medssl("statistics", stage, "--data", root / "xr", "-o", at, "--batch", 4)
    assert code == 0, err
    assert "16 cases of 16 subjects" in out and "8 cases of split test are left out" in out
    a, b = load_statistics(at / "xr.json"), load_statistics(journey / "packets" / "02_xr" / "statistics" / "xr.json")
    assert a.info["model"] == b.info["model"] and a.info["image"] == b.info["image"] == [1, 32, 32] and a.info["channels"] == ["xr"]
    assert a.digest() == b.digest() and a.info["batch"] == 4 and a.info["cases"] == 16, "the same cases in the same order under the same masks: the same numbers, to the bit"
    code, out, err = medssl("statistics", stage, "--data", root / "xr", "-o", root / "by_fives", "--batch", 5)
    assert code == 0 and "16 cases of 16 subjects" in out, "the one who fills no batch of five is looked at, too"
    code, out, err = medssl("invert", stage, "--statistics", at, "-o", root / "afterwards_pool", "--n", 2, "--how.steps", 2, "--how.z-channels", 4, "--how.widths", 8, 8, 8, "--how.cache", 4, 4, 4, "--how.bar", "False", "--device", "cpu")
    assert code == 0, err
    refused("statistics", journey / "stages" / "01_report", "--data", root / "report", says="reports are not inverted")
    refused("statistics", journey, "--data", root / "xr", says=["holds a sequence of stages", "stages/02_xr"])
    half = root / "half"
    code, out, err = go(root, "half", ("xr",), train=dict(LOOP, max_minutes=0.0))
    assert code == 130 and "stage xr is at step 1 of 8; the same command continues" in err and not (half / "packets").exists()
    refused("statistics", half / "stages" / "01_xr", "--data", root / "xr", says="is at step 1, which is not its last; expected a stage that has ended")


def test_audit_of_codes(journey, root):
    "A pool that is a generator and codes is drawn to be read, also where it is a shadow: the verdict is that on its images."
    import numpy as np

    from medssl_nb.data.cases import write_case, write_index

    how = ["--how.steps", 2, "--how.z-channels", 4, "--how.widths", 8, 8, 8, "--how.cache", 4, 4, 4, "--how.bar", "False", "--device", "cpu"]
    codes, images = root / "codes", root / "codes_images"
    code, out, err = medssl("invert", journey / "packets" / "02_xr", "-o", codes, "--n", 12, "--how.store", "codes", *how)
    assert code == 0, err
    assert not (codes / "volumes").exists() and sorted(p.name for p in (codes / "generator").iterdir()) == ["block_0000.safetensors", "generator.json"]
    code, out, err = medssl("render", codes, "-o", images)
    assert code == 0 and len(list((images / "volumes").glob("*.b2nd"))) == 12, err
    held, rng, said = root / "held", np.random.default_rng(0), {}
    for i in range(12):  # nobody has seen these
        write_case(held, dict(case=f"h-{i:02}", subject=f"h-s{i:02}", session="", group="", split="test", dims=2, channels=["xr"], spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=str(i)), rng.random((1, 1, 32, 32)).astype(np.float32))
    write_index(held)
    for name, pool, shadow in (("codes", codes, images), ("images", images, codes)):
        code, out, err = medssl("audit", pool, "--against", root / "xr", "--held", held, "-o", root / f"audit_{name}", "--shadows", shadow, "--nearest", 3, "--draws", 20)
        assert code in (0, 1) and "Traceback" not in err, err
        said[name] = json.loads((root / f"audit_{name}" / "audit.json").read_text())
    assert said["codes"] == said["images"] and said["codes"]["pool"] == 12 and said["codes"]["persons"] == dict(training=24, held_out=12)
    calibrated = [c["value"] for c in said["codes"]["checks"] if c["check"] == "membership: calibrated"]
    assert calibrated and set(calibrated) == {0.5}, "a pool calibrated by itself says nothing about anybody"


@pytest.fixture(scope="module")
def solids(tmp_path_factory):
    "Two stages of volumes of 16 voxels: gratings and lattices; a third of the persons is left out."
    from medssl_nb.data.cases import write_case, write_index
    from medssl_nb.data.patterns import pattern_phantom

    at = tmp_path_factory.mktemp("solids")
    for family, n in (("grating", 30), ("lattice", 18)):
        x = pattern_phantom(family, n, dims=3)["image"].numpy()
        for i in range(n):
            row = dict(case=f"{family}-{i:02}", subject=f"{family}-s{i:02}", session="", group="", split="test" if i % 3 == 0 else "train", dims=3, channels=["ct"], spacing=[1.0, 1.0, 1.0], labels={}, fingerprint=str(i))
            write_case(at / family, row, x[i], info=dict(intensity=dict(ct=dict(rule="unit"))))
        write_index(at / family)
    return at


def test_volumes_through_the_loop(solids):
    "Two stages in 3-D: statistics and a pool of volumes, replayed; the packet is verified, the audit reads it and goes into it."
    import numpy as np

    from medssl_nb.core import read_jsonl
    from medssl_nb.data.cases import Prepared

    settings = {**SETTINGS, "share": 0.5, "invert": {**INVERT, "steps": 40}, "last": False}
    stages = [dict(name=s, data=str(solids / s)) for s in ("grating", "lattice")]
    code, out, err = medssl("continual", "run", plan(solids, solids / "run", stages, "invcoss", settings, score=dict(scores=[]), steps=12))
    assert code == 0 and "10 images made instead of keeping grating" in out, err
    packet = solids / "run" / "packets" / "02_lattice"
    f = facts(packet)
    assert [s["kind"] for s in f["stages"]] == ["3d", "3d"] and f["patient_data"] is False and list(f["replay"]) == ["grating"] and f["replay"]["grating"]["kind"] == "inverted"
    p = Prepared(packet / "replay" / "grating")
    x = np.stack([p.read(r)[0] for r in p.rows]).astype(np.float32)
    info = json.loads((packet / "statistics" / "grating.json").read_text())
    assert x.shape == (10, 1, 16, 16, 16) and info["image"] == [1, 16, 16, 16] and len({v.tobytes() for v in x}) == 10
    assert info["lo"][0] - 1e-2 <= x.min() < x.max() <= info["hi"][0] + 1e-2 and x.std() > 0.02
    made_of = read_jsonl(packet / "replay" / "grating" / "history.jsonl")
    assert len(made_of) == 40 and all(r["img"] > 0 for r in made_of) and made_of[-1]["loss"] < made_of[0]["loss"]
    rows = read_jsonl(solids / "run" / "stages" / "02_lattice" / "history.jsonl")
    old = [r for r in rows if r["old"]]
    assert len(rows) - len(old) == 12 and len(old) >= 6 and all("fd" in r for r in old)
    assert medssl("continual", "verify", packet)[0] == 0
    code, out, err = medssl("audit", packet, "--against", solids / "grating", "-o", solids / "audit", "--nearest", 3, "--draws", 20, "--repeats", 1)
    r = json.loads((solids / "audit" / "audit.json").read_text())
    assert code in (0, 1) and r["shape"] == [1, 16, 16, 16] and r["pool"] == 10 and r["persons"] == dict(training=20, held_out=10) and "network" in r["spaces"], err
    assert r["verdict"] in out, "the sentence that says it is said, not only written"
    assert medssl("continual", "verify", packet)[0] == 0 and facts(packet)["audited"] and {n: h for n, h in files(packet, "replay/").items()} == {n: h for n, h in f["files"].items() if n.startswith("replay/")}


def in_a_process(root, out, batch, pools=None):
    "A plan of two stages, in which each process writes down whether it inverted, and which old images it was given; then statistics of one network, by all processes together. `pools`: a run whose pools are taken as they are."
    import hashlib

    import torch
    from test_continual import TWO, PlainConfig, two_plans

    import medssl_nb.continual as loop
    import medssl_nb.invcoss as invcoss
    from medssl_nb.data.cases import Cases, Prepared
    from medssl_nb.invert import InvertConfig
    from medssl_nb.losses.statistics import calibrate, save_statistics
    from medssl_nb.tasks.registry import load_task

    TWO["invcoss"]["invert"] = InvertConfig(**{**INVERT, "steps": 20})
    rank, mix, invert = int(os.environ.get("RANK", 0)), loop.mix_cases, invcoss.invert
    out.mkdir(exist_ok=True)

    def note(*words):
        with open(out / f"said_{rank}", "a") as f:
            f.write(" ".join(words) + "\n")

    def mixed(strategy, new, old, name):
        for n, c in old.items():
            note("given", n, hashlib.sha256(b"".join(Prepared(c.dir).read(r)[0].tobytes() for r in c.rows)).hexdigest())
        return mix(strategy, new, old, name)

    def inverted(*a):
        note("inverts", a[4])
        return invert(*a)

    loop.mix_cases, invcoss.invert = mixed, inverted
    two_plans(root, out, batch, ["invcoss"], {s: pools / "invcoss" / "packets" / p / "replay" / s for s, p in (("xr", "01_xr"), ("he", "02_he"))} if pools else {})
    torch.manual_seed(0)
    p = Prepared(root / "xr")
    stats = calibrate(load_task("plain_test", PlainConfig()), Cases(p, p.rows, region=(32, 32)), batch, stage="xr")
    if not rank:
        save_statistics(stats, out / "together")


def test_two_processes_one_pool(root):
    """One process of two makes the pool, as a process alone would from the same packet, to the byte; both replay it, and where the task draws nothing the losses are those of one process that replays it.

    A pool made by one process from weights that one process trained is another pool: their last bits differ, and Adam, which divides by what it has seen, makes that visible."""
    import numpy as np
    from test_continual import make_plain

    from medssl_nb.core import read_jsonl
    from medssl_nb.data.cases import Cases, Prepared
    from medssl_nb.invert import InvertConfig, invert, open_model
    from medssl_nb.losses.statistics import calibrate, load_statistics

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for words, out, batch, *pools in ((torchrun, "two", 4), ([], "one", 8, root / "two")):
        r = subprocess.run([sys.executable, *words, __file__, str(root), str(root / out), str(batch), *map(str, pools)], capture_output=True, text=True, timeout=200, env=env)
        assert r.returncode == 0, r.stderr[-4000:]
    told = lambda run, k: (root / run / f"said_{k}").read_text().splitlines()
    first, second, single = ([w for w in told(*a) if w.startswith("inverts")] for a in (("two", 0), ("two", 1), ("one", 0)))
    assert (first, second, single) == (["inverts xr", "inverts he"], [], []), "the first process makes the pools, and it alone; who is given pools makes none"
    given = [{w for w in told(*a) if w.startswith("given")} for a in (("two", 0), ("two", 1), ("one", 0))]
    assert len(given[0]) == 1 and given[0] == given[1] == given[2], "all go on with the same images"
    one, two = (root / n / "invcoss" for n in ("one", "two"))
    for stage in ("01_xr", "02_he"):
        a, b = (read_jsonl(o / "stages" / stage / "history.jsonl") for o in (one, two))
        assert [x["old"] for x in a] == [x["old"] for x in b] and (stage == "01_xr" or sum(x["old"] for x in a) >= 2)
        gap = max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True))
        assert gap < 1e-4, (stage, gap)
    make_plain()
    task, _, folder = open_model(two / "packets" / "01_xr")
    settings = json.loads((two / "packets" / "01_xr" / "replay" / "xr" / "provenance.json").read_text())["settings"]
    how = InvertConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in InvertConfig.__dataclass_fields__})
    invert(task, load_statistics(folder / "xr.json"), how, root / "alone", "xr")
    volumes = lambda d: {p.name: p.read_bytes() for p in (d / "volumes").glob("*.b2nd")}
    assert volumes(root / "alone") == volumes(two / "packets" / "01_xr" / "replay" / "xr") and len(volumes(root / "alone")) == 6
    # what the layers saw: by the first process alone in the loop, by both together where `pretrain` records it
    p = Prepared(root / "xr")
    mine = calibrate(open_model(one / "packets" / "01_xr")[0], Cases(p, [r for r in p.rows if r["split"] != "test"], region=(32, 32)), how.batch, stage="xr", channels=("xr",))
    for a, b in ((mine, load_statistics(two / "packets" / "02_he" / "statistics" / "xr.json")), (load_statistics(o.parent / "together.json") for o in (one, two))):
        assert (a.info["cases"], a.info["subjects"], a.info["rows"]) == (b.info["cases"], b.info["subjects"], b.info["rows"])
        for site, s in a.sites.items():
            for k in ("mean", "var"):
                np.testing.assert_allclose(s[k], b.sites[site][k], rtol=1e-4, atol=1e-6)
        assert abs(a.info["loss_task"] / b.info["loss_task"] - 1) < 1e-4 and a.info["cases"] >= 16


def test_no_reports_no_patients(root):
    code, out, err = go(root, "mute", ("report", "xr"), settings={**SETTINGS, "text": "none"}, steps=3)
    assert code == 0, err
    f = facts(root / "mute" / "packets" / "02_xr")
    assert f["patient_data"] is False and list(f["replay"]) == ["xr"] and f["stages"][1]["statistics"] == dict(cases=16, subjects=16)


def test_too_few_people_before_anything_is_trained(root):
    code, out, err = go(root, "few", ("xr",), settings={**SETTINGS, "few": False})
    assert code == 2 and "statistics of 16 persons" in err and "Traceback" not in err
    assert not (root / "few" / "stages").exists()
    refused("continual", "run", plan(root, root / "sel", stages=("xr",), strategy="invcoss", name="sel.yaml", settings={**SETTINGS, "select": "kmeans"}), says="select")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A site of 124 people, 24 of them put aside, and 40 canaries of which 20 are learnt from."
    from medssl_nb.data.cases import write_case, write_index
    from medssl_nb.data.patterns import pattern_case

    site = tmp_path_factory.mktemp("canaries") / "site"
    for i in range(124):
        row = dict(case=f"c-{i:03}", subject=f"s-{i:03}", session="", group="", split="train" if i < 100 else "test", dims=2, channels=["mr"], spacing=[1.0] * 3, labels={}, fingerprint=str(i))
        write_case(site, row, pattern_case("grating", 0, i)["image"][None, None], info=dict(intensity={}))
    write_index(site)
    code, out, err = medssl("canaries", site, "--n", 40)
    assert code == 0 and "20 to be learnt from, 20 kept back" in out, (out, err)
    return site


@pytest.mark.slow
@pytest.mark.parametrize("steps,learnt", [(700, True), (5, False)])
def test_canaries_come_home(planted, steps, learnt):
    """Plant, learn, invert, audit, as two sites would: a network that was trained until it knew its cases by heart gives the canaries away, one that has hardly seen them does not.

    With twenty kept back the most that can be shown is log2(21) = 4.4 bits.
    """
    root = planted.parent
    small = dict(region2d=(32, 32), patch2d=8, channels2d=1, width=96, depth=2, heads=8, decoder_width=96, decoder_depth=1, decoder_heads=8, drop_path=0, crop=(1, 1), flip=0, ratio=0.5, norm_target=False, normalise="zscore")
    train = dict(batch=40, lr=4e-3, workers=0, bar=False, tensorboard=False, device="cpu")
    invert = dict(steps=40, batch=8, widths=(16, 16, 8, 8), cache=(4,) * 4, z_channels=4, bar=False, lr=5e-3)
    words = [w for at, said in (("task", small), ("train", train), ("settings.invert", invert)) for k, v in said.items() for w in (f"--{at}.{k.replace('_', '-')}", *(v if isinstance(v, tuple) else (v,)))]
    code, out, err = medssl("continual", "stage", "--strategy", "invcoss", "--method", "mim", "--preset", "small2d", "--data", planted, "--kind", "2d", "--name", "mr", "--to", root / f"to_{steps}", "--steps", steps, "--settings.share", 0.2, *words)
    assert code == 0, err
    page = root / f"audit_{steps}"
    code, out, err = medssl("audit", root / f"to_{steps}", "--against", planted, "-o", page, "--draws", 100)
    assert code in (0, 1), err
    a = json.loads((page / "audit.json").read_text())
    assert a["volumes"] == dict(training=100, held_out=24, canaries=40) and a["persons"] == dict(training=100, held_out=24)  # a canary is nobody
    row = {c["check"]: c for c in a["checks"] if c["space"] == "network"}
    mine, loss = row["canaries in the network, bits"], row["membership: loss of the network itself"]
    assert mine["expected"] == 1.0 and (mine["status"] == "leak") is learnt, mine
    if learnt:
        assert mine["value"] > 3 and mine["p"] < 1e-4 and loss["value"] > 0.9 and a["network_leaks"], (mine, loss)
        assert "gives its training patients away" in a["verdict"]
    else:
        assert mine["p"] > 0.01, mine
    assert not any("No canaries were planted" in s for s in a["limits"])


if __name__ == "__main__":
    in_a_process(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:]))
