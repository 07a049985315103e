"""What the scripts here share: sides take turns and are clocked, a peak of memory is that of a process of its own, and a result says where it was measured.

Only the standard library is imported at first: threads are set before torch is there, and a process whose memory is watched holds nothing that it does not need.
"""
import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIVE_BACK = dict(MALLOC_MMAP_THRESHOLD_="262144")  # freed blocks go back at once, so that a peak is what was needed and not what the allocator kept


# Time. Neighbours on a shared machine slow whoever is at work, so sides take turns; processor time feels them less than the clock does.
def clocked(f, *args):
    "`(seconds on the clock, of the processor, what f returned)`"
    wall, cpu = time.perf_counter(), time.process_time()
    out = f(*args)
    return time.perf_counter() - wall, time.process_time() - cpu, out


def turns(ways, rounds, warm=1, feed=lambda i: ()):
    "Each way once in every round: name -> `[(wall, cpu)]` of the rounds behind the first `warm`. `feed(i)`: what all are given in round `i`, made off the clock."
    out = {k: [] for k in ways}
    for i in range(-warm, rounds):
        given = feed(i)
        for k, f in ways.items():
            took = clocked(f, *given)[:2]  # what it returned is let go
            if i >= 0:
                out[k].append(took)
    return out


# Memory.
def status(key):
    "A line of /proc/self/status, bytes: VmRSS is resident memory now, RssAnon that without pages of files, VmHWM its peak (Linux only)."
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))


@contextmanager
def watched(out):
    "Into `out`: `cpu` and `clock`, seconds, and `extra`, bytes at the peak above what the process held before: imports are no part of it."
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base, cpu, wall = status("VmRSS"), time.process_time(), time.perf_counter()
    yield
    out.update(cpu=round(time.process_time() - cpu, 3), clock=round(time.perf_counter() - wall, 3), extra=status("VmHWM") - base)


class Peak:
    "MiB above what this process (on a GPU: torch) held when it was made."

    def __init__(self, device="cpu"):
        self.gpu = device != "cpu"
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.torch = torch
        self.before = torch.cuda.memory_allocated() if self.gpu else status("VmRSS")

    def __call__(self):
        return ((self.torch.cuda.max_memory_allocated() if self.gpu else status("VmHWM")) - self.before) / 2**20


def child(file, *args, **env):
    "What the script prints last, as JSON, when it is run with `args` in a process of its own."
    r = subprocess.run([sys.executable, file, *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})
    if r.returncode:
        raise SystemExit(f"{' '.join(map(str, args))}: exit {r.returncode} (-9: out of memory)\n{r.stderr}")
    return json.loads(r.stdout.splitlines()[-1])


def command(doc, main, measure, sizes, **more):
    "Command line of a script whose points are children: `--measure WORD ...` prints that of `measure`, everything else is for `main`."
    ap = argparse.ArgumentParser(description=doc.splitlines()[0])
    ap.add_argument("--sizes", type=int, nargs="+", default=sizes)
    ap.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    for name, how in more.items():
        ap.add_argument("--" + name, **how)
    a = vars(ap.parse_args())
    if words := a.pop("measure"):
        print(json.dumps(measure(*words)))
    else:
        main(**a)


# What a result says of the machine, and where it is kept.
def cpuinfo(key):
    "The first such line of /proc/cpuinfo, or nothing."
    try:
        return next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith(key)), "")
    except OSError:
        return ""


FACTS = dict(
    machine=platform.machine, cpu=lambda: platform.processor() or platform.machine(), model=lambda: cpuinfo("model name"), cpus=os.cpu_count, cores=os.cpu_count, python=platform.python_version,
    load=lambda: round(os.getloadavg()[0], 2), threads=lambda: sys.modules["torch"].get_num_threads(), torch=lambda: str(sys.modules["torch"].__version__),
)


def facts(*names):
    return {n: FACTS[n]() for n in names}


