#!/usr/bin/env bash
# The pipeline, narrated.
#
#   bash train.sh                                       the demo: about 8 minutes on 2 CPU cores, nothing else needed
#   bash train.sh --model .. --data .. --out .. [..]    currreft.py on all GPUs of this machine
#   bash train.sh ablation [..]                         every row of the paper's ablation (flags of demo/ablation.py)
#
# RANKS: processes (default: the GPUs, or 1 on a CPU). THREADS: CPU threads in the demo (default 2).
set -euo pipefail
cd "$(dirname "$0")"
source support/setup.sh # leaves in $PYTHON an interpreter that has the packages
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # threads that wait for long yield their core, which others may need
RANKS=${RANKS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}
torchrun=("$PYTHON" -m support.launch --standalone --nproc_per_node "$RANKS")

if [ "${1:-}" = ablation ]; then
    exec "$PYTHON" -m demo.ablation "${@:2}"
elif [ $# -gt 0 ]; then
    exec "${torchrun[@]}" currreft.py "$@"
fi

export OMP_NUM_THREADS=${THREADS:-2}
echo "== 1. Data and base model: drawn, tokenized and pre-trained here, because no GPU and no download is assumed"
"$PYTHON" -m demo.base --out runs/demo --threads "$OMP_NUM_THREADS"

echo "== 2. Curr-ReFT: binary -> choice -> open -> rejection-sampled SFT, evaluated after every stage"
resume=$([ -f runs/demo/run/config.json ] && echo --resume || true)
"${torchrun[@]}" currreft.py --model runs/demo/base --data runs/demo/data --out runs/demo/run $resume \
    --stages binary:60 choice:60 open:80 reject:20 \
    --prompts_per_step 4 --num_generations 8 --micro_batch 4 --max_completion_length 64 --lr 1e-4 --sft_lr 1e-4 \
    --lr_schedule constant --reject_samples 4

echo "== 3. Ask the trained model about a picture; the box it finds is drawn"
"$PYTHON" sample.py answer --model runs/demo/run --image runs/demo/data/images/test/0000.png \
    --task detection --question "Where is the blue cross?" --out runs/demo/answer.png --max_completion_length 64

echo "== 4. Pictures of the run: its curves, and test questions with its answers"
"$PYTHON" -m tools.pictures run runs/demo/run
