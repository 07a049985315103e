"""What each switch of the trainer costs or saves: memory layout, 16 bits, torch.compile, fused optimisers, fused attention.

    python benchmarks/switches.py            # writes benchmarks/switches.json; about half an hour on one core (--no-compile: six minutes)
    python benchmarks/switches.py --only swin uniformer   # these rows alone, anew, in the file that is there

Every variant of a step (forward, losses, backward; views are made before) runs once in each round, so that a slow moment of the machine hits all of them; processor time of this process, median over
rounds, as a ratio to plain float32 in the memory layout that PyTorch gives by default. Beside each time stands what the switch changes: relative difference of the loss, and the angle between
gradients (cosine over all weights), both against float32. Only a CPU was at hand; `device` in the JSON says which.
"""
import argparse
import copy
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile in this process, so that its time counts here

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from measure import clocked, cpuinfo, facts, save, turns  # noqa: E402
from medssl_nb.core import generator  # noqa: E402
from medssl_nb.nets.narrow import exact_kernels  # noqa: E402
from medssl_nb.nets.nnunet import PlainEncoder, ResEncEncoder  # noqa: E402
from medssl_nb.nets.swin3d import SwinEncoder  # noqa: E402
from medssl_nb.nets.unet import ResNetEncoder, UNetEncoder  # noqa: E402
from medssl_nb.nets.uniformer3d import UniFormerEncoder  # noqa: E402
from medssl_nb.tasks.registry import load_task, task_config  # noqa: E402

HERE = Path(__file__).parent


def layout(x):
    if isinstance(x, list):
        return [layout(v) for v in x]
    if not torch.is_tensor(x) or x.ndim not in (4, 5):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Alone(nn.Module):
    "An encoder with a loss that wants something of every feature."

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, v):
        return dict(feats=self.encoder(v["x"]))

    def losses(self, out, v):
        return dict(mean=sum(f.float().square().mean() for f in out["feats"]))


def encoders():
    x = lambda *s: dict(x=torch.rand(*s, generator=generator(0)))
    return {
        "unet 3-D, 16 to 128, 2x1x32x64x64": (Alone(UNetEncoder(1, (16, 32, 64, 128))), x(2, 1, 32, 64, 64)),
        "unet 2-D, 16 to 128, 8x1x128x128": (Alone(UNetEncoder(1, (16, 32, 64, 128), 2)), x(8, 1, 128, 128)),
        "resnet18 2-D, 4x3x128x128": (Alone(ResNetEncoder(3)), x(4, 3, 128, 128)),
        "uniformer 3-D, UniFormer-S, 1x1x64x64x64": (Alone(UniFormerEncoder(1)), x(1, 1, 64, 64, 64)),
        "swin 3-D, width 48, 1x1x64x64x64": (Alone(SwinEncoder(1)), x(1, 1, 64, 64, 64)),
        "plain 3-D, nnU-Net, 32 to 320, 1x1x64x64x64": (Alone(PlainEncoder(1)), x(1, 1, 64, 64, 64)),
        "resenc 3-D, nnU-Net, 32 to 320, 1x1x64x64x64": (Alone(ResEncEncoder(1)), x(1, 1, 64, 64, 64)),
    }


def tasks():
    out = {}
    for name, preset, B in (("mae", "small3d", 4), ("mae", "small2d", 8), ("pcrlv2", "small3d", 4), ("pcrlv2", "small2d", 8)):
        task = load_task(name, task_config(name, preset))
        S = task.region
        x = torch.rand(B, 1, *S, generator=generator(1))
        full = torch.tensor([list(S)] * B)
        batch = dict(image=x, present=torch.ones(B, 1).bool(), start=torch.zeros_like(full), valid=torch.stack([torch.zeros_like(full), full], 1), full=full, spacing=torch.ones(B, len(S)),
                     case=[f"c-{i}" for i in range(B)], subject=[f"s-{i}" for i in range(B)], progress=0.0, step=0)
        out[f"{name} {preset}, batch {B}, region {'x'.join(map(str, S))}"] = (task, task.views(batch, generator(0, 0, 0, "views")))
    return out


class Variant:
    def __init__(self, task, views, bits=32, last=False, compiled=False):
        self.task, self.bits, self.times = copy.deepcopy(task).train(), bits, []
        if bits == 16:
            exact_kernels(self.task)  # as the trainer does
        if last:
            for p in self.task.parameters():
                p.data = layout(p.data)
            views = {k: layout(v) for k, v in views.items()}
        self.views, self.run = views, torch.compile(self.task) if compiled else self.task

    def step(self):
        for p in self.task.parameters():
            p.grad = None
        _, cpu, loss = clocked(self.learn)
        self.times.append(cpu)
        return loss.item(), torch.cat([p.grad.flatten().double() for p in self.task.parameters() if p.grad is not None])

    def learn(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bits == 16):
            out = self.run(self.views)
        wide = lambda v: v.float() if torch.is_tensor(v) and v.is_floating_point() else type(v)(map(wide, v)) if isinstance(v, (list, tuple)) else {k: wide(x) for k, x in v.items()} if isinstance(v, dict) else v
        loss = sum(self.task.losses(wide(out), self.views).values())
        loss.backward()
        return loss


