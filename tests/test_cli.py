"""Bad input at the command line: one sentence that says what came, what was expected, what to do; exit code 2; nothing lost.

The commands run in this process (a new interpreter costs seconds for torch alone); one test goes through the installed program.
"""
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medssl_nb.cli import main
from medssl_nb.core import read_jsonl
from medssl_nb.data.cases import write_case, write_index


def medssl(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(w) for w in words])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), re.sub(r"\x1b\[[0-9;]*m", "", err.getvalue())


def refused(*words, says):
    code, out, err = medssl(*words)
    assert code == 2, (code, out, err)
    for s in [says] if isinstance(says, str) else says:
        assert s in err, f"{s!r} not in {err!r}"
    assert "Traceback" not in err
    return err


def write_prepared(out, n=8, shape=(20, 20, 20), seg=True, channels=("t1",), labels=None, split=None, values=(0, 1)):
    rng = np.random.default_rng(0)
    for i in range(n):
        lab = rng.choice(values, (1, *shape)).astype(np.uint8) if (seg[i] if isinstance(seg, list) else seg) else None
        row = dict(case=f"c-{i:02}", subject=f"s-{i:02}", session="", group="g", dims=3, channels=list(channels), spacing=[1, 1, 1], labels=labels[i] if labels else {}, fingerprint="x",
                   split=split[i] if split else None)
        write_case(out, row, rng.random((len(channels), *shape)).astype(np.float32), lab, dict(intensity={c: dict(rule="percentile") for c in channels}))
    write_index(out)
    return out


def nifti(path, x, affine=None):
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(x), np.eye(4) if affine is None else affine), path)


def test_the_installed_program():
    r = subprocess.run([str(Path(sys.executable).parent / "medssl"), "pretain"], capture_output=True, text=True)
    assert r.returncode == 2 and "did you mean 'pretrain'?" in r.stderr and "Traceback" not in r.stderr


def test_help_of_every_command():
    from medssl_nb.cli import COMMANDS

    for name in COMMANDS:
        code, out, err = medssl(name, "--help")
        assert code == 0 and ("--out" in out or name in ("where", "claims")), (name, code, err)  # these write nothing


def test_unknown_flag_names_the_nearest(tmp_path):
    for words in (("ingest", tmp_path, "--modalty", "t1"), ("prepare", tmp_path, "--spacng", "1"), ("pretrain", tmp_path, "--train.step", "3")):
        code, out, err = medssl(*words)
        assert code == 2 and re.search(r"--modality|--spacing|--train\.steps", err), err


def test_wrong_value_names_the_nearest(tmp_path):
    "Where a setting takes one of a few words, a slip of the finger is answered like a wrong command."
    for words, says in (
        (("export", tmp_path, "--to", "mona"), ["--to 'mona' is not known", "did you mean 'monai'?"]),
        (("pretrain", tmp_path, "--preset", "small3d", "--train.optimizer", "adamww"), "did you mean 'adamw'?"),
        (("prepare", tmp_path, "--crop", "centered"), "did you mean 'centred'?"),
        (("prepare", tmp_path, "--order=2"), "expected one of 0, 1, 3"),
        (("ingest", tmp_path, "--progress", "Flase"), "did you mean 'False'?"),
        (("continual", "run", "--resume", "alto"), "did you mean 'auto'?"),
    ):
        refused(*words, says=says)
    code, out, err = medssl("pretrain", tmp_path, "--preset", "small3d", "--train.steps", "ten")  # a number is a number
    assert code == 2 and "ten" in err and "Traceback" not in err


def test_wrong_path(tmp_path):
    (tmp_path / "scans").mkdir()
    refused("ingest", tmp_path / "scanz", "-o", tmp_path / "m", says=["scanz", "did you mean"])
    refused("prepare", tmp_path / "nothing", "-o", tmp_path / "p", says="nothing")
    refused("pretrain", tmp_path / "nothing", "--preset", "small3d", "-o", tmp_path / "r", says="medssl prepare")


