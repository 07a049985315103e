"A transformer from masked modelling, in front of labels: pretrain, finetune and probe as a user calls them, in 2-D and in 3-D."
import numpy as np
import pytest
import torch

from medssl_nb.cli import main
from medssl_nb.core import read_json, read_jsonl
from medssl_nb.data.cases import write_case, write_index
from medssl_nb.eval.transfer import FinetuneConfig, ProbeConfig, finetune, load_arm, probe
from medssl_nb.tasks.mim import MIM, MIMConfig
from medssl_nb.train.checkpoint import export_encoder, load_encoder

SIZE = {2: (1, 32, 32), 3: (16, 32, 32)}


def prepared(out, dims, patients=12, channels=None):
    "A disc or a ball on noise, large or small."
    r = np.random.default_rng(0)
    channels = channels or (["xr"] if dims == 2 else ["ct"])
    S = SIZE[dims]
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in S], indexing="ij"))
    affine = np.eye(4).tolist()
    inverse = dict(file_grid=dict(shape=list(S), affine=affine), orientation="RAS", dims=dims, resampled_shape=list(S), resampled_affine=affine, crop=[[0, 0, 0], list(S)])
    for p in range(patients):
        big = p % 2
        centre = np.array([S[0] / 2 - 0.5, *(r.uniform(12, 20, 2))]).reshape(3, 1, 1, 1)
        y = (((grid - centre) ** 2).sum(0) < (7 if big else 4) ** 2).astype(np.uint8)
        x = np.stack([0.2 + 0.5 * y + 0.1 * r.random(S) for _ in channels]).astype(np.float32)
        row = dict(case=f"c-{p:02}", subject=f"s-{p:02}", session="", split=None, group="demo", dims=dims, channels=channels, spacing=[1.0, 1.0, 1.0], labels={"size": ["small", "large"][big]}, fingerprint="")
        write_case(out, row, x, y[None], info=dict(inverse=inverse, intensity={c: dict(rule="percentile") for c in channels}))
    write_index(out)
    return out


TINY = ["--task.width", "32", "--task.heads", "4", "--task.decoder-width", "24", "--task.decoder-depth", "1", "--train.steps", "4", "--train.batch", "2", "--train.workers", "0", "--train.tensorboard", "False", "--train.bar", "False"]


@pytest.mark.parametrize("dims", [2, 3])
def test_from_prepared_images_to_tables(tmp_path, dims, capsys):
    data, run = prepared(tmp_path / "data", dims), tmp_path / "run"
    region = ["--task.region2d", "32", "32"] if dims == 2 else ["--task.region3d", "16", "32", "32"]
    assert main(["pretrain", str(data), "-o", str(run), "--method", "mim", "--preset", f"small{dims}d", *region, *TINY]) in (0, None)
    history, card = read_jsonl(run / "history.jsonl"), read_json(run / "encoder" / "card.json")
    assert [r["step"] for r in history] == [1, 2, 3, 4] and all(0 < r["mim"] < 5 for r in history)
    assert (card["method"], card["encoder"]["net"], card["input"], card["encoder"]["kinds"]) == ("mim", "vit", "fixed:0.5:0.2", [f"{dims}d"])
    enc, _ = load_encoder(run)
    assert (enc.dims, enc.strides[-1], len(enc.widths)) == (dims, 8, 5)
    shared = dict(data=data, arms=dict(mim=str(run)), seeds=(0,), budgets=(4,), target="size", bar=False, predictions=0)
    fit = dict(steps=2, batch=2)
    seg = finetune(FinetuneConfig(out=tmp_path / "seg", kind="segment", **fit, **shared))
    assert {(r["arm"], r["metric"]) for r in seg["table"]} >= {("mim", "dice"), ("scratch", "dice")}
    cls = finetune(FinetuneConfig(out=tmp_path / "cls", kind="classify", **fit, **shared))
    assert all(np.isfinite(r["mean"]) for r in cls["table"]) and {r["arm"] for r in cls["table"]} == {"mim", "scratch"}
    for level in ("last", "all"):
        lin = probe(ProbeConfig(out=tmp_path / f"probe-{level}", kind="classify", level=level, **shared))
        assert {r["arm"] for r in lin["table"]} == {"mim", "scratch"}
    dense = probe(ProbeConfig(out=tmp_path / "dense", kind="segment", steps=2, batch=2, **shared))
    assert {r["metric"] for r in dense["table"]} >= {"dice"}


def test_one_encoder_of_three_kinds_serves_both_dimensions(tmp_path):
    "An export of the unified form is narrowed to the data: nothing idle, all tensors of that kind land, and more channels are inflated."
    torch.manual_seed(0)
    task = MIM(MIMConfig.small_unified(width=32, depth=4, heads=4, decoder_width=24, decoder_depth=1))
    export_encoder(task, tmp_path / "encoder", dict(input="none"))
    for dims, channels in ((2, 1), (2, 3), (3, 1), (3, 4)):
        arm = load_arm("u", tmp_path / "encoder", channels, dims, FinetuneConfig())
        assert arm.spec["kinds"] == [f"{dims}d"] and arm.report.share == 1.0
        assert not [k for k in arm.state if "text" in k or k == "words"]
        proj = arm.state[f"tokenizers.{dims}d.proj.weight"]
        mine = task.encoder.tokenizers[f"{dims}d"].proj.weight
        assert torch.allclose(proj.sum(1), mine.sum(1), atol=1e-5)
        assert proj.shape[1] == (3 if dims == 2 else channels)


def test_a_run_continues_bit_for_bit(tmp_path):
    "Four steps, and two and two: drawn masks, stochastic depth and moments are those of the unbroken run."
    data = prepared(tmp_path / "data", 2)
    words = ["--method", "mim", "--preset", "small2d", "--task.region2d", "32", "32", *TINY, "--train.save-every", "2", "--train.keep", "0"]
    main(["pretrain", str(data), "-o", str(tmp_path / "a"), *words])
    main(["pretrain", str(data), "-o", str(tmp_path / "b"), *words])
    import shutil

    from safetensors.torch import load_file

    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "b" / "encoder")
    main(["pretrain", str(data), "-o", str(tmp_path / "b"), *words])
    a, b = (load_file(tmp_path / n / "checkpoints" / "step_00000004" / "model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
