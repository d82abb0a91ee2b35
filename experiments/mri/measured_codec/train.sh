#!/usr/bin/env bash
# How the packaged codec was trained: twelve minutes on one GPU, of which the second part continues
# the first from a new, lower learning rate. Then it is scored on measured scans, an .npz file of
# complex [slices, coils, H, W] by name.
#
#   experiments/mri/measured_codec/train.sh DATA SCANS.npz
set -euo pipefail
data=$1 scans=$2 runs=runs/mri-study measured=runs/mri-study/measured
python -m experiments.mri.prepare "$data" --out data/mri-study.npz
python -m experiments.mri.study --method codec --seed 0 --minutes 7 --train-only
python -m experiments.mri.study --method codec --seed 1 --initial "$runs/codec-codec-0" --lr 5e-4 --minutes 5
codec=(--method codec --codec "$runs/codec-codec-1")
python -m experiments.mri.measured "${codec[@]}" --scans "$scans" --results "$measured/measured.jsonl"
python -m experiments.mri.phantom "${codec[@]}" --scans "$scans" --results "$measured/phantom.jsonl"
python -m experiments.mri.adaptation "${codec[@]}" --scans "$scans" --results "$measured/adaptation.jsonl"
python -m experiments.mri.speed "${codec[@]}" --results "$measured/speed.jsonl"
cp "$runs/results.jsonl" "$measured/study-rows.jsonl"
python -m experiments.mri.measured_page --folder "$measured"
