"""A TACO training step at 96^3, Swin and UniFormer, against a literal reading of the released form, as the specification describes it.

    python benchmarks/taco_step.py                          # CPU, one thread; writes benchmarks/taco_step.json
    python benchmarks/taco_step.py --forms uniformer --people 4 --parts time memory topology
    python benchmarks/taco_step.py --parts check            # seconds: both forms compute the same losses
    python benchmarks/taco_step.py --forms uniformer --people 1 --parts time memory --recompute
    python benchmarks/taco_step.py --device cuda --people 2

`Literal` is written from the specification alone (sections 3, 4 and the defects of section 8): all lateral blocks are built and run, though one is read; tokens by the bare reshape; every T x T table
of distances in the graph; Python loops over the pairs of people and over the anchors, a list of strangers made for each; a mask token that nobody reads; AdamW tensor by tensor. For UniFormer, which has no
lateral blocks, attention that writes its table and the library's own gradient of depthwise convolutions; the losses are those of sections 4.2 to 4.6 on the bottleneck, not the older draft of 4.9.
Ours is this library at the published level (`level=-1`, 27 tokens for Swin, 216 for UniFormer). Networks hold the same weights, the views are the same, and so are the strangers drawn:
`check` asserts that the losses and the gradients agree where both sides read tokens as places. Anomaly detection, which the released script leaves on, is off on both sides.

`time`: steps alternate; the ratio uses CPU seconds of the process where one thread works. The graph of the unused lateral blocks is *not* kept there (`--keep` keeps it): it would need 14 GB for two people,
and nothing flows back through it, so this costs the literal form nothing. `memory`: peak of a process of its own, above what it held before, graph kept, optimiser's state included. `kept`: bytes that autograd
keeps for the backward pass of the Swin networks, counted on tensors without data, for any number of people. `topology`: the two hinges alone, from tokens to their gradient. `profile`: where our step spends its time.
"""
import copy, json, os
from contextlib import nullcontext
from statistics import median
from measure import Peak, StepRecord, step_child, step_clock, step_means, step_peaks, step_settings, step_turns

a = step_settings(__doc__, __file__, ('check', 'kept', 'topology', 'time', 'memory'), 1, forms=dict(nargs='*', default=['swin', 'uniformer']),
    people=dict(type=int, default=2, help='per step; the paper: 2 for Swin, 4 for UniFormer. Each shows two sequences'), region=dict(type=int, default=96, help='side of the volumes, voxels'),
    warm=dict(type=int, default=1, help='steps of each form that are not timed'), recompute=dict(action='store_true', help='ours makes its widened maps again in the backward pass (UniFormer)'),
    keep=dict(action='store_true', help='keep the graph of unused blocks in time, too'))

import warnings; warnings.simplefilter('ignore')
import torch
import torch.nn.functional as F
from torch import nn
from medssl_nb.core import generator
from medssl_nb.nets.swin3d import lateral_block
from literal import plain
from medssl_nb.tasks.taco import TACO, TACOConfig
from medssl_nb.train.trainer import TrainConfig, make_optimizer

def config(form, **kw): return (TACOConfig.uniformer if form == 'uniformer' else TACOConfig.for_3d)(**{**dict(level=-1, region=(a.region,)*3), **kw})
SIDE = a.region

def cosines(x, y): return 1 - F.normalize(x, dim=1)@F.normalize(y, dim=1).T

