"""How often the privacy audit alarms: pools without any copy (false alarms), pools with a few (power), and whether the p-values of its checks are what they say.

    python experiments/audit_rates.py runs/rates --worlds xray lattice --sites 40        # seven pools a site: about half a minute of one core
    python experiments/audit_rates.py runs/rates --copies --sites 12                     # every disguise of twenty copies, all four worlds
    python experiments/audit_rates.py runs/rates --report                                # results/audit_rates.{json,md}

A site: 60 generated people whose images the network would have learnt, 60 held out. Pools of 40: other people as they are, smoothed (sigma .8 pixels), with 5 % noise, and mixtures of two of them; then the first of these with 1, 4 or 20
images replaced by training patients, smoothed and with 5 % noise. Every site has its own people, so sites are what intervals are taken over. Also: how far down each order of candidates (correlation at low resolution, as the audit
uses; fixed filters; pixels) the truly nearest patient by SSIM stands. And for each disguise of a copy: how many of twenty are named. What is finished is read, not made again.
"""
import argparse
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.stats import beta

from medssl_nb.audit import SHARP, Bench, Site, checks, coarse, control, filter_features, orientations, oriented, small, ssim, with_status
from medssl_nb.core import generator, read_json, seed_of, write_json
from medssl_nb.data.patterns import pattern_phantom
from medssl_nb.data.phantom import ct_phantom, xray_phantom
from medssl_nb.eval.metrics import mean_interval

N, POOL = 60, 40
WORLDS = {
    "xray": ("chest X-rays, 32 x 32", lambda n, seed: xray_phantom(n, 32, seed, depth=12)),
    "xray64": ("chest X-rays, 64 x 64", lambda n, seed: xray_phantom(n, 64, seed, depth=12)),
    "lattice": ("lattices, 32 x 32", lambda n, seed: pattern_phantom("lattice", n, seed=seed)),
    "ct": ("chest CT, 16 x 16 x 16", lambda n, seed: ct_phantom(n, (16, 16, 16), seed)),
}
HONEST = ("as they are", "smoothed", "5 % noise", "mixtures of two")
COPIES = (1, 4, 20)


def soft(x, sigma=0.8):
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, *[sigma] * (x.ndim - 2))))


def people(world, site):
    "Training, held-out, and twice a pool of others: one call, so nobody is there twice."
    b = WORLDS[world][1](2 * N + 2 * POOL, seed_of("rates", world, site, 0) % 2**31)
    return b["image"].float().split([N, N, POOL, POOL]), tuple(float(v) for v in b["spacing"][0])


def candidates(a, b, span):
    "Rank of the nearest by SSIM among all `b`, in three orders; 0 is first. `a`: others, or patients changed."
    turns = orientations(tuple(a.shape[2:]))
    c, o = coarse(a, b, 16 if a.ndim == 4 else 8)
    sa, sb = (small(v, SHARP[v.ndim - 2]) for v in (a, b))
    best = [int(ssim(torch.stack([oriented(sa[i], turns[k]) for k in o[i]]), sb, span).argmax()) for i in range(len(a))]
    f = [filter_features(v) for v in (a, b)]
    sd = f[1].std(0)
    sd[sd < 1e-9] = np.inf
    orders = {"correlation": -c, "filters": cdist(f[0] / sd, f[1] / sd), "pixels": cdist(a.flatten(1), b.flatten(1))}
    return {n: [int((d[i] < d[i, best[i]]).sum()) for i in range(len(a))] for n, d in orders.items()}


def bench_of(train, held, spacing):
    return Bench.of(Site(torch.cat([train, held]), [f"p{i}" for i in range(2 * N)], np.arange(2 * N) < N, spacing))


def copies(world, site):
    "Twenty copies in a pool of forty, in every disguise: the share that is named, one by one; and which checks notice a tenth."
    (train, held, fresh, _), spacing = people(world, site)
    bench = bench_of(train, held, spacing)
    s, ref = bench.state(fresh), bench.patients(fresh)
    tenth = control(s, ref, bench, draws=100, seed=site)["caught"]
    return dict(world=world, site=site, named=control(s, ref, bench, share=0.5, draws=50, seed=site)["disguises"], tenth={k: any(v[k] for v in tenth.values()) for k in ("unchanged", "5 % noise")})


