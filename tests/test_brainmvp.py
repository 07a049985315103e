"""BrainMVP as a user runs it: prepared cases with different sequences, a run with sparse templates that is cut and continued, its templates on disk, a network that is fine-tuned with them."""
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl_nb.core import UserError

SEQS = (["t1", "t2", "flair"], ["t1", "t2"], ["t1", "t1c", "t2", "flair", "dwi", "adc"], ["t2"], ["t1", "flair"])


def prepared(dir, spec=SEQS, shape=(20, 22, 18), mm=lambda i: (2.0, 1.0, 1.0), corner=None):
    "Small volumes in the store's form, with two, six, three and single sequences; `corner(i)`: where voxel 0 lies, mm (x, y, z)."
    from medssl_nb.data.cases import write_case, write_index

    for i, chans in enumerate(spec):
        rng = np.random.default_rng(i)
        z = np.linspace(0, 1, shape[0])[:, None, None] * np.ones(shape)
        x = np.stack([np.clip((z if k % 2 else 1 - z) + 0.1 * rng.standard_normal(shape), 0, 1) for k, _ in enumerate(chans)])
        row = dict(case=f"c-{i}", subject=f"s-{i}", session="1", split=None, group="", dims=3, channels=list(chans), spacing=list(mm(i)), labels={}, fingerprint=str(i))
        info = {}
        if corner is not None:
            a = np.eye(4)
            a[:3, :3], a[:3, 3] = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]]) * mm(i), corner(i)
            info = dict(inverse=dict(resampled_affine=a.tolist(), resampled_shape=list(shape), crop=[[0, 0, 0], list(shape)]))
        write_case(dir, row, x, info=info)
    write_index(dir)
    return Path(dir)


def config(data, out, steps=6, **task):
    from medssl_nb.pretrain import PretrainConfig
    from medssl_nb.tasks.brainmvp import BrainMVPConfig
    from medssl_nb.train.trainer import TrainConfig

    t = BrainMVPConfig.small3d(**{**dict(widths=(8, 16), depths=(1, 1), head_width=8, region=(16, 16, 16), sparse="yes"), **task})
    train = TrainConfig(steps=steps, batch=3, lr=1e-3, device="cpu", workers=0, save_every=3, keep=0, tensorboard=False, bar=False, clip=0.5, lr_scale={"templates": 10.0} if t.w_template else {})
    return PretrainConfig[BrainMVPConfig](task=t, method="brainmvp", preset="small3d", data=data, out=out, train=train)


def run(cfg):
    from medssl_nb.pretrain import pretrain

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pretrain(cfg)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return run(config(data, tmp_path_factory.mktemp("runs") / "whole"))


def test_a_mixture_of_sequence_sets_trains(whole):
    rows, task = whole["history"], whole["task"]
    assert len(rows) == 6 and all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
    assert task.channels == ("t1", "t1c", "t2", "flair", "dwi", "adc") and task.cfg.atlas == (20, 22, 18)
    assert rows[0]["cross"] == 0 and rows[-1]["cross"] > 0  # warm-up, then pairs
    assert rows[0]["contrast"] == 0 and rows[-1]["contrast"] > 0
    assert task.templates.weight.abs().max() > 0


def test_a_cut_run_continues_bit_for_bit(whole, data, tmp_path):
    import shutil

    shutil.copytree(whole["out"] / "checkpoints" / "step_00000003", tmp_path / "cut" / "checkpoints" / "step_00000003")
    again = run(config(data, tmp_path / "cut"))
    for (n, a), (_, b) in zip(whole["task"].state_dict().items(), again["task"].state_dict().items()):
        assert torch.equal(a, b), n


def test_sparse_and_dense_templates_take_the_same_first_step(data, tmp_path):
    "Only the first: afterwards the dense form moves rows that nobody used, by their momentum."
    a, b = (run(config(data, tmp_path / s, 1, sparse=s)) for s in ("yes", "no"))
    assert a["history"][0]["loss"] == b["history"][0]["loss"] and a["history"][0]["grad_norm"] == pytest.approx(b["history"][0]["grad_norm"], rel=1e-5)
    # clipping scaled the rows, too; a step of Adam is blind to scale, the decay of used rows is not felt at zero
    assert torch.allclose(a["task"].templates.weight, b["task"].templates.weight, atol=1e-5)


