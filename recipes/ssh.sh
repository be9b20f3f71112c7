#!/bin/bash
# Nodes of eight GPUs, reached by ssh: recipes/ssh.sh first second third, in the clone, on a file system that all nodes see at the same path.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: recipes/ssh.sh HOST..." >&2; exit 2; }
first=$1
here=$(pwd)
started=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for host in "$@"; do
    # Without the variable torchrun does not reconnect after a node was replaced. The terminal (-tt) ends the remote processes when this script ends.
    ssh -tt "$host" "cd '$here' && TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 .venv/bin/torchrun --nnodes $# --nproc_per_node 8 --max_restarts 3 \
        --rdzv_backend c10d --rdzv_endpoint $first:29500 --rdzv_id pretrain \
        -m src.cli pretrain --config configs/model_1b.yaml --data fineweb-edu --tokens 20_000_000_000 --amp --bf16 \
        --batch_size 8 --train.tokens_per_step $((262144 * $#)) --out_dir outputs/pretrain --resume auto" &
    started+=($!)
done
for one in "${started[@]}"; do wait "$one"; done
