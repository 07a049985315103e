"""`medssl lab` from an installed package, which has no clone around it, and the lessons it opens."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent


def built(tmp_path):
    "What a wheel would hold."
    src = tmp_path / "src"
    for n in ("setup.py", "settings.ini", "README.md", "pyproject.toml"):
        src.mkdir(exist_ok=True)
        shutil.copy(ROOT / n, src / n)
    for n in ("medssl_nb", "nbs"):
        shutil.copytree(ROOT / n, src / n, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")], cwd=src, check=True, capture_output=True)
    return tmp_path / "lib"


def test_lessons_of_an_installed_package(tmp_path):
    lib = built(tmp_path)
    here = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert {str(p.relative_to(lib / "medssl_nb" / "notebooks")) for p in (lib / "medssl_nb" / "notebooks").rglob("*.ipynb")} == here
    r = subprocess.run([sys.executable, "-m", "medssl_nb.cli", "lab", "mine", "--open", "False"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(lib)}, capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.splitlines()[-1] == "mine", r.stdout + r.stderr
    assert {str(p.relative_to(tmp_path / "mine")) for p in (tmp_path / "mine").rglob("*.ipynb")} == here


def test_jupyterlab_starts_at_the_lessons(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["--browser", "False", "--port", str(port), "--allow-root", "True"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_TOKEN": "t", "JUPYTER_CONFIG_DIR": str(tmp_path / "c"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "r")}
    p = subprocess.Popen([sys.executable, "-m", "medssl_nb.cli", "lab", "mine", *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        for _ in range(600):
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents/companions/72_invcoss.ipynb?content=0&token=t", timeout=5).read()
                break
            except OSError:
                assert p.poll() is None, p.stdout.read()
                time.sleep(0.2)
        else:
            raise AssertionError("JupyterLab did not answer")
        assert b'"type": "notebook"' in page
        moved = urllib.request.build_opener(NoRedirect).open(f"http://127.0.0.1:{port}/?token=t", timeout=20)
        assert moved.headers["Location"].startswith("/lab/tree/companions"), moved.headers["Location"]
    finally:
        if p.poll() is None:
            os.killpg(p.pid, 15)
            p.wait(30)


class NoRedirect(urllib.request.HTTPErrorProcessor):
    def http_response(self, request, response):
        return response

    https_response = http_response
