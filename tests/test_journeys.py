"""Journeys: what no single notebook owns. Files to a table, in one go, with a check at every hand-over."""
import re

import numpy as np

from medssl_nb.core import read_json, read_jsonl


def test_from_nothing_to_a_page(tmp_path, capsys):
    "The demo in miniature: every part hands on what the next one needs, and the page tells it."
    from medssl_nb.data.cases import Prepared
    from medssl_nb.data.volume import read_volume
    from medssl_nb.demo import DemoConfig, demo

    cfg = DemoConfig(out=tmp_path / "demo", heads=12, steps=3, finetune_steps=3, budgets=(2, 4), seeds=(0, 1), jobs=1, people=100, others=10, story_steps=3, inversion_steps=3)
    made = demo(cfg)
    out = tmp_path / "demo"

    # nobody who is tested was seen in pre-training, and nobody is on both sides
    p = Prepared(out / "prepared")
    test = {r["subject"] for r in p.rows if r["split"] == "test"}
    train = {r["subject"] for r in p.rows if r["split"] == "train"}
    assert test and train and not test & train
    card = read_json(out / "runs" / "pcrlv2" / "encoder" / "card.json")
    assert card["data"]["subjects"] == len(train)

    # every cell of the table is there, for the arm and its twin, on the same test people
    cells = read_jsonl(out / "finetune" / "cells.jsonl")
    assert {(c["arm"], c["budget"], c["seed"]) for c in cells} == {(a, b, s) for a in ("scratch", "pcrlv2") for b in (2, 4) for s in (0, 1)}
    rows = [r for f in (out / "finetune" / "cells").rglob("rows.jsonl") for r in read_jsonl(f)]
    assert {r["subject"] for r in rows} <= test
    assert all(0 <= r["dice"] <= 1 for r in rows)

    # predictions are on the grid of the files they belong to
    from medssl_nb.data.cases import Manifest

    man = Manifest(out / "manifest")
    files = sorted((out / "finetune" / "cells").rglob("predictions/*.nii.gz"))
    assert files
    for f in files[:2]:
        case = f.name.removesuffix(".nii.gz")
        row = next(c for c in man.cases if c["case"] == case)
        src = next(iter(row["images"].values()))
        a, b = read_volume([f]), read_volume(man.paths(src["file"]))
        assert a.grid.same(b.grid, tol=1e-2)

    # the page: self-contained, with its figures, and no name of a file's folder in it
    html = made["out"].read_text()
    assert html.count("<img ") == 10 and html.count("<h2>") == 9 and not re.findall(r'(?:src|href)="(?!data:)[^"]*"', html)
    assert "Traceback" not in html and str(tmp_path) not in html and "sub-0" not in html

    # steps are counted; what one hospital gives to the next holds nobody's image unless it says so, and B's packet carries A's audit
    from medssl_nb.packet import Packet

    said = capsys.readouterr().out
    assert re.findall(r"^\[(\d)/8\]", said, flags=re.M) == list("12345678")
    ends = {w: Packet(out / "story" / w / "packets" / "02_head") for w in ("sequential", "lwf", "medcoss", "invcoss")}
    assert {w for w, k in ends.items() if k.facts["patient_data"]} == {"medcoss"}
    assert "audit/xray.html" in ends["invcoss"].facts["files"] and ends["invcoss"].facts["audit"]["xray"]["verdict"][:40] in html
    assert {(r["strategy"], r["score"], r["after"], r["stage"]) for r in made["story"]["rows"]} == {(w, s, a, k) for w in ends for s in ("own", "refit") for a, k in ((1, 1), (2, 1), (2, 2))}
    assert len({r["value"] for r in made["story"]["rows"] if r["after"] == 1 and r["score"] == "own"}) == 10  # ten people, and the first hospital does not know what will be kept

    # a second call finds nothing left to train and makes the same page but for the times
    files = lambda: {f.relative_to(out): f.read_bytes() for d in ("runs", "finetune", "story") for f in (out / d).rglob("*") if f.suffix in (".safetensors", ".jsonl", ".md")}
    before = files()
    again = demo(cfg)
    assert files() == before
    strip = lambda h: re.sub(r"<pre>.*?</pre>", "", h, flags=re.S)
    assert strip(again["out"].read_text()) == strip(html)


def test_a_story_that_is_cut_goes_on(tmp_path, monkeypatch):
    "The power fails at hospital A while the other ways are under way; the same call ends where an unbroken one ends, and leaves no process behind."
    import multiprocessing as mp
    import os
    import shutil
    import signal

    import pytest

    from medssl_nb import demo as d
    from medssl_nb.packet import Packet
    from medssl_nb.strategies import ContinualTask
    from medssl_nb.train.trainer import Stopped

    def story(cfg):
        d.story_data(cfg)
        with d.meanwhile(cfg):
            packet = d.hospital_a(cfg)
            d.story_audit(cfg, packet)
            d.hospital_b(cfg, packet)
        return {w: Packet(p).facts["files"]["model/model.safetensors"] for w in d.WAYS for p in (cfg.out / "story" / w / "packets").iterdir() if p.name == "02_head"}

    make = lambda name, jobs: d.DemoConfig(out=tmp_path / name, people=100, others=10, story_steps=8, inversion_steps=2, jobs=jobs)
    whole = story(make("whole", 1))
    assert len({f["sha256"] for f in whole.values()}) == len(whole) == 4
    shutil.copytree(tmp_path / "whole" / "story" / "xray", tmp_path / "cut" / "story" / "xray")  # the images, which take the longest
    shutil.copytree(tmp_path / "whole" / "story" / "head", tmp_path / "cut" / "story" / "head")
    real = ContinualTask.after_step
    monkeypatch.setattr(ContinualTask, "after_step", lambda self, step: (real(self, step), os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None))
    with pytest.raises(Stopped):
        story(make("cut", 2))
    assert not mp.active_children() and not (tmp_path / "cut" / "story" / "invcoss" / "packets").exists()
    monkeypatch.undo()
    assert story(make("cut", 2)) == whole


def test_no_identifier_leaves_the_private_folder(tmp_path):
    "Names planted in folders, files and DICOM tags are found nowhere outside private/."
    import nibabel as nib

    from medssl_nb.data.ingest import IngestConfig, ingest
    from medssl_nb.data.prepare import PrepareConfig, prepare

    rng = np.random.default_rng(0)
    for who in ("Doe_Jane", "Roe_Richard"):
        for mod in ("t1", "flair"):
            f = tmp_path / "scans" / who / f"{who}_19700101_{mod}.nii.gz"
            f.parent.mkdir(parents=True, exist_ok=True)
            im = nib.Nifti1Image(rng.random((10, 11, 12)).astype(np.float32), np.eye(4))
            im.header["descrip"] = b"Jane Doe 1970"
            nib.save(im, f)
    ingest(IngestConfig(src=tmp_path / "scans", out=tmp_path / "m", progress=False))
    prepare(PrepareConfig(manifest=str(tmp_path / "m"), out=str(tmp_path / "p"), progress=False))
    public = [f for d in ("m", "p") for f in (tmp_path / d).rglob("*") if f.is_file() and "private" not in f.parts]
    assert len(public) >= 6
    for f in public:
        text = f.read_bytes().lower() + str(f.relative_to(tmp_path)).lower().encode()
        for name in (b"doe", b"jane", b"roe", b"richard", b"19700101"):
            assert name not in text, (f.name, name)
    private = b"".join(f.read_bytes() for f in (tmp_path / "m" / "private").rglob("*") if f.is_file())
    assert b"Doe_Jane" in private  # so the check above looks for something that is really there