@pytest.mark.parametrize("sparse", ["yes", "no"])
def test_accumulation_is_one_large_batch(sparse, tmp_path):
    "Property 24: four cases at once, in two halves, one by one; batch norms rest, contrast (which compares what lies in a batch) has not begun. Windows overlap, so rows of a template come from several micro-batches."
    from medssl_nb.core import generator
    from medssl_nb.tasks.brainmvp import BrainMVP, BrainMVPConfig
    from medssl_nb.train.trainer import TrainConfig, Trainer, make_fabric

    cfg = BrainMVPConfig.small3d(widths=(8, 16), depths=(1, 1), head_width=8, region=(16,) * 3, sequences=("t1", "t2", "flair"), atlas=(24,) * 3, sparse=sparse, contrast_from=1.0)
    present, start = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 1]]).bool(), torch.tensor([[3] * 3, [5] * 3, [0] * 3, [3] * 3])

    class Given(BrainMVP):
        def train(self, mode=True):
            super().train(mode)
            [m.eval() for m in self.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
            return self

        def views(self, batch, gen):
            return batch

    def go(accum):
        torch.manual_seed(0)
        task = Given(cfg)
        task.templates.weight.data.fill_(0.5)
        fabric, c = make_fabric(TrainConfig(steps=3, batch=4 // accum, accum=accum, lr=1e-3, clip=0.5, lr_scale={"templates": 10.0}, device="cpu", workers=0, save_every=0, tensorboard=False, bar=False))
        trainer, k = Trainer(task, c, fabric, tmp_path / f"{accum}"), 4 // accum
        rows = []
        for s in range(3):
            x = torch.rand(4, 3, 16, 16, 16, generator=generator(s)) * present.view(4, 3, 1, 1, 1)
            v = BrainMVP(cfg).views(dict(image=x, present=present, start=start, full=torch.full((4, 3), 24), progress=0.5), generator(0, s))
            row, _ = trainer.train_step([{n: x[i * k : (i + 1) * k] if torch.is_tensor(x) else x for n, x in v.items()} for i in range(accum)])
            rows += [row["loss"], row["grad_norm"], row["lr"]]  # Adam is blind to the size of a gradient, its norm is not
        return dict(task.named_parameters()), rows

    whole, rows = go(1)
    assert (whole["templates.weight"] != 0.5).float().mean() > 0.3
    for accum in (2, 4):
        parts, again = go(accum)
        assert again == pytest.approx(rows, rel=1e-5)
        for n, p in parts.items():
            assert (p - whole[n]).abs().max() < 5e-6, (n, accum)  # a step of Adam is 1e-3, of templates 1e-2


def test_templates_lie_in_the_run_as_the_encoder_saw_them(whole):
    import nibabel as nib

    from medssl_nb.tasks.brainmvp import load_templates

    names, t = load_templates(whole["out"] / "templates")
    assert names == whole["task"].channels and torch.equal(t, whole["task"].templates.volumes())
    assert 0 <= t.min() and t.max() <= 1 and t.max() > 0
    im = nib.load(whole["out"] / "templates" / "flair.nii.gz")
    assert im.shape == (18, 22, 20) and [float(z) for z in im.header.get_zooms()] == [1.0, 1.0, 2.0] and nib.aff2axcodes(im.affine) == ("R", "A", "S")


def test_templates_lie_where_the_cases_do(data, tmp_path):
    "Registered cases put their templates where they are; one that lies elsewhere, and the file says that there is no such place."
    import nibabel as nib

    from medssl_nb.core import read_json

    for name, corner, space in (("one", lambda i: (-9, -11, -20), "world of the cases"), ("many", lambda i: (-9, -11 + 5 * (i == 3), -20), "middle of the grid at 0: the cases lie up to 5 voxels from where most of them do")):
        out = run(config(prepared(tmp_path / name, corner=corner), tmp_path / f"{name}_run", 1, atlas=(22, 22, 20)))["out"] / "templates"
        im = nib.load(out / "t2.nii.gz")
        assert read_json(out / "templates.json")["space"] == space
        assert np.allclose(im.affine @ [1, 0, 1, 1], (-9, -11, -20, 1) if name == "one" else (-8.5, -10.5, -19, 1))  # 22 - 20 slices and 20 - 18 columns: one before, one after


def test_the_encoder_goes_on_with_its_templates(whole):
    "Export -> another number of channels -> a segmentation that fills what is missing."
    from medssl_nb.core import generator
    from medssl_nb.nets.registry import build_encoder
    from medssl_nb.tasks.base import check_task
    from medssl_nb.tasks.brainmvp import load_templates
    from medssl_nb.tasks.missing import MissingConfig, SegmentMissing, in_order, predict_missing
    from medssl_nb.tasks.supervised import evaluating
    from medssl_nb.train.checkpoint import load_encoder, load_into

    enc, card = load_encoder(whole["out"])
    assert card["input"] == "none" and card["method"] == "brainmvp"
    new = build_encoder({**enc.spec(), "in_channels": 2})
    report = load_into(new, enc.state_dict(), "divide")
    x = torch.rand(1, 1, 16, 16, 16, generator=generator(0))
    with torch.no_grad(), evaluating(whole["task"]):  # property 32: the file holds the network that was trained, running averages included
        assert all(torch.equal(a, b) for a, b in zip(enc.eval()(x), whole["task"].encoder(x)))
    with torch.no_grad():  # property 32: one image, twice, divided by two, is the image
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(enc.eval()(x), new.eval()(x.expand(-1, 2, -1, -1, -1)))) and report.share == 1
    t = in_order(*load_templates(whole["out"] / "templates"), ("t2", "flair"))
    task = SegmentMissing(new, MissingConfig(region=(16, 16, 16), values=(1,), deep=1), t)
    x = torch.rand(2, 2, 16, 16, 16, generator=generator(1))
    batch = dict(image=x, present=torch.tensor([[True, True], [False, True]]), label=(x[:, :1] > 0.7).long(), start=torch.tensor([[2, 3, 0]] * 2), full=torch.tensor([[20, 22, 18]] * 2), progress=0.5)
    assert set(check_task(task, batch, steps=1)) == {"seg", "seg1", "consistency"}
    assert predict_missing(task, torch.rand(2, 20, 22, 18), torch.tensor([True, False])).shape == (1, 20, 22, 18)


def outlined(dir, n=8, shape=(20, 22, 18), mm=(2.0, 1.0, 1.0)):
    "Cases with a bright cube to outline; every third has no flair."
    from medssl_nb.data.cases import write_case, write_index

    for i in range(n):
        rng = np.random.default_rng(100 + i)
        a = rng.integers(3, 9, 3)
        y = np.zeros((1, *shape), np.uint8)
        y[0, a[0] : a[0] + 7, a[1] : a[1] + 7, a[2] : a[2] + 7] = 1
        chans = ["t2", "flair"] if i % 3 else ["t2"]
        x = np.stack([np.clip(0.3 + 0.5 * y[0] + 0.05 * rng.standard_normal(shape), 0, 1) for _ in chans])
        row = dict(case=f"o-{i}", subject=f"p-{i}", session="1", split=None, group="", dims=3, channels=chans, spacing=list(mm), labels={}, fingerprint=str(i))
        write_case(dir, row, x, y)
    write_index(dir)
    return Path(dir)


def test_finetune_fills_what_is_missing_with_the_templates_of_the_run(whole, tmp_path):
    "The command, as a user types it; once without the templates, which is refused."
    from medssl_nb.core import read_jsonl

    words = [str(Path(sys.executable).parent / "medssl"), "finetune", str(outlined(tmp_path / "d")), "--out", str(tmp_path / "r"), "--arms", "brainmvp", str(whole["out"]), "--channels", "t2", "flair"]
    words += "--missing template --steps 2 --batch 2 --budgets 3 --seeds 0 --region 16 16 16 --predictions 0 --device cpu".split()
    bare = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert bare.returncode and "--templates runs/NAME/templates" in " ".join((bare.stdout + bare.stderr).replace("│", " ").split())
    done = subprocess.run([*words, "--templates", str(whole["out"] / "templates")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(tmp_path / "r" / "rows.jsonl")
    assert {r["arm"] for r in rows} == {"scratch", "brainmvp"} and all(0 <= r["dice"] <= 1 for r in rows)
    terms = read_jsonl(next((tmp_path / "r" / "cells" / "brainmvp").rglob("history.jsonl")))[0]
    assert {"seg", "seg1", "consistency"} <= terms.keys()


def test_intensities_and_crop_of_the_paper_are_settings_of_prepare():
    "Properties 25 and 26: percentiles 5 and 95 of the foreground, each channel by itself, clipped; a box symmetric about the middle."
    from medssl_nb.data.prepare import PrepareConfig, crop_box, normalise

    cfg = PrepareConfig(percentiles=(5.0, 95.0), crop="centred", margin=0)
    rng = np.random.default_rng(0)
    x = np.zeros((1, 16, 18, 20), np.float32)
    x[:, 3:12, 4:15, 5:13] = rng.gamma(3.0, 50.0, (1, 9, 11, 8))
    y, rule, fg = normalise(x, "t1", "float32", cfg)
    lo, hi = np.percentile(x[0][fg], (5, 95))
    assert y.min() == 0 and y.max() == 1 and (y[0][fg & (x[0] <= lo)] == 0).all() and (y[0][x[0] >= hi] == 1).all()
    inner = fg & (x[0] > lo) & (x[0] < hi)
    assert np.allclose(y[0][inner], (x[0][inner] - lo) / (hi - lo), atol=1e-5) and ((y[0][inner] > 0) & (y[0][inner] < 1)).all()
    assert np.allclose(normalise(x * 7 + 3, "t1", "float32", cfg)[0], y, atol=1e-4)
    for seed in range(20):
        k = np.zeros((9, 12, 15), bool)
        k[tuple(np.random.default_rng(seed).integers(0, s, 3) for s in k.shape)] = True
        lo, hi = crop_box(k, 0, True)
        assert [a + b for a, b in zip(lo, hi)] == list(k.shape)  # the middle of the box is the middle of the volume
        inside = np.zeros_like(k)
        inside[tuple(map(slice, lo, hi))] = True
        assert not (k & ~inside).any()


@pytest.mark.parametrize(
    "spec, task, says",
    [
        ([["t1"], ["t2"], ["flair"]], {}, "none of 3 cases has two aligned sequences"),
        (SEQS, dict(atlas=(16, 22, 18)), "5 of 5 cases are larger than the atlas (16, 22, 18)"),
        (SEQS, dict(sequences=("mra", "pd")), "none of the sequences mra, pd is in the data"),
    ],
)
def test_bad_data_is_refused_before_a_network_is_built(spec, task, says, tmp_path):
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
        run(config(prepared(tmp_path / "d", spec), tmp_path / "run", **task))
    assert not (tmp_path / "run").exists()


def test_cases_of_different_voxels_are_refused(whole, tmp_path):
    "For pre-training among themselves, for fine-tuning beside the templates."
    thick = prepared(tmp_path / "d", mm=lambda i: (5.0 if i == 2 else 2.0, 1.0, 1.0))
    with pytest.raises(UserError, match="those of c-0 are 2 x 1 x 1 mm, those of c-2 5 x 1 x 1 mm.*--spacing 2 1 1 --crop centred"):
        run(config(thick, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    from medssl_nb.eval.transfer import FinetuneConfig, resolve

    fine = dict(arms=dict(brainmvp=str(whole["out"])), channels=("t2",), missing="template", templates=whole["out"] / "templates", budgets=(2,), seeds=(0,), val=0.0)
    resolve(FinetuneConfig(data=outlined(tmp_path / "same"), **fine))
    with pytest.raises(UserError, match=r"those of o-\d are 1 x 1 x 1 mm, those of the templates 2 x 1 x 1 mm"):
        resolve(FinetuneConfig(data=outlined(tmp_path / "thin", mm=(1.0, 1.0, 1.0)), **fine))


def test_the_command_line_says_which_sequence_was_meant(data, tmp_path):
    out = subprocess.run([str(Path(sys.executable).parent / "medssl"), "pretrain", str(data), "--out", str(tmp_path / "r"), "--method", "brainmvp", "--preset", "small3d", "--task.sequences", "t1ce", "t2"], capture_output=True, text=True, timeout=120)
    assert out.returncode and "did you mean 't1c'?" in " ".join((out.stdout + out.stderr).replace("│", " ").split())


GLOO = """
import os, sys, warnings, torch, torch.distributed as dist
warnings.simplefilter('ignore'); torch.set_num_threads(1)
from medssl_nb.core import generator
from medssl_nb.tasks.brainmvp import BrainMVP, BrainMVPConfig
rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
dist.init_process_group('gloo')
torch.manual_seed(0)
task = BrainMVP(BrainMVPConfig.small3d(net='residual', widths=(8,16), depths=(1,1), region=(8,8,8), sequences=('t1','t2','flair'), atlas=(12,12,12), template_warmup=0., contrast_from=0., sparse='yes', temp=.5))
task.templates.weight.data.uniform_(generator=generator(0))
B = 4
batch = dict(image=torch.rand(B,3,8,8,8, generator=generator(1)), present=torch.ones(B,3).bool(), start=torch.tensor([[i,1,2] for i in range(B)]), full=torch.full((B,3), 12), progress=.5)
views = task.views(batch, generator(2))
n = B//world; mine = slice(rank*n, rank*n+n)
views = {k: v[mine] if torch.is_tensor(v) else v for k, v in views.items()}
model = torch.nn.parallel.DistributedDataParallel(task) if world > 1 else task
sum(task.losses(model(views), views).values()).backward()
if rank == 0: torch.save({k: p.grad.to_dense() if p.grad.is_sparse else p.grad for k, p in task.named_parameters()}, sys.argv[1])
dist.barrier(); dist.destroy_process_group()
"""


def test_two_processes_are_one_with_their_cases_together(tmp_path):
    "Negatives of both, and sparse templates, in value and gradient. (Group norm: batch norm is shared on request.)"
    (tmp_path / "gloo.py").write_text(GLOO)
    root = Path(__file__).resolve().parents[1]
    for world in (1, 2):
        cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(tmp_path / "gloo.py"), str(tmp_path / f"{world}.pt")]
        out = subprocess.run(cmd, capture_output=True, text=True, timeout=300, cwd=root)
        assert out.returncode == 0, out.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{w}.pt", weights_only=True) for w in (1, 2))
    assert (one["templates.weight"] != 0).any()
    for k in one:
        assert torch.allclose(one[k], two[k], atol=2e-6 + 1e-4 * one[k].abs().max()), (k, (one[k] - two[k]).abs().max())


def test_the_recipe_scales_each_sequence_by_itself(tmp_path):
    "Decision 14 and properties 25, 26 from the command line: 1 mm, a box centred in the image, in each sequence 5 % of the brain at 0 and 5 % at 1; another scanner's scale is the same image."
    import nibabel as nib

    from medssl_nb.cli import main
    from medssl_nb.data.cases import Prepared

    rng = np.random.default_rng(0)
    brain = np.zeros((24, 26, 28), bool)
    brain[6:14, 5:21, 4:20] = True  # x nearer to its low end, z too
    raw = {"t1": rng.gamma(3, 40, brain.shape) + 1, "t2": rng.normal(0, 1, brain.shape) ** 2 * 1000 + 5}
    for who, scale in (("a", 1.0), ("b", 37.0)):
        (tmp_path / "scans" / who).mkdir(parents=True)
        for n, x in raw.items():
            nib.save(nib.Nifti1Image((x * scale * brain).astype(np.float32), np.eye(4)), tmp_path / "scans" / who / f"{n}.nii.gz")
    assert main(["ingest", str(tmp_path / "scans"), "-o", str(tmp_path / "man")]) == 0
    assert main(["prepare", str(tmp_path / "man"), "-o", str(tmp_path / "prep"), "--recipe", "brainmvp", "--workers", "0"]) == 0
    p = Prepared(tmp_path / "prep")
    got = []
    for r in p.rows:
        x, here = p.read(r)
        assert list(r["channels"]) == ["t1", "t2"] and here.all() and x.shape == (2, 20, 16, 12)  # by hand: 4 to 20 of 28 slices becomes 4 to 24, 5 to 21 of 26 stays, 6 to 14 of 24 becomes 6 to 18
        got.append(x)
    lo = [min(a, n - b) for a, b, n in ((4, 20, 28), (5, 21, 26), (6, 14, 24))]
    box = tuple(slice(a, n - a) for a, n in zip(lo, (28, 26, 24)))
    for x in got:
        assert x.shape[1:] == tuple(s.stop - s.start for s in box)
        for c, n in enumerate(("t1", "t2")):
            v = raw[n].astype(np.float32)[brain]
            a, b = np.percentile(v, (5, 95))
            want = (np.clip((raw[n] - a) / (b - a), 0, 1) * brain).transpose(2, 1, 0)[box]
            assert np.abs(x[c] - want).max() < 2e-3, n
    assert np.abs(got[0] - got[1]).max() < 2e-3
