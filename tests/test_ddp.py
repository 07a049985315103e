"""Two processes under torchrun (gloo, CPU): the same weights in both, and those of one process with twice the batch; for each method, copied (DDP) and divided (FSDP2).

What "the same" means here: methods are computed in float64, where weights after three steps agree to 1e-8 and the losses (kept as float32) to 1e-6; what is left is the order of sums. In float32 that
order moves single gradients by up to 1e-4 of the largest, which says nothing about right or wrong. Where a method normalises over the batch, batch norm is shared between the processes. Not the same by nature, and so not compared: means over a *varying* number of values (weighted cross-entropy, masked errors with padding), where each process
divides by its own number.
"""
import atexit
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS = 4


def settings(**k):
    from test_resume import settings

    # SGD: an optimiser in which a rounding error stays as small as it was
    return settings(steps=STEPS, optimizer="sgd", lr=0.5, accum=1, save_every=2, **k)


METHODS = ("mae small3d", "mae small2d", "pcrlv2 small3d", "pcrlv2 small2d", "segment 3d", "segment 2d", "mim small2d")


def tiny(seed=0):
    "The small task, with a moving average of a weight in a buffer, and one of the whole encoder in a teacher."
    from test_resume import task

    from medssl_nb.nets.heads import Teacher
    from medssl_nb.train.trainer import whole

    t = task(seed=seed, plain=True)
    t.teacher = Teacher(t.encoder, 0.9)

    def after_step(step):
        t.slow.lerp_(whole(t.encoder.net[0].bias.detach()), 0.1)
        t.teacher.update(t.encoder, step)

    t.after_step = after_step
    return t


def strategies(name):
    return ("ddp",) if name in ("mae small2d", "pcrlv2 small2d", "segment 3d") else ("ddp", "fsdp")  # some of each: they take their time


