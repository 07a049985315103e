"""Views of a PCRLv2-3D batch: ours, batched, against the same views made case by case with TorchIO and with MONAI.

    python benchmarks/views.py                     # CPU, one thread; writes benchmarks/views.json
    python benchmarks/views.py --device cuda       # ours on the device, the case-by-case ones still on the CPU

A view: 2 global crops (of sizes as in the specification, resized to 32x64x64) and 6 local ones (to 16x16x16) of each volume; anti-aliased resizing, flip, affine,
then blur, noise, gamma, for global crops block swap (100 iterations), z-score. The boxes are the same for all competitors. MONAI has no block swap, so it is left out there (that
favours MONAI), and it interpolates twice (resize, then affine) where ours does once. Each competitor is run once to warm up, then in turn, `--repeats` times, each time on newly drawn boxes, the same for all.
The verdict is the median over repeats of the paired ratio, in CPU seconds of the process where one thread works (a busy machine disturbs those less), in wall seconds on a GPU. Goal (DESIGN 6): <= 0.5 on a CPU, <= 0.2 on a GPU.
"""
import argparse
import json
import os
import statistics
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from measure import clocked, cpuinfo, facts, save, turns, versions  # noqa: E402
from medssl_nb.core import generator  # noqa: E402
from medssl_nb.data import crops as K  # noqa: E402
from medssl_nb.data import transforms as T  # noqa: E402

GLOBAL = [(64, 96, 96), (96, 96, 96), (64, 112, 112), (32, 64, 64)]  # (d, h, w) voxels, PCRLv2 specification 2.2
LOCAL = [(16, 32, 32), (16, 16, 16), (32, 32, 32), (8, 8, 8)]
BIG, SMALL = (32, 64, 64), (16, 16, 16)


