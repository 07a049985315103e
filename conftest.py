"""Notebooks as tests: each cell that checks something is a test, each notebook that runs from the top is one, each set of stored outputs is one.

The rules are nbdev's: a cell with `#| eval: false` or a flag of `settings.ini` (`slow`, `cuda`) is not run unless asked for (`MEDSSL_SLOW=1`, `MEDSSL_CUDA=1`).
A notebook runs in a real Jupyter kernel, once per process, so what is compared with the stored outputs is what a reader sees.
"""
import base64
import io
import os
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def flags():
    c = ConfigParser(delimiters=["="], interpolation=None)
    c.read(ROOT / "settings.ini")
    return c["DEFAULT"]["tst_flags"].split()


def asked(flag):
    return os.environ.get(f"MEDSSL_{flag.upper()}", "") not in ("", "0")


def directive(src, name):
    return re.search(rf"^#\|\s*{name}\b", src, re.M) is not None


def why_not(src):
    "None if the cell runs; else the reason it does not."
    if re.search(r"^#\|\s*eval:\s*false", src, re.M):
        return "eval: false"
    for f in flags():
        if directive(src, f) and not asked(f):
            return f"flagged {f}; run with MEDSSL_{f.upper()}=1"
    return None


CHECKS = re.compile(r"\bassert\b|\btest_\w+\(|\braises\(|assert_close|check_task\(")


def checks(src):
    return not directive(src, "export") and CHECKS.search(src) is not None


def patient(client):
    """Ask a notebook's kernel for its answer once a second instead of once. An Output widget sends on the shell channel past the loop that
    waits on it (nbclient.output_widget), and a send takes the one signal away that an answer gives: it lay in the socket of a lesson with
    sliders for a quarter of an hour, unread, while the kernel had long finished. Whoever looks again finds it."""
    from queue import Empty
    from time import monotonic

    begin = client.async_start_new_kernel_client

    async def start():
        kc = await begin()
        ask = kc.shell_channel.get_msg

        async def get_msg(timeout=None):
            end = float("inf") if timeout is None else monotonic() + timeout
            while True:
                try:
                    return await ask(timeout=max(0, min(1, end - monotonic())))
                except Empty:
                    if monotonic() >= end:
                        raise

        kc.shell_channel.get_msg = get_msg
        return kc

    client.async_start_new_kernel_client = start
    return client


class Run:
    "One execution of one notebook, kept for all its tests."

    done = {}

    def __init__(self, path):
        import nbformat
        from nbclient import NotebookClient

        self.stored = nbformat.read(path, 4)
        nb = nbformat.read(path, 4)
        self.skipped = {}
        for i, c in enumerate(nb.cells):
            if c.cell_type == "code" and (why := why_not(c.source)):
                self.skipped[i] = why
                c.source = ""
        os.environ["IN_TEST"] = "1"
        client = NotebookClient(nb, startup_timeout=300, timeout=1800 if os.environ.get("MEDSSL_SLOW") else 900, kernel_name="python3", allow_errors=False, resources={"metadata": {"path": str(Path(path).parent)}})
        patient(client)
        self.error, self.failed = None, None
        try:
            client.execute()
        except Exception as e:  # reported by every test of the notebook, with its cell
            self.error = re.sub(r"\x1b\[[0-9;]*m", "", str(e))
            ran = [i for i, c in enumerate(nb.cells) if c.cell_type == "code" and any(o.output_type == "error" for o in c.get("outputs", []))]
            self.failed = ran[0] if ran else 0
        self.nb = nb

    @classmethod
    def of(cls, path):
        if path not in cls.done:
            cls.done[path] = cls(path)
        return cls.done[path]


class Cell(pytest.Item):
    def __init__(self, *, index, source, **kw):
        super().__init__(**kw)
        self.index, self.source = index, source

    def runtest(self):
        if why := why_not(self.source):
            pytest.skip(why)
        r = Run.of(self.path)
        if r.failed is not None and self.index >= r.failed:
            raise Failed(r.error if self.index == r.failed else f"an earlier cell ({r.failed}) failed")

    def repr_failure(self, exc):
        return str(exc.value) if isinstance(exc.value, Failed) else super().repr_failure(exc)

    def reportinfo(self):
        return self.path, self.index, f"{self.path.name}::{self.name}"


