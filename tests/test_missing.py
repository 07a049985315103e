"Every subset of the sequences, as a user asks for it: `medssl finetune --subsets True`, outlines and decisions, with gaps in training and without."
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

MEDSSL = str(Path(sys.executable).parent / "medssl")
CHANNELS = ("t1", "t2", "flair")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    "Cubes that one sequence shows well, one weakly, one not; one test case has the first alone. And an encoder."
    from medssl_nb.data.cases import write_case, write_index
    from medssl_nb.nets.unet import UNetEncoder
    from medssl_nb.train.checkpoint import export_encoder

    d = tmp_path_factory.mktemp("missing")
    rng = np.random.default_rng(0)
    for i in range(16):
        y = np.zeros((1, 8, 8, 8), np.uint8)
        a = rng.integers(0, 4, 3)
        y[0, a[0] : a[0] + 4, a[1] : a[1] + 4, a[2] : a[2] + 4] = 1
        have = CHANNELS[:1] if i == 15 else CHANNELS
        x = np.stack([k * y[0] + 0.2 * rng.standard_normal(y.shape[1:]) for k in (1.0, 0.4, 0.0)][: len(have)]).astype(np.float32)
        row = dict(case=f"c-{i:02d}", subject=f"s-{i:02d}", session="", split="test" if i > 9 else "train", group="", dims=3, channels=list(have), spacing=[1.0] * 3, labels=dict(place="low" if i % 2 else "high"), fingerprint="")
        write_case(d / "data", row, x, y)
    write_index(d / "data")

    class Holder(torch.nn.Module):
        pass

    h = Holder()
    torch.manual_seed(0)
    h.encoder = UNetEncoder(1, (4, 8), dims=3)
    export_encoder(h, d / "enc", dict(method="toy", input="zscore"))
    return d


def run(heads, out, *more):
    words = [MEDSSL, "finetune", heads / "data", "-o", out, "--arms", "mine", heads / "enc", *"--budgets 4 --seeds 0 1 --steps 6 --lr 1e-2 --val 0 --predictions 0 --bar False --device cpu".split(), *more]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind, missing", [("segment", "no"), ("segment", "zero"), ("classify", "zero")])
