#!/usr/bin/env bash
# Does pre-training on 4406 unlabelled chest X-rays help to tell pneumonia from normal with 10, 30 or 100 labels?
#   REAL=/path/to/real OUT=runs/xray bash experiments/xray.sh
set -euo pipefail
: "${REAL:?the folder with MANIFEST.csv}" "${OUT:=runs/xray}"
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
medssl ingest "$REAL/cxr/pneumoniamnist.npz" -o "$OUT/manifest" --modality xr --group pneumoniamnist
medssl prepare "$OUT/manifest" -o "$OUT/prepared" --size 64
for m in pcrlv2 mae; do medssl pretrain "$OUT/prepared" --config experiments/xr_$m.yaml -o "$OUT/$m"; done
medssl finetune "$OUT/prepared" --config experiments/xr_ft.yaml --arms pcrlv2 "$OUT/pcrlv2" mae "$OUT/mae" --jobs 2 -o "$OUT/finetune"