class Literal(nn.Module):
    "Sections 2 to 4 of the specification, as they stand."
    def __init__(self, task, legacy=True, metric='euclidean'):
        super().__init__()
        self.cfg,self.legacy,self.metric = task.cfg,legacy,metric
        self.encoder,self.decoder = plain(copy.deepcopy(task.encoder)),copy.deepcopy(task.decoder)
        w = self.encoder.widths
        if task.lateral is not None: self.lateral = nn.ModuleDict({f'L{i}': lateral_block(c, task.cfg.lateral) for i,c in enumerate((1, *w[:3]))} | {'L5': copy.deepcopy(task.lateral)})
        self.mask_token = nn.Parameter(torch.zeros(1, 1, w[-1]))
    def features(self, x, keep=True):
        unused = lambda i, f: self.lateral[f'L{i}'](f)
        if not hasattr(self, 'lateral'): feats = self.encoder(x); return feats[-1],self.decoder(feats[-1]),None
        if not keep:
            with torch.no_grad(): unused(0, x)                  # the largest first, while nothing else is held
        feats = self.encoder(x)
        with nullcontext() if keep else torch.no_grad(): rest = [unused(i, f) for i,f in enumerate((x, *feats[:3])) if i or keep]
        return self.lateral['L5'](feats[-1]),self.decoder(feats[-1]),rest if keep else None
    def tokens(self, f):
        B,C,*s = f.shape; T = s[0]*s[1]*s[2]
        return f.reshape(B, T, C) if self.legacy else f.flatten(2).transpose(1, 2)
    def intra(self, A, B, ranks):
        k,T = self.cfg.k,len(A)
        near = torch.cdist(A, A, compute_mode='donot_use_mm_for_euclid_dist') if self.metric == 'euclidean' else cosines(A, A)
        d,loss = cosines(B, B),0.
        for u in range(T):
            n = [v for v in near[u].argsort().tolist() if v != u][:k]
            free = [v for v in range(T) if v != u and v not in n]
            s = [free[r] for r in ranks[u].tolist()]
            loss = loss + (d[u,n] - d[u,s] + self.cfg.margin_intra).clamp(min=0).mean()
        return loss/T
    def inter(self, A, B, w):
        k,T = self.cfg.k,len(A)
        D,here,there = cosines(A, B),cosines(A, A),cosines(B, B)
        pi,rho = D.argmin(1).tolist(),D.argmin(0).tolist()
        matched = {u for u in range(T) if rho[pi[u]] == u}
        claimed = {pi[u] for u in matched}
        loss,active = 0.*D.sum(),0
        for u in sorted(matched):
            n = [v for v in here[u].argsort().tolist() if v != u][:k]
            P = [(slot, pi[v]) for slot,v in enumerate(n) if v in matched]
            pool = [v for v in range(T) if v not in claimed] or [v for v in range(T) if v != pi[u] and v not in {p for _,p in P}]
            if not P or not pool: continue
            s = [pool[int(w[u,slot]*len(pool))] for slot,_ in P]
            loss = loss + (there[pi[u], [p for _,p in P]] - there[pi[u], s] + self.cfg.margin_inter).clamp(min=0).mean(); active += 1
        return loss/max(active, 1)
    def forward(self, v, keep=True):
        f,pred,rest = self.features(v['seen'], keep)
        z1,z2 = self.tokens(f).chunk(2); n = len(v['who']); intra = inter = 0.
        for j,i in enumerate(v['who'].tolist()): intra = intra + self.intra(z1[i], z2[i], v['ranks'][j]) + self.intra(z2[i], z1[i], v['ranks'][n+j])
        p,q = v['pairs12'].tolist(),v['pairs21'].tolist()
        for j,(s,t) in enumerate(p): inter = inter + self.inter(z1[s], z2[t], v['slots'][j])/len(p)
        for j,(s,t) in enumerate(q): inter = inter + self.inter(z2[s], z1[t], v['slots'][len(p)+j])/len(q)
        rec = (pred - v['target']).square().mean()
        return dict(rec=rec, intra=10*intra/n, inter=10*inter),rest

def make(form, side, task=None):
    "`(run(batch, i), optimiser)` of a form, all from the same first weights."
    torch.manual_seed(0); task = task or TACO(config(form)); views = lambda b, i: task.views(b, generator(0, i))
    if side == 'literal':
        net = Literal(task).to(a.device).train(); opt = torch.optim.AdamW(net.parameters(), 3e-4, weight_decay=.1)
        def run(b, i): terms,rest = net(views(b, i), a.keep); return sum(terms.values()),rest
        return run,opt
    task.to(a.device).train(); opt = make_optimizer(task, TrainConfig(lr=3e-4, weight_decay=.1))
    for m in task.modules():
        if hasattr(m, 'recompute'): m.recompute = a.recompute
    def run(b, i): v = views(b, i); return sum(task.losses(task(v), v).values()),None
    return run,opt

