"""Names planted wherever an identifier can hide, the whole journey, and a search through every byte that it wrote.

Every planted word is unique to its place, so a find says where it came from. What is searched: manifest, looks, prepared volumes (unpacked), runs with TensorBoard and checkpoints, results, exports, pages, pictures,
and everything that the commands printed (both streams, as file descriptors, so that C++ libraries are heard too). Only `private/` may hold names, and the text of reports only `reports.jsonl`.
"""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")

# place -> the word that is planted there (all invented)
DICOM = dict(
    PatientName="Quistgaard^Zebulon", PatientID="MRN-7788321", PatientBirthDate="19441231", PatientBirthName="Ferrabosco^Zebulon", PatientAddress="14 Larkspindle Lane", OtherPatientNames="Abernaughty^Z",
    PatientMotherBirthName="Dravensburg", PatientTelephoneNumbers="0555-7719-334", PatientComments="met Mrs Colquhane", AccessionNumber="ACC9981277", StudyID="STU66612", StudyDate="20190704", StudyTime="093412.77",
    SeriesDate="20190705", AcquisitionDateTime="20190706093412", ContentDate="20190707", InstitutionName="St Mungover Hospital", InstitutionAddress="77 Thistledown Road", InstitutionalDepartmentName="Neuro Wexcombe",
    StationName="STATIONQX7", DeviceSerialNumber="SN-0042-XKCD", ReferringPhysicianName="Vantongeren^Ida", PerformingPhysicianName="Okonjavu^Ebele", OperatorsName="Szathmarics^Olga", NameOfPhysiciansReadingStudy="Haverbrooke^L",
    RequestingPhysician="Ullsteinberg^P", StudyDescription="follow-up of Brontovel", ImageComments="discussed with Dr Pettigrove", RequestedProcedureDescription="asked by Winterhalde", DeviceUID="1.2.826.0.1.3680043.8.498.55501",
    IssuerOfPatientID="ISSUERZQ9", MilitaryRank="Majorzq", EthnicGroup="Ethnozq", Occupation="Occupazq", AdditionalPatientHistory="hist Carrowmore", ReasonForStudy="fell at Glenfinnock", DerivationDescription="by Tressilium",
)
WORDS = dict(SeriesDescription="t1 mprage Yarborough", ProtocolName="t1 Entwhistley", ContrastBolusAgent="")  # used for a word, never written
UIDS = dict(StudyInstanceUID="1.2.826.0.1.3680043.8.498.11101", SeriesInstanceUID="1.2.826.0.1.3680043.8.498.22202", FrameOfReferenceUID="1.2.826.0.1.3680043.8.498.33303")
SEARCH = """Quistgaard Zebulon MRN-7788321 7788321 19441231 Ferrabosco Larkspindle Abernaughty Dravensburg 0555-7719-334 Colquhane ACC9981277 STU66612 20190704 093412 20190705 20190706 20190707 Mungover Thistledown Wexcombe STATIONQX7
SN-0042-XKCD Vantongeren Okonjavu Szathmarics Haverbrooke Ullsteinberg Brontovel Pettigrove Winterhalde 498.55501 498.11101 498.22202 498.33303 498.44404 ISSUERZQ9 Majorzq Ethnozq Occupazq Carrowmore Glenfinnock Tressilium Yarborough Entwhistley
Privatezq Blockzq Sequenzq Nestzq AETITLEZQ Preamblezq Typezq Foldzqdicom Filezqdcm
Descripzq Auxfilzq Intentzq Dbnamezq Extensizq Sidecarzq Lindqvarn Sessionzq 1987-03-21 Filezqnii Nrrdzq Mhazq Pngzq Ztxtzq Exifzq Jpegcomzq Picfilezq Ottenwald PID-550077 550077 Tablezq
Parnamezq Parexamzq 2004.03.28 Parprotozq Parfilezq Headlesszq 19480117 Crookedzq Unlatinzq
Truncazq Notniftizq Emptyzq Danglingzq Brokendcmzq Npzzq Foldbroken Listzq Metazq Reppatzq Repdobzq 1951-11-30 REPMRN881 Repfilezq Scanroot""".split()
FOLDER = "Outfoldzq"  # stands in the folder that the user chose for what is made: it may be printed, and written nowhere
REPORT = "Fenwickzq"  # stands in the text of a report, which is training data and kept


