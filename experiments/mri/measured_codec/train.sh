#!/usr/bin/env bash
# How the packaged codec was trained: twelve minutes on one GPU, of which the second part continues
# the first from a new, lower learning rate. Then it is scored on simulated people and on measured
# scans, an .npz file of complex [slices, coils, H, W] by name. With --tiny all of it runs with a
# very small codec on any machine, to try the programs.
#
#   experiments/mri/measured_codec/train.sh DATA SCANS.npz [--tiny]
set -euo pipefail
data=$1 scans=$2 runs=runs/mri-study measured=runs/mri-study/measured
study=() scored=() timed=() adapted=()
if [ "${3:-}" = --tiny ]; then
  study=(--tiny --steps 2 --device cpu) scored=(--device cpu) timed=(--side 64 --slices 2)
  adapted=(--masks 1 --steps 1)
fi
mkdir -p "$measured"
python -m experiments.mri.prepare "$data" --out data/mri-study.npz
python -m experiments.mri.study --method codec --seed 0 --minutes 7 --train-only "${study[@]}"
python -m experiments.mri.study --method codec --seed 1 --initial "$runs/codec-codec-0" --lr 5e-4 \
  --minutes 5 --results "$measured/study-rows.jsonl" "${study[@]}"
codec=(--method codec --codec "$runs/codec-codec-1" "${scored[@]}")
python -m experiments.mri.measured "${codec[@]}" --scans "$scans" --results "$measured/measured.jsonl"
python -m experiments.mri.measured "${codec[@]}" --scans "$scans" --points \
  --results "$measured/measured.jsonl"
python -m experiments.mri.phantom "${codec[@]}" --scans "$scans" --results "$measured/phantom.jsonl"
python -m experiments.mri.adaptation "${codec[@]}" --scans "$scans" \
  --results "$measured/adaptation.jsonl" "${adapted[@]}"
python -m experiments.mri.speed "${codec[@]}" --results "$measured/speed.jsonl" "${timed[@]}"
python -m experiments.mri.measured_page --folder "$measured"
