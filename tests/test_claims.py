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


def test_the_command_prints_them(capsys):
    assert main(["claims", "--method", "invcoss"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("invcoss") and "taco" not in out.splitlines()[0] and out.strip().splitlines()[-1].count(",") == 3
    assert main(["claims", str(RESULTS / "claims.jsonl"), "--verdict", "too large to test here"]) == 0
    assert "0 reproduced" in capsys.readouterr().out
    assert main(["claims", "--method", "invcos"]) == 2 and "did you mean 'invcoss'?" in capsys.readouterr().err
