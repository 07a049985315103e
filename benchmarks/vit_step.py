"""One step of ViT-B masked modelling (views, forward, backward, AdamW) against a literal reading of its specification.

The literal form: attention that writes its table of all pairs, q, k and v cut out of one product, LayerScale and stochastic depth as operations of their own, a convolution that makes patches, position tables of
1 024 and 4 096 rows in raster order and a temporal row drawn at each step, noise argsorted twice to restore the order, targets and losses of all patches multiplied by a dense mask, all tokenizers, heads and the
1 229 568 unused parameters in memory, torch's default AdamW. The same weights, draws and loss on both sides; forms take turns step by step. Written from the text alone.

    python benchmarks/vit_step.py            # all parts: 2d, 3d, 2d-bf16, 3d-bf16, memory
    python benchmarks/vit_step.py --parts 2d --steps 5
"""
import json, os
from statistics import median
from measure import Peak, StepRecord, step_child, step_means, step_peaks, step_settings, step_turns

PARTS = ('2d','3d','2d-bf16','3d-bf16','memory-2d','memory-3d')
a = step_settings(__doc__, __file__, PARTS, 3, PARTS, cases=dict(type=int, default=8, help='per step; 128 in the paper'))

import torch
import torch.nn.functional as F
from torch import nn
from medssl_nb.core import generator
from medssl_nb.data.masking import kept_blocks
from medssl_nb.nets.vit import UnifiedViT, MaskDecoder, TextHead
from medssl_nb.tasks.mim import MIM, MIMConfig
from medssl_nb.train.trainer import TrainConfig, make_optimizer

HYPER = dict(momentum=.9, beta2=.95, weight_decay=.05, decay='weights')
def config(kind): return (MIMConfig.for_2d if kind == '2d' else MIMConfig.for_3d)()

