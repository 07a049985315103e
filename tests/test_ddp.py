"""Two processes under torchrun (gloo, CPU): the same weights in both, and those of one process with twice the batch."""
import json
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


def main(root):
    "What each process runs: train, compare weights, resume, and stop together on one bad batch."
    import hashlib

    import torch
    import torch.distributed as dist
    from test_resume import cases, task

    from medssl_nb.core import UserError
    from medssl_nb.train.trainer import NonFinite, train

    torch.set_num_threads(1)
    rank, root, said = int(os.environ["RANK"]), Path(root), {}
    data = cases(root / "data")
    digest = lambda t: hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in t.parameters())).hexdigest()

    t = task(seed=rank, plain=True)  # different weights to begin with: they must not stay different
    train(t, data, settings(batch=2), root / "two", method="tiny")
    said["weights"] = digest(t)

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

    try:
        train(task(plain=True), data, settings(batch=2, sync_batchnorm=True), root / "sync", method="tiny")
    except UserError as e:
        said["sync"] = str(e)
    (root / f"said_{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from test_resume import prepared

    root = tmp_path_factory.mktemp("ddp")
    prepared(root / "data")
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(root)],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return root


def said(root, rank):
    return json.loads((root / f"said_{rank}.json").read_text())


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
    import math

    from test_resume import task

    from medssl_nb.train.trainer import replay

    dump = root / "bad" / "nonfinite_step_3"
    assert math.isnan(replay(dump, task(9, plain=True), rank=1)[0]["recon"])
    want = json.loads((dump / "rank_0.json").read_text())["terms"][0]["recon"]
    assert repr(replay(dump, task(9, plain=True), rank=0)[0]["recon"]) == want


def test_synchronised_batch_norm_needs_a_gpu(root):
    assert "sync_batchnorm on cpu" in said(root, 0)["sync"]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main(sys.argv[1])