def test_no_place_and_no_room(tmp_path, monkeypatch):
    "A place where nothing can be made is refused before the work; a disk that is full at its end is a sentence, too."
    import errno
    import os

    import medssl_nb.data.ingest as ing
    import medssl_nb.data.phantom as phantom
    import medssl_nb.export as ex
    import medssl_nb.qc as qc
    from medssl_nb.nets.registry import build_encoder
    from medssl_nb.train.checkpoint import export_encoder

    nifti(tmp_path / "scans" / "a_t1.nii.gz", np.random.default_rng(0).random((6, 6, 6)).astype(np.float32))
    (tmp_path / "file").write_text("in the way")
    export_encoder(ex.Holder(build_encoder(dict(net="plain", in_channels=1, widths=[4, 8, 8], dims=3))), tmp_path / "enc", dict(region=[16] * 3))
    quiet = ("--workers", "0", "--progress", "False")
    assert medssl("ingest", tmp_path / "scans", "-o", tmp_path / "m", *quiet)[0] == 0
    there = [(("ingest", tmp_path / "scans", *quiet), "the manifest"), (("qc", tmp_path / "m", *quiet), "the page"), (("samples",), "the samples"), (("doctor", "--selftest", "False"), "the report"),
             *((("export", tmp_path / "enc", "--to", to), "the export") for to in ("medssl", "monai", "nnunet"))]
    before = sorted(tmp_path.rglob("*"))
    for words, what in there:
        refused(*words, "-o", tmp_path / "file" / "x", says=[f"{what} could not be written", "a file stands where a folder is needed"])
        if os.path.isdir("/proc/self"):  # where even root makes nothing
            refused(*words, "-o", "/proc/x", says=[f"{what} could not be written to /proc/x", "nothing can be made there"])
    assert sorted(tmp_path.rglob("*")) == before

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(ing, "write_manifest", full)
    monkeypatch.setattr(qc, "atomic", full)
    monkeypatch.setattr(phantom, "write_heads", full)
    monkeypatch.setattr(ex, "atomic_dir", full)
    for words, what in there[:3] + there[5:]:
        refused(*words, "-o", tmp_path / "new", says="the disk is full")
        import shutil

        shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_the_report_of_the_doctor_is_named(tmp_path):
    code, out, err = medssl("doctor", "--selftest", "False", "-o", tmp_path / "r.json")
    assert out.splitlines()[-1] == str(tmp_path / "r.json") and (tmp_path / "r.json").is_file()
    code, out, err = medssl("doctor", "--selftest", "False", "--json", "-o", tmp_path / "s.json")
    import json

    assert json.loads(out) == json.loads((tmp_path / "s.json").read_text())


def test_empty_folder(tmp_path):
    (tmp_path / "scans").mkdir()
    refused("ingest", tmp_path / "scans", "-o", tmp_path / "m", says="scans")


def test_wrong_modality_name(tmp_path):
    nifti(tmp_path / "scans" / "a_t1.nii.gz", np.ones((4, 4, 4), np.float32))
    refused("ingest", tmp_path / "scans", "--modality", "flare", "-o", tmp_path / "m", says="did you mean 'flair'?")
    data = write_prepared(tmp_path / "p")
    refused("pretrain", data, "--method", "mae", "--preset", "small3d", "--channels", "t2", "-o", tmp_path / "r", says=["t2", "t1"])


def test_unknown_method_and_preset(tmp_path):
    refused("pretrain", tmp_path, "--method", "pcrlv3", says="did you mean 'pcrlv2'?")
    refused("pretrain", tmp_path, "--preset", "smal3d", says="did you mean 'small3d'?")


def test_one_broken_file_never_stops_the_rest(tmp_path):
    for i, s in enumerate("abc"):
        nifti(tmp_path / "scans" / s / "t1.nii.gz", np.random.default_rng(i).random((6, 6, 6)).astype(np.float32))
    f = tmp_path / "scans" / "b" / "t1.nii.gz"
    f.write_bytes(f.read_bytes()[:200])
    code, out, err = medssl("ingest", tmp_path / "scans", "-o", tmp_path / "m", "--progress", "False")
    assert code == 0, err
    assert len(read_jsonl(tmp_path / "m" / "cases.jsonl")) == 2
    problems = read_jsonl(tmp_path / "m" / "problems.jsonl")
    assert len(problems) == 1 and problems[0]["severity"] == "error" and "/" not in problems[0]["file"]


def test_nan_voxels_and_labels_elsewhere_are_problems(tmp_path):
    rng = np.random.default_rng(0)
    scans = tmp_path / "scans"
    for s in "abc":
        nifti(scans / s / "t1.nii.gz", rng.random((12, 12, 12)).astype(np.float32) + (np.nan if s == "b" else 0))
        nifti(scans / s / "seg.nii.gz", np.ones((12, 12, 12), np.uint8) if s != "c" else np.ones((6, 6, 6), np.uint8), np.eye(4) if s != "c" else np.diag([2, 2, 2, 1]))
    medssl("ingest", scans, "-o", tmp_path / "m", "--progress", "False")
    code, out, err = medssl("prepare", tmp_path / "m", "-o", tmp_path / "p", "--progress", "False")
    kinds = read_jsonl(tmp_path / "m" / "problems.jsonl") + (read_jsonl(tmp_path / "p" / "problems.jsonl") if (tmp_path / "p" / "problems.jsonl").exists() else [])
    text = " ".join(f"{p.get('kind')} {p['reason']}" for p in kinds).lower()
    assert "nan" in text and "grid" in text, text
    assert len(read_jsonl(tmp_path / "p" / "index.jsonl")) >= 1