def volumes(n, shape, gen):
    "Smooth random volumes in [0, 1]: what is in them does not matter for time, but SimpleITK should not see constants."
    v = torch.rand(n, 1, *[s // 8 for s in shape], generator=gen)
    return torch.nn.functional.interpolate(v, shape, mode="trilinear")


def draw_boxes(n, shape, gen):
    valid = torch.tensor([[[0, 0, 0], list(shape)]]).repeat(n, 1, 1)
    pair = K.draw_pair(valid, GLOBAL, gen)
    return pair, K.draw_local(K.enclosing(pair), 6, LOCAL, gen)


def ours(x, shape, gen):
    "Everything, the drawing included."
    n = len(x)
    pair, local = draw_boxes(n, shape, gen)
    out = []
    for boxes, size, swap in ((pair, BIG, True), (local, SMALL, False)):
        k = n * boxes.shape[1]
        v = K.sample_boxes(x, boxes, size, T.draw_affine(k, 3, gen)).flatten(0, 1)
        target = v
        v = T.apply_blur(v, T.draw_blur(k, 3, gen))
        v = T.apply_noise(v, T.draw_noise(k, gen))
        v = T.apply_gamma(v, T.draw_gamma(k, gen))
        if swap:
            v = T.apply_block_swap(v, T.draw_block_swap(k, size, gen))
        out.append((T.zscore(v), target))
    return out


def slices(box):
    return tuple(slice(int(a), int(b)) for a, b in box.T)


def with_torchio(antialias):
    import torchio as tio

    geometry = tio.Compose([tio.RandomFlip(axes=(2,), flip_probability=0.5), tio.RandomAffine(scales=0.1, degrees=10, default_pad_value=0)])
    light = [tio.RandomBlur(std=(0, 2)), tio.RandomNoise(mean=0, std=(0, 0.25)), tio.RandomGamma(log_gamma=(-0.3, 0.3))]
    corrupt = {
        True: tio.Compose([*light, tio.RandomSwap(patch_size=(4, 4, 8), num_iterations=100), tio.ZNormalization()]),
        False: tio.Compose([*light, tio.ZNormalization()]),
    }
    import monai.transforms as M

    shrink = {s: M.Resize(s, mode="trilinear", anti_aliasing=antialias) for s in (BIG, SMALL)}  # TorchIO's own Resize is a resampling by SimpleITK, which is slower

    def run(x, pair, local):
        out = []
        for boxes, size, swap in ((pair, BIG, True), (local, SMALL, False)):
            for b in range(len(x)):
                for box in boxes[b]:
                    v = shrink[size](x[(b, slice(None), *slices(box))])
                    s = tio.Subject(im=tio.ScalarImage(tensor=torch.as_tensor(v)))
                    s = geometry(s)
                    target = s["im"].data.clone()
                    out.append((corrupt[swap](s)["im"].data, target))
        return out

    return run


def with_monai(antialias):
    import math

    import monai.transforms as M

    r = math.radians(10)
    geometry = M.Compose([M.RandFlip(0.5, 2), M.RandAffine(1.0, rotate_range=(r,) * 3, scale_range=(0.1,) * 3, mode="bilinear", padding_mode="zeros")])
    light = M.Compose(
        [
            M.RandGaussianSmooth((0.05, 2), (0.05, 2), (0.05, 2), prob=1.0),
            M.RandGaussianNoise(1.0, 0.0, 0.25),
            M.RandAdjustContrast(1.0, (math.exp(-0.3), math.exp(0.3))),
            M.NormalizeIntensity(),
        ]
    )
    shrink = {s: M.Resize(s, mode="trilinear", anti_aliasing=antialias) for s in (BIG, SMALL)}

    def run(x, pair, local):
        out = []
        for boxes, size in ((pair, BIG), (local, SMALL)):
            for b in range(len(x)):
                for box in boxes[b]:
                    v = geometry(shrink[size](x[(b, slice(None), *slices(box))]))
                    out.append((light(v.clone()), v))
        return out

    return run


def parts(x, shape, gen, sync):
    "Where our time goes, for the global crops: seconds for each step."
    n = len(x)
    rows = {}

    def clock(name, f):
        sync()
        wall, _, (r, _) = clocked(lambda: (f(), sync()))
        rows[name] = round(wall, 5)
        return r

    pair, local = clock("draw boxes", lambda: draw_boxes(n, shape, gen))
    k = 2 * n
    v = clock("crop, resize, affine", lambda: K.sample_boxes(x, pair, BIG, T.draw_affine(k, 3, gen)).flatten(0, 1))
    v = clock("blur", lambda: T.apply_blur(v, T.draw_blur(k, 3, gen)))
    v = clock("noise", lambda: T.apply_noise(v, T.draw_noise(k, gen)))
    v = clock("gamma", lambda: T.apply_gamma(v, T.draw_gamma(k, gen)))
    v = clock("block swap", lambda: T.apply_block_swap(v, T.draw_block_swap(k, BIG, gen)))
    clock("z-score", lambda: T.zscore(v))
    clock("local: crop, resize, affine", lambda: K.sample_boxes(x, local, SMALL, T.draw_affine(6 * n, 3, gen)))
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default="cpu", help="where our views are made")
    ap.add_argument("--batch", type=int, default=4, help="volumes")
    ap.add_argument("--shape", type=int, nargs=3, default=(160, 192, 192), help="voxels of a region, d h w")
    ap.add_argument("--repeats", type=int, default=9)
    ap.add_argument("--out", default=None, help="JSON file; default views.json (views.DEVICE.json on another device) beside this script")
    a = ap.parse_args()
    torch.set_num_threads(1)
    shape = tuple(a.shape)
    x = volumes(a.batch, shape, generator(0, name="benchmark"))
    xd = x.to(a.device)
    sync = torch.cuda.synchronize if a.device.startswith("cuda") else (lambda: None)
    load = os.getloadavg()[0]

    def run_ours(i, pair, local):
        ours(xd, shape, generator(0, i, 0, "views"))  # draws the same boxes for itself
        sync()

    runs = {"ours, batched": run_ours}
    for name, make in (("TorchIO", with_torchio), ("MONAI, no block swap", with_monai)):
        try:
            for anti in (True, False):
                f = make(anti)
                runs[f"{name}, {'anti-aliased' if anti else 'resized without a filter'}"] = lambda i, pair, local, f=f: f(x, pair, local)
        except ImportError as e:
            print(f"{name} is not installed ({e}): left out")
    took = turns(runs, a.repeats, feed=lambda i: (i + 1, *draw_boxes(a.batch, shape, generator(0, i + 1, 0, "views"))))
    seconds, cpu = ({k: [t[n] for t in v] for k, v in took.items()} for n in (0, 1))
    med = {k: statistics.median(v) for k, v in seconds.items()}
    paired = {k: [round(o / t, 3) for o, t in zip((cpu if a.device == "cpu" else seconds)["ours, batched"], v)] for k, v in (cpu if a.device == "cpu" else seconds).items() if k != "ours, batched"}
    row = dict(
        goal=dict(cpu=0.5, gpu=0.2),
        device=a.device if a.device == "cpu" else torch.cuda.get_device_name(),
        **facts("machine"),
        processor=cpuinfo("model name"),
        **facts("threads", "python"),
        versions=versions("torch", "torchio", "monai", "simpleitk", "scipy"),
        batch=a.batch,
        region=shape,
        crops=f"2 x {BIG} + 6 x {SMALL} for each volume",
        repeats=a.repeats,
        seconds={k: dict(median=round(v, 4), min=round(min(seconds[k]), 4), max=round(max(seconds[k]), 4)) for k, v in med.items()},
        cpu_seconds={k: round(statistics.median(v), 4) for k, v in cpu.items()},
        ratio={k: round(statistics.median(v), 3) for k, v in paired.items()},
        ratio_of_each_repeat=paired,
        load_average=dict(before=round(load, 1), after=round(os.getloadavg()[0], 1)),
        parts=parts(xd, shape, generator(0, 1, 0, "views"), sync),
    )
    out = Path(a.out) if a.out else Path(__file__).parent / ("views.json" if a.device == "cpu" else f"views.{a.device.split(':')[0]}.json")
    save(out, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