def versions(*packages, **named):
    "Those that are installed; `sklearn='scikit-learn'` where the name of the distribution is another."
    out = {}
    for k, p in {**{p: p for p in packages}, **named}.items():
        try:
            out[k] = version(p)
        except PackageNotFoundError:
            pass
    return out


def save(path, row):
    Path(path).write_text(json.dumps(row, indent=1) + "\n")


# A training step, literal against ours: brainmvp_step.py, pcrlv2_step.py, taco_step.py, vit_step.py.
def step_settings(doc, file, parts, steps, choices=None, **more):
    "The settings, read before torch is there, because it takes its threads when it comes. A child is given the words of its parent and its own behind them."
    ap = argparse.ArgumentParser(description=doc.splitlines()[0])
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--steps", type=int, default=steps, help="timed steps of each form, after those that are not")
    ap.add_argument("--parts", nargs="*", default=list(parts), choices=choices)
    ap.add_argument("--out", default=str(Path(file).with_suffix(".json")))
    ap.add_argument("--child", help=argparse.SUPPRESS)
    ap.add_argument("--form", default="", help=argparse.SUPPRESS)
    for name, how in more.items():
        ap.add_argument("--" + name, **how)
    a = ap.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    torch.set_num_threads(a.threads)
    return a


def step_clock(a):
    "`(sync, clock)`: seconds of the processor where one thread works, else seconds on the wall behind a wait for the device."
    import torch

    return (lambda: None) if a.device == "cpu" else torch.cuda.synchronize, time.process_time if a.device == "cpu" and a.threads == 1 else time.perf_counter


def step_turns(made, feed, a, warm=1):
    "Forms take turns step by step on the same `feed(i)`; `made`: name -> `(run, optimiser)`, where `run` gives a loss, or `(loss, what must live until its backward pass is done)`. Name -> seconds `(forward, backward, update)` of the timed steps, name -> losses of all."
    where, losses = {k: [] for k in made}, {k: [] for k in made}
    sync, clock = step_clock(a)
    for i in range(warm + a.steps):
        given = feed(i)
        for k, (run, opt) in made.items():
            sync(); t0 = clock(); out = run(*given); sync(); t1 = clock()
            loss = out[0] if isinstance(out, tuple) else out; loss.backward(); del out; sync(); t2 = clock(); opt.step(); opt.zero_grad(set_to_none=True); sync(); t3 = clock()
            losses[k].append(round(loss.item(), 5))
            if i >= warm:
                where[k].append((t1 - t0, t2 - t1, t3 - t2))
    return where, losses


def step_means(where):
    mean = {k: [sum(c) / len(c) for c in zip(*v)] for k, v in where.items()}
    return dict(seconds={k: round(sum(m), 3) for k, m in mean.items()}, ratio=round(sum(mean["ours"]) / sum(mean["literal"]), 3), forward_backward_update={k: [round(x, 3) for x in m] for k, m in mean.items()})


def step_child(file, part, form="", *words):
    return child(file, *sys.argv[1:], "--child", part, "--form", form, *words, **(GIVE_BACK if form else {}))


def step_peaks(file, part, *words):
    m = {f: step_child(file, part, f, *words) for f in ("literal", "ours")}
    return dict(peak_mib={k: round(v) for k, v in m.items()}, ratio=round(m["ours"] / m["literal"], 3))


class StepRecord:
    "The JSON beside a script, by device; written after each part, so what is there from another day stays."

    def __init__(self, a):
        import torch

        self.path = Path(a.out)
        self.all = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.here = self.all.setdefault(a.device, {})
        self.here["machine"] = dict(**facts("cpu", "model"), gpu=torch.cuda.get_device_name() if a.device != "cpu" else None, threads=a.threads, **facts("torch", "python"))

    def put(self, name, row, *under):
        here = self.here
        for k in under:
            here = here.setdefault(k, {})
        here[name] = row
        print(*under, name, json.dumps(row), flush=True)
        save(self.path, self.all)
