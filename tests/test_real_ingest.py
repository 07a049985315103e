"""Real images against the numbers somebody else read from them: `ingest` and `read_volume` on every row of MANIFEST.csv outside `nasty`.

The data lies outside the project (`MEDSSL_REAL`, or ../shared/data/real beside the repository). Run with `-s` to see the table.
"""
import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get('MEDSSL_REAL') or Path(__file__).resolve().parents[2]/'shared'/'data'/'real')
TABLE = ROOT/'MANIFEST.csv'
pytestmark = pytest.mark.skipif(not TABLE.is_file(), reason=f'no real images: {TABLE} is not there (set MEDSSL_REAL)')
# rows that are no image by themselves, and what must become of them
PROBLEMS = {'multimodal/sts_dicom/STS_002/CT_rtstruct.dcm': 'not-image', 'multimodal/sts_dicom/STS_002/MR_T1_rtstruct.dcm': 'not-image', 'multimodal/sts_dicom/STS_002/PET_rtstruct.dcm': 'not-image',
    'histology/wsi/CMU-1-Small-Region.svs': 'format', 'spine/sct/dmri_4d.nii.gz': '4d'}


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "Rows of the table, and the manifest made from them."
    from medssl_nb.data.cases import Manifest
    from medssl_nb.data.ingest import IngestConfig, ingest
    tmp = tmp_path_factory.mktemp('real')
    with open(TABLE, encoding='utf-8') as f: rows = [r for r in csv.DictReader(f) if not r['path'].startswith('nasty/')]
    with open(tmp/'table.csv', 'w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    ingest(IngestConfig(src=ROOT, table=tmp/'table.csv', out=tmp/'m', columns=dict(case='coreg_group'), verify=True, progress=False))
    m = Manifest(tmp/'m'); by = {}
    for c in m.cases:
        for kind,entries in (('image', c['images']), ('label', c['labels'])):
            for name,f in entries.items():
                if isinstance(f, dict):
                    for p in m.paths(f['file']): by.setdefault(p.resolve(), []).append((c, kind, name, f))
    wrong = {}
    for r in m.problems:
        for p in m.paths(r['file']): wrong.setdefault(p.resolve(), []).append(r)
    return rows, m, by, wrong, tmp


def numbers(text): return [float(t) for t in text.split('x')]


def compare(row, entry, paths):
    "What differs between a row of the table and ours: `[(what, expected, ours)]`."
    from medssl_nb.data.volume import read_volume
    f = entry; v = read_volume(paths, f['format'], f['item'], channels=f['channels'])
    image = f['format'] == 'image'
    out = []
    def check(what, want, have, ok): out.append((what, want, have)) if not ok else None
    shape = [int(n) for n in numbers(row['shape'])]
    while len(shape) > 3 and shape[-1] == 1: shape.pop()
    ours = [*f['shape'][1:], *([f['channels']] if f['channels'] == 3 else [])] if image else f['shape'][::-1]
    check('shape', shape, ours, shape == ours)
    if row['spacing_mm'] and not image:
        want = numbers(row['spacing_mm']); check('spacing', want, f['spacing'][::-1], np.allclose(want, f['spacing'][::-1], atol=6e-5, rtol=0))
    if row['orientation']: check('orientation', row['orientation'], f['orientation'], row['orientation'] == f['orientation'])
    if row['n_files'] == '1' or row['kind'] == 'series': check('sha256', row['sha256'], f['sha256'], row['sha256'] == f['sha256'])
    stored = row['dtype'].split('/')[0]
    if f['format'] != 'dicom': check('dtype', stored, f['dtype'], np.dtype(stored).name == f['dtype'])
    for what,have in (('min', v.data.min()), ('max', v.data.max())):
        want = float(row[what]); check(what, want, float(have), abs(want - have) <= 1e-4*max(1, abs(want)) + 5e-5)
    return out


def test_every_row(real):
    rows, m, by, wrong, _ = real; bad, done = [], 0
    for r in rows:
        p = (ROOT/r['path']).resolve()
        files = sorted(q.resolve() for q in p.iterdir()) if p.is_dir() else [p]
        if r['path'] in PROBLEMS or r['role'] == 'licence' or (r['format'] == 'csv' and r['role'] == 'label'):
            kinds = {w['kind'] for w in wrong.get(p, [])}; want = PROBLEMS.get(r['path'], 'ignored')
            if want not in kinds: bad.append((r['path'], 'problem', want, kinds))
        elif r['role'] == 'text' or r['path'].endswith('.npz'): pass              # tests of their own below
        else:
            found = by.get(files[0], [])
            if len(found) != 1: bad.append((r['path'], 'cases', 1, len(found))); continue
            c, kind, _, f = found[0]
            if sorted(q.resolve() for q in m.paths(f['file'])) != files: bad.append((r['path'], 'files', len(files), len(m.paths(f['file']))))
            if (kind == 'label') != (r['role'] in ('label', 'mask')): bad.append((r['path'], 'role', r['role'], kind))
            bad += [(r['path'], *b) for b in compare(r, f, m.paths(f['file']))]
            done += 1
    print(f'\n{len(rows)} rows, {done} volumes and images read, {len(bad)} differences')
    assert not bad, 'differences between MANIFEST.csv and ours:\n' + '\n'.join(f'{p:<60} {what:<12} expected {w}  ours {h}' for p,what,w,h in bad)


def test_cases(real):
    "Aligned contrasts share a case; different grids do not; hemispheres of one person share a subject."
    rows, m, by, _, _ = real
    case = lambda path: by[(ROOT/path).resolve()][0][0]
    glioma = {case(f'brain/brats2023_gli/00001-000/{n}.nii.gz')['case'] for n in ('t1n', 't1c', 't2w', 't2f', 'seg_auto')}
    assert len(glioma) == 1 and list(case('brain/brats2023_gli/00001-000/t1n.nii.gz')['images']) == ['t1', 't1c', 't2', 'flair']
    sts = [case(f'multimodal/sts/STS_008/{n}_image.nii.gz') for n in ('CT', 'PET', 'MR_T1')]
    assert len({c['case'] for c in sts}) == 3 and len({c['subject'] for c in sts}) == 1 and all('seg' in c['labels'] for c in sts)
    people = {}
    for r in rows:
        if r['path'].startswith('small3d') and r['role'] == 'image': people.setdefault(r['subject'], set()).add(case(r['path'])['subject'])
    assert all(len(s) == 1 for s in people.values()) and len({s for v in people.values() for s in v}) == len(people) < 120
    assert set(case('brain/brats2013/pat0001/flair_zscored.nii.gz')['labels']) == {'seg', 'brainmask'}


def test_archive_and_reports(real):
    _, m, by, _, _ = real
    rows = by[(ROOT/'cxr/pneumoniamnist.npz').resolve()]
    assert [sum(c['split'] == s for c, *_ in rows) for s in ('train', 'val', 'test')] == [3882, 524, 624]
    assert {c['labels']['class'] for c, *_ in rows} == {0, 1} and all(f['shape'] == [1, 28, 28] for *_, f in rows)
    with open(ROOT/'reports/indiana_reports.csv', encoding='utf-8') as f: words = [r for r in csv.DictReader(f) if r['findings'].strip() or r['impression'].strip()]
    assert len(by[(ROOT/'reports/indiana_reports.csv').resolve()]) == len(words)


def test_tables_of_classes(real):
    "Chest X-rays and histology tiles with their own labels.csv: class, and persons kept together."
    from medssl_nb.data.cases import Manifest
    from medssl_nb.data.ingest import IngestConfig, ingest
    *_, tmp = real
    ingest(IngestConfig(ROOT/'cxr'/'nih', tmp/'x', modality='xr', progress=False)); m = Manifest(tmp/'x')
    with open(ROOT/'cxr'/'nih'/'labels.csv', encoding='utf-8') as f: want = {r['file']: r for r in csv.DictReader(f)}
    who = {}
    for c in m.cases:
        r = want[m.paths(c['images']['xr']['file'])[0].name]
        assert c['labels'] == {'class': r['class'], 'finding_labels': r['finding_labels'].split('|')}
        who.setdefault(r['patient_id'], set()).add(c['subject'])
    assert all(len(s) == 1 for s in who.values()) and len(who) == len({c['subject'] for c in m.cases})
    ingest(IngestConfig(ROOT/'histology'/'lc25000_lung', tmp/'h', modality='he', columns=dict(subject='cluster'), progress=False)); m = Manifest(tmp/'h')
    assert len(m) == 240 and {c['images']['he']['channels'] for c in m.cases} == {3}
    assert sorted({c['labels']['class'] for c in m.cases}) == ['lung_aca', 'lung_n', 'lung_scc']


def test_no_name_leaves(real):
    "Neither a path nor a subject of the table is anywhere outside `private/`."
    rows, m, *_ = real
    public = [json.loads(line) for f in m.dir.glob('*.jsonl') for line in f.read_text().splitlines()]
    text = '\n'.join(json.dumps(r) for r in public) + (m.dir/'meta.json').read_text()
    names = {n for r in rows for n in (Path(r['path']).name, r['subject'], r['coreg_group']) if len(n) > 7}
    assert not [n for n in names if n in text]
    assert (m.dir/'private').stat().st_mode & 0o077 == 0


def test_nasty_never_crashes(real):
    "The broken and unusual part: every file ends in a case or in a named problem."
    from medssl_nb.data.cases import Manifest
    from medssl_nb.data.ingest import IngestConfig, ingest
    *_, tmp = real
    if not (ROOT/'nasty').is_dir(): pytest.skip('no nasty part')
    ingest(IngestConfig(ROOT/'nasty', tmp/'n', modality='mr', progress=False)); m = Manifest(tmp/'n')
    ids = {f['file'] for c in m.cases for f in (*c['images'].values(), *(v for v in c['labels'].values() if isinstance(v, dict)))} | {p['file'] for p in m.problems}
    assert {p.resolve() for i in ids for p in m.paths(i)} == {p.resolve() for p in (ROOT/'nasty').rglob('*') if p.is_file()}
    assert all(p['kind'] and p['reason'] for p in m.problems)
