"""A PCRLv2 training step against the form the authors published, as the specification describes it.

    python benchmarks/pcrlv2_step.py                     # CPU, one thread, about half an hour; writes benchmarks/pcrlv2_step.json
    python benchmarks/pcrlv2_step.py --device cuda --cases 8
    python benchmarks/pcrlv2_step.py --parts time64 memory64

The literal form (`Literal` below) is written from the specification alone: every view goes through the whole decoder, all restoration
heads and the final map, up-sampling and convolution stay apart, twelve comparisons run in a loop, and what is not needed is thrown away.
Both forms use the same modules, weights, views and drawn levels, the same precision and the same memory layout; they give the same loss (asserted here) and the same gradients
(asserted in nbs/42_tasks.pcrlv2.ipynb). The views are noise in their shapes, made outside the clock: making real ones is measured in views.py. The 3-D head is the authors' `bounded` one, the 2-D head the paper's.
`half64` runs both under bfloat16 autocast, `layout64` both in channels_last. Steps alternate, literal and ours, on the same views, so that a busy machine is busy for both; the ratio is the median over steps of
the paired ratio, in CPU seconds of the process where one thread works, wall seconds otherwise. The first step of each form warms up and is not counted (96^3: one step, counted). Peak memory is that of a process of its own.
`macs` counts multiplications of the forward pass: the floor that the ratio could reach if every multiplication cost the same and everything else nothing.
"""
import json, os, time
from statistics import median
from measure import Peak, StepRecord, step_child, step_clock, step_peaks, step_settings, turns

a = step_settings(__doc__, __file__, ('macs', 'profile', 'time64', 'memory64', 'half64', 'layout64', 'time2d', 'memory2d', 'views', 'time96', 'memory96'), 3,
    cases=dict(type=int, default=2, help='per step; batch norm over pooled vectors needs two'), forms=dict(nargs='*', default=['literal', 'ours', 'ours_unmerged', 'ours_one_level'], help='what is timed; literal always'))

import torch
import torch.nn.functional as F
from torch import nn
from medssl_nb.core import generator
from medssl_nb.tasks.pcrlv2 import PCRLv2, PCRLv2Config, draw_levels, make_views


class Literal(nn.Module):
    "The published form, from the specification's sections 3 and 4."
    def __init__(self, task): super().__init__(); self.t = task
    def everything(self, x):
        t = self.t; f = t.encoder(x)[-1]; pyramid,maps,zp = [],[],[]
        for level,project,predict,restore in zip(t.decoder.levels, t.project, t.predict, t.restore):
            f = level(f); pyramid.append(f)
            z = project(f); zp.append((z, predict(z)))
            maps.append(F.interpolate(restore(f), size=x.shape[2:], mode='trilinear' if x.ndim == 5 else 'bilinear', align_corners=False))
        return zp, maps, t.decoder.restore(f)
    def forward(self, v):
        D = lambda p,z: -F.cosine_similarity(p, z.detach(), dim=1).mean()
        sim = lambda a,b: .5*(D(a[1], b[0]) + D(b[1], a[0]))
        (g1,maps,final),(g2,_,_),(l,_,_) = self.everything(v['x1']),self.everything(v['x2']),self.everything(v['local'])
        s,B,gl = v['levels']['pair'][0],len(v['x1']),0.
        for j,both in enumerate(v['levels']['local']):
            for k,g in enumerate((g1, g2)):
                c = both[k][0]; mine = tuple(x[j*B:(j+1)*B] for x in l[c])
                gl = gl + sim(g[c], mine)
        return F.mse_loss(final, v['target'][0]) + v['beta']*F.mse_loss(maps[s], v['target'][0]) + sim(g1[s], g2[s]) + gl/(2*len(v['levels']['local']))


def config(part):
    if '2d' in part: return PCRLv2Config.for_2d()
    return PCRLv2Config(head='bounded', size=(96,96,96) if '96' in part else (32,64,64))   # the authors' 3-D code has bounded heads

def make(cfg, form):
    torch.manual_seed(0); task = PCRLv2(cfg).to(a.device)
    if form == 'literal': run = Literal(task)
    else: run = lambda v: sum(task.losses(task(v), v).values())
    return task, run, torch.optim.SGD(task.parameters(), lr=1e-3, momentum=.9, weight_decay=1e-4)