def tags(ds, k):
    "Everything that may name somebody, on one data set."
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    for n, v in {**DICOM, **WORDS, **UIDS}.items():
        if v:
            setattr(ds, n, v)
    ds.SOPInstanceUID, ds.BurnedInAnnotation = f"1.2.826.0.1.3680043.8.498.44404.{k}", "YES"
    inner = Dataset()
    inner.PatientName, inner.RequestedProcedureComments, inner.PixelSpacing = "Sequenzq^A", "Nestzq", [1, 1]
    outer = Dataset()
    outer.RequestAttributesSequence = Sequence([inner])
    ds.RequestAttributesSequence, ds.ReferencedStudySequence, ds.PixelMeasuresSequence = Sequence([inner]), Sequence([outer]), Sequence([inner])
    ds.add_new(0x00290010, "LO", "Blockzq"), ds.add_new(0x00291001, "LT", "Privatezq moved during the scan"), ds.add_new(0x60004000, "LT", "Privatezq overlay")


def dicom(path, k, x):
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    path.parent.mkdir(parents=True, exist_ok=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.SourceApplicationEntityTitle, ds.preamble = pydicom.uid.ExplicitVRLittleEndian, "AETITLEZQ", b"Preamblezq".ljust(128, b"\0")
    ds.SOPClassUID, ds.Modality, ds.ImageType = "1.2.840.10008.5.1.4.1.1.4", "MR", ["ORIGINAL", "PRIMARY", "Typezq"]
    tags(ds, k)
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.SliceThickness, ds.PixelSpacing = [0, 0, 2 * k], [1, 0, 0, 0, 1, 0], 2, [1, 1]
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = *x.shape, 16, 12, 11, 0, 1, "MONOCHROME2"
    ds.PixelData = x.astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)


def nifti(path, x):
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    im = nib.Nifti1Image(x, np.diag([1.0, 1, 1, 1]))
    h = im.header
    h["descrip"], h["aux_file"], h["intent_name"], h["db_name"] = b"Descripzq 19441231", b"Auxfilzq.mat", b"Intentzq", b"Dbnamezq"
    h.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Extensizq Quistgaard"))
    nib.save(im, path)