def one(world, site):
    "All pools of a site."
    (train, held, fresh, more), spacing = people(world, site)
    bench = bench_of(train, held, spacing)
    span = bench.grey[1] - bench.grey[0]
    noise = span * torch.randn(fresh.shape, generator=generator(site, 0, 0, "rates"))
    pools = dict(zip(HONEST, (fresh, soft(fresh), fresh + 0.05 * noise, (fresh + more) / 2)))
    for k in COPIES:
        pools[f"{k} copies"] = torch.cat([fresh[: POOL - k], soft(train[:k], 1.0) + 0.05 * noise[:k]])
    out = {}
    for n, x in pools.items():
        rows = with_status(checks(bench.state(x), bench.patients(x), bench, draws=200), {})
        out[n] = [{k: r[k] for k in ("check", "space", "value", "p", "status")} for r in rows]
    looked = {"people": candidates(fresh, train, span), "smoothed and noisy patients": candidates(soft(train[:POOL], 1.0) + 0.05 * noise, train, span)}
    return dict(world=world, site=site, pools=out, candidates=looked)


def share(hits, of):
    "A share with its Clopper-Pearson interval."
    return dict(share=hits / of, low=float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0, high=float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0, hits=hits, of=of)


def report(runs, out):
    cells = [read_json(p) for p in sorted(Path(runs).glob("*_[0-9][0-9][0-9].json"))]
    found_out = [read_json(p) for p in sorted(Path(runs).glob("*_copies.json"))]
    alarm = lambda rows: any(r["status"] == "alarm" for r in rows)
    rates, calibration, found = [], [], []
    for w in WORLDS:
        mine = [c for c in cells if c["world"] == w]
        if not mine:
            continue
        rates += [dict(world=w, pool=p, **share(sum(alarm(c["pools"][p]) for c in mine), len(mine))) for p in mine[0]["pools"]]
        rates.append(dict(world=w, pool="any of the four honest pools", **share(sum(any(alarm(c["pools"][p]) for p in HONEST) for c in mine), len(mine))))
        for j, r in enumerate(mine[0]["pools"][HONEST[0]]):
            rows = [c["pools"][p][j] for c in mine for p in HONEST]
            if r["p"] is None:
                calibration.append(dict(world=w, check=r["check"], space=r["space"], named=sum(x["value"] > 0 for x in rows), of=len(rows)))
            else:
                calibration.append(dict(world=w, check=r["check"], space=r["space"], below_05=sum(x["p"] < 0.05 for x in rows), below_01=sum(x["p"] < 0.01 for x in rows), alarms=sum(x["status"] == "alarm" for x in rows), of=len(rows)))
        for kind in mine[0]["candidates"]:
            for order in mine[0]["candidates"][kind]:
                r = np.concatenate([c["candidates"][kind][order] for c in mine])
                found.append(dict(world=w, of=kind, order=order, first_10=float((r < 10).mean()), first_50=float((r < 50).mean()), median=float(np.median(r)), n=len(r)))
    named = []
    for w in WORLDS:
        if mine := [c for c in found_out if c["world"] == w]:
            named += [dict(world=w, disguise=d, sites=len(mine), **{k: mean_interval([c["named"][d] for c in mine])[k] for k in ("mean", "low", "high")}) for d in mine[0]["named"]]
            named += [dict(world=w, disguise=f"a tenth, {d}, noticed by a check", sites=len(mine), **{k: v for k, v in zip(("mean", "low", "high"), itemgetter("share", "low", "high")(share(sum(c["tenth"][d] for c in mine), len(mine))))}) for d in mine[0]["tenth"]]
    result = dict(named=named, what=__doc__.split("\n")[0], sites={w: sum(c["world"] == w for c in cells) for w in WORLDS}, people=N, pool=POOL, rates=rates, calibration=calibration, candidates=found)
    write_json(Path(out) / "audit_rates.json", result)
    note = Path(__file__).parent / "audit_rates_verdict.md"  # written by a person who read the tables
    (Path(out) / "audit_rates.md").write_text((note.read_text() + "\n" if note.exists() else "") + in_words(result).replace("# How often the privacy audit alarms\n", "", 1))
    print(in_words(result))