def random_views(cfg, S, step):
    "Noise in the shapes of the views, and levels as a run draws them."
    g = generator(0, step, 0, 'bench'); r = lambda n,s: torch.rand(n, cfg.in_channels, *s, generator=g).to(a.device)
    return dict(x1=r(a.cases, cfg.size), x2=r(a.cases, cfg.size), local=r(a.cases*cfg.n_local, cfg.local_size), target=[r(a.cases, cfg.size)], beta=.7, levels=draw_levels(cfg, S, g))

sync,clock = step_clock(a)

def timing(part):
    from dataclasses import replace
    cfg = config(part); steps = 1 if '96' in part and a.device == 'cpu' else a.steps
    forms = dict(literal=cfg, ours=cfg, ours_unmerged=replace(cfg, merge=False), ours_one_level=replace(cfg, draws='one'))
    if '96' in part or part.startswith(('half', 'layout')): forms = dict(literal=cfg, ours=cfg)
    forms = {k: c for k,c in forms.items() if k == 'literal' or k in a.forms}
    made = {k: make(c, k) for k,c in forms.items()}; t = {k: [] for k in forms}; losses = {}; load = os.getloadavg()[0]
    def lay(x):
        if isinstance(x, list): return [lay(y) for y in x]
        if not part.startswith('layout') or not torch.is_tensor(x) or x.ndim not in (4,5): return x
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    for task,_,_ in made.values():
        for p in task.parameters(): p.data = lay(p.data)
    def step(k, v):
        task,run,opt = made[k]; sync(); t0 = clock()
        with torch.autocast(a.device, torch.bfloat16, enabled=part.startswith('half')): loss = run(v)
        loss.backward(); opt.step(); opt.zero_grad(set_to_none=True); sync()
        return clock()-t0, loss.item()
    warm = not ('96' in part and a.device == 'cpu')
    for i in range(steps + warm):
        for k in forms:
            v = random_views(forms[k], made[k][0].S, i); s,l = step(k, v if not part.startswith('layout') else {n: lay(x) if n != 'levels' else x for n,x in v.items()}); losses[k] = l
            if i or not warm: t[k].append(s)
        if i == 0: assert abs(losses['literal'] - losses['ours']) < (.02 if part.startswith('half') else 1e-4), losses
        if i == 0: first = dict(losses)
    pairs = {k: [y/z for y,z in zip(x, t['literal'])] for k,x in t.items() if k != 'literal'}
    return dict(size=cfg.size, cases=a.cases, head=cfg.head, net=cfg.net, layout='channels_last' if part.startswith('layout') else 'contiguous', precision='bfloat16 autocast' if part.startswith('half') else 'float32', views='noise',
        steps=steps, warm_up=int(warm), date=time.strftime('%Y-%m-%d'), load_average=[round(load, 1), round(os.getloadavg()[0], 1)], seconds={k: round(median(x), 3) for k,x in t.items()}, ratio={k: round(median(x), 3) for k,x in pairs.items()},
        ratio_of_each_step={k: [round(y, 3) for y in x] for k,x in pairs.items()}, first_loss={k: round(first[k], 6) for k in ('literal','ours')})

def macs(_):
    "Multiplications of the forward pass, by counting what each convolution does."
    from torch.utils.flop_counter import FlopCounterMode
    out = {}
    for name,part in (('3d_64','time64'), ('2d','time2d')):
        cfg = config(part); out[name] = {}
        for form in ('literal','ours'):
            task,run,_ = make(cfg, form); v = random_views(cfg, task.S, 0)
            v['levels'] = dict(pair=[task.S-1], mid=[task.S-1], local=[[[task.S-1]]*2]*cfg.n_local)     # the finest level everywhere: the dearest draw, and in 3-D nearly every draw
            with FlopCounterMode(display=False) as count: run(v).backward()
            out[name][form] = round(count.get_total_flops()/2e9, 1)
        out[name]['ratio'] = round(out[name]['ours']/out[name]['literal'], 3)
    return dict(what='billions of multiply-adds in convolutions and matrix products, forward and backward, all views, finest level asked everywhere', cases=a.cases, **out)