def plant(root):
    "A folder of scans with a name in every corner."
    import SimpleITK as sitk
    from PIL import Image, PngImagePlugin

    rng = np.random.default_rng(0)
    blob = lambda s: (rng.random((20, 22, 24)) * 40 + 200 * (np.indices((20, 22, 24)).transpose(1, 2, 3, 0) - np.array([10, 11, 12]) < s).all(-1)).astype(np.float32)
    for i in range(6):  # enough to train on; folders and files carry names
        d = root / f"Lindqvarn_Oskar{i}" / "ses-1987-03-21"
        x = blob(i)
        nifti(d / "Filezqnii_t1.nii.gz", x)
        nifti(d / "Filezqnii_seg.nii.gz", (x > 150).astype(np.uint8))
        (d / "Filezqnii_t1.json").write_text(json.dumps(dict(PatientName="Sidecarzq", InstitutionName="Mungover", AcquisitionTime="093412")))
    for k in range(6):
        dicom(root / "Foldzqdicom" / "Quistgaard_Zebulon" / f"Filezqdcm{k}.dcm", k, rng.integers(0, 3000, (24, 20)))
    for ext in ("nrrd", "mha"):
        im = sitk.GetImageFromArray(blob(3))
        im.SetMetaData("PatientName", f"{ext.title()}zq")
        (root / "other" / f"Sessionzq_{ext}").mkdir(parents=True)
        sitk.WriteImage(im, str(root / "other" / f"Sessionzq_{ext}" / f"t1.{ext}"))
    pics = root / "xray"
    pics.mkdir()
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Pngzq"), info.add_text("Comment", "Ztxtzq", zip=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "Exifzq", "Exifzq the photographer"
    for i in range(30):  # enough persons for an audit
        im = Image.fromarray(rng.integers(0, 255, (40, 36), dtype=np.uint8))
        im.save(pics / f"Picfilezq{i}_cxr.png", pnginfo=info) if i % 2 else im.save(pics / f"Picfilezq{i}_cxr.jpg", exif=exif, comment=b"Jpegcomzq")
    with open(root / "labels.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["file", "class", "patient_id", "patient_name"])
        for i in range(6):
            w.writerow([f"Picfilezq{i}_cxr." + ("png" if i % 2 else "jpg"), "Dr. Ottenwald: sick" if i == 5 else ("well", "sick")[i % 2], f"PID-550077{i}", "Tablezq"])
    philips(root / "mr" / "Parfilezq_t2s")
    (pics / os.fsdecode(b"Unlatinzq\xfc_cxr.png")).write_bytes((pics / "Picfilezq1_cxr.png").read_bytes()[:-9])  # a name that is no UTF-8, and a picture that is cut off
    (root / "other" / "labels.csv").write_text("Crookedzq Anna,19480117,well,one cell more\n" + "x" * 140_000 + "\n")  # without a header, and with a cell that has no end
    broken = root / "Foldbroken_Quistgaard"
    nifti(broken / "Truncazq" / "t1.nii.gz", blob(2))
    whole = (broken / "Truncazq" / "t1.nii.gz").read_bytes()
    (broken / "Truncazq" / "t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    for name, data in (("Notniftizq/t1.nii", b"hello Quistgaard"), ("Emptyzq/t1.nii.gz", b""), ("Brokendcmzq/a.dcm", (root / "Foldzqdicom/Quistgaard_Zebulon/Filezqdcm0.dcm").read_bytes()[:900]), ("Notniftizq/x.nrrd", b"NRRD0004\nPatient:=Quistgaard\n"),
                       ("Npzzq/a.npz", b"PK\x03\x04Quistgaard"), ("Notniftizq/cxr.png", b"\x89PNG\r\n\x1a\nQuistgaard")):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes(data)
    (broken / "Danglingzq_t1.nii.gz").symlink_to(broken / "Quistgaard_gone.nii.gz")


def philips(path):
    "A pair of PAR and REC; the text says who it was."
    import re

    import nibabel

    data = Path(nibabel.__file__).parent / "tests" / "data" / "phantom_EPI_asc_CLEAR_2_1"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = data.with_suffix(".PAR").read_text()
    for line, word in (("Patient name", "Parnamezq Quistgaard"), ("Examination name", "Parexamzq"), ("Examination date/time", "2004.03.28 / 09:34:12"), ("Protocol name", "Parprotozq")):
        text, n = re.subn(rf"({line} +: +).*", rf"\g<1>{word}", text)
        assert n == 1
    path.with_suffix(".PAR").write_text(text)
    path.with_suffix(".REC").write_bytes(data.with_suffix(".REC").read_bytes())


def place(tmp):
    return tmp / FOLDER


def commands(root, tmp):
    "The journey, as a user types it."
    out = place(tmp)
    (tmp / "key").write_text("33" * 32)  # who is put aside for testing follows from it
    (tmp / "lists").mkdir()
    (tmp / "lists" / "Listzq.json").write_text(json.dumps({"training": [{"image": str(root / "Lindqvarn_Oskar0/ses-1987-03-21/Filezqnii_t1.nii.gz"), "label": str(root / "Lindqvarn_Oskar0/ses-1987-03-21/Filezqnii_seg.nii.gz"), "patient": "Metazq"},
                                                                       {"image": str(root / "Foldbroken_Quistgaard/gone_t1.nii.gz")}]}))
    with open(tmp / "Repfilezq.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["patient_id", "name", "born", "mrn", "report"])
        w.writerows([["Reppatzq", "Repdobzq", "1951-11-30", "REPMRN881", f"The lungs are clear. Seen with Dr {REPORT}."], ["Reppatzq2", "Repdobzq", "1951-11-30", "REPMRN881", ""]])
    tiny = ["--train.steps", "2", "--train.batch", "2", "--train.workers", "1", "--train.warmup", "0", "--task.widths", "4", "8", "8", "8", "--task.region", "16", "16", "16"]
    (tmp / "Headlesszq.csv").write_text("Headlesszq Anna,19480117,well\nQuistgaard Zebulon,19441231,sick\n")
    fit = ["--budgets", "2", "--seeds", "0", "--steps", "2", "--batch", "2", "--region", "16", "16", "16", "--val", "0", "--group", "zqset", "--leave-unlabelled", "True"]
    return [
        ["ingest", root, "--labels", root / "labels.csv", "--modality-map", "cxr", "xr", "--group", "zqset", "--key", tmp / "key", "-o", out / "m"],
        ["ingest", tmp / "lists" / "Listzq.json", "-o", out / "ml", "--modality", "t1"],
        ["ingest", tmp / "Repfilezq.csv", "-o", out / "mr", "--text-columns", "report"],
        ["prepare", out / "m", "-o", out / "p", "--size", "32", "--workers", "2"],
        ["prepare", out / "mr", "-o", out / "pr"],
        ["qc", out / "m", "-o", out / "qc.html", "--prepared", out / "p"],
        ["qc", out / "mr", "-o", out / "qcr.html"],
        ["pretrain", out / "p", "--method", "mae", "--preset", "small3d", "-o", out / "runs" / "a", *tiny],
        ["finetune", out / "p", "-o", out / "f", "--arms", "mine", out / "runs" / "a", *fit],
        ["export", out / "runs" / "a", "-o", out / "exported"],
        # a table without a header: its first patient must not be told
        [2, "ingest", root / "xray", "--labels", tmp / "Headlesszq.csv", "-o", out / "refused"],
        [2, "ingest", root / "xray", "--table", tmp / "Headlesszq.csv", "-o", out / "refused"],
        [2, "ingest", tmp / "Headlesszq.csv", "--text-columns", "report", "-o", out / "refused"],
        [2, "ingest", root / "xray", "--labels", tmp / "Headlesszq.csv", "--label-columns", "class", "-o", out / "refused"],
        # what travels: pictures through two stages, images made instead of patients, and everything that is written about them
        ["prepare", out / "m", "-o", out / "p2", "--size", "32", "--modalities", "xr", "t1", "--test-share", "0.45"],
        ["continual", "run", plan(tmp), "-o", out / "cont"],
        ["continual", "verify", out / "cont" / "packets" / "02_volumes"],
        ["statistics", out / "cont" / "stages" / "01_films", "--data", out / "p2", "-o", out / "statistics"],
        ["invert", out / "cont" / "packets" / "01_films", "-o", out / "pool", "--n", "2", "--how.steps", "2", "--how.z-channels", "4", "--how.widths", "8", "8", "8", "--how.cache", "4", "4", "4", "--how.bar", "False", "--device", "cpu"],
        [1, "audit", out / "cont" / "packets" / "02_volumes", "--against", out / "p2", "-o", out / "audit", "--nearest", "2", "--draws", "9", "--repeats", "1"],  # it decides nothing with so few persons
    ]


def plan(tmp):
    "Radiographs, then volumes, by one small network; of the radiographs an inverted pool goes on."
    made = dict(batch=4, steps=4, lr=5e-3, z_channels=4, widths=[8, 8, 8], cache=[4, 4, 4], bar=False, save_every=2)
    task = dict(region2d=[32, 32], region3d=[16, 16, 16], patch2d=8, patch3d=8, width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, vocab=200, text_length=24)
    loop = dict(batch=2, workers=0, bar=False, device="cpu", save_every=2)
    stages = [dict(name="films", data=str(place(tmp) / "p2"), kind="2d", channels=["xr"]), dict(name="volumes", data=str(place(tmp) / "p2"), kind="3d", channels=["t1"], group=["zqset"])]
    (tmp / "plan.yaml").write_text(json.dumps(dict(method="mim", preset="small_unified", strategy="invcoss", settings=dict(share=1.0, centres=0.1, few=True, last=False, invert=made), task=task, steps=3, train=loop, score=dict(scores=["own", "refit"], refit_steps=2, cases=4), stages=stages)))  # JSON is YAML
    return tmp / "plan.yaml"


SCRIPT = """
import json, sys
from medssl_nb.cli import main
codes = []
for words in json.load(open(sys.argv[1])):
    print('$ medssl', words[0], flush=True)   # the words themselves hold the folder that was typed
    try: codes.append(main(words))
    except SystemExit as e: codes.append(e.code)
    except BaseException:
        import traceback; traceback.print_exc(); codes.append(70)
json.dump(codes, open(sys.argv[2], 'w'))
"""


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("deidentify")
    root = tmp / "Scanroot_Quistgaard"  # even the folder that is given has a name in it
    root.mkdir()
    plant(root)
    place(tmp).mkdir()
    asked = [c if isinstance(c[0], int) else [0, *c] for c in commands(root, tmp)]
    words = [[str(w) for w in c[1:]] for c in asked]
    (tmp / "words.json").write_text(json.dumps(words))
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MEDSSL_SHOW_PATHS")}
    r = subprocess.run([sys.executable, "-c", SCRIPT, tmp / "words.json", tmp / "codes.json"], capture_output=True, env={**env, "OMP_NUM_THREADS": "1"}, cwd=place(tmp), timeout=900)
    (place(tmp) / "log_stdout.txt").write_bytes(r.stdout)
    (place(tmp) / "log_stderr.txt").write_bytes(r.stderr)
    codes = json.loads((tmp / "codes.json").read_text()) if (tmp / "codes.json").is_file() else []
    said = r.stdout.decode(errors="replace")[-3000:] + r.stderr.decode(errors="replace")[-6000:]
    assert codes == [c[0] for c in asked], ([(w[0], c) for w, c in zip(words, codes)], said)
    picture(place(tmp))
    return tmp, root


def picture(out):
    "A figure and a page as the demo makes them."
    from medssl_nb.data.cases import Prepared
    from medssl_nb.plot.volume import png, show_slices
    from medssl_nb.report import Page

    p = Prepared(out / "p")
    row = p.select(dims=3)[0]
    fig = show_slices(p.read(row, channels=row["channels"])[0], spacing=row["spacing"], names=row["channels"])
    (out / "figure.png").write_bytes(png(fig))
    Page("a page").figure(fig, "one case").table(p.rows[:5], ["case", "subject", "labels"]).save(out / "page.html")


def test_the_planted_words_are_there(journey):
    "The search looks for something: every word stands in the scans, and the private folder knows the paths."
    from medssl_nb.data.privacy import find_leaks

    tmp, root = journey
    found = {r["word"] for r in find_leaks(tmp, SEARCH, skip=(FOLDER,))}
    missing = {w for w in SEARCH if w not in found}
    assert not missing, f"never planted: {missing}"
    assert find_leaks(place(tmp) / "m" / "private", ["Lindqvarn"]), "the way back is kept"


def test_nothing_leaves(journey):
    "Not one of them in any byte outside private/."
    from medssl_nb.data.privacy import find_leaks

    tmp, _ = journey
    out = place(tmp)
    files = [p for p in out.rglob("*") if p.is_file() and "private" not in p.relative_to(out).parts]
    kinds = {p.suffix for p in files}
    assert {".jsonl", ".json", ".b2nd", ".html", ".png", ".safetensors", ".yaml", ".txt", ".md"} <= kinds and any("tfevents" in p.name for p in files), kinds
    travels = {p.relative_to(out).as_posix() for p in files}
    assert {"cont/packets/02_volumes/packet.json", "cont/packets/02_volumes/README.md", "cont/packets/02_volumes/replay/films/provenance.json", "cont/packets/02_volumes/statistics/films.json", "cont/packets/02_volumes/audit/films.html", "cont/result.md", "cont/plan.yaml",
            "statistics/films.json", "pool/provenance.json", "audit/audit.html", "runs/a/config.yaml", "f/config.yaml"} <= travels, sorted(travels)
    leaks = [r for r in find_leaks(out, [*SEARCH, FOLDER]) if r["word"] != FOLDER or not r["file"].startswith("log_std")]
    assert not leaks, "\n".join(f"{r['file']} ({r['where']}): {r['word']} as {r['written']}" for r in leaks[:40])


def test_everything_was_used(journey):
    "The scans did come in: this is not the silence of an empty manifest."
    from medssl_nb.data.cases import Manifest

    tmp, _ = journey
    m = Manifest(place(tmp) / "m")
    kinds = {p["kind"] for p in m.problems}
    assert {"truncated", "unreadable", "empty", "burned-in", "label-identity"} <= kinds, kinds
    formats = {f["format"] for c in m.cases for f in c["images"].values()}
    assert {"nifti", "dicom", "sitk", "image"} <= formats
    one = next(c for c in m.cases if "t1" in c["images"] and c["images"]["t1"]["format"] == "nifti")
    assert one["session"].startswith("v-") and one["subject"].startswith("s-")
    labels = {c["labels"].get("class") for c in m.cases}
    assert {"well", "sick"} <= labels and any(str(v).startswith("k-") for v in labels)


def test_the_log_tells_how_to_find_a_file(journey):
    "Without names, and with the way to them."
    from medssl_nb.cli import main

    tmp, root = journey
    log = (place(tmp) / "log_stdout.txt").read_text()
    ids = {w.strip(":") for w in log.split() if w.startswith("f-") and len(w.strip(":")) == 14}
    assert ids and "medssl where MANIFEST f-" in log
    import contextlib
    import io

    from medssl_nb.data.cases import Manifest

    one = sorted(ids & {p["file"] for p in Manifest(place(tmp) / "m").problems})[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["where", str(place(tmp) / "m"), one]) == 0
    assert all(os.path.lexists(p) and Path(p).is_relative_to(root) for p in said.getvalue().split("\n") if p)


def test_reports_keep_their_text_and_only_there(journey):
    "What is stated is true: the words of a report are in reports.jsonl, and nowhere else; users are told."
    from medssl_nb.data.privacy import find_leaks

    out = place(journey[0])
    assert {r["file"] for r in find_leaks(out, [REPORT])} == {"pr/reports.jsonl"}
    assert "It may hold names" in (out / "qcr.html").read_text()
    assert "Text burned into pixels" in (out / "qc.html").read_text()
    log = (out / "log_stdout.txt").read_text()
    assert "not looked for: text burned into pixels, faces" in log and "may hold names" in log


def test_the_header_holds_nothing_else(journey):
    "What the reader hands on has the allowed attributes and no others, at any depth."
    from medssl_nb.data.privacy import DICOM_ALLOWED
    from medssl_nb.data.volume import dicom_header

    _, root = journey
    ds = dicom_header(next((root / "Foldzqdicom").rglob("*.dcm")), pixels=True)
    names = {e.keyword for e in ds.iterall()}
    assert names <= set(DICOM_ALLOWED) and "PixelData" in names
    text = ds.to_json() + str(ds.file_meta) + str(ds.preamble)
    for place, v in DICOM.items():
        if place != "PatientID":
            assert v not in text, place


def test_an_error_of_ours_does_not_quote(journey, monkeypatch, capfd):
    "A bug while a patient's file is open prints where in the code, and not which file."
    import medssl_nb.data.prepare as prep

    tmp, _ = journey

    def bad(row, paths, cfg):
        raise RuntimeError(f"cannot stack {next(iter(paths.values()))[0]}")

    monkeypatch.setattr(prep, "build_case", bad)
    prep.prepare(prep.PrepareConfig(manifest=str(place(tmp) / "m"), out=str(tmp / "q"), limit=2, progress=False))
    both = "".join(capfd.readouterr())
    assert "RuntimeError" in both and "in bad" in both and "Quistgaard" not in both and "Lindqvarn" not in both and "MEDSSL_SHOW_PATHS" in both


@pytest.mark.parametrize("hole", ["a tag", "a name", "a path in a reason", "metadata"])
def test_the_search_notices(tmp_path, monkeypatch, hole):
    "Let one thing through, and it is found: a check that cannot fail is none."
    import medssl_nb.data.ingest as ing
    from medssl_nb.data import privacy, volume
    from medssl_nb.data.privacy import find_leaks

    root = tmp_path / "scans"
    for k in range(3):
        dicom(root / "Quistgaard" / f"{k}.dcm", k, np.random.default_rng(k).integers(0, 3000, (12, 10)))
    if hole == "a tag":  # the allow-list lets the name of the patient through, and somebody writes it down
        monkeypatch.setitem(privacy.DICOM_ALLOWED, "PatientName", ("number", "-", "a mistake"))
        privacy._tags.cache_clear()
        probe = volume.probe
        monkeypatch.setattr(ing, "probe", lambda paths, *a, **k: dict(probe(paths, *a, **k), operator=str(volume.dicom_header(paths[0]).get("PatientName", ""))))
    if hole == "a name":
        monkeypatch.setattr(ing.Names, "of", lambda self, text, prefix: f"{prefix}-{text}")
    if hole == "a path in a reason":
        monkeypatch.setattr(ing, "probe", lambda paths, *a, **k: (_ for _ in ()).throw(volume.ReadError(f"cannot read {paths[0].parent.name}", kind="unreadable")))
    if hole == "metadata":
        write = ing.write_manifest
        monkeypatch.setattr(ing, "write_manifest", lambda out, cases, problems, meta, paths: write(out, cases, problems, dict(meta, source=str(root / "Quistgaard")), paths))
    try:
        ing.ingest(ing.IngestConfig(root, tmp_path / "m", workers=0, progress=False))
    except Exception:
        assert hole == "a path in a reason"  # refused already at the door of the manifest, or nothing is left to ingest
    finally:
        privacy._tags.cache_clear()
    assert find_leaks(tmp_path / "m", SEARCH), hole
