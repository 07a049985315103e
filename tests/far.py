"""A device that exists in name only: tensors say `far:0`, the arithmetic is done on the CPU.

    python tests/far.py "mae small3d" "segment 2d"      # two steps of the trainer on it; prints what happened as JSON

Most mistakes that only a GPU shows are mistakes about *where* a tensor is: a constant made on the CPU meets a batch on the device, a CPU generator is asked for numbers on the device, an index
lives on the wrong side. On this device they show on any machine, because it refuses what CUDA refuses. It also counts what a GPU pays for dearly: every moment at which the host waits for the
device (`.item()`, `.tolist()`, `nonzero`, a boolean index) and every copy across. And since the arithmetic is the CPU's, losses must equal those of a CPU run wherever the code draws on the CPU.

torch lets a backend be written in Python (`torch.utils.backend_registration`); it changes the process for good, so this file runs in a process of its own.
"""
import contextlib
import json
import sys
import traceback
from collections import Counter

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "far"
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount", "item", "allclose")
# what CUDA lets a CPU tensor do beside one on the device: copies, indices of an indexing; single numbers are let through below
MIXERS = ("copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_")


GENERATOR = torch.Generator


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, *_):
        return torch.empty(0)

    def set_rng_state(self, *_):
        pass


class WrongPlace(RuntimeError):
    "What a real device would have refused."


class FarGenerator(torch.Generator):
    "A generator of the device (the CPU's in disguise)."


class Far(torch.Tensor):
    "A tensor on the device; `held` has its values."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0))

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Far({self.held})"

    def tolist(self):
        LOG.syncs[f"tolist {site()}"] += 1
        return self.held.tolist()

    def numpy(self, **_):
        raise WrongPlace("numpy() of a tensor on the device")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return LOG.run(func, args, kwargs or {})


class Dice(TorchFunctionMode):
    "A generator must be where its numbers are wanted."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gen, to = kwargs.get("generator"), kwargs.get("device")
        if isinstance(gen, GENERATOR):
            here = torch.device(to).type == NAME if to is not None else any(isinstance(a, Far) for a in args)
            if isinstance(gen, FarGenerator) != here:
                raise WrongPlace(f"{func}: a generator of {'the CPU' if here else 'the device'} for numbers on {'the device' if here else 'the CPU'}")
        return func(*args, **kwargs)


class Log(TorchDispatchMode):
    "Runs every operation on the CPU, refuses what is in the wrong place, counts what is slow."

    def __init__(self):
        super().__init__()
        self.ops, self.syncs, self.up, self.down, self.doubles = Counter(), Counter(), Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func.__name__.split(".")[0]
        leaves = tree_leaves((args, kwargs))
        far = [x for x in leaves if isinstance(x, Far)]
        near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Far)]
        to = kwargs.get("device")
        here = bool(far) if to is None else torch.device(to).type == NAME
        self.check(func, name, far, near, here, args, kwargs)
        if to is not None and here:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        a, k = tree_map(lambda x: x.held if isinstance(x, Far) else x, (args, kwargs))
        out = func(*a, **k)
        back = {id(x.held): x for x in far}

        def wrap(o):
            if not isinstance(o, torch.Tensor):
                return o
            if id(o) in back:
                return back[id(o)]
            if here and o.dtype == torch.float64:
                self.doubles[site()] += 1
            return Far(o) if here else o

        return tree_map(wrap, out)

    def check(self, func, name, far, near, here, args, kwargs):
        if not far and not here:
            return
        self.ops[str(func)] += 1
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and not isinstance(args[0], Far):
            raise WrongPlace(f"{func}: a CPU tensor is indexed by one on the device")
        if far and name not in MIXERS and any(t.ndim for t in near):
            raise WrongPlace(f"{func}: {[tuple(t.shape) for t in near]} on the CPU meets {[tuple(t.shape) for t in far]} on the device")
        where = site()
        if name in SYNCS and far:
            self.syncs[f"{name} {where}"] += 1
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1])):
            self.syncs[f"boolean index {where}"] += 1
        if name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 2 and far:
            self.syncs[f"repeat_interleave {where}"] += 1
        if name in ("_to_copy", "copy_") and far and not here or name == "copy_" and not isinstance(args[0], Far):
            self.down[where] += 1
        elif name in ("_to_copy", "copy_", "index", "index_put_") and here and near:
            self.up[where] += 1


def site():
    "The line of the package that asked."
    for f in reversed(traceback.extract_stack(limit=60)):
        if "medssl_nb" in f.filename:
            return f"{f.filename.rsplit('/', 2)[-2]}/{f.filename.rsplit('/', 1)[-1]}: {f.line.strip()[:100]}"
    return "elsewhere"


LOG = Log()


def far_module(m):
    "Parameters and buffers on the device, in place."
    for sub in m.modules():
        for k, v in sub._parameters.items():
            if v is not None:
                sub._parameters[k] = nn.Parameter(Far(v.detach()), v.requires_grad)
        for k, v in sub._buffers.items():
            if v is not None:
                sub._buffers[k] = Far(v)
    return m


class Fabric:
    "As much of Lightning Fabric as the trainer uses, on the device that exists in name only."

    global_rank, world_size = 0, 1

    def __init__(self):
        self.device = torch.device(NAME, 0)

    def setup(self, model, opt):
        return model, opt

    def backward(self, loss):
        loss.backward()

    def clip_gradients(self, model, opt, max_norm, error_if_nonfinite):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


