"""Real images against the numbers somebody else read from them: every row of MANIFEST.csv, the broken ones too, is a case that agrees or a named problem.

The data lies outside the project (`MEDSSL_REAL`, or ../shared/data/real beside the repository). The table of all rows (row, expected, ours, verdict) is results/real_ingest.csv,
what is worth reading of it results/real_ingest.md; `MEDSSL_WRITE=1 pytest tests/test_real_ingest.py` writes both anew.
"""
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get('MEDSSL_REAL') or Path(__file__).resolve().parents[2]/'shared'/'data'/'real')
TABLE = ROOT/'MANIFEST.csv'
RESULTS = Path(__file__).resolve().parents[1]/'results'
pytestmark = pytest.mark.skipif(not TABLE.is_file(), reason=f'no real images: {TABLE} is not there (set MEDSSL_REAL)')
NO_WORD = 'the table names no modality for it, and its header says something that is none of ours'
# rows that must end as a problem: its kind, and why that is right
PROBLEMS = {
    'multimodal/sts_dicom/STS_002/CT_rtstruct.dcm': ('not-image', 'contours; the row names the series they belong to'), 'multimodal/sts_dicom/STS_002/MR_T1_rtstruct.dcm': ('not-image', 'as above'), 'multimodal/sts_dicom/STS_002/PET_rtstruct.dcm': ('not-image', 'as above'),
    'histology/wsi/CMU-1-Small-Region.svs': ('format', 'a whole slide has to be cut into tiles first'), 'spine/sct/dmri_4d.nii.gz': ('4d', 'diffusion without b-values: nothing says which volume is weighted'),
    'nasty/dicom/ExplVR_BigEndNoMeta.dcm': ('not-image', 'it is a treatment plan'), 'nasty/dicom/JPEG-lossy.dcm': ('modality', f'{NO_WORD} (nuclear medicine); the table says it cannot be decoded, SimpleITK decodes it, equal to JPGExtended.dcm'),
    'nasty/dicom/JPEG2000.dcm': ('modality', f'{NO_WORD} (nuclear medicine)'), 'nasty/dicom/JPGExtended.dcm': ('modality', f'{NO_WORD} (nuclear medicine)'), 'nasty/dicom/MR_truncated.dcm': ('truncated', ''),
    'nasty/dicom/SC_rgb_small_odd_jpeg.dcm': ('modality', f'{NO_WORD} (a screenshot)'), 'nasty/dicom/badVR.dcm': ('not-image', 'it is a dose'), 'nasty/dicom/rtdose.dcm': ('not-image', 'it is a dose'), 'nasty/dicom/rtstruct.dcm': ('not-image', 'contours, whose series is not here'),
    'nasty/dicom/emri_small.dcm': ('no-geometry', 'ten frames without a place in space are no volume'), 'nasty/dicom/emri_small_big_endian.dcm': ('no-geometry', 'as above'), 'nasty/dicom/emri_small_jpeg_2k_lossless_too_short.dcm': ('no-geometry', 'as above; the cut-off frame is found when that frame is asked for'),
    'nasty/dicom/examples_palette.dcm': ('modality', f'{NO_WORD} (ultrasound)'), 'nasty/dicom/image_dfl.dcm': ('modality', f'{NO_WORD} (a screenshot)'), 'nasty/dicom/meta_missing_tsyntax.dcm': ('unreadable', 'nested private fields and nothing else'), 'nasty/dicom/no_meta.dcm': ('unreadable', 'its first byte is a stray one, so no field begins where it should; SimpleITK cannot read it either'),
    'nasty/nifti/5D_zeros.nii.gz': ('mask-like', 'of its three volumes the first is taken, and that is constant'), 'nasty/nifti/complex.nii.gz': ('complex', ''), 'nasty/nifti/ct_perfusion.nii.gz': ('rgb', ''), 'nasty/nifti/example4d.nii.gz': ('4d', 'diffusion without b-values'), 'nasty/nifti/example_nifti2.nii.gz': ('4d', 'diffusion without b-values'),
    'nasty/nifti/low_res.nii.gz': ('modality', 'a synthetic pattern'), 'nasty/nifti/minimal.nii.gz': ('modality', 'a synthetic pattern'), 'nasty/nifti/orphan_label_hippocampus_281.nii.gz': ('label-grid', 'its person has another image, and its grid is not that of the label'), 'nasty/nifti/resampled_anat_moved.nii': ('nan', ''), 'nasty/nifti/shear.nii.gz': ('sheared', ''),
    'nasty/nifti/truncated_hippocampus_001.nii.gz': ('truncated', ''), 'nasty/nifti/with_extension.nii.gz': ('mask-like', 'a brain mask without a name that says so'), 'nasty/other/mha.mha': ('modality', 'the table says CT/MR, which is two'),
    'nasty/series/gantry_tilt': ('sheared', ''), 'nasty/series/siemens_mosaic': ('mosaic', 'its private header was removed, so the number of slices is not known'), 'nasty/series/t1_missing_slices': ('gap', '')}
