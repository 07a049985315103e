"""A BrainMVP training step at 96^3 against a literal reading of the form the authors published, as the specification describes it.

    python benchmarks/brainmvp_step.py                     # CPU, one thread; writes benchmarks/brainmvp_step.json
    python benchmarks/brainmvp_step.py --device cuda --cases 3
    python benchmarks/brainmvp_step.py --parts time --steps 1

`Literal` is written from the specification alone: two branches, one after the other; masks drawn case by case in a Python loop over blocks;
templates min-max normalised over their whole volume in the graph, with a dense gradient and a dense AdamW; attention that writes its
table; depthwise convolutions with the library's own gradient; the decoder's chain of transposed convolutions at full resolution. Ours is
the default configuration. Both run the full UniFormer-S (22.0 million parameters) with eight templates of 155x240x240 in AdamW; the
networks hold the same weights. Steps alternate, and the ratio uses CPU seconds of the process where one thread works. Peak memory is that
of a process of its own, above what it held before the first step, the optimiser's state included. `forward_backward_update` says where the time goes. (The first losses are of two draws of noise and need not agree; that the pieces compute the same is asserted in nbs/21_nets.uniformer3d.ipynb.)
"""
import argparse, copy, json, os, platform, subprocess, sys, time
from pathlib import Path

ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
ap.add_argument('--device', default='cpu')
ap.add_argument('--threads', type=int, default=1)
ap.add_argument('--cases', type=int, default=1, help='per step; 3 in the paper')
ap.add_argument('--steps', type=int, default=2, help='timed steps of each form, after one that is not')
ap.add_argument('--parts', nargs='*', default=['time', 'memory'])
ap.add_argument('--out', default=str(Path(__file__).with_suffix('.json')))
ap.add_argument('--child', help=argparse.SUPPRESS)
ap.add_argument('--form', help=argparse.SUPPRESS)
a = ap.parse_args()
os.environ['OMP_NUM_THREADS'] = str(a.threads)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warnings; warnings.simplefilter('ignore')
import torch
import torch.nn.functional as F
from torch import nn
torch.set_num_threads(a.threads)
from medssl_nb.core import generator
from medssl_nb.nets.uniformer3d import Attention, Depthwise
from medssl_nb.tasks.brainmvp import BrainMVP, BrainMVPConfig, minmax
from medssl_nb.train.trainer import TrainConfig, make_optimizer

CFG = BrainMVPConfig()
SIDE,BLOCK = CFG.region[0],CFG.block