def part(views, rank, world, n):
    "The share of `n` cases that one process sees."
    rows = slice(rank * n // world, (rank + 1) * n // world)

    def cut(v):
        if isinstance(v, list) and v and hasattr(v[0], "shape"):
            return [cut(x) for x in v]
        if not hasattr(v, "shape") or not v.ndim:
            return v
        return v.unflatten(0, (len(v) // n, n))[:, rows].flatten(0, 1)  # local views are view-major

    return {k: cut(v) for k, v in views.items()}


def method_steps(name, strategy="ddp", shared=True, steps=3):
    "Three steps of a real method on views that are drawn for all four cases; this process takes its share of them."
    import torch
    from far import make

    from medssl_nb.core import generator
    from medssl_nb.train.trainer import TrainConfig, Trainer, make_fabric, whole

    task, batch = make(*name.split())
    batch["valid"][:, 0], batch["valid"][:, 1] = 0, batch["full"]  # no padding: see above
    views = [task.views({**batch, "progress": s / 10, "step": s}, generator(0, s, 0, "views")) for s in range(steps)]
    cast = lambda v: [cast(x) for x in v] if isinstance(v, list) else v.double() if torch.is_tensor(v) and v.is_floating_point() else v
    views, task = [{k: cast(x) for k, x in v.items()} for v in views], task.double()
    for m in task.modules():
        if hasattr(m, "drop"):
            m.drop = 0.0  # stochastic depth draws for the cases of a process
    cfg = TrainConfig(steps=10, batch=4, optimizer="sgd", lr=0.02, momentum=0.0, device="cpu", strategy=strategy, sync_batchnorm=shared)
    fabric, cfg = make_fabric(cfg)
    task.views = lambda batch, gen: part(views[batch["step"]], fabric.global_rank, fabric.world_size, 4)
    tr = Trainer(task, cfg, fabric)
    rows = [tr.train_step([batch])[0] for _ in range(steps)]
    divided = {k: [list(v.to_local().shape), list(v.shape)] for k, v in task.state_dict().items() if hasattr(v, "to_local")}
    return rows, {k: whole(v).detach().clone() for k, v in task.state_dict().items()}, divided


def nce_case():
    import torch

    from medssl_nb.core import generator

    return [torch.randn(s, generator=generator(2, i)) for i, s in enumerate(((6, 5), (6, 5), (5, 5)))]


def nce(rank, world=2):
    "InfoNCE with negatives from both processes: value, and gradients of the features and of a shared weight."
    from medssl_nb.losses.contrast import info_nce

    f, g, w = nce_case()
    n = len(f) // world
    f, g = (x[rank * n : (rank + 1) * n].clone().requires_grad_() for x in (f, g))
    w = w.requires_grad_()
    loss = info_nce(f @ w, g @ w, 0.5)
    loss.backward()
    return dict(loss=loss.item(), f=f.grad.tolist(), g=g.grad.tolist(), w=w.grad.tolist())


def averages(task, go):
    "Running averages of the last three of four steps while something trains: site -> (means, variances)."
    from medssl_nb.losses.statistics import Running

    with Running(task, 0.3, after=0.25) as r:
        go()
    return dict(steps=r.k, sites={n: [v.tolist() for v in both] for n, both in r.moments().items()})


def main(root):
    "What each process runs: train, compare weights, resume, and stop together on one bad batch."
    import hashlib
    from dataclasses import replace

    import torch
    import torch.distributed as dist
    from test_resume import cases, task

    from medssl_nb.train.trainer import NonFinite, train

    torch.set_num_threads(1)
    rank, root, said = int(os.environ["RANK"]), Path(root), {}
    # first registered, so called last: what the package leaves behind when the process ends
    atexit.register(lambda: (root / f"left_{rank}").write_text(str(not dist.is_initialized())))
    data = cases(root / "data")
    digest = lambda t: hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in t.parameters())).hexdigest()

    t = task(seed=rank, plain=True)  # different weights to begin with: they must not stay different
    said["running"] = averages(t, lambda: train(t, data, settings(batch=2), root / "two", method="tiny"))
    said["weights"] = digest(t)

    t = task(seed=0)  # its batch norm is another layer as soon as it is shared
    said["shared"] = averages(t, lambda: train(t, data, settings(batch=2, sync_batchnorm=True), root / "shared", method="tiny"))

    class Bad:  # the second process meets a NaN at step 3
        def loader(self, **k):
            from medssl_nb.data.cases import make_loader

            for i, b in enumerate(make_loader(data, **k), k["start"]):
                if i == 3 and rank == 1:
                    b["image"][0, 0, 0, 0, 0] = float("nan")
                yield b

    t = task(seed=0, plain=True)
    try:
        train(t, Bad(), settings(batch=2), root / "bad", method="tiny")
    except NonFinite as e:
        said["stopped"] = str(e)
    said["bad"] = digest(t)

    fsdp = settings(batch=2, strategy="fsdp", clip=0.5)
    train(tiny(rank), data, fsdp, root / "fsdp", method="tiny")
    train(tiny(rank), data, replace(fsdp, max_minutes=0.0), root / "cut", method="tiny")  # one step
    dist.barrier()
    train(tiny(7 + rank), data, fsdp, root / "cut", method="tiny")
    adamw = settings(batch=2, strategy="fsdp")
    train(tiny(rank), data, replace(adamw, optimizer="adamw", lr=1e-3, accum=2), root / "adamw", method="tiny")

    for name in METHODS:
        for strategy in strategies(name):
            rows, weights, _ = method_steps(name, strategy=strategy)
            said[f"{name} {strategy}"] = rows
            if rank == 0:
                torch.save(weights, root / f"{name} {strategy}.pt")
    said["alone"] = method_steps("pcrlv2 small2d", shared=False)[0]  # what un-shared statistics give
    said["divided"] = method_steps("mae small3d", strategy="fsdp")[2]
    said["nce"] = nce(rank)
    (root / f"said_{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from test_resume import prepared

    root = tmp_path_factory.mktemp("ddp")
    prepared(root / "data")
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(root)],
        capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return root


def said(root, rank):
    return json.loads((root / f"said_{rank}.json").read_text())


def test_each_process_leaves_the_group_when_it_ends(root):
    "gloo's threads, left alone, abort one ending process in some dozens; Fabric tidies up for NCCL only."
    assert [(root / f"left_{r}").read_text() for r in (0, 1)] == ["True", "True"]


def test_both_processes_hold_the_same_weights(root):
    assert said(root, 0)["weights"] == said(root, 1)["weights"]


def test_two_processes_equal_one_with_twice_the_batch(root, tmp_path):
    import torch
    from test_resume import cases, task

    from medssl_nb.core import read_jsonl
    from medssl_nb.train.checkpoint import latest, read_tensors
    from medssl_nb.train.trainer import train

    one = train(task(seed=0, plain=True), cases(root / "data"), settings(batch=4), tmp_path / "one", method="tiny")
    two = read_jsonl(root / "two" / "history.jsonl")
    assert [r["step"] for r in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-6 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-5
    a, b = (read_tensors(latest(d) / "model.safetensors") for d in (tmp_path / "one", root / "two"))
    start = task(seed=0, plain=True).state_dict()
    for k in a:
        assert torch.allclose(a[k], b[k], atol=1e-6), k
    assert any((a[k] - start[k]).abs().max() > 1e-3 for k in a), "nothing was learnt: the comparison says nothing"


def test_running_statistics_of_two_processes_are_those_of_one(root, tmp_path):
    "With twice the batch, and with twice the micro-batches; what a process sees is not what both see."
    import numpy as np
    from test_resume import cases, task

    from medssl_nb.train.checkpoint import latest, read_tensors
    from medssl_nb.train.trainer import train

    two = said(root, 0)["running"]
    assert two == said(root, 1)["running"] and two["steps"] == 3 and sorted(two["sites"]) == ["net.1", "output"]
    for name, k in (("batch", dict(batch=4)), ("micros", dict(batch=2))):
        t = task(seed=0, plain=True)
        how = settings(**k)
        how.accum = 4 // k["batch"]
        one = averages(t, lambda t=t, how=how, name=name: train(t, cases(root / "data"), how, tmp_path / name, method="tiny"))
        assert one["steps"] == 3 and one["sites"].keys() == two["sites"].keys()
        for site, both in one["sites"].items():
            for a, b in zip(both, two["sites"][site], strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)
    kept = read_tensors(latest(root / "two") / "running.safetensors")  # the first process keeps what is everybody's
    weight = 1 - 0.7**3
    np.testing.assert_allclose(kept["var::net.1"] / weight, two["sites"]["net.1"][1], rtol=1e-12)
    assert sorted(said(root, 0)["shared"]["sites"]) == ["net.1", "output"] and said(root, 0)["shared"] == said(root, 1)["shared"]


def test_one_bad_batch_stops_both_before_a_weight_moves(root):
    from medssl_nb.train.checkpoint import latest

    for r in (0, 1):
        assert "step 3: recon not finite" in said(root, r)["stopped"]
    assert said(root, 0)["bad"] == said(root, 1)["bad"]
    assert latest(root / "bad").name == "step_00000002"
    dump = root / "bad" / "nonfinite_step_3"
    bad = [json.loads((dump / f"rank_{r}.json").read_text())["inputs_not_finite"] for r in (0, 1)]
    assert bad[0] == [] and len(bad[1]) == 1 and bad[1][0].startswith("image of c-")


def test_replay_shows_the_culprit_and_the_innocent(root):
    from test_resume import task

    from medssl_nb.train.trainer import replay

    dump = root / "bad" / "nonfinite_step_3"
    assert math.isnan(replay(dump, task(9, plain=True), rank=1)[0]["recon"])
    want = json.loads((dump / "rank_0.json").read_text())["terms"][0]["recon"]
    assert repr(replay(dump, task(9, plain=True), rank=0)[0]["recon"]) == want


@pytest.fixture(scope="module")
def alone():
    "The same three steps in one process with all four cases."
    return {name: method_steps(name) for name in METHODS}


@pytest.mark.parametrize("name,strategy", [(n, s) for n in METHODS for s in strategies(n)])
def test_a_method_in_two_processes_equals_itself_in_one(root, alone, name, strategy):
    import torch

    rows, weights, _ = alone[name]
    two = said(root, 0)[f"{name} {strategy}"]
    assert two == said(root, 1)[f"{name} {strategy}"]
    for a, b in zip(rows, two):
        assert abs(a["loss"] - b["loss"]) < 1e-6 * max(1, abs(a["loss"])), (a, b)
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-6 * a["grad_norm"], (a, b)
    got = torch.load(root / f"{name} {strategy}.pt", weights_only=True)
    assert got.keys() == weights.keys()
    for k, w in weights.items():
        assert (w.double() - got[k].double()).abs().max() < 1e-8, k
    assert all(r["grad_norm"] > 0.1 for r in rows) and rows[0]["lr"] == 0.02, "nothing moved: the comparison says nothing"


def test_statistics_that_are_not_shared_give_other_numbers(root, alone):
    "The comparison above can fail."
    rows, un = alone["pcrlv2 small2d"][0], said(root, 0)["alone"]
    assert abs(rows[0]["loss"] - un[0]["loss"]) > 1e-3


def test_negatives_from_both_processes_in_value_and_gradient(root):
    import torch

    from medssl_nb.losses.contrast import info_nce

    f, g, w = (x.requires_grad_() for x in nce_case())
    loss = info_nce(f @ w, g @ w, 0.5)
    loss.backward()
    a, b = (said(root, r)["nce"] for r in (0, 1))
    assert (a["loss"] + b["loss"]) / 2 == pytest.approx(loss.item(), abs=1e-6)
    assert a["loss"] != b["loss"]
    # a process's gradient is that of the sum of both losses; the mean is half of it
    for name, grad in (("f", f.grad), ("g", g.grad)):
        assert torch.allclose(torch.tensor(a[name] + b[name]) / 2, grad, atol=1e-6), name
    assert torch.allclose((torch.tensor(a["w"]) + torch.tensor(b["w"])) / 2, w.grad, atol=1e-6)


def test_divided_weights_are_divided(root):
    "Each process holds half of every weight, and the two halves are not the same half."
    shapes = [said(root, r)["divided"] for r in (0, 1)]
    assert len(shapes[0]) > 20
    held, full = (sum(math.prod(v[i]) for v in shapes[0].values()) for i in (0, 1))
    assert held < 0.55 * full


def test_a_divided_run_is_the_copied_run_and_its_checkpoint_is_whole(root, tmp_path):
    import torch
    from test_resume import cases

    from medssl_nb.core import read_jsonl
    from medssl_nb.train.checkpoint import latest, read_tensors
    from medssl_nb.train.trainer import train

    one = train(tiny(), cases(root / "data"), settings(batch=4, clip=0.5), tmp_path / "one", method="tiny")
    rows = read_jsonl(root / "fsdp" / "history.jsonl")
    for a, b in zip(one, rows, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-5
    a, b = (read_tensors(latest(d) / "model.safetensors") for d in (tmp_path / "one", root / "fsdp"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert (b["teacher.module.net.0.weight"] - b["encoder.net.0.weight"]).abs().max() > 1e-4 and b["slow"].abs().max() > 0
    assert (root / "fsdp" / "encoder" / "encoder.safetensors").is_file()


def test_a_divided_run_continues_bit_for_bit(root):
    from medssl_nb.train.checkpoint import latest

    a, b = (latest(root / d) for d in ("fsdp", "cut"))
    assert a.name == b.name == f"step_{STEPS:08d}"
    for f in ("model.safetensors", "optimizer.safetensors"):
        assert (a / f).read_bytes() == (b / f).read_bytes(), f


@pytest.mark.parametrize("run", ["fsdp", "adamw"])
def test_a_divided_run_continues_in_one_process(root, tmp_path, run):
    "From step 2 on, with all cases in one process."
    import shutil
    from dataclasses import replace

    import torch
    from test_resume import cases

    from medssl_nb.train.checkpoint import latest, read_tensors
    from medssl_nb.train.trainer import train

    shutil.copytree(root / run, tmp_path / run)
    shutil.rmtree(tmp_path / run / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(tmp_path / run / "encoder")
    cfg = settings(batch=4, clip=0.5) if run == "fsdp" else replace(settings(batch=4), accum=2, optimizer="adamw", lr=1e-3)
    rows = train(tiny(5), cases(root / "data"), cfg, tmp_path / run, method="tiny", resume="force")
    assert len(rows) == STEPS
    for f in ("model.safetensors", "optimizer.safetensors"):
        a, b = (read_tensors(latest(d) / f) for d in (root / run, tmp_path / run))
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-6) for k in a), f


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main(sys.argv[1])