# rows that differ from the table: in which fields, and who is right
OURS = {
    'nasty/images/rgba_00000773_001.png': ({'shape', 'max'}, 'ours: the fourth channel is transparency, and 255 its value; the X-ray ends at 253'),
    'nasty/nifti/functional.nii': ({'shape'}, 'both: the table counts 20 volumes, the first is taken and a row says so; over all 20 the range agrees'),
    'nasty/nifti/mpld_asl.nii.gz': ({'shape'}, 'both: 25 volumes, the first is taken; over all the range agrees'),
    'nasty/nifti/example4d.nii.gz': ({'shape'}, 'both: 2 volumes; over both the range agrees'), 'nasty/nifti/example_nifti2.nii.gz': ({'shape'}, 'both: 2 volumes; over both the range agrees'),
    'spine/sct/dmri_4d.nii.gz': ({'shape'}, 'both: 7 volumes; over all the range agrees'), 'nasty/nifti/5D_zeros.nii.gz': ({'shape'}, 'both: 3 volumes of zeros'),
    'nasty/other/phantom_EPI_asc_CLEAR_2_1.PAR': ({'shape'}, 'both: 3 volumes, the first is taken; over all the range agrees'),
    'nasty/series/philips_enhanced': ({'shape'}, 'ours: the 32 frames are 8 positions at 4 times, as their headers say; stacked they would hold each place four times'),
    'nasty/dicom/CT_small.dcm': ({'min', 'max'}, 'ours: the table gives stored values, -1024 has to be added (it says so in its own column)'),
    'nasty/dicom/cxr_mono2_jpeg.dcm': ({'max'}, 'both: lossy JPEG, whose decoders may differ by one grey value; GDCM, Pillow and ITK all give 254'), 'nasty/dicom/cxr_mono1_fake.dcm': ({'min'}, 'both: the same image turned round, as its header asks')}
TABLES_USED = {'cxr/nih/labels.csv', 'histology/lc25000_lung/labels.csv'}                                      # by folder they give the images beside them their classes
HALVES = {'nasty/nifti/air.img.gz', 'nasty/nifti/ras.img', 'nasty/other/phantom_EPI_asc_CLEAR_2_1.REC'}      # pixels of the header beside them
TREE = 'nasty/series/dicomdir_tree'


def collect(m):
    "Path -> its entries `(case, 'image' or 'label', name, FILE)`, and path -> its problems."
    by,wrong = {},{}
    for c in m.cases:
        for kind,entries in (('image', c['images']), ('label', c['labels'])):
            for name,f in entries.items():
                if isinstance(f, dict):
                    for p in m.paths(f['file']): by.setdefault(p.resolve(), []).append((c, kind, name, f))
    for r in m.problems:
        for p in m.paths(r['file']): wrong.setdefault(p.resolve(), []).append(r)
    return by,wrong


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "Rows of the table, and the manifest made from them."
    from medssl_nb.data.cases import Manifest
    from medssl_nb.data.ingest import IngestConfig, ingest
    tmp = tmp_path_factory.mktemp('real'); (tmp/'key').write_text('22'*32)
    with open(TABLE, encoding='utf-8') as f: rows = list(csv.DictReader(f))
    ingest(IngestConfig(src=ROOT, table=TABLE, out=tmp/'m', columns=dict(case='coreg_group'), key=tmp/'key', progress=False))
    m = Manifest(tmp/'m')
    return rows, m, *collect(m), tmp


@pytest.fixture(scope='module')
def folder(real):
    "The same files as a user would give them: the folder, and not a word more."
    from medssl_nb.data.cases import Manifest
    from medssl_nb.data.ingest import IngestConfig, ingest
    *_, tmp = real
    ingest(IngestConfig(src=ROOT, out=tmp/'folder', key=tmp/'key', progress=False)); m = Manifest(tmp/'folder')
    return m, *collect(m)