class Block(nn.Module):
    "One operation after the other."
    def __init__(self, b):
        super().__init__()
        for n in ('norm1','qkv','proj','norm2','fc1','fc2'): setattr(self, n, getattr(b, n))
        self.scale1,self.scale2,self.heads,self.drop = b.scale1,b.scale2,b.heads,b.drop
    def path(self, y):
        if not self.training or not self.drop: return y
        keep = (torch.rand(len(y), 1, 1, device=y.device) >= self.drop).to(y.dtype)
        return y.div(1 - self.drop)*keep
    def forward(self, x):
        B,N,D = x.shape; h = self.heads
        q,k,v = self.qkv(self.norm1(x)).reshape(B, N, 3, h, D//h).permute(2, 0, 3, 1, 4)
        y = self.proj(((q @ k.transpose(-2, -1)*(D//h)**-.5).softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))
        x = x + self.path(y if self.scale1 is None else self.scale1*y)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + self.path(y if self.scale2 is None else self.scale2*y)

class Literal(nn.Module):
    "Sections 3 and 4.1 of the specification, as they stand; everything that the printed total counts."
    def __init__(self, task, kind):
        super().__init__()
        self.kind = kind; d = 2 if kind == '2d' else 3; self.d,self.p = d,16
        whole = UnifiedViT(('text','2d','3d'), positions='raster', temporal=8, vocab=49_411, text_length=512, text_types=2, depth=1)
        self.tokens,self.norm,self.cls = whole.tokenizers,task.encoder.norm,task.encoder.cls
        self.unused = nn.ParameterList([nn.Parameter(torch.zeros(1600, 768)), nn.Parameter(torch.zeros(1, 768))])
        self.text_head = TextHead(whole, 2)
        mine,theirs = task.encoder.tokenizers[kind],self.tokens[kind]
        theirs.proj = mine.proj
        with torch.no_grad():
            code = mine.pos(mine.pos.grid); theirs.pos.table[:len(code)] = code; theirs.pos.temporal.zero_()        # so that both begin with the same loss
        self.blocks = nn.ModuleList(Block(b) for b in task.encoder.blocks)
        dec = task.decoder; both = MaskDecoder(whole, depth=1)
        self.embed,self.mask,self.final = dec.embed,dec.mask,dec.norm
        self.pos,self.pred = both.pos,both.pred; self.pos[kind],self.pred[kind] = dec.pos[kind],dec.pred[kind]
        self.dblocks = nn.ModuleList(Block(b) for b in dec.blocks)
    def patchify(self, x):
        n,p = len(x),self.p
        if self.d == 2: h,w = (s//p for s in x.shape[2:]); return torch.einsum('nchpwq->nhwpqc', x.reshape(n, -1, h, p, w, p)).reshape(n, h*w, -1)
        t,h,w = (s//p for s in x.shape[2:]); return torch.einsum('nctohpwq->nthwopqc', x.reshape(n, -1, t, p, h, p, w, p)).reshape(n, t*h*w, -1)
    def forward(self, x, noise, row):
        tok = self.tokens[self.kind]; B = len(x)
        t = tok.proj(x).flatten(2).transpose(1, 2); L = t.shape[1]
        at = torch.arange(L, device=x.device)
        t = self.norm(t + F.embedding(at, tok.pos.table) + F.embedding(torch.full((B, L), row, device=x.device), tok.pos.temporal))
        order = noise.argsort(1); back = order.argsort(1); keep = order[:,:kept_blocks(L, .75)]
        t = torch.gather(t, 1, keep[...,None].repeat(1, 1, t.shape[-1]))
        mask = torch.ones(B, L, device=x.device); mask[:,:keep.shape[1]] = 0; mask = torch.gather(mask, 1, back)
        z = torch.cat([self.cls.expand(B, -1, -1), t], 1)
        for b in self.blocks: z = b(z)
        y = self.embed(z)
        fill = self.mask.repeat(B, L + 1 - y.shape[1], 1)
        full = torch.gather(torch.cat([y[:,1:], fill.to(y.dtype)], 1), 1, back[...,None].repeat(1, 1, y.shape[-1]))
        y = torch.cat([y[:,:1], full], 1) + self.pos[self.kind]
        for b in self.dblocks: y = b(y)
        pred = self.pred[self.kind](self.final(y))[:,1:]
        target = self.patchify(x); target = (target - target.mean(-1, keepdim=True))/(target.var(-1, keepdim=True) + 1e-6)**.5
        return (((pred.float() - target)**2).mean(-1)*mask).sum()/mask.sum()

def make(form, kind):
    "`step(batch, number) -> loss` and the optimiser of a form, both from the same first weights."
    torch.manual_seed(0); c = config(kind); task = MIM(c)
    if form == 'ours':
        task.to(a.device).train(); opt = make_optimizer(task, TrainConfig(lr=1e-4, **HYPER))
        def run(b, i):
            v = task.views(b, generator(0, i)); torch.manual_seed(i)
            return task.losses(task(v), v)['mim']
        return run,opt,task
    m = Literal(task, kind).to(a.device).train()
    groups = [dict(params=[p for p in m.parameters() if p.ndim > 1]), dict(params=[p for p in m.parameters() if p.ndim <= 1], weight_decay=0.)]
    opt = torch.optim.AdamW(groups, 1e-4, betas=(.9,.95), weight_decay=.05)
    def run(b, i):
        g = generator(0, i); views = task.views(b, g); noise = torch.ones(views['hidden'].shape, device=a.device)       # the same crop and the same patches
        noise.scatter_(1, views['keep'], torch.linspace(0, .5, views['keep'].shape[1], device=a.device).expand(len(noise), -1))
        row = i % 8; torch.manual_seed(i)
        return m(views['image'], noise, row)
    return run,opt,m

def batch(kind, i):
    c = config(kind); g = generator(0, i, 0, 'bench'); M = 3 if kind == '2d' else 1
    return dict(image=torch.rand(a.cases, M, *c.region, generator=g).to(a.device), present=torch.ones(a.cases, M).bool(), progress=.5)

def timing(part):
    kind,bf = part.split('-')[0],part.endswith('bf16')
    made = {k: make(k, kind) for k in ('literal','ours')}; cast = torch.autocast(a.device.split(':')[0], torch.bfloat16, enabled=bf)
    where,losses = step_turns({k: (cast(run), opt) for k,(run,opt,_) in made.items()}, lambda i: (batch(kind, i), i), a)
    pairs = sorted(sum(o)/sum(l) for o,l in zip(where['ours'], where['literal']))
    return dict(size=list(config(kind).region), cases=a.cases, steps=a.steps, precision='bf16-mixed' if bf else '32-true', **step_means(where) | dict(ratio=round(median(pairs), 3)),
        ratios=[round(p, 3) for p in pairs], losses=losses, parameters={k: sum(p.numel() for p in m.parameters()) for k,(_,_,m) in made.items()}, load=[round(v, 1) for v in os.getloadavg()])

def memory(form, kind):
    "Peak of two steps, MiB, above the process before the task was made."
    peak = Peak(a.device); run,opt,_ = make(form, kind)
    for i in range(2): loss = run(batch(kind, i), i); loss.backward(); opt.step(); opt.zero_grad(set_to_none=True)
    return peak()

if a.child: print(json.dumps(memory(a.form, a.child.split('-')[1]) if a.form else timing(a.child)))
else:
    record = StepRecord(a)
    for part in a.parts:
        record.put(part, dict(size=list(config(part[7:]).region), cases=a.cases, **step_peaks(__file__, part)) if part.startswith('memory') else step_child(__file__, part))