class Table(nn.Module):
    "Attention with its table of all pairs."
    def __init__(self, a): super().__init__(); self.a = a
    def forward(self, t):
        a,(B,N,C) = self.a,t.shape
        q,k,v = a.qkv(t).view(B, N, 3, a.heads, C//a.heads).permute(2, 0, 3, 1, 4)
        return a.out(((q@k.transpose(-2, -1)*(C//a.heads)**-.5).softmax(-1)@v).transpose(1, 2).reshape(B, N, C))

def plain(module):
    "The same network from the library's own layers."
    for n,m in list(module.named_children()):
        if isinstance(m, Depthwise):
            c = nn.Conv3d(m.weight.shape[0], m.weight.shape[0], m.weight.shape[2:], padding=m.weight.shape[2]//2, groups=m.weight.shape[0])
            c.weight,c.bias = m.weight,m.bias; setattr(module, n, c)
        elif isinstance(m, Attention): setattr(module, n, Table(m))
        else: plain(m)
    return module

class Literal(nn.Module):
    "Sections 2.3, 3 and 4 of the specification, as they stand."
    def __init__(self, task):
        super().__init__()
        self.encoder,self.decoder = plain(copy.deepcopy(task.encoder)),copy.deepcopy(task.decoder); self.decoder.merge = False
        self.templates = nn.Parameter(task.templates.raw.detach().clone())
    def mask(self, n, gen):
        out = torch.ones(n, 1, SIDE, SIDE, SIDE); g = SIDE//BLOCK
        for i in range(n):
            for b in torch.randperm(g**3, generator=gen)[int(g**3*(1-CFG.ratio)):].tolist():
                z,y,x = b//g**2*BLOCK,b//g % g*BLOCK,b % g*BLOCK
                out[i, :, z:z+BLOCK, y:y+BLOCK, x:x+BLOCK] = 0
        return out.to(a.device)
    def forward(self, batch, gen):
        x = batch['image']; n = len(x); t,p = torch.randperm(4, generator=gen)[:2].tolist()   # one slot for the batch, another sequence
        X,Y = x[:,t:t+1],x[:,p:p+1]
        whole = minmax(self.templates[t]); R = self.templates.shape[1:]
        start = batch['start'] + (torch.tensor(R) - batch['full'])//2
        crop = torch.stack([whole[s[0]:s[0]+SIDE, s[1]:s[1]+SIDE, s[2]:s[2]+SIDE] for s in start.tolist()])[:,None]
        m1,m2 = self.mask(n, gen),self.mask(n, gen)
        codes,loss = [],0.
        for filled in (m1*X + (1-m1)*Y, m2*X + (1-m2)*crop):                                  # two branches
            z = self.encoder(filled)[-1]; codes.append(F.normalize(z.flatten(1), dim=1))
            loss = loss + F.mse_loss(self.decoder(z), X)
        f,g = codes; me = torch.arange(n, device=f.device)
        return loss + .5*(F.cross_entropy(f@g.T, me) + F.cross_entropy(g@f.T, me))

def make(form):
    "`(step, optimiser)` of a form, both from the same first weights."
    torch.manual_seed(0); task = BrainMVP(CFG)
    task.templates.weight.data.uniform_(0, 1, generator=generator(0, 0, 0, 'templates'))      # not zero: the first parity gradient is 1e9 times too large there
    if form == 'literal':
        task = Literal(task).to(a.device); opt = torch.optim.AdamW(task.parameters(), 3e-4, weight_decay=1e-5)
        return (lambda b, g: task(b, g)),opt
    task.to(a.device); opt = make_optimizer(task, TrainConfig(lr=3e-4, weight_decay=1e-5))
    def run(b, g): v = task.views(b, g); return sum(task.losses(task(v), v).values())
    return run,opt

def batch(step):
    g = generator(0, step, 0, 'bench'); x = torch.rand(a.cases, 8, SIDE, SIDE, SIDE, generator=g); p = torch.zeros(a.cases, 8).bool(); p[:,:4] = True
    x[:,4:] = 0
    return dict(image=x.to(a.device), present=p, start=torch.tensor([[20,70,60]]*a.cases), full=torch.tensor([[150,200,170]]*a.cases), case=['c']*a.cases, progress=.9)

def sync():
    if a.device != 'cpu': torch.cuda.synchronize()
clock = time.process_time if a.device == 'cpu' and a.threads == 1 else time.perf_counter

def timing():
    made = {k: make(k) for k in ('literal','ours')}; t = {k: [] for k in made}; where = {k: [] for k in made}; losses = {}
    for i in range(a.steps + 1):
        b = batch(i)
        for k,(run,opt) in made.items():
            sync(); t0 = clock(); loss = run(b, generator(0, i)); sync(); t1 = clock()
            loss.backward(); sync(); t2 = clock(); opt.step(); opt.zero_grad(set_to_none=True); sync(); t3 = clock()
            losses.setdefault(k, round(loss.item(), 5))
            if i: t[k].append(t3-t0); where[k].append((t1-t0, t2-t1, t3-t2))
    mean = {k: sum(v)/len(v) for k,v in t.items()}
    return dict(size=list(CFG.region), cases=a.cases, steps=a.steps, seconds={k: round(v, 3) for k,v in mean.items()}, ratio=round(mean['ours']/mean['literal'], 3),
        forward_backward_update={k: [round(sum(c)/len(c), 3) for c in zip(*v)] for k,v in where.items()}, first_loss=losses)

def rss(key): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(key))

def memory(form):
    "Peak of two steps, MiB, above the process before the task was made."
    before = rss('VmRSS')
    run,opt = make(form)
    if a.device != 'cpu': torch.cuda.reset_peak_memory_stats()
    for i in range(2): loss = run(batch(i), generator(0, i)); loss.backward(); opt.step(); opt.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()/2**20 if a.device != 'cpu' else rss('VmHWM') - before

def child(part, form=''):
    cmd = [sys.executable, __file__, '--child', part, '--form', form, '--device', a.device, '--threads', str(a.threads), '--cases', str(a.cases), '--steps', str(a.steps)]
    # give freed blocks back at once, so that the peak is what was needed and not what the allocator kept
    r = subprocess.run(cmd, capture_output=True, text=True, env=os.environ | (dict(MALLOC_MMAP_THRESHOLD_='262144') if form else {}))
    if r.returncode: raise SystemExit(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])

if a.child: print(json.dumps(memory(a.form) if a.form else timing()))
else:
    out = Path(a.out); res = json.loads(out.read_text()) if out.exists() else {}
    here = res.setdefault(a.device, {})
    here['machine'] = dict(cpu=platform.processor() or platform.machine(), model=next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), ''),
        gpu=torch.cuda.get_device_name() if a.device != 'cpu' else None, threads=a.threads, torch=torch.__version__, python=platform.python_version())
    for part in a.parts:
        if part == 'memory':
            m = {f: child('memory', f) for f in ('literal','ours')}
            here[part] = dict(size=list(CFG.region), cases=a.cases, peak_mib={k: round(v) for k,v in m.items()}, ratio=round(m['ours']/m['literal'], 3))
        else: here[part] = child(part)
        print(part, json.dumps(here[part]), flush=True)
        out.write_text(json.dumps(res, indent=1) + '\n')