def numbers(text): return [float(t) for t in text.split('x')]
def files_of(row): p = (ROOT/row['path']).resolve(); return sorted(q.resolve() for q in p.rglob('*') if q.is_file()) if p.is_dir() else [p]


def read_all(paths, fmt, channels=None):
    "Every volume of a file, and how many there are."
    from medssl_nb.data.volume import ReadError, read_volume
    try: return [read_volume(paths, fmt, channels=channels, finite=False)]
    except ReadError as e:
        if e.frames < 2: raise
        return [read_volume(paths, fmt, k, channels, finite=False) for k in range(e.frames)]


def compare(row, paths, fmt, f=None, twin=None):
    "What differs between a row of the table and ours: `[(what, expected, ours)]`; `f` the FILE of the manifest, where there is one."
    vs = read_all(paths, fmt, f['channels'] if f else None); v = vs[0]; out = []
    def check(what, want, have, ok): out.append((what, want, have)) if not ok else None
    d,h,w = v.grid.shape; shape = [int(n) for n in numbers(row['shape'])]; single = fmt == 'dicom' and row['kind'] == 'file'
    while len(shape) > 3 and shape[-1] == 1: shape.pop()
    ours = [h, w, *([3] if len(v.data) == 3 else [])] if fmt == 'image' else [len(vs)*d, h, w] if single else [w, h, d]
    check('shape', shape, ours, shape == ours)
    if row['spacing_mm'] and fmt != 'image':
        want = numbers(row['spacing_mm']); have = list(v.grid.spacing[1:] if single else v.grid.spacing[::-1])
        check('spacing', want, have, len(want) == len(have) and np.allclose(want, have, atol=6e-5, rtol=0))
    if row['orientation']: check('orientation', row['orientation'], v.grid.orientation, row['orientation'] == v.grid.orientation)
    if f:
        sums = [row['sha256'], *([twin['sha256']] if twin else [])]
        want = sums[0] if len(sums) == 1 else hashlib.sha256(''.join(sorted(sums)).encode()).hexdigest()
        have = hashlib.sha256(f['sha256'].encode()).hexdigest() if row['kind'] == 'series' and len(paths) == 1 else f['sha256']
        check('sha256', want, have, want == have)
        if fmt != 'dicom': check('dtype', row['dtype'].split('/')[0], f['dtype'], np.dtype(row['dtype'].split('/')[0]).name == f['dtype'])
        assert list(v.grid.shape) == f['shape'] and np.allclose(v.grid.affine, f['affine'])        # the manifest says what the reader gives
    for what,g,fun in (('min', np.nanmin, min), ('max', np.nanmax, max)):
        if row[what]: want = float(row[what]); have = float(fun(g(x.data) for x in vs)); check(what, want, have, abs(want - have) <= 1e-4*max(1, abs(want)) + 5e-5)
    return out


def words(row):
    "What the table expects of a row."
    t = ' '.join(x for x in (row['role'], row['modality'], row['shape'], row['spacing_mm'] and row['spacing_mm'] + ' mm', row['orientation'], row['dtype'], row['min'] and f"{row['min']}..{row['max']}") if x)
    return t + (f' [{row["known_defect"]}]' if row['known_defect'] else '')


def outcome(found, wrong, of, m):
    "Cases and problems of a row's files, in words."
    cases = Counter((kind if kind == 'label' else name, 'x'.join(map(str, f['shape']))) for _,kind,name,f in {json.dumps([c['case'], n, f['file'], f['item']]): (c, k, n, f) for c,k,n,f in found}.values())
    ids = lambda t: re.sub(r'f-[0-9a-f]{12}', lambda x: os.path.relpath(os.path.commonpath(m.paths(x[0])), ROOT) if of else x[0], t)
    out = [f'{n} x {a} {s}' if n > 1 else f'{a} {s}' for (a,s),n in cases.most_common(3)] + (['...'] if len(cases) > 3 else [])
    by = {}
    for w in wrong: by.setdefault((w['severity'], w['kind']), []).append(w['reason'])
    return '; '.join(out + [(f'{len(rs)} x ' if len(rs) > 1 and of else '') + f'{s} {k}' + (f' ({ids(sorted(rs)[0])})' if of else '') for (s,k),rs in sorted(by.items())])