def batch(step, side=SIDE):
    g = generator(0, step, 0, 'bench'); n = a.people
    x = torch.rand(n, 4, *[side]*3, generator=g); x[...,:side//6,:] = 0
    return dict(image=x.to(a.device), present=torch.ones(n, 4, dtype=torch.bool), case=[f'c-{i}' for i in range(n)], subject=[f's-{i}' for i in range(n)], progress=0.)

def check(form):
    "Losses and gradients of the two readings, small networks, tokens as places on both sides, the same draws."
    from medssl_nb.nets.swin3d import SwinEncoder
    import medssl_nb.tasks.taco as module
    small = (lambda *_: SwinEncoder(1, 12, heads=(1, 2, 3, 4), window=4)) if form == 'swin' else (lambda *_: module_encoder(1, (16, 32, 64, 64), (1, 1, 1, 1), head_width=32))
    from medssl_nb.nets.uniformer3d import UniFormerEncoder as module_encoder
    real,module.named_encoder = module.named_encoder,small
    try: torch.manual_seed(0); task = TACO(config(form, region=(96,)*3 if form == 'swin' else (48,)*3, metric='euclidean', **(dict(lateral=24) if form == 'swin' else {})))
    finally: module.named_encoder = real
    lit = Literal(task, legacy=False)
    v = task.views(batch(0, task.region[0]), generator(0, 0))
    mine = task.losses(task(v), v); theirs,_ = lit(v)
    sum(mine.values()).backward(); sum(theirs.values()).backward()
    loss = max(abs(mine[k].item() - theirs[k].item())/max(abs(theirs[k].item()), 1e-6) for k in mine)
    pairs = [(p.grad, q.grad) for p,q in zip([*task.encoder.parameters(), *task.decoder.parameters()], [*lit.encoder.parameters(), *lit.decoder.parameters()])] if form == 'swin' else [(p.grad, dict(lit.decoder.named_parameters())[n].grad) for n,p in task.decoder.named_parameters()]
    grad = max(((g-h).norm()/h.norm().clamp(min=1e-8)).item() for g,h in pairs if h is not None and h.norm() > 1e-6)
    unused = sum(p.numel() for p in lit.parameters() if p.grad is None)
    assert loss < 1e-4 and grad < 1e-2, (loss, grad)
    if form == 'swin': assert sum(p.numel() for n,p in Literal(TACO(config(form)).to('meta')).named_parameters() if n == 'mask_token' or n[:10] in ('lateral.L0', 'lateral.L1', 'lateral.L2', 'lateral.L3')) == 5_756_928   # section 3.1
    return dict(terms={k: round(x.item(), 5) for k,x in mine.items()}, loss_difference=loss, gradient_difference=grad, parameters_without_gradient_literal=unused,
                parameters_without_gradient_ours=sum(p.numel() for p in task.parameters() if p.grad is None))

def timing(form):
    where,_ = step_turns({k: make(form, k) for k in ('literal', 'ours')}, lambda i: (batch(i), i), a, a.warm)
    return dict(size=[SIDE]*3, people=a.people, steps=a.steps, steps_before=a.warm, graph_of_unused_kept=a.keep, **step_means(where))

def topology(form):
    "The losses of topology alone, from tokens to their gradient: median of the paired ratios."
    sync,clock = step_clock(a); task = TACO(config(form)); lit = Literal(task); T,C = task.tokens,task.cfg.lateral or task.encoder.widths[-1]; rows = []
    v = task.views(batch(0), generator(0, 0))
    for i in range(5):
        z = torch.randn(2*a.people, T, C, generator=generator(0, i, 0, 'z')).to(a.device); s = []
        for form_ in ('literal', 'ours'):
            x = z.clone().requires_grad_(); sync(); t0 = clock()
            if form_ == 'ours': out = dict(z=x); loss = task.intra(out, v) + task.inter(out, v)[0]
            else:
                z1,z2 = x.chunk(2); n = len(v['who']); loss = 0.
                for j in range(n): loss = loss + (lit.intra(z1[j], z2[j], v['ranks'][j]) + lit.intra(z2[j], z1[j], v['ranks'][n+j]))/n
                for j,(p,q) in enumerate(v['pairs12'].tolist()): loss = loss + lit.inter(z1[p], z2[q], v['slots'][j])/len(v['pairs12'])
                for j,(p,q) in enumerate(v['pairs21'].tolist()): loss = loss + lit.inter(z2[p], z1[q], v['slots'][len(v['pairs12'])+j])/len(v['pairs21'])
            loss.backward(); sync(); s.append(clock() - t0)
        rows.append(s)
    return dict(people=a.people, tokens=T, seconds=dict(literal=round(median(r[0] for r in rows), 4), ours=round(median(r[1] for r in rows), 4)), ratio=round(median(r[1]/r[0] for r in rows), 4))

def profile(form):
    "Operations of one step of ours, as shares of its time."
    from torch.profiler import ProfilerActivity, profile as watch
    run,opt = make(form, 'ours'); step = lambda i: (run(batch(i), i)[0].backward(), opt.step(), opt.zero_grad(set_to_none=True)); step(0)
    with watch(activities=[ProfilerActivity.CPU]) as p: step(1)
    rows = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total); whole = sum(e.self_cpu_time_total for e in rows)
    return dict(people=a.people, share={e.key: round(e.self_cpu_time_total/whole, 3) for e in rows[:14]})