def in_words(r):
    pct = lambda v: f"{100 * v:.0f} %"
    cell = lambda q: f"{pct(q['share'])} [{pct(q['low'])}, {pct(q['high'])}]"
    worlds = [w for w in WORLDS if r["sites"][w]]
    line = lambda *v: "| " + " | ".join(str(x) for x in v) + " |"
    head = lambda *v: [line(*v), line(*["---"] * len(v))]
    t = [
        "# How often the privacy audit alarms",
        "",
        r["what"] + f" Sites of {r['people']} training and {r['people']} held-out people, pools of {r['pool']}; number of sites: " + ", ".join(f"{WORLDS[w][0]} {r['sites'][w]}" for w in worlds) + ". Brackets: exact 95 % intervals over sites.",
        "",
        "## Pools in which an alarm was raised",
        "",
        *head("pool", *(WORLDS[w][0] for w in worlds)),
    ]
    names = list(dict.fromkeys(q["pool"] for q in r["rates"]))
    t += [line(n, *(cell(next(q for q in r["rates"] if (q["world"], q["pool"]) == (w, n))) for w in worlds)) for n in names]
    t += ["", "Copies are training patients, smoothed by one pixel and with 5 % noise.", "", "## Are the p-values what they say?", "", "Share of the honest pools in which a check's p is below 5 % (1 %); named: pools in which it named a volume.", ""]
    t += head("check", "space", *(WORLDS[w][0] for w in worlds))
    keys = list(dict.fromkeys((q["check"], q["space"]) for q in r["calibration"]))
    say = lambda q: f"named {q['named']} of {q['of']}" if "named" in q else f"{pct(q['below_05'] / q['of'])} ({pct(q['below_01'] / q['of'])}), alarms {q['alarms']} of {q['of']}"
    t += [line(*k, *(say(next(q for q in r["calibration"] if (q["world"], q["check"], q["space"]) == (w, *k))) for w in worlds)) for k in keys]
    t += ["", "## Where the nearest patient by SSIM stands in each order of candidates", "", "SSIM with everybody is too slow for large sites, so only the first 50 candidates are compared. Share of images whose truly nearest training patient is among the first 10 of 60.", ""]
    t += head("of", "order", *(WORLDS[w][0] for w in worlds))
    keys = list(dict.fromkeys((q["of"], q["order"]) for q in r["candidates"]))
    t += [line(*k, *(pct(next(q for q in r["candidates"] if (q["world"], q["of"], q["order"]) == (w, *k))["first_10"]) for w in worlds)) for k in keys]
    if r["named"]:
        worlds = [w for w in WORLDS if any(q["world"] == w for q in r["named"])]
        t += ["", "## How many copies are named, by disguise", "", "Twenty training patients in a pool of forty; the mean share that the audit names, one by one, over " + ", ".join(f"{next(q['sites'] for q in r['named'] if q['world'] == w)} sites ({WORLDS[w][0]})" for w in worlds) + "; 95 % t-intervals over sites. Last: sites where a tenth of copies is noticed by at least one check.", ""]
        t += head("disguise", *(WORLDS[w][0] for w in worlds))
        span = lambda q: f"{pct(q['mean'])} [{pct(max(q['low'], 0))}, {pct(min(q['high'], 1))}]"
        t += [line(d, *(span(next(q for q in r["named"] if (q["world"], q["disguise"]) == (w, d))) for w in worlds)) for d in dict.fromkeys(q["disguise"] for q in r["named"])]
    return "\n".join(t) + "\n"


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("runs", type=Path)
    a.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    a.add_argument("--sites", type=int, default=40)
    a.add_argument("--copies", action="store_true", help="disguised copies instead of pools")
    a.add_argument("--report", action="store_true")
    a = a.parse_args()
    if a.report:
        report(a.runs, Path(__file__).parent.parent / "results")
    else:
        torch.set_num_threads(1)
        a.runs.mkdir(parents=True, exist_ok=True)
        for s in range(a.sites):
            for w in a.worlds:
                if not (p := a.runs / f"{w}_{s:03}{'_copies' * a.copies}.json").exists():
                    write_json(p, copies(w, s) if a.copies else one(w, s))
                    print(p.name, flush=True)
