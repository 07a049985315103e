"""Tables for `medssl ingest --table` out of the MANIFEST.csv of the real images, with people put aside for testing.

    python experiments/tables.py REAL OUT      # REAL: the folder with MANIFEST.csv; writes OUT/hippocampus.csv
"""
import csv
import random
import sys
from pathlib import Path


def hippocampus(real: Path, out: Path, share=0.3, seed=0):
    "120 crops of 77 people; the two hemispheres of a person are on the same side."
    rows = [r for r in csv.DictReader(open(real / "MANIFEST.csv", encoding="utf-8")) if r["group"] == "small3d_segmentation"]
    people = sorted({r["subject"] for r in rows})
    random.Random(seed).shuffle(people)
    test = set(people[: round(len(people) * share)])
    with open(out / "hippocampus.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["path", "subject", "case", "modality", "role", "split", "group"])
        for r in rows:
            w.writerow([r["path"], r["subject"], r["coreg_group"], "t1" if r["role"] == "image" else "", r["role"], "test" if r["subject"] in test else "train", "hippocampus"])
    print(f"{len(rows)} files, {len(people)} people, {len(test)} of them for testing -> {out / 'hippocampus.csv'}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    real, out = map(Path, sys.argv[1:])
    if not (real / "MANIFEST.csv").is_file():
        sys.exit(f"no MANIFEST.csv in {real}")
    out.mkdir(parents=True, exist_ok=True)
    hippocampus(real, out)