class Failed(Exception):
    pass


class Runs(Cell):
    def runtest(self):
        r = Run.of(self.path)
        if r.error:
            raise Failed(r.error)


def texts(cell):
    out = []
    for o in cell.get("outputs", []):
        if o.output_type == "stream" and o.name == "stdout":
            out.append(o.text)
        elif o.output_type in ("execute_result", "display_data") and "image/png" not in o.data and "application/vnd.jupyter.widget-view+json" not in o.data:
            out.append(o.data.get("text/plain", ""))
    return "".join(out)


NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?")


def same_text(a, b, tol=0.02):
    "Equal up to the last digits of numbers: another processor may round differently."
    if NUMBER.sub("#", a).split() != NUMBER.sub("#", b).split():
        return False
    pairs = zip(map(float, NUMBER.findall(a)), map(float, NUMBER.findall(b)))
    return all(abs(x - y) <= tol * max(abs(x), abs(y)) + 1e-4 for x, y in pairs)


def pictures(cell):
    from PIL import Image

    raw = [o.data["image/png"] for o in cell.get("outputs", []) if o.output_type in ("execute_result", "display_data") and "image/png" in o.data]
    return [Image.open(io.BytesIO(base64.b64decode(r))).convert("RGB") for r in raw]


class Outputs(Cell):
    "What is stored is what the notebook shows: no error, no stale picture, nothing unseeded."

    def runtest(self):
        import numpy as np

        r = Run.of(self.path)
        if r.error:
            pytest.skip("the notebook does not run")
        bad = []
        for i, (old, new) in enumerate(zip(r.stored.cells, r.nb.cells)):
            if old.cell_type != "code" or i in r.skipped:
                continue
            if any(o.output_type == "error" for o in old.outputs):
                bad.append(f"cell {i} stores an error")
            a, b = texts(old), texts(new)
            if not same_text(a, b):
                bad.append(f"cell {i}: stored {a[:200]!r}, now {b[:200]!r}")
            p, q = pictures(old), pictures(new)
            if len(p) != len(q) or any(x.size != y.size for x, y in zip(p, q)):
                bad.append(f"cell {i}: {len(p)} pictures stored, now {len(q)} (or of another size)")
            elif any(np.abs(np.asarray(x, float) - np.asarray(y, float)).mean() > 4 for x, y in zip(p, q)):
                bad.append(f"cell {i}: a picture differs from the stored one")
        if bad:
            raise Failed("stored outputs are not what the notebook shows (run it from the top and save):\n" + "\n".join(bad))


class Notebook(pytest.File):
    def collect(self):
        import nbformat

        n = 0
        for i, c in enumerate(nbformat.read(self.path, 4).cells):
            if c.cell_type == "code" and checks(c.source):
                yield Cell.from_parent(self, name=f"cell{i}", index=i, source=c.source)
                n += 1
        yield Runs.from_parent(self, name="runs", index=0, source="")
        yield Outputs.from_parent(self, name="outputs", index=0, source="")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and ".ipynb_checkpoints" not in file_path.parts:
        return Notebook.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(items):
    for it in items:
        for f in ("slow", "cuda"):
            if it.get_closest_marker(f) and not asked(f):
                it.add_marker(pytest.mark.skip(reason=f"marked {f}; run with MEDSSL_{f.upper()}=1"))


@pytest.fixture(scope="session")
def real():
    "The folder of real images, or a loud skip."
    p = Path(os.environ.get("MEDSSL_REAL", ROOT.parent / "shared" / "data" / "real"))
    if not (p / "MANIFEST.csv").exists():
        pytest.skip("NO REAL DATA: set MEDSSL_REAL to the folder with MANIFEST.csv; nothing real was checked")
    return p
