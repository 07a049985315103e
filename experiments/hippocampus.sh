#!/usr/bin/env bash
# Does pre-training on 84 unlabelled hippocampus crops help to segment anterior and posterior hippocampus from 4, 8 or 16 labelled ones?
#   REAL=/path/to/real OUT=runs/hippocampus bash experiments/hippocampus.sh
# Two cores, no GPU: about 25 minutes of pre-training and 35 of fine-tuning on an otherwise idle machine.
set -euo pipefail
: "${REAL:?the folder with MANIFEST.csv}" "${OUT:=runs/hippocampus}"
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python experiments/tables.py "$REAL" "$OUT"
medssl ingest "$REAL" --table "$OUT/hippocampus.csv" -o "$OUT/manifest"
medssl prepare "$OUT/manifest" -o "$OUT/prepared" --spacing 1 1 1
for m in pcrlv2 mae; do medssl pretrain "$OUT/prepared" --config experiments/hippo_$m.yaml -o "$OUT/$m"; done
medssl finetune "$OUT/prepared" --config experiments/hippo_ft.yaml --arms pcrlv2 "$OUT/pcrlv2" mae "$OUT/mae" --jobs 2 -o "$OUT/finetune"
