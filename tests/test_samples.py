"""The committed samples are what the generator writes today, byte for byte, and nobody has edited them."""
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest

from medssl_nb.core import sha256_file
from medssl_nb.data.phantom import SamplesConfig, write_samples

DATA = Path(__file__).parent.parent/'data_samples'
TABLES = ('labels.csv', 'participants.tsv', 'landmarks.csv')   # one row a file: fewer files give the first rows
SUMMARY = ('README.md', 'samples.json')

def payload(path):
    "What a file says, whatever library compressed it: zlib and its drop-in replacements write different bytes for the same content."
    b = path.read_bytes()
    if path.suffix == '.gz': return gzip.decompress(b)
    if path.suffix == '.png':
        from PIL import Image
        x = np.asarray(Image.open(io.BytesIO(b)))
        return x.shape, x.tobytes()
    return b

@pytest.fixture(scope='module')
def part(tmp_path_factory):
    return write_samples(SamplesConfig(out=str(tmp_path_factory.mktemp('samples')/'s'), heads=3, cts=1, xrays=4, tiles=4), progress=False)

def test_regenerated_part_is_the_committed_one(part):
    files = [f.relative_to(part) for f in sorted(part.rglob('*')) if f.is_file() and f.name not in SUMMARY]
    assert len(files) > 120
    recompressed = []
    for f in files:
        if f.name in TABLES: assert (DATA/f).read_text().startswith((part/f).read_text()), f
        elif (part/f).read_bytes() != (DATA/f).read_bytes():
            assert payload(part/f) == payload(DATA/f), f'{f} has other content than the generator writes'
            recompressed.append(str(f))
    if recompressed: print(f'same content, other compressor: {len(recompressed)} files, e.g. {recompressed[0]}')

def test_committed_files_are_whole_and_complete():
    listed = json.loads((DATA/'samples.json').read_text())['files']
    present = {str(f.relative_to(DATA)) for f in DATA.rglob('*') if f.is_file() and f.name != 'samples.json'}
    assert present == set(listed)
    assert not [f for f,h in listed.items() if sha256_file(DATA/f) != h]

def test_settings_are_the_defaults():
    "The README names `medssl samples` as the command; it must be true."
    settings = json.loads((DATA/'samples.json').read_text())['settings']
    default = json.loads(json.dumps({k: v for k,v in SamplesConfig().__dict__.items() if k != 'out'}))
    assert settings == default

def test_nobody_is_in_two_places():
    "Heads under DICOM are other people than heads in BIDS: a split by subject must not be fooled by two names."
    import nibabel as nib
    import pydicom
    dicom = {f.parent.name: pydicom.dcmread(f).pixel_array for f in sorted((DATA/'dicom'/'head-001').rglob('*.dcm'))}
    names = {'t1': 'T1w', 't1c': 'ce-gadolinium_T1w', 't2': 'T2w', 'flair': 'FLAIR'}
    for f in (DATA/'bids').glob('sub-*/anat/*.nii.gz'):
        m = next(k for k,v in names.items() if f.name.split('_', 1)[1] == f'{v}.nii.gz')
        x = np.asarray(nib.load(f).dataobj)
        for s in x.transpose(2, 1, 0): assert s.shape != dicom[m].shape or s.max() == 0 or not np.array_equal(s, dicom[m]), f