def judge(row, real, by_folder):
    "One line of the table: `(row, expected, ours, by folder, verdict, why)`, and what is wrong with it."
    rows, m, by, wrong, _ = real; path = row['path']; files = files_of(row)
    found = [x for p in files for x in by.get(p, [])]; bad = [x for p in files for x in wrong.get(p, [])]; kinds = {w['kind'] for w in bad}
    fm, fby, fwrong = by_folder; faults = []
    there = outcome([x for p in files for x in fby.get(p, [])], [x for p in files for x in fwrong.get(p, [])], False, fm)
    if path in TABLES_USED: there = there or 'table of labels'
    if not there: faults.append('by folder: neither a case nor a problem')
    def line(verdict, why=''): return (path, words(row), outcome(found, bad, True, m), there, verdict, why), faults
    if not found and not bad: faults.append('neither a case nor a problem'); return line('LOST')
    fmt = 'dicom' if row['format'].startswith('dicom') else 'image' if row['format'] in ('png', 'jpeg', 'jpg') else None
    if path in PROBLEMS or row['role'] == 'licence' or (row['format'] == 'csv' and row['role'] == 'label'):
        kind,why = PROBLEMS.get(path, ('ignored', 'no image'))
        if kind not in kinds or found: faults.append(f'expected only a problem {kind}, came {sorted(kinds)} and {len(found)} entries')
        if row['shape'] and row['min'] not in ('', 'rgb', 'complex') and kind in ('modality', '4d', 'nan', 'mask-like', 'no-geometry', 'label-grid'):
            faults += differs(row, compare(row, files, fmt)); return line('named problem; the voxels agree', '; '.join(x for x in (why, OURS.get(path, ('', ''))[1]) if x))
        return line('named problem', why)
    if row['role'] == 'text' or path.endswith('.npz'): return line('cases, one a row')                       # counted in tests of their own
    if path == TREE:
        faults += [] if (len(found), kinds) == (3, {'gap', 'localiser', 'projection', 'not-image'}) else [f'{len(found)} entries and {sorted(kinds)}']
        return line('several series', 'three X-rays are cases; localisers and projections are no volumes; of the CT four slices of 182 are there')
    if path in HALVES:
        c,_,_,f = found[0]; faults += [] if len(m.paths(f['file'])) == 2 else ['its header is not with it']
        return line('part of its header')
    if len({json.dumps([x[0]['case'], x[2]]) for x in found}) != 1: faults.append(f'{len(found)} entries instead of 1'); return line('LOST')
    c,kind,_,f = found[0]; twin = next((r for r in rows if r['path'] in HALVES and (ROOT/r['path']).resolve() in [p.resolve() for p in m.paths(f['file'])]), None)
    if not twin and sorted(p.resolve() for p in m.paths(f['file'])) != files: faults.append(f"{len(m.paths(f['file']))} files instead of {len(files)}")
    if (kind == 'label') != (row['role'] in ('label', 'mask')): faults.append(f'{kind} instead of {row["role"]}')
    faults += differs(row, compare(row, m.paths(f['file']), f['format'], f, twin))
    return line('differs, explained' if OURS.get(path, (0,))[0] else 'same', OURS.get(path, ('', ''))[1])


def differs(row, found):
    "Differences that nobody has explained, and explanations without a difference."
    allowed = OURS.get(row['path'], (set(), ''))[0]
    return [f'{w}: expected {a}, ours {b}' for w,a,b in found if w not in allowed] + [f'{w} agrees, though a difference is explained' for w in allowed - {w for w,_,_ in found}]


@pytest.fixture(scope='module')
def table(real, folder): return [judge(r, real, folder) for r in real[0]]


def as_csv(lines):
    f = io.StringIO(); w = csv.writer(f, lineterminator='\n'); w.writerow(('row', 'expected', 'ours', 'by folder', 'verdict', 'why')); w.writerows(lines)
    return f.getvalue()


