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
import copy, json
from measure import Peak, StepRecord, step_child, step_means, step_peaks, step_settings, step_turns

a = step_settings(__doc__, __file__, ('time', 'memory'), 2, cases=dict(type=int, default=1, help='per step; 3 in the paper'))

import warnings; warnings.simplefilter('ignore')
import torch
import torch.nn.functional as F
from torch import nn
from medssl_nb.core import generator
from literal import plain
from medssl_nb.tasks.brainmvp import BrainMVP, BrainMVPConfig, minmax
from medssl_nb.train.trainer import TrainConfig, make_optimizer

CFG = BrainMVPConfig()
SIDE,BLOCK = CFG.region[0],CFG.block

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
    "`(run(batch, i), optimiser)` of a form, both from the same first weights."
    torch.manual_seed(0); task = BrainMVP(CFG)
    task.templates.weight.data.uniform_(0, 1, generator=generator(0, 0, 0, 'templates'))      # not zero: the first parity gradient is 1e9 times too large there
    if form == 'literal':
        task = Literal(task).to(a.device); opt = torch.optim.AdamW(task.parameters(), 3e-4, weight_decay=1e-5)
        return (lambda b, i: task(b, generator(0, i))),opt
    task.to(a.device); opt = make_optimizer(task, TrainConfig(lr=3e-4, weight_decay=1e-5))
    def run(b, i): v = task.views(b, generator(0, i)); return sum(task.losses(task(v), v).values())
    return run,opt

def batch(step):
    g = generator(0, step, 0, 'bench'); x = torch.rand(a.cases, 8, SIDE, SIDE, SIDE, generator=g); p = torch.zeros(a.cases, 8).bool(); p[:,:4] = True
    x[:,4:] = 0
    return dict(image=x.to(a.device), present=p, start=torch.tensor([[20,70,60]]*a.cases), full=torch.tensor([[150,200,170]]*a.cases), case=['c']*a.cases, progress=.9)

def timing():
    where,losses = step_turns({k: make(k) for k in ('literal','ours')}, lambda i: (batch(i), i), a)
    return dict(size=list(CFG.region), cases=a.cases, steps=a.steps, **step_means(where), first_loss={k: v[0] for k,v in losses.items()})

def memory(form):
    "Peak of two steps, MiB, above the process before the task was made."
    peak = Peak(a.device); run,opt = make(form)
    for i in range(2): loss = run(batch(i), i); loss.backward(); opt.step(); opt.zero_grad(set_to_none=True)
    return peak()

if a.child: print(json.dumps(memory(a.form) if a.form else timing()))
else:
    record = StepRecord(a)
    for part in a.parts:
        record.put(part, dict(size=list(CFG.region), cases=a.cases, **step_peaks(__file__, part)) if part == 'memory' else step_child(__file__, part))
