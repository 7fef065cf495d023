# What cifar10.sh and mnist.sh share: train a U-Net and a feature network, run the table, save shards. Sourced by them.
#
# A stage is one call of at most ten minutes; a training that takes longer is gone on with by calling it again.
# In small, to try the scripts: CPU=1 STEPS=20 FEATURE_STEPS=20 BATCH=16 CHANNELS=32,32,32 N=64 TABLE_BATCH=32
set -euo pipefail
python=${PYTHON:-python}
samplerbench() { "$python" -m samplerbench "$@"; }
device=(); precision=(--mixed-precision bf16 --compile)
[ -n "${CPU:-}" ] && { device=(--cpu); precision=(); }

train_features() {
  samplerbench train features --data "$data" --out "$runs/features" --channels "$feature_channels" \
    --dimension 128 --steps "${FEATURE_STEPS:-6000}" --batch-size "${BATCH:-256}" "${device[@]}"
}

train_unet() {
  samplerbench train unet --data "$data" --out "$runs/unet" --channels "${CHANNELS:-$channels}" --layers 2 \
    --attention 1 --head-dim 32 --groups 32 --dropout 0.1 $flip --batch-size "${BATCH:-256}" --lr 4e-4 --warmup 1000 \
    --steps "${STEPS:-$steps}" --ema 0.9995 --checkpoint-every 5000 --minutes "${MINUTES:-8.5}" \
    "${precision[@]}" "${device[@]}"
}

run_table() {
  samplerbench run "$suite" --model "$runs/unet" --features "$runs/features" --data "$data" --out "$runs/results" \
    --n "${N:-10000}" --batch-size "${TABLE_BATCH:-2048}" --dtype "$([ -n "${CPU:-}" ] && echo fp32 || echo bf16)" \
    --device "$([ -n "${CPU:-}" ] && echo cpu || echo auto)"
}

# The weights in half precision, in files small enough to be fetched one by one; and the results as they are.
save() {
  "$python" "$(dirname "${BASH_SOURCE[0]}")/shards.py" "$runs/unet" "$1/unet"
  cp -r "$runs/results" "$1/results"
}

case "${1:-}" in
  features) train_features ;;
  train) train_unet ;;
  table) run_table; [ -n "${OUT:-}" ] && save "$OUT" || true ;;
  all) train_features; until [ -e "$runs/unet/model_index.json" ]; do train_unet; done; run_table ;;
  *) echo "usage: bash $0 features | train | table | all" >&2; exit 2 ;;
esac