def as_page(lines):
    cell = lambda t: t.replace('|', '\\|')
    groups = {}
    for x in lines: groups.setdefault('/'.join(x[0].split('/')[:2]) if x[0].count('/') > 1 else x[0], []).append(x[4])
    verdicts = sorted({v for x in groups.values() for v in x})
    out = ['# Every row of the real images', '', f'{len(lines)} rows of MANIFEST.csv (image files and DICOM series of the open set, numbers read by others), each ingested twice: by the table, which names modality and case, and as a bare folder.',
        'Generated and checked by `tests/test_real_ingest.py`; all rows with both outcomes are in `real_ingest.csv`. *Same* means: shape, spacing, orientation, stored type, smallest and largest value, checksum and role agree.', '',
        '| part | rows | ' + ' | '.join(verdicts) + ' |', '|---|' + '---|'*(len(verdicts) + 1)]
    out += [f'| {g} | {len(v)} | ' + ' | '.join(str(v.count(x) or '') for x in verdicts) + ' |' for g,v in groups.items()]
    out += [f'| **all** | {len(lines)} | ' + ' | '.join(str(sum(v.count(x) for v in groups.values())) for x in verdicts) + ' |', '', '## Rows that are not simply the same, and every nasty one', '', '| row | expected | ours | by folder | verdict | why |', '|---|---|---|---|---|---|']
    return '\n'.join(out + ['| ' + ' | '.join(map(cell, x)) + ' |' for x in lines if x[4] != 'same' or x[0].startswith('nasty')]) + '\n'


def test_every_row(table):
    bad = [(line[0], f) for line,faults in table for f in faults]
    print('\n', Counter(line[4] for line,_ in table))
    assert not bad, f'{len(bad)} differences between MANIFEST.csv and ours:\n' + '\n'.join(f'{p:<60} {f}' for p,f in bad)


def test_no_expectation_is_idle(real):
    "Every row that is expected to be special is a row of the table."
    assert not {*PROBLEMS, *OURS, *HALVES, TREE} - {r['path'] for r in real[0]}


@pytest.mark.parametrize('name,make', [('real_ingest.csv', as_csv), ('real_ingest.md', as_page)])
def test_committed_table(table, name, make):
    text = make([line for line,_ in table])
    if os.environ.get('MEDSSL_WRITE'): (RESULTS/name).write_text(text, encoding='utf-8')
    assert (RESULTS/name).read_text(encoding='utf-8') == text, f'results/{name} is not what the test generates; look at the difference, then MEDSSL_WRITE=1 writes it'


def test_what_the_table_says_of_broken_files():
    "Where we contradict the table, or say more than it: looked at in the files themselves."
    from medssl_nb.data.volume import ReadError, read_volume
    d = ROOT/'nasty'/'dicom'
    a,b = (read_volume(d/f'{n}.dcm').data for n in ('JPEG-lossy', 'JPGExtended')); assert (a == b).all() and a.max() == 264       # another file of the same image that the table calls sound
    one,two = (read_volume(d/f'cxr_mono{k}_{n}.dcm').data for k,n in ((1, 'fake'), (2, 'jpeg'))); assert (one + two == 255).all()
    good = [read_volume(d/'emri_small.dcm', item=k).data for k in range(10)]; assert len({x.tobytes() for x in good}) == 10
    with pytest.raises(ReadError): read_volume(d/'emri_small_jpeg_2k_lossless_too_short.dcm', item=9)
    assert all((read_volume(d/f).data == read_volume(d/'MR_small.dcm').data).all() for f in ('MR_small_RLE.dcm', 'MR_small_bigendian.dcm', 'MR_small_jp2klossless.dcm', 'MR_small_jpeg_ls_lossless.dcm', 'MR_small_padded.dcm'))
    import pydicom
    f = ROOT/'nasty'/'series'/'philips_enhanced'/'IM-0001-9600-0001.dcm'; ds = pydicom.dcmread(f); raw = ds.pixel_array.astype(float)      # its pixels are noise, so its headers are the judge
    when = [g.FrameContentSequence[0].TemporalPositionIndex for g in ds.PerFrameFunctionalGroupsSequence]; z = [float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in ds.PerFrameFunctionalGroupsSequence]
    for k in range(4):
        want = raw[sorted((i for i in range(32) if when[i] == k + 1), key=lambda i: z[i])]
        assert np.corrcoef(read_volume(f, item=k).data[0].ravel(), want.ravel())[0, 1] > .9999


def test_every_file_of_the_folder(folder):
    "Nothing is lost: the files of cases and problems are the files there are."
    m, by, wrong = folder
    assert {*by, *wrong} | {(ROOT/p).resolve() for p in TABLES_USED} == {p.resolve() for p in ROOT.rglob('*') if p.is_file()}
    assert all(p['kind'] and p['reason'] for p in m.problems) and len(m) == 401


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
