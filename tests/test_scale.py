"""What grows with the number of cases, counted rather than timed (`benchmarks/scale.py` measures up to 100 000): bytes held, rows parsed, files opened, folders listed."""
import gc
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from scale import simulate  # noqa: E402

N = (60, 240)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    "The same study in two sizes."
    out = {}
    for n in N:
        out[n] = tmp_path_factory.mktemp("scale") / str(n)
        simulate(out[n], n)
    return out


def held(make):
    "Bytes that stay."
    make()  # imports, caches
    tracemalloc.start()
    x = make()
    gc.collect()
    now = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return now, x


def per_case(make):
    (a, _), (b, _) = (held(lambda: make(n)) for n in N)
    return (b - a) / (N[1] - N[0])


def test_bytes_a_case(roots):
    from medssl_nb.data.cases import Cases, Manifest, Prepared
    from medssl_nb.data.prepare import Plan, PrepareConfig

    def manifest(n):
        m = Manifest(roots[n] / "manifest")
        m.paths("f-000000000")  # with the private list of five files a case
        return m

    def cases(n):
        p = Prepared(roots[n] / "prepared")
        p.row("c-000000000003")
        return Cases(p, p.select(channels=["t1", "t2"]), region=(4, 4, 4), seg=True, target="class")

    def plan(n):
        return Plan(Manifest(roots[n] / "manifest"), PrepareConfig(), roots[n] / "prepared")

    # 16 a row, and 32 for each of five files; 16 a row, 16 a name, 16 a choice; 16 a row, 9 in the plan
    assert per_case(manifest) < 16 + 5 * 32 + 24
    assert per_case(cases) < 3 * 16 + 24
    assert per_case(plan) < 2 * 16 + 9 + 24
    a, b = (len(pickle.dumps(cases(n))) for n in N)
    assert (b - a) / (N[1] - N[0]) < 24  # what a worker process is given


def test_each_row_is_parsed_once(roots, monkeypatch):
    from medssl_nb.data import cases as c

    count, real = [0], json.loads

    class Counting:
        def __getattr__(self, k):
            return getattr(json, k)

        @staticmethod
        def loads(*a, **k):
            count[0] += 1
            return real(*a, **k)

    monkeypatch.setattr(c, "json", Counting())

    def parsed(f):
        count[0] = 0
        f()
        return count[0]

    for n in N:
        assert parsed(lambda: c.Manifest(roots[n] / "manifest")) == n
        assert parsed(lambda: c.Prepared(roots[n] / "prepared")) == n - 1
        p = c.Prepared(roots[n] / "prepared")
        assert parsed(lambda: p.row("c-000000000007")) == n  # the names once, then one row
        assert parsed(lambda: p.row("c-000000000011")) == 1
        assert parsed(lambda: c.Cases(p, region=(4, 4, 4), seg=True, target="class")) <= 3 * (n - 1) + 1  # kinds, classes, checks


AUDIT = """
import json, sys
from collections import Counter
from medssl_nb.data.prepare import PrepareConfig, prepare
import medssl_nb.data.prepare, torch, blosc2, nibabel, tqdm
seen, on = Counter(), [False]
def hook(event, args):
    if not on[0]: return
    if event == 'open' and isinstance(args[0], str) and sys.argv[1] in args[0]: seen['open ' + ('json' if args[0].endswith('.json') else 'volume' if args[0].endswith('.b2nd') else 'other')] += 1
    if event in ('os.listdir', 'os.scandir', 'glob.glob', 'glob.glob/2', 'pathlib.Path.glob', 'pathlib.Path.rglob') and sys.argv[1] in str(args[0]): seen['list'] += 1
    if event in ('os.rename', 'os.remove'): seen[event] += 1
sys.addaudithook(hook)
on[0] = True
prepare(PrepareConfig(manifest=sys.argv[1] + '/manifest', out=sys.argv[1] + '/' + sys.argv[2], workers=0, progress=False, limit=int(sys.argv[3])))
on[0] = False
print(json.dumps(seen))
"""


def audit(root, out, limit):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    r = subprocess.run([sys.executable, "-c", AUDIT, str(root), out, str(limit)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


def test_files_touched_by_resuming(roots):
    "Each mark is read twice (is it up to date? what goes into the index?), no finished volume is opened, no folder is listed again and again."
    import shutil

    got = {}
    for n in N:
        shutil.copytree(roots[n] / "prepared", roots[n] / "again")
        got[n] = audit(roots[n], "again", n)
    a, b = (got[n] for n in N)
    more = {k: b.get(k, 0) - a.get(k, 0) for k in {*a, *b}}
    assert {k: v for k, v in more.items() if v} == {"open json": 2 * (N[1] - N[0])}, (a, b)
    assert a["list"] <= 6


def test_files_touched_by_preparing(roots):
    "A case costs its own files, however many there are already; folders are listed as often for 90 cases as for 30."
    a, b = audit(roots[N[1]], "few", 30), audit(roots[N[1]], "many", 90)
    assert a["list"] == b["list"] <= 6
    assert b["os.rename"] - a["os.rename"] == 3 * 60  # volume, label, mark


def test_an_epoch_is_drawn_once(monkeypatch):
    "One permutation an epoch, two of them kept; a step costs its own slots."
    import torch

    from medssl_nb.data.cases import StepSampler

    count, real = [0], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: (count.__setitem__(0, count[0] + 1), real(*a, **k))[1])
    for n in (100, 1000):
        count[0], s = 0, StepSampler(n, 10, seed=3)
        for t in range(5 * s.steps_per_epoch):
            s.keys(t)
        assert count[0] == 5 and len(s._orders) <= 2