def measure(task, views, rounds, compiled):
    kinds = {"float32": {}, "float32 channels_last": dict(last=True), "bf16": dict(bits=16), "bf16 channels_last": dict(bits=16, last=True)}
    if compiled:
        kinds = {"float32": {}, "float32 compile": dict(compiled=True), "bf16 channels_last compile": dict(bits=16, last=True, compiled=True)}
    made, first, out = {}, {}, {}
    for k, kw in kinds.items():
        torch.manual_seed(0)
        try:
            v = Variant(task, views, **kw)
            _, cpu, got = clocked(v.step)
            first[k] = (*got, cpu)
            made[k] = v
            v.times.clear()
        except Exception as e:  # a switch that does not work here is a result, too
            out[k] = dict(error=f"{type(e).__name__}: {str(e).splitlines()[0][:120]}")
    for _ in range(rounds):
        for v in made.values():
            v.step()
    base, (l0, g0, _) = statistics.median(made["float32"].times), first["float32"]
    for k, v in made.items():
        loss, g, once = first[k]
        out[k] = dict(cpu_s=round(statistics.median(v.times), 4), ratio=round(statistics.median(v.times) / base, 3), first_step_s=round(once, 2), loss_difference=float(f"{abs(loss - l0) / abs(l0):.2g}"),
                      gradient_cosine=round(F.cosine_similarity(g, g0, dim=0).item(), 6))
    return out


def cpu_medians(ways, rounds):
    return {k: statistics.median(cpu for _, cpu in v) for k, v in turns(ways, rounds - 1).items()}  # the first of the rounds warms up


def optimisers(rounds):
    "One step over the seven million weights of PCRLv2's 3-D encoder."
    def net():
        torch.manual_seed(0)
        m = UNetEncoder(1, (64, 128, 256, 512))
        for p in m.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        return m

    out = {}
    for name, cls, kw in (("adamw", torch.optim.AdamW, dict(lr=1e-3, weight_decay=0.01)), ("sgd", torch.optim.SGD, dict(lr=1e-3, momentum=0.9, weight_decay=1e-4))):
        nets = {k: net() for k in ("loop", "foreach", "fused")}
        opts = {k: cls(m.parameters(), **kw, **(dict(foreach=False) if k == "loop" else {k: True})) for k, m in nets.items()}
        med = cpu_medians({k: o.step for k, o in opts.items()}, rounds)
        vec = {k: nn.utils.parameters_to_vector(m.parameters()).detach() for k, m in nets.items()}
        out[name] = {k: dict(cpu_s=round(med[k], 4), ratio=round(med[k] / med["loop"], 3), largest_difference=float(f"{(vec[k] - vec['loop']).abs().max().item():.2g}")) for k in nets}
    return dict(parameters=sum(p.numel() for p in net().parameters()), steps=rounds, results=out)


def attention(rounds):
    "Scaled dot products by PyTorch's own function against softmax(q k) v written out: forward and backward."
    out = {}
    for B, H, N, d in ((2, 6, 512, 32), (2, 12, 1728, 64)):
        q, k, v = (torch.randn(B, H, N, d, generator=generator(0, i)).requires_grad_() for i in range(3))
        by_hand = lambda: (q @ k.transpose(-1, -2) / d**0.5).softmax(-1) @ v
        own = lambda: F.scaled_dot_product_attention(q, k, v)
        a, b = cpu_medians({n: lambda fn=fn: fn().square().mean().backward() for n, fn in (("written_out", by_hand), ("fused", own))}, rounds).values()
        out[f"batch {B}, heads {H}, tokens {N}, width {d}"] = dict(written_out_cpu_s=round(a, 4), fused_cpu_s=round(b, 4), ratio=round(b / a, 3), largest_difference=float(f"{(by_hand() - own()).abs().max().item():.2g}"))
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--rounds", type=int, default=7)
    a.add_argument("--no-compile", action="store_true")
    a.add_argument("--only", nargs="*", default=None, help="beginnings of names of networks; the other rows stay as they are")
    a.add_argument("--out", type=Path, default=HERE / "switches.json")
    a = a.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(cpuinfo("flags").split()))
    here = dict(device="cpu", **facts("machine"), processor=processor, **facts("threads", "cpus", "torch"), rounds=a.rounds, **facts("load"))
    if a.only is None:
        row = dict(here, optimiser=optimisers(9), attention=attention(a.rounds), steps={})
    else:
        row = json.loads(a.out.read_text())
        if (row["torch"], row["processor"]) != (here["torch"], here["processor"]):
            raise SystemExit(f"{a.out} is of torch {row['torch']} on {row['processor']}; here {here['torch']} on {here['processor']}: run it whole")
    wanted = {k: v for k, v in {**encoders(), **tasks()}.items() if a.only is None or k.startswith(tuple(a.only))}
    for name, (task, views) in wanted.items():
        got = measure(task, views, a.rounds, False)
        if not a.no_compile:
            more = measure(task, views, a.rounds, True)  # against a float32 of its own, which took turns with it
            got.update({k: v for k, v in more.items() if k != "float32"})
            torch._dynamo.reset()
        if a.only is not None:
            got["load"] = here["load"]
        row["steps"][name] = got
        save(a.out, row)
        print(name, {k: v.get("ratio", v.get("error")) for k, v in got.items() if isinstance(v, dict)}, flush=True)


if __name__ == "__main__":
    main()