def test_every_subset_is_judged(heads, tmp_path, kind, missing):
    from medssl_nb.core import read_json, read_jsonl

    r = run(heads, tmp_path / "r", "--subsets", "True", "--kind", kind, "--missing", missing, *(["--target", "place"] if kind == "classify" else []))
    assert r.returncode == 0, r.stdout + r.stderr
    rows, whole = read_jsonl(tmp_path / "r" / "subsets.jsonl"), read_jsonl(tmp_path / "r" / "rows.jsonl")
    every = {"+".join(c) for n in (1, 2, 3) for c in itertools.combinations(CHANNELS, n)}
    assert {x["subset"] for x in rows} == every and {x["subset"] for x in rows if x["case"] == "c-15"} == {"t1"}
    assert len(rows) == 2 * 2 * (5 * 7 + 1)  # arms, seeds, five complete test cases and one with a single sequence
    say = "dice" if kind == "segment" else "prob"
    full = {(x["arm"], x["seed"], x["case"]): x[say] for x in whole}
    for x in rows:  # with all a case has, both judgements are the same
        if x["n"] == 3 or x["case"] == "c-15":
            assert np.allclose(x[say], full[x["arm"], x["seed"], x["case"]], atol=1e-5)
    table = read_json(tmp_path / "r" / "subsets.json")
    assert {(l["arm"], l["n"]) for l in table["count"]} == {(a, n) for a in ("scratch", "mine") for n in (3, 2, 1, "fewer")}
    line = next(l for l in table["count"] if l["arm"] == "mine" and l["n"] == 1)
    assert line["score"][1] <= line["score"][0] <= line["score"][2] and len(line["drop"]) == len(line["diff"]) == len(line["drop_diff"]) == 3
    if kind == "segment":  # the mean by hand, and the paired drop of the five who have all
        mine = [x for x in rows if x["arm"] == "mine"]
        person = lambda pick: np.mean([np.mean([x["dice"] for x in mine if x["n"] == 1 and x["case"] == c and x["seed"] == s]) for s in (0, 1) for c in pick])
        assert np.isclose(line["score"][0], person([f"c-{i}" for i in range(10, 16)]))
        five = [f"c-{i}" for i in range(10, 15)]
        assert np.isclose(line["drop"][0], person(five) - np.mean([x["dice"] for x in mine if x["n"] == 3 and x["case"] in five]))
    assert "drop from all" in (tmp_path / "r" / "subsets.md").read_text() and (tmp_path / "r" / "subsets.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_asked(heads, tmp_path):
    r = run(heads, tmp_path / "r", "--subsets", "True", "--channels", "t1")
    assert r.returncode == 2 and "subsets of the single sequence t1" in r.stderr
    r = run(heads, tmp_path / "r", "--missing", "template", "--kind", "classify", "--target", "place")
    assert r.returncode == 2 and "missing=template without templates" in r.stderr


def test_label_maps_are_read_by_their_edition(tmp_path):
    "Label maps of 2023 (enhancing tumour: 3): the edition gives WT, TC and ET; that of 2018, or its regions typed out, is refused before anything is trained."
    from medssl_nb.core import read_jsonl
    from medssl_nb.data.cases import write_case, write_index
    from medssl_nb.nets.unet import UNetEncoder
    from medssl_nb.train.checkpoint import export_encoder

    rng = np.random.default_rng(0)
    for i in range(6):
        y = np.zeros((1, 1, 16, 16), np.uint8)
        y[..., 2:13, 2:13], y[..., 4:11, 4:11], y[..., 6:9, 6:9] = 2, 1, 3
        row = dict(case=f"c-{i}", subject=f"s-{i}", session="", split="test" if i > 3 else "train", group="", dims=2, channels=["flair"], spacing=[1.0] * 3, labels={}, fingerprint="")
        write_case(tmp_path / "data", row, (0.2 * y + 0.05 * rng.standard_normal(y.shape)).astype(np.float32), y)
    write_index(tmp_path / "data")
    h = torch.nn.Module()
    h.encoder = UNetEncoder(1, (4, 8), dims=2)
    export_encoder(h, tmp_path / "enc", dict(method="toy", input="zscore"))
    base = [MEDSSL, "finetune", str(tmp_path / "data"), "--arms", "toy", str(tmp_path / "enc"), *"--budgets 2 --seeds 0 --steps 2 --batch 2 --predictions 0 --device cpu --bar False".split()]
    ask = lambda out, *more: subprocess.run([*base, "--out", str(tmp_path / out), *more], capture_output=True, text=True, timeout=200)
    said = lambda r: " ".join((r.stdout + r.stderr).replace("│", " ").split())
    (tmp_path / "old.yaml").write_text("regions: [[1, 2, 4], [1, 4], [4]]\n")
    for k, (more, says) in enumerate(
        [
            (("--config", str(tmp_path / "old.yaml")), "no label map holds 4, which is to be outlined"),
            (("--edition", "2018"), "6 cases hold label values outside [0, 1, 2, 4]"),
        ]
    ):
        r = ask(f"old{k}", *more)
        assert r.returncode and says in said(r) and "--edition 2023" in said(r), said(r)
        assert not (tmp_path / f"old{k}" / "cells").exists()
    (tmp_path / "c.yaml").write_text("edition: 2023\nsubsets: false\n")  # a number for YAML
    for out, more in (("new", ("--edition", "2023", "--missing", "zero")), ("file", ("--config", str(tmp_path / "c.yaml")))):
        r = ask(out, *more)
        assert r.returncode == 0, said(r)
        assert {q["class"] for q in read_jsonl(tmp_path / out / "rows.jsonl")} == {"WT", "TC", "ET"}
        assert {q["class"]: q["voxels_ref"] for q in read_jsonl(tmp_path / out / "rows.jsonl")} == dict(WT=121, TC=49, ET=9)