def test_unlabelled_case_in_finetuning(tmp_path):
    data = write_prepared(tmp_path / "p", seg=[True] * 7 + [False])
    refused("finetune", data, "-o", tmp_path / "f", "--budgets", "2", says=["have no label", "--leave-unlabelled"])


def test_label_values_outside_the_list(tmp_path):
    data = write_prepared(tmp_path / "p", values=(0, 1, 7))
    refused("finetune", data, "-o", tmp_path / "f", "--values", "1", "2", "--budgets", "2", says=["7", "c-0"])


def test_one_case_split(tmp_path):
    data = write_prepared(tmp_path / "p", n=1)
    refused("finetune", data, "-o", tmp_path / "f", "--budgets", "1", says="subject")


def test_missing_and_foreign_checkpoints(tmp_path):
    data = write_prepared(tmp_path / "p")
    refused("finetune", data, "-o", tmp_path / "f", "--arms", "mine", tmp_path / "no_run", "--budgets", "2", says="no_run")
    tiny = ("--train.steps", "2", "--train.batch", "2", "--train.workers", "0", "--train.warmup", "0", "--train.tensorboard", "False", "--train.bar", "False", "--task.widths", "4", "8", "8", "8")
    code, out, err = medssl("pretrain", data, "--method", "mae", "--preset", "small3d", "-o", tmp_path / "r", *tiny)
    assert code == 0, err
    refused("pretrain", data, "--method", "pcrlv2", "--preset", "small3d", "-o", tmp_path / "r", *tiny, says="mae")
    # with a real encoder: no arm at all, and a budget that the patients cannot fill
    refused("finetune", data, "-o", tmp_path / "f", "--budgets", "2", says="no arm")
    refused("finetune", data, "-o", tmp_path / "f", "--arms", "mine", tmp_path / "r", "--budgets", "50", says="budget of 50")


def test_crop_larger_than_the_volume_is_padded_not_refused(tmp_path):
    "Property 18 of the PCRLv2 specification: a volume smaller than the crop still yields crops of the requested size."
    data = write_prepared(tmp_path / "p", n=4, shape=(10, 12, 14))
    code, out, err = medssl("pretrain", data, "--method", "pcrlv2", "--preset", "small3d", "-o", tmp_path / "r", "--train.steps", "1", "--train.batch", "2", "--train.workers", "0", "--train.warmup", "0",
                            "--train.tensorboard", "False", "--train.bar", "False", "--task.widths", "4", "8", "8", "8")
    assert code == 0, err


def test_a_settings_file_with_a_mistake(tmp_path):
    f = tmp_path / "run.yaml"
    f.write_text("method: mae\npreset: small3d\ntrain: {lerning_rate: 1e-3}\n")
    refused("pretrain", tmp_path, "--config", f, says="train.lerning_rate")
    refused("pretrain", tmp_path, "--config", tmp_path / "none.yaml", says="no settings file")


def test_2d_task_on_3d_data(tmp_path):
    refused("pretrain", write_prepared(tmp_path / "p", n=2), "--preset", "small2d", "-o", tmp_path / "r", says="no 2-D case")


@pytest.mark.parametrize("text", ["", "{", '{"case": 3}\n'])
def test_broken_index(tmp_path, text):
    d = tmp_path / "p"
    d.mkdir()
    (d / "index.jsonl").write_text(text)
    code, out, err = medssl("pretrain", d, "--preset", "small3d", "-o", tmp_path / "r")
    assert code == 2 and "Traceback" not in err, err


@pytest.mark.parametrize("words", [["pretrain", "--help"], ["ingest", "--help"]])
def test_a_reader_who_has_seen_enough(words):
    """`medssl pretrain --help | head`: the pipe is closed before the first word."""
    import os
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "medssl_nb.cli", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == "", (done.returncode, done.stderr)


def test_a_broken_pipe_of_our_own_is_an_error(monkeypatch):
    """The pipe to a worker, not standard output."""
    from medssl_nb import doctor
    monkeypatch.setattr(doctor, "doctor", lambda cfg: (_ for _ in ()).throw(BrokenPipeError("a worker is gone")))
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        main(["doctor"])
