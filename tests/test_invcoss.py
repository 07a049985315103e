"""Old images from weights, by the command line: reports and two kinds of pictures in one network, without a patient's picture in any packet.

The pool is made where the data are; whoever has the packet, and no data, makes the same one.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
from test_cli import medssl, refused
from test_continual import plan, prepared

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
