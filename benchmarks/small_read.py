"""Small prepared arrays, read again and again: kept in memory against opened each time.

    python benchmarks/small_read.py           # ten seconds; writes benchmarks/small_read.json

An item of the data set (read, widened, stacked with its facts), of thumbnails and of slabs, the two ways taking turns in one run, from the page cache, one thread. Processor time, because the clock of a
shared machine measures its neighbours. Arrays above 256 KB are not kept, so nothing changes for them.
"""
import os, statistics, tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np

from measure import clocked, facts, save, versions
from medssl_nb.data.cases import KEPT, Cases, Prepared, write_case, write_index

SETS = {'32 x 32': (1,32,32), '64 x 64': (1,64,64), '224 x 224': (1,224,224), '16 x 48 x 48': (16,48,48), '32 x 32 x 32': (32,32,32)}

def make(out, shape, n=64):
    g = np.random.default_rng(0); dims = 2 if shape[0] == 1 else 3
    for i in range(n):
        write_case(out, dict(case=f'c-{i}', subject=f's-{i}', session='', split=None, group='', dims=dims, channels=['xr'], spacing=[1.]*3, labels={}, fingerprint=''), g.random((1, *shape)).astype(np.float16))
    write_index(out)
    return Cases(Prepared(out), region=shape[-dims:])

def main(rounds=15):
    tmp,rows,each = Path(tempfile.mkdtemp()),[],KEPT.each
    for k,(name,shape) in enumerate(SETS.items()):
        cases = make(tmp/str(k), shape); t = {'kept': [], 'opened': []}; got = {}
        for r in range(rounds + 1):
            for way in t:
                KEPT.each = each if way == 'kept' else 0
                if way == 'opened': KEPT.fresh()
                else: [cases[i,0] for i in range(len(cases))]                 # read once: this is about every time after it
                _,c,x = clocked(lambda: [cases[i,0]['image'] for i in range(len(cases))])
                if r: t[way].append(c/len(cases)*1e3)
                got[way] = x
        assert all((a == b).all() for a,b in zip(*got.values())), 'not the same voxels'
        kept,opened = (statistics.median(t[w]) for w in ('kept', 'opened'))
        rows.append(dict(set=name, kept_cpu_ms=round(kept, 4), opened_cpu_ms=round(opened, 4), ratio=round(kept/opened, 3))); print(rows[-1], flush=True)
    KEPT.each = each
    out = dict(what='an item of the data set, milliseconds of the processor; ratio kept / opened each time', rows=rows, limit_bytes=each, total_bytes=KEPT.total, rounds=rounds, threads=1, cache='warm',
        machine=facts('cpu', 'cores', 'python'), versions=versions('blosc2', 'numpy'))
    save(Path(__file__).with_suffix('.json'), out)

if __name__ == '__main__': main()
