"What no single notebook owns: the layers, the export, the hygiene of what is committed."
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with IN_TEST set nbdev_export silently does nothing


def cells(nb):
    return json.loads(nb.read_text())["cells"]


def code(nb):
    return ["".join(c["source"]) for c in cells(nb) if c["cell_type"] == "code"]


def numbered():
    return sorted(p for p in NBS.glob("*.ipynb") if re.match(r"\d\d_", p.name))


def layers():
    "module -> (number, project modules imported in exported cells)"
    out = {}
    for nb in numbered():
        src = code(nb)
        mods = [m.group(1) for s in src for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", s, re.M)]
        if not mods:
            continue
        deps = set()
        for s in src:
            if not re.search(r"^#\|\s*export", s, re.M):
                continue
            for node in ast.walk(ast.parse("\n".join(line for line in s.splitlines() if not line.startswith("%")))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medssl_nb."):
                    base = node.module[len("medssl_nb.") :]
                    deps.add(base)
                    deps.update(f"{base}.{a.name}" for a in node.names)
                if isinstance(node, ast.Import):
                    deps.update(a.name[len("medssl_nb.") :] for a in node.names if a.name.startswith("medssl_nb."))
        out[mods[0]] = (int(nb.name[:2]), deps)
    return out


def test_imports_point_down():
    L = layers()
    assert len(L) > 5
    up = [(a, b) for a, (n, deps) in L.items() for b in deps if b in L and L[b][0] >= n]
    assert not up, f"exported imports must point to smaller numbers: {up}"


def test_layer_check_sees_a_violation():
    L = dict(low=(10, {"high"}), high=(20, set()))
    assert [(a, b) for a, (n, deps) in L.items() for b in deps if b in L and L[b][0] >= n] == [("low", "high")]


def test_export_leaves_no_difference(tmp_path):
    "Exporting a copy of the notebooks gives the library byte for byte."
    import shutil

    for n in ("nbs", "settings.ini", "medssl_nb", "pyproject.toml", "setup.py"):
        src = ROOT / n
        shutil.copytree(src, tmp_path / n, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")) if src.is_dir() else shutil.copy(src, tmp_path / n)
    for f in (tmp_path / "medssl_nb").rglob("*.py"):
        if f.name != "__init__.py":
            f.unlink()
    subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=tmp_path, env=ENV, check=True, capture_output=True)
    ours = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "medssl_nb").rglob("*.py")}
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "medssl_nb").rglob("*.py")}
    assert set(ours) == set(fresh), set(ours) ^ set(fresh)
    differ = [str(k) for k in ours if ours[k] != fresh[k]]
    assert not differ, f"run `make export`: {differ}"


@pytest.mark.parametrize("nb", sorted(NBS.rglob("*.ipynb")), ids=lambda p: p.name)
def test_notebook_is_clean(nb):
    "No error, no counts, no widget state, no path of a machine, no warnings in what is committed."
    if ".ipynb_checkpoints" in nb.parts:
        pytest.skip("checkpoint")
    bad = []
    raw = json.loads(nb.read_text())
    if "widgets" in raw["metadata"]:
        bad.append("widget state")
    if twice := {c["id"] for c in raw["cells"] if [d["id"] for d in raw["cells"]].count(c["id"]) > 1}:
        bad.append(f"cells with the same id: {sorted(twice)}")
    for i, c in enumerate(raw["cells"]):
        if c["cell_type"] != "code":
            continue
        if c.get("execution_count") is not None:
            bad.append(f"cell {i}: an execution count (run nbdev_clean)")
        for o in c["outputs"]:
            text = json.dumps({k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}) + "".join(o.get("text", []))
            if o["output_type"] == "error":
                bad.append(f"cell {i}: an error is stored")
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {}):
                bad.append(f"cell {i}: a widget without its state is stored; it shows an error where it is opened")
            if o.get("name") == "stderr":
                bad.append(f"cell {i}: stderr is stored")
            if re.search(r"(?<![\w.])/(home|root|tmp|work|var|usr)/", text) or re.search(r"0x[0-9a-f]{8,}", text):
                bad.append(f"cell {i}: a path or address of this machine: {text[:120]}")
            if re.search(r"\d+%\|", text):
                bad.append(f"cell {i}: a progress bar")
    assert not bad, "\n".join(bad)


def test_notebooks_fit_their_budget():
    "Outputs are committed, so they stay small: 400 KB for a numbered notebook, 2.5 MB for a companion."
    big = [(p.name, p.stat().st_size) for p in NBS.rglob("*.ipynb") if p.stat().st_size > (2_500_000 if "companions" in p.parts else 600_000)]
    assert not big, big


def test_title_is_a_promise():
    "Each notebook opens with a title and a quoted promise that becomes the module's docstring."
    for nb in numbered():
        first = "".join(cells(nb)[0]["source"])
        assert re.match(r"# \S.*\n+> \S", first), f"{nb.name}: {first[:60]!r}"


def tracked():
    r = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / f for f in r.stdout.split("\0") if f]


def test_nothing_of_this_machine_is_committed():
    bad = []
    for p in tracked():
        if p.suffix in {".py", ".md", ".toml", ".ini", ".yaml", ".yml", ".json", ".ipynb"} and p.exists() and p != Path(__file__):
            for m in re.finditer(r"(?<![\w.>])/(work|root|home|tmp)/[a-z.]\S*", p.read_text(errors="replace")):
                bad.append(f"{p.relative_to(ROOT)}: {m.group()[:60]}")
    assert not bad, "\n".join(bad[:20])


def test_no_pickle_in_the_library():
    "Nothing that a stranger sends may run: no pickle, no torch.load without weights_only."
    bad = []
    for p in (ROOT / "medssl_nb").rglob("*.py"):
        s = p.read_text()
        if re.search(r"^\s*(import|from) (pickle|dill|joblib|cloudpickle)\b", s, re.M):
            bad.append(f"{p.name}: pickle")
        for m in re.finditer(r"torch\.load\(([^)]*)\)", s):
            if "weights_only=True" not in m.group(1):
                bad.append(f"{p.name}: torch.load without weights_only=True")
        if re.search(r"np\.load\([^)]*allow_pickle\s*=\s*True", s):
            bad.append(f"{p.name}: np.load with pickle")
    assert not bad, bad


def test_light_imports():
    "The command line reads these before it knows whether torch will be needed."
    for m in ("medssl_nb", "medssl_nb.core", "medssl_nb.config", "medssl_nb.cli"):
        r = subprocess.run([sys.executable, "-c", f"import {m}, sys; print([x for x in ('torch','monai','lightning','matplotlib','nibabel') if x in sys.modules])"], capture_output=True, text=True, env=ENV)
        assert r.stdout.strip() == "[]", (m, r.stdout, r.stderr)


def test_readme_is_the_index():
    "README.md is made from nbs/index.ipynb (`make readme`)."
    head = "".join(cells(NBS / "index.ipynb")[0]["source"]).splitlines()[0]
    readme = (ROOT / "README.md").read_text()
    assert head in readme
    for c in cells(NBS / "index.ipynb"):
        if c["cell_type"] == "markdown":
            for line in "".join(c["source"]).splitlines():
                assert line.strip() in readme, f"README.md lacks {line[:80]!r}: run `make readme`"
