"""Out of the door: the command on a run, and nnU-Net's own package fine-tuning from the file.

The slow part needs `nnunetv2` (`make test-all` installs it, into .venv-nnunet); without it the tests are skipped and say so.
"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from medssl_nb.core import generator, read_json
from medssl_nb.export import Holder, leaving, load_monai, monai_form
from medssl_nb.nets.nnunet import PlainEncoder, ResEncEncoder
from medssl_nb.nets.unet import UNetEncoder
from medssl_nb.train.checkpoint import export_encoder, load_encoder
from test_cli import medssl, write_prepared

HAVE = importlib.util.find_spec("nnunetv2") is not None
needs_nnunet = pytest.mark.skipif(not HAVE, reason="NO nnunetv2 HERE: nothing was checked with nnU-Net itself; make nnunet, then run this file with .venv-nnunet/bin/python")


def lived(enc, seed=0):
    gen = generator(seed, 0, 0, "lived")
    with torch.no_grad():
        for k, v in enc.state_dict().items():
            if v.is_floating_point():
                v.copy_(torch.rand(v.shape, generator=gen) * 0.5 + 0.25 if v.ndim == 1 else torch.randn(v.shape, generator=gen) * (2 / v[0].numel()) ** 0.5)
    return enc.eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    d = tmp_path_factory.mktemp("encoders")
    nets = dict(plain=PlainEncoder(1, (8, 16, 16)), resenc=ResEncEncoder(1, (8, 16, 16), blocks=(1, 2, 1)), unet=UNetEncoder(1, (8, 16, 32)))
    for n, e in nets.items():
        export_encoder(Holder(lived(e)), d / n, dict(method="mae", region=[16, 16, 16], input="zscore", citation="nobody 2026"))
    return d


def test_a_run_leaves_by_every_door(tmp_path):
    "From prepared volumes through pre-training to the three exports, at the command line."
    data = write_prepared(tmp_path / "p", n=4)
    code, out, err = medssl("pretrain", data, "--method", "mae", "--preset", "small3d", "--task.region", 16, 16, 16, "--task.net", "plain", "--task.widths", 4, 8, 8, "-o", tmp_path / "r", "--train.steps", 2,
                            "--train.batch", 2, "--train.workers", 0, "--train.warmup", 0, "--train.tensorboard", "False", "--train.bar", "False")
    assert code == 0, err
    enc, _ = load_encoder(tmp_path / "r")
    x = torch.rand(1, 1, 16, 16, 16)
    for to in ("medssl", "monai", "nnunet"):
        code, out, err = medssl("export", tmp_path / "r", "--to", to, "-o", tmp_path / to)
        assert code == 0 and out.splitlines()[-1] == str(tmp_path / to), err
    twin, card = load_encoder(tmp_path / "medssl")
    assert card["method"] == "mae" and card["data"]["cases"] == 4
    net, new = load_monai(tmp_path / "monai")
    for a, b, c in zip(enc.eval()(x), twin.eval()(x), monai_form(enc).walk(net.eval(), x)):
        assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-4)
    ckpt = torch.load(tmp_path / "nnunet" / "checkpoint_medssl.pth", weights_only=True)
    assert all(torch.equal(ckpt["network_weights"][f"encoder.{k}"], v) for k, v in enc.state_dict().items())
    assert "c-0" not in json.dumps([card, read_json(tmp_path / "nnunet" / "card.json")])  # no case in what leaves


def test_the_form_that_nnunet_reads(encoders, tmp_path):
    "Keys and types of the checkpoint, with nothing in it but tensors and plain values."
    assert medssl("export", encoders / "resenc", "--to", "nnunet", "--inputs", 2, "--spacing", 1, 1, 2, "--patch", 32, 32, 16, "-o", tmp_path / "o")[0] == 0
    ckpt = torch.load(tmp_path / "o" / "checkpoint_medssl.pth", weights_only=True)  # what is not plain would be refused here
    assert set(ckpt) == {"network_weights", "nnssl_adaptation_plan", "citations"}
    plan = ckpt["nnssl_adaptation_plan"]
    conf = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert (conf["spacing"], conf["patch_size"], plan["recommended_downstream_patchsize"]) == ([1, 1, 2], [32, 32, 16], [32, 32, 16])
    assert plan["pretrain_num_input_channels"] == 2 and plan["key_to_lpe"] is None
    assert (plan["key_to_encoder"], plan["key_to_stem"]) == ("encoder.stages", "encoder.stem")
    for k in plan["keys_to_in_proj"]:
        assert ckpt["network_weights"][f"{k}.weight"].shape == (8, 2, 3, 3, 3)
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert read_json(tmp_path / "o" / "adaptation_plan.json") == plan
    enc, _ = load_encoder(encoders / "resenc")  # spread over two inputs, each half as strong
    stem = ckpt["network_weights"]["encoder.stem.convs.0.conv.weight"]
    assert torch.allclose(stem.sum(1, keepdim=True), enc.state_dict()["stem.convs.0.conv.weight"], atol=1e-6)


def test_what_cannot_leave(encoders, tmp_path):
    for words, says in (
        (("unet", "--to", "nnunet"), "--task.net resenc"),
        (("resenc", "--to", "monai"), "3 tensors would have no place"),
        (("plain", "--to", "nnunet", "--plans", tmp_path / "no.json"), "no plans at"),
        (("plain", "--to", "onnx"), "onnx"),
    ):
        code, out, err = medssl("export", encoders / words[0], *words[1:], "-o", tmp_path / "o")
        assert code == 2 and says in err and not (tmp_path / "o").exists(), err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, out, err = medssl("export", encoders / "plain", "-o", tmp_path / "mine")
    assert code == 2 and "nothing is overwritten" in err and (tmp_path / "mine" / "thesis.txt").exists()


def test_a_card_cannot_lead_elsewhere(encoders, tmp_path):
    "A folder somebody sent: links out of it and changed bytes are refused, whatever the target."
    for name in ("card.json", "encoder.safetensors"):
        sent = tmp_path / f"sent_{name}"
        sent.mkdir()
        for f in (encoders / "plain").iterdir():
            (sent / f.name).symlink_to(f) if f.name == name else (sent / f.name).write_bytes(f.read_bytes())
        for to in ("medssl", "monai", "nnunet"):
            code, out, err = medssl("export", sent, "--to", to, "-o", tmp_path / "o")
            assert code == 2 and "link" in err and not (tmp_path / "o").exists(), err


# --- with nnU-Net itself -------------------------------------------------------------------------------------------------------------

def same_networks(net):
    "nnU-Net's network of an architecture, and the features of its encoder."
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from medssl_nb.export import nnunet_architecture

    a = nnunet_architecture(net)
    return get_network_from_plans(a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], net.in_channels, 3, allow_init=True, deep_supervision=True)


@needs_nnunet
@pytest.mark.slow
@pytest.mark.parametrize("net", [PlainEncoder(2, (4, 6, 8)), PlainEncoder(1, (4, 6, 8, 8), 2, "batch", (1, 2, 3, 2)), ResEncEncoder(1, (4, 6, 6, 8), blocks=(1, 3, 1, 2)), ResEncEncoder(3, (4, 8, 8), 2)], ids=lambda e: f"{e.spec()['net']}{e.dims}{e.norm}")
def test_our_networks_are_theirs(net):
    "Names, shapes and features agree with the package that nnU-Net uses."
    from medssl_nb.export import nnunet_weights

    lived(net)
    theirs = same_networks(net).eval()
    want = {k: v.shape for k, v in theirs.state_dict().items() if ".seg_layers." not in k}
    have = nnunet_weights(net)
    assert {k: v.shape for k, v in have.items()} == want
    theirs.load_state_dict({**theirs.state_dict(), **have})
    x = torch.randn(2, net.in_channels, *[4 * net.strides[-1]] * net.dims, generator=generator(0))
    with torch.no_grad():
        for a, b in zip(net(x), theirs.encoder(x)):
            assert torch.allclose(a, b, atol=1e-5)


@needs_nnunet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "resenc"])
def test_the_adaptation_plan_finds_every_tensor(encoders, tmp_path, name):
    "The keys of the plan, used as nnU-Net's development version uses them: cut off, then loaded strictly into the network the plan describes."
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    assert medssl("export", encoders / name, "--to", "nnunet", "-o", tmp_path / "o")[0] == 0
    ckpt = torch.load(tmp_path / "o" / "checkpoint_medssl.pth", weights_only=True)
    plan, arch = ckpt["nnssl_adaptation_plan"], ckpt["nnssl_adaptation_plan"]["architecture_plans"]
    net = get_network_from_plans(arch["arch_class_name"], arch["arch_kwargs"], arch["arch_kwargs_requiring_import"], plan["pretrain_num_input_channels"], 2, allow_init=True, deep_supervision=False)
    assert (net.key_to_encoder, net.key_to_stem, sorted(net.keys_to_in_proj)) == (plan["key_to_encoder"], plan["key_to_stem"], sorted(plan["keys_to_in_proj"]))
    decoder = {k: v.clone() for k, v in net.state_dict().items() if k.startswith("decoder.") and not k.startswith("decoder.encoder.")}
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {k[len(key):].lstrip("."): v for k, v in ckpt["network_weights"].items() if k.startswith(key)}
        net.get_submodule(key).load_state_dict(part, strict=True)
    enc, _ = leaving(encoders / name)
    state = net.encoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in enc.state_dict().items())
    assert all(torch.equal(net.state_dict()[k], v) for k, v in decoder.items())  # the decoder begins as nnU-Net begins it
    x = torch.randn(1, 1, 16, 16, 16, generator=generator(1))
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(net.eval().encoder(x), enc(x)))


TRAIN = """
import json, sys
import torch
def main():
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
    plans, weights, out = sys.argv[1:]
    torch.set_num_threads(1); torch.manual_seed(0)
    t = get_trainer_from_args("900", "3d_fullres", 0, "nnUNetTrainer", plans, device=torch.device("cpu"))
    t.num_epochs, t.num_iterations_per_epoch, t.num_val_iterations_per_epoch = 2, 3, 1
    maybe_load_checkpoint(t, False, False, None if weights == "none" else weights)
    if t.network is None: t.initialize()
    torch.save({k: v.clone() for k, v in t.network.state_dict().items()}, out)
    t.run_training()
    t.perform_actual_validation()