@contextlib.contextmanager
def pretend():
    "Generators and default devices for the device."

    def generator(device="cpu"):
        return FarGenerator() if torch.device(device).type == NAME else GENERATOR()

    torch.Generator = generator
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(.., device=)` is then seen as a copy
    try:
        yield
    finally:
        torch.Generator = GENERATOR
        torch._C._set_only_lift_cpu_tensors(False)


TASKS = ("mae small3d", "mae small2d", "pcrlv2 small3d", "pcrlv2 small2d", "brainmvp small2d", "taco small3d", "segment 3d", "segment 2d", "regions 3d", "classify 3d", "classify 2d", "linear 3d")


def make(name, preset):
    "A task and a batch as the loader yields it, padding and an absent channel included."
    from medssl_nb.core import generator
    from medssl_nb.nets.unet import UNetEncoder

    torch.manual_seed(0)
    dims = int(preset[-2])
    if name in ("segment", "regions", "linear", "classify"):
        from medssl_nb.tasks.supervised import Classify, ClassifyConfig, Segment, SegmentConfig

        enc = UNetEncoder(2, (8, 16, 32), dims)
        region = (16,) * dims
        if name == "classify":
            task = Classify(enc, ClassifyConfig(region=region, classes=3, weight=(1.0, 2.0, 3.0)))
        else:
            more = dict(regions=dict(values=(1, 2), regions=((1, 2), (2,))), linear=dict(values=(1, 2), decoder="linear", freeze=0.5), segment=dict(values=(1, 2)))[name]
            task = Segment(enc, SegmentConfig(region=region, **more))
    else:
        from dataclasses import replace

        from medssl_nb.tasks.registry import load_task, task_config

        cfg = task_config(name, preset)
        task = load_task(name, replace(cfg, sequences=("t1", "t2")) if hasattr(cfg, "sequences") else cfg)
    S, B, g = task.region, 4, generator(0, name="far")
    x = torch.rand(B, 2, *S, generator=g)
    present = torch.tensor([[True, True]] * (B - 1) + [[True, False]])
    valid = torch.tensor([[0] * dims, list(S)]).repeat(B, 1, 1)
    valid[0, 1, -1] -= 4
    x[0, ..., -4:] = 0
    x = x * present.view(B, 2, *[1] * dims)
    full = torch.tensor([list(S)] * B)
    return task, dict(image=x, present=present, start=torch.zeros_like(full), valid=valid, full=full, spacing=torch.ones(B, dims), case=[f"c-{i}" for i in range(B)],
                      label=torch.randint(0, 3, (B, 1, *S), generator=g), target=torch.tensor([0, 1, 2, 1]))


def step(name, preset, steps=2, **kw):
    "Steps of the trainer on the device, and what they cost."
    from medssl_nb.train.trainer import TrainConfig, Trainer

    task, batch = make(name, preset)
    cfg = TrainConfig(steps=10, batch=4, optimizer="adamw", clip=1.0, tensorboard=False, bar=False, **kw)
    fabric = Fabric()
    tr = Trainer(far_module(task), cfg, fabric)
    rows = [tr.train_step([batch])[0] for _ in range(steps - 1)]
    for c in (LOG.ops, LOG.syncs, LOG.up, LOG.down):
        c.clear()
    rows.append(tr.train_step([batch])[0])
    return rows


def no_mps_kernel(ops):
    "Operations without a kernel of their own for Apple's GPUs, by torch's own table."
    import pathlib

    import torchgen
    import yaml

    table = yaml.load((pathlib.Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(), yaml.CSafeLoader)
    known = {}
    for f in table:
        name = f["func"].split("(")[0]
        keys = ",".join(map(str, (f.get("dispatch") or {"CompositeImplicitAutograd": ""})))
        known[name] = any(k in keys for k in ("MPS", "Composite")) or bool(f.get("structured_delegate"))
        if f.get("structured_delegate"):
            known[name] = f["structured_delegate"]
    for n, v in known.items():
        if isinstance(v, str):
            known[n] = known.get(v, True) is True
    strip = [o.removeprefix("aten.").removesuffix(".default") for o in ops]
    return sorted({o for o in strip if known.get(o) is False})


def plain(name, preset, steps=2):
    "The same steps on the CPU."
    from medssl_nb.train.trainer import TrainConfig, Trainer, make_fabric

    task, batch = make(name, preset)
    fabric, cfg = make_fabric(TrainConfig(steps=10, batch=4, optimizer="adamw", clip=1.0, tensorboard=False, bar=False, device="cpu"))
    tr = Trainer(task, cfg, fabric)
    return [tr.train_step([batch])[0] for _ in range(steps)]


def report(what):
    "One task, in words and numbers."
    for c in (LOG.ops, LOG.syncs, LOG.up, LOG.down, LOG.doubles):
        c.clear()
    try:
        with pretend(), Dice(), LOG:
            rows = step(*what.split())
    except Exception as e:
        at = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.line}" for f in traceback.extract_tb(e.__traceback__) if "medssl_nb" in f.filename]
        return dict(error=f"{type(e).__name__}: {str(e).splitlines()[0]} at {at[-1] if at else '?'}")
    return dict(rows=rows, doubles=dict(LOG.doubles), syncs=dict(LOG.syncs), up=dict(LOG.up), down=dict(LOG.down), ops=sum(LOG.ops.values()), mps_missing=no_mps_kernel(LOG.ops))


def main(words):
    import lightning.fabric  # noqa: F401  # imported before generators are disguised

    if words[0] == "--damage":
        from medssl_nb.tasks.mae import MAE

        setattr(MAE, words[1], eval(words[2], dict(torch=torch, was=getattr(MAE, words[1]))))
        words = words[3:]
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    print(json.dumps({w: report(w) for w in words}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