def profile(_):
    "Seconds of one step by kind of work (torch.profiler, wall clock: only worth reading on a quiet machine)."
    from torch.profiler import profile as watch
    kinds = dict(convolution=('convolution',), norm=('batch_norm',), relu=('threshold', 'clamp_min'), pool=('max_pool',), copies=('copy_', 'fill_', 'cat'), sums=('aten::sum', 'aten::add', 'aten::mul', 'aten::div'), matrix=('aten::mm', 'aten::bmm'))
    cfg = config('time64'); out = {}
    for form in ('literal', 'ours'):
        task,run,opt = make(cfg, form)
        with watch() as p: run(random_views(cfg, task.S, 0)).backward(); opt.step()
        row = {}
        for e in p.key_averages():
            kind = next((k for k,words in kinds.items() if any(w in e.key for w in words)), 'other')
            row[kind] = row.get(kind, 0) + e.self_cpu_time_total/1e6
        out[form] = {k: round(x, 2) for k,x in sorted(row.items(), key=lambda r: -r[1])}
    return dict(size=cfg.size, cases=a.cases, steps=1, load_average=round(os.getloadavg()[0], 1), seconds=out)

def memory(part, form):
    "Peak of two steps over what the process held before them, MiB."
    task,run,opt = make(config(part), form); peak = Peak(a.device)
    for i in range(1 if '96' in part else 2):
        loss = run(random_views(config(part), task.S, i)); loss.backward(); opt.step(); opt.zero_grad(set_to_none=True)
    return peak()

def views(_):
    "The views of a batch: ours, batched, against the same steps case by case with TorchIO (specification, section 2.2)."
    try: import torchio as tio
    except ImportError: print('views: torchio is not installed, skipped'); return None
    cfg = PCRLv2Config(); B = 4; g = generator(0, 0, 0, 'ct')
    x = torch.rand(B, 1, *cfg.region, generator=g)
    batch = dict(image=x.to(a.device), present=torch.ones(B,1).bool(), valid=torch.tensor([[[0]*3, list(cfg.region)]]).repeat(B,1,1), spacing=torch.ones(B,3), progress=0.)
    clean = [tio.RandomFlip(axes=2, flip_probability=.5), tio.RandomAffine(scales=.1, degrees=10, default_pad_value='minimum')]
    spoil = [tio.RandomBlur((0,2)), tio.RandomNoise(0, (0,.25)), tio.RandomGamma((-.3,.3))]
    glob,loc = tio.Compose(spoil + [tio.RandomSwap(cfg.swap_block, 100), tio.ZNormalization()]),tio.Compose(spoil + [tio.ZNormalization()])
    clean = tio.Compose(clean)
    from medssl_nb.tasks.pcrlv2 import crop_boxes
    def one_by_one(i):
        pair,local,_ = crop_boxes(cfg, x, batch['valid'], generator(0, i)); out = []
        for b in range(B):
            for boxes,size,bad in ((pair[b], cfg.size, glob), (local[b], cfg.local_size, loc)):
                for lo,hi in boxes.tolist():
                    p = x[b][:, lo[0]:hi[0], lo[1]:hi[1], lo[2]:hi[2]]
                    im = clean(tio.Resize(size)(tio.ScalarImage(tensor=p)))
                    out.append((im.data.clone(), bad(im).data))
        return out
    def batched(i): make_views(cfg, 3, batch, generator(0, i)); sync()
    t = turns(dict(torchio=one_by_one, ours=batched), a.steps, 0, lambda i: (i,)); of_cpu = dict(torchio=True, ours=clock is time.process_time)
    m = {k: sorted(s[of_cpu[k]] for s in v)[len(v)//2] for k,v in t.items()}
    return dict(cases=B, region=cfg.region, seconds={k: round(v, 3) for k,v in m.items()}, ratio=round(m['ours']/m['torchio'], 3))

if a.child:
    print(json.dumps(memory(a.child, a.form) if a.form else dict(views=views, macs=macs, profile=profile).get(a.child, timing)(a.child)))
else:
    record = StepRecord(a)
    for part in a.parts: record.put(part, dict(size=config(part).size, cases=a.cases, **step_peaks(__file__, part)) if part.startswith('memory') else step_child(__file__, part))