def kept(form):
    "MiB that autograd keeps of one pass of the networks, parameters not counted; on tensors without data."
    out = {}
    for n in (1, 2, 4):
        row = {}
        for side in ('literal', 'ours'):
            task = TACO(config(form)); net = (Literal(task) if side == 'literal' else task).to('meta').train(); own = {id(p) for p in net.parameters()}; seen = {}
            def see(t):
                if id(t) not in own and not (t._base is not None and id(t._base) in own): seen[id(t.untyped_storage())] = (t.untyped_storage(), t.untyped_storage().nbytes())
                return t
            x = torch.zeros(2*n, 1, *[SIDE]*3, device='meta')
            with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
                if side == 'literal': keep = net.features(x)
                else: f = net.encoder(x); keep = net.decoder(f[-1]),net.lateral(f[-1]) if net.lateral is not None else None  # noqa: F841 (the graph must live until it is counted)
            row[side] = round(sum(b for _,b in seen.values())/2**20)  # noqa: F841
        out[f'{n} people'] = row | dict(ratio=round(row['ours']/row['literal'], 3))
    return out

def memory(form, side):
    "Peak of two steps, MiB, above the process before the task was made."
    peak = Peak(a.device); a.keep = True; run,opt = make(form, side)
    for i in range(2): loss,rest = run(batch(i), i); loss.backward(); del rest; opt.step(); opt.zero_grad(set_to_none=True); del loss
    return peak()

PARTS = dict(check=check, time=timing, topology=topology, profile=profile, kept=kept)
if a.child: print(json.dumps(memory(a.forms[0], a.form) if a.form else PARTS[a.child](a.forms[0])))
else:
    record = StepRecord(a)
    for form in a.forms:
        for part in a.parts:
            if part == 'kept' and form != 'swin': continue      # without data, attention is not fused
            load = round(os.getloadavg()[0], 1); one = ('--forms', form)
            row = dict(size=[SIDE]*3, people=a.people, **step_peaks(__file__, part, *one)) if part == 'memory' else step_child(__file__, part, '', *one)
            name = part if part in ('check', 'kept') else f'{part}, {a.people} people' + (f', {SIDE}^3' if SIDE != 96 else '') + (', recompute' if a.recompute else '')
            record.put(name, row | dict(load=load), form)