if __name__ == "__main__":
    main()
"""


def raw_dataset(root):
    "Six small heads with lesions, in nnU-Net's raw form."
    import nibabel as nib
    import numpy as np

    from medssl_nb.data.phantom import head_case

    d = root / "Dataset900_Heads"
    for part in ("imagesTr", "labelsTr"):
        (d / part).mkdir(parents=True)
    for i in range(6):
        c = head_case(0, (24, 28, 24), subject=i, modalities=("t1",), lesions=1)
        turn = lambda x: np.asarray(x).transpose(2, 1, 0)  # files are (x, y, z)
        affine = c["affine"] @ np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
        nib.save(nib.Nifti1Image(turn(c["images"]["t1"] if isinstance(c["images"], dict) else c["images"][0]).astype(np.float32), affine), d / "imagesTr" / f"head_{i:03}_0000.nii.gz")
        nib.save(nib.Nifti1Image((turn(c["label"]) > 0).astype(np.uint8), affine), d / "labelsTr" / f"head_{i:03}.nii.gz")
    (d / "dataset.json").write_text(json.dumps(dict(channel_names={"0": "T1"}, labels=dict(background=0, lesion=1), numTraining=6, file_ending=".nii.gz")))


@needs_nnunet
@pytest.mark.slow
def test_nnunet_fine_tunes(encoders, tmp_path):
    "Planning, preprocessing, fine-tuning and its scratch twin with nnU-Net's own program; every encoder tensor is in the network before the first step."
    raw, pre, res = (tmp_path / n for n in ("raw", "pre", "res"))
    for p in (raw, pre, res):
        p.mkdir()
    raw_dataset(raw)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(nnUNet_raw=str(raw), nnUNet_preprocessed=str(pre), nnUNet_results=str(res), nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f", OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)

    def run(*words):
        r = subprocess.run([sys.executable, *map(str, words)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
        return r.stdout

    entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import {0}\nif __name__ == '__main__': {0}()\n"
    for f in ("plan_and_preprocess_entry", "preprocess_entry"):
        (tmp_path / f"{f}.py").write_text(entry.format(f))
    (tmp_path / "train.py").write_text(TRAIN)
    run("plan_and_preprocess_entry.py", "-d", 900, "--no_pp", "-npfp", 1)
    home = pre / "Dataset900_Heads"
    code, out, err = medssl("export", encoders / "resenc", "--to", "nnunet", "--plans", home / "nnUNetPlans.json", "--patch", 16, 16, 16, "-o", tmp_path / "o")
    assert code == 0, err
    for n in ("medsslPlans", "medsslPlans_scratch"):
        (home / f"{n}.json").write_text((tmp_path / "o" / f"{n}.json").read_text())
    run("preprocess_entry.py", "-d", 900, "-plans_name", "medsslPlans", "-c", "3d_fullres", "-np", 1)
    enc, _ = load_encoder(encoders / "resenc")
    landed = {}
    for plans, weights in (("medsslPlans", tmp_path / "o" / "checkpoint_medssl.pth"), ("medsslPlans_scratch", "none")):
        run("train.py", plans, weights, tmp_path / f"{plans}.pt")
        net = torch.load(tmp_path / f"{plans}.pt", weights_only=True)
        landed[plans] = sum(torch.equal(net[f"encoder.{k}"], v) for k, v in enc.state_dict().items())
        done = res / "Dataset900_Heads" / f"nnUNetTrainer__{plans}__3d_fullres" / "fold_0"
        assert (done / "checkpoint_final.pth").exists() and (done / "validation" / "summary.json").exists()
    assert landed["medsslPlans"] == len(enc.state_dict())
    assert landed["medsslPlans_scratch"] == 0
