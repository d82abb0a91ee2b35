#!/bin/bash
# usage: bash gpu27/train_gpu.sh first|second    with OUT set; one H200, or two (the controls then run beside the codec)
# first : codec from scratch (about 7 min), scores on the measured head; on a second GPU E2E-VarNet (4.3 min) and U-Net (2.3 min)
# second: codec continued from gpu27/codec (the parts that `first` returned, joined by join.sh; 5 min), scores on the head and the study's test scans;
#         on a second GPU the codec with tokens through Nirvana and without a backbone (3.2 min each)
set -u
PLAN=$1; HERE=$(cd "$(dirname "$0")" && pwd); REPO=$(pwd); RUNS=/tmp/runs27
export PYTHONPATH=$HERE/src:$HERE:${PYTHONPATH:-} PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False
mkdir -p $RUNS $OUT; OUT=$(realpath $OUT); cd $HERE
[ -e src/nirvana/assets ] || ln -s $REPO/src/nirvana/assets src/nirvana/assets
nvidia-smi --query-gpu=name --format=csv,noheader; GPUS=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
STUDY="python3 -m experiments.mri.study --data $HERE/data/mri-study.npz --device cuda --commit scan27"
START=$SECONDS
FLAGS=""
timeout 120 $STUDY --method codec --steps 3 --train-only --out $RUNS/smoke > $RUNS/smoke.log 2>&1 || { tail -25 $RUNS/smoke.log; echo "SMOKE WITH GRAPHS FAILED"; FLAGS="--no-graphs"; rm -rf $RUNS/smoke; timeout 120 $STUDY --method codec --steps 3 --train-only --out $RUNS/smoke $FLAGS 2>&1 | tail -25; }
echo "smoke done after $((SECONDS-START)) s, flags '$FLAGS'"; grep -h slices/s $RUNS/smoke.log | tail -1
train() {  # gpu seconds-limit method arguments...
  local gpu=$1 limit=$2 method=$3; shift 3
  CUDA_VISIBLE_DEVICES=$gpu timeout -s TERM $limit $STUDY --method $method --train-only --out $RUNS $FLAGS "$@" > $RUNS/$method.log 2>&1
  tail -4 $RUNS/$method.log
}
measure() {  # gpu method folder
  CUDA_VISIBLE_DEVICES=$1 timeout 100 python3 -m experiments.mri.measured --method $2 --codec $3 --scans $HERE/data/head.npz --device cuda --results $RUNS/measured.jsonl 2>&1 | tail -8
}
evaluate() {  # gpu seconds-limit method seed: scores on the study's test scans (simulated people, one-coil head and knee)
  CUDA_VISIBLE_DEVICES=$1 timeout $2 $STUDY --method $3 --seed $4 --out $RUNS --results $RUNS/results.jsonl > $RUNS/$3-scores.log 2>&1; tail -12 $RUNS/$3-scores.log
}
LIMIT=$((505-(SECONDS-START))); MINUTES=$(python3 -c "print(max(0.3, ($LIMIT-35)/60))")   # what is left of 10 minutes, less scoring and packing
if [ $PLAN = first ]; then
  ( [ $GPUS -gt 1 ] && { train 1 290 e2e-varnet --minutes 4.0; train 1 170 unet --minutes 2.1 --lr 1e-3; } ) & SIDE=$!
  train 0 $LIMIT codec --minutes $MINUTES
  measure 0 codec $RUNS/codec-codec-0
  wait $SIDE
  [ $GPUS -gt 1 ] && { measure 1 e2e-varnet $RUNS/codec-e2e-varnet-0; }
else
  ( [ $GPUS -gt 1 ] && { train 1 220 nirvana --minutes 3.0; train 1 220 tokens --minutes 3.0; measure 1 nirvana $RUNS/codec-nirvana-0; measure 1 tokens $RUNS/codec-tokens-0; } ) & SIDE=$!
  train 0 $LIMIT codec --minutes ${SECOND_MINUTES:-5.0} --initial $HERE/codec --lr 5e-4 --seed 1
  measure 0 codec $RUNS/codec-codec-1
  evaluate 0 150 codec 1
  wait $SIDE
fi
# At most 8 files of 16 MiB: codecs in parts, and one archive of logs and rows.
cd $RUNS
pack() { [ -d codec-$1 ] && { cp codec-$1/config.json $OUT/$1.config.json; split -b 15M -d codec-$1/model.safetensors $OUT/$1.part; }; }
if [ $PLAN = first ]; then pack codec-0; [ $GPUS -gt 1 ] && pack e2e-varnet-0; else pack codec-1; [ $GPUS -gt 1 ] && pack nirvana-0; fi
mv $OUT/*.config.json . 2>/dev/null
tar czf $OUT/logs.tgz *.log *.jsonl *.config.json */metrics.jsonl codec-*/facts.json 2>/dev/null
[ -d codec-unet-0 ] && echo "unet trained (weights stay here)"; ls -la $OUT; echo "total $((SECONDS-START)) s"
