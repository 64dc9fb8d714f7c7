#!/usr/bin/env bash
# Usage:
#   ./run.sh                          the record run: check, train, quantize, score; one process per GPU
#   ./run.sh check                    what could waste a run, in seconds: machine, settings, data, disk; starts nothing
#   ./run.sh seeds 42 0 1234          the record run for each seed, then table, checks and the submission folder
#   ./run.sh frontier                 beyond the record: joined tokens, small steps at first, trellis rounding; same rules
#   ./run.sh one-gpu                  the record run on fewer GPUs: all budgets times 8 / GPUs, the same update
#   ./run.sh proxy [--docs FILE]      minutes on one GPU for trying ideas, no download: a corpus from what is installed
#   ./run.sh demo                     the same pipeline on a small CPU model and text that Python ships, minutes
#   ./run.sh test [pytest arguments]  the tests
#   ./run.sh --help                   this text
#
# A submission folder holds what the record run and one-gpu need; the other commands belong to the repository.
#
# Every setting of the record run is stated below, and then what a command changes; a variable set outside wins:
#   SEED=0 RUN_ID=seed0 DATA_PATH=shards TOKENIZER_PATH=my.model NPROC_PER_NODE=4 ./run.sh
# `python train_gpt.py --help` explains each one. NPROC_PER_NODE is the number of GPUs when not given: 1, 2, 4 or 8.
# SKIP_CHECK=1 starts without the preflight.
#
# Runs use PYTHON, else .venv if it holds what this machine needs, else python3, and say which. demo and test use
# PYTHON, else an environment in .venv that they make.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")"       # OLDPWD is where the caller is

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' run.sh; }

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python >= 3.10 with venv found (Debian, Ubuntu: apt-get install python3-venv); or set PYTHON to" \
         "an interpreter that has the packages of ${files[*]}" >&2
    return 2
}

# Set `python` to an interpreter that has the packages of `files`.
files=(requirements.txt requirements-test.txt requirements-report.txt)
use_environment() {
    python=${PYTHON:-.venv/bin/python}
    [[ -z ${PYTHON:-} ]] || return 0
    local wanted base
    wanted=$(cat "${files[@]}")
    if "$python" -c '' 2>/dev/null && [[ -f .venv/installed && $(<.venv/installed) == "$wanted" ]]; then
        return
    fi
    base=$(find_python)
    echo "environment: making .venv with $("$base" --version) and installing ${files[*]}"
    if ! command -v nvidia-smi >/dev/null && [[ $(uname) == Linux ]]; then
        echo "environment: no GPU here; the plain torch wheel brings CUDA libraries, README.md names a smaller one"
    fi
    "$base" -m venv --clear .venv
    "$python" -m pip install --quiet --disable-pip-version-check "${files[@]/#/-r}"
    echo "$wanted" > .venv/installed
    echo "environment: done, $("$python" -c 'import torch; print("torch", torch.__version__)')"
}

# What an interpreter is, and its number of GPUs; fails unless it has what a run needs here: the packages, and a torch
# that sees the GPUs if there are any.
describe() {
    "$1" - 2>/dev/null <<'EOF'
import platform, shutil, sys
import numpy, sentencepiece, torch
if sys.version_info < (3, 10) or shutil.which("nvidia-smi") and not torch.cuda.is_available():
    sys.exit(1)
print(sys.executable, platform.python_version(), "torch", torch.__version__, "gpus", torch.cuda.device_count())
EOF
}

# Set `python` and `gpus` for runs, and say which interpreter it is.
choose_python() {
    local name told names=(.venv/bin/python python3)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        if told=$(describe "$name"); then
            python=$name gpus=${told##* }
            echo "python: $told"
            return
        fi
    done
    name=${PYTHON:-python3}
    echo "error: $name cannot run this: it needs Python >= 3.10 with the packages of requirements.txt, and on a machine" \
         "with NVIDIA GPUs a torch that sees them. Install them:" >&2
    echo "    $name -m pip install -r requirements.txt$(command -v nvidia-smi >/dev/null && echo " -r requirements-gpu.txt")" >&2
    return 2
}

# Refuse a command whose companion is not here, as in a submission folder.
needs() {
    [[ -e $1 ]] || { echo "error: ./run.sh $command needs $1, which is in the repository, not here; run it there" >&2; exit 2; }
}

# Set `processes`: NPROC_PER_NODE, else the GPUs, else one.
count_processes() {
    processes=${NPROC_PER_NODE:-$((gpus ? gpus : 1))}
    [[ ! $processes =~ ^[1248]$ ]] || return 0
    echo "error: $processes processes (found $gpus GPUs): expected 1, 2, 4 or 8, because one optimizer step is 8 rows" \
         "dealt evenly; set NPROC_PER_NODE" >&2
    return 2
}

command=${1:-}
case $command in
    "" | one-gpu | frontier)
        [[ $command != frontier ]] || needs caseops_merges.py
        (($# <= 1)) || {
            echo "error: '${*:2}': $command takes no arguments; settings are variables:" \
                 "NAME=value ./run.sh $command" >&2
            exit 2
        }
        choose_python ;;
    check) needs check.py; choose_python ;;
    proxy) needs demo.py; choose_python; "$python" demo.py corpus .data/proxy --base "$OLDPWD" "${@:2}" ;;
    seeds)
        shift
        (($#)) || { echo "error: name the seeds: ./run.sh seeds 42 0 1234" >&2; exit 2; }
        stamp=$(date +%Y%m%d_%H%M%S) logs=()
        for seed in "$@"; do
            [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] ||
                { echo "error: seed '$seed': expected a whole number without leading zeros" >&2; exit 2; }
            log=logs/seed${seed}_$stamp.txt
            [[ " ${logs[*]} " != *" $log "* ]] || { echo "error: seed $seed is named twice" >&2; exit 2; }
            logs+=("$log")
        done
        needs report.py
        choose_python
        for seed in "$@"; do
            SEED=$seed RUN_ID=seed${seed}_$stamp PYTHON=$python bash run.sh
        done
        "$python" report.py table "${logs[@]}"
        "$python" report.py check "${logs[@]}"
        (($# >= 3)) || echo "note: a submission needs three seeds, these are $#" >&2
        exec "$python" report.py pack "submission_$stamp" "${logs[@]}" ;;
    demo) needs demo.py; use_environment; shift; exec "$python" demo.py "$@" ;;
    test) needs tests; use_environment; shift; exec "$python" -m pytest -q -n 2 --dist loadfile "$@" ;;   # -n 0: one process
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown command '$command'" >&2; usage >&2; exit 2 ;;
esac

# Put back below, so that what the caller exported wins; the shell's own read-only variables cannot be.
outside=$(export -p | LC_ALL=C sed '/^declare -[a-z]*r/d')

# run and model
export SEED=42
export VOCAB_SIZE=8192 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4.0
export NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 PARALLEL_START_LAYER=8 PARALLEL_FINAL_LANE=mean
export XSA_LAST_N=11 GATED_XSA=1 SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 SKIP_GATES_ENABLED=1 LN_SCALE=1
export SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_INIT_STD=0 SPARSE_ATTN_GATE_SCALE=1.0
export QK_GAIN_INIT=5.25 ROPE_BASE=10000 ROPE_DIMS=16 ROPE_YARN=0 LOGIT_SOFTCAP=30
export TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=0.005 CASEOPS_ENABLED=1

# training
export ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 GPTQ_RESERVE_SECONDS=4
export TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 WARMUP_STEPS=20
export WARMDOWN_FRAC=0.75 MIN_LR=0.1 ENABLE_LOOPING_AT=0.35
export MATRIX_LR=0.028 MUON_WD=0.095 MUON_BACKEND_STEPS=5 MUON_ROW_NORMALIZE=1
export MUON_MOMENTUM=0.97 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
export TIED_EMBED_LR=0.03 EMBED_WD=0.085 SCALAR_LR=0.02 ADAM_WD=0.02 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8
export GRAD_CLIP_NORM=0.3 EMA_DECAY=0.9965 FUSED_CE_ENABLED=1

# evaluation and quantization
export VAL_BATCH_TOKENS=524288 EVAL_SEQ_LEN=2560
export MATRIX_BITS=6 EMBED_BITS=7 GPTQ_CALIBRATION_BATCHES=16 COMPRESSOR=pergroup
export ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5 EMBED_CLIP_SIGMAS=14.0
export AWQ_LITE_ENABLED=1 AWQ_LITE_BITS=8 AWQ_LITE_GROUP_TOP_K=1 AWQ_LITE_GROUP_SIZE=64
export LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_SCOPE=all LQER_GAIN_SELECT=0
export LQER_RANK=2 LQER_ASYM_GROUP=32 LQER_TOP_K=4

# test-time training
export TTT_ENABLED=1 TTT_OPTIMIZER=adam TTT_GRAD_STEPS=1 TTT_EVAL_SEQ_LEN=2560 TTT_CHUNK_SIZE=48 TTT_BATCH_SIZE=64
export TTT_LORA_RANK=80 TTT_LORA_ALPHA=144 TTT_WARM_START_A=1 TTT_K_LORA=1 TTT_O_LORA=1 TTT_MLP_LORA=1
export TTT_LORA_LR=1e-4 TTT_BETA1=0 TTT_BETA2=0.999 TTT_WEIGHT_DECAY=2.0
export PHASED_TTT_NUM_PHASES=1 PHASED_TTT_PREFIX_DOCS=1000
export GLOBAL_TTT_LR=0.001 GLOBAL_TTT_MOMENTUM=0.9 GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_GRAD_CLIP=1.0
export GLOBAL_TTT_CHUNK_TOKENS=32768 GLOBAL_TTT_BATCH_SEQS=32 GLOBAL_TTT_WARMUP_CHUNKS=0
export GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1
export NGRAM_TILT_ENABLED=1 NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 TOKEN_ORDER=16 TOKEN_THRESHOLD=0.8 TOKEN_BOOST=2.625

# What a command changes in the record run.
case $command in
    frontier)
        # What each is worth: README.md, "Beyond the record".
        export QUARTER_ROWS_UNTIL=0.1 HALF_ROWS_UNTIL=0.5    # four steps for one at first, then two
        export RDO_LAMBDA=1 FILL_ARTIFACT=1 ;;     # trellis rounding, in steps that fill the size limit
    one-gpu)
        # The update does not depend on the number of GPUs: the same schedule in GPU seconds gives the same model.
        ((gpus)) || [[ ${NPROC_PER_NODE:-0} != 0 ]] || { echo "error: no GPU found; ./run.sh demo runs on a CPU" >&2; exit 2; }
        count_processes
        export NPROC_PER_NODE=$processes MAX_WALLCLOCK_SECONDS=$((600 * 8 / processes))
        export GPTQ_RESERVE_SECONDS=$((4 * 8 / processes)) EVAL_WALLCLOCK_SECONDS=$((600 * 8 / processes)) ;;
    proxy)
        # Short, so an average over fewer steps, and fewer documents to adapt on.
        export DATA_PATH=.data/proxy MAX_WALLCLOCK_SECONDS=180 EMA_DECAY=0.97 PHASED_TTT_PREFIX_DOCS=100 ;;
esac

# FlashAttention-4 keeps what it has compiled between runs only when told to.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1

eval "$outside"

if [[ $command == frontier ]]; then
    # Its shards have tokens joined into all ids that no text can give; joined ones are taken as they are.
    # --reuse keeps what was joined before, unless the shards have changed since.
    shards=${DATA_PATH:-data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved}
    shards=${shards%/}
    DATA_PATH=$shards
    if [[ ! -e $shards/merges.json ]]; then
        DATA_PATH=${shards}_fused
        "$python" prepare_caseops_data.py fuse "$shards" "$DATA_PATH" --merges all --reuse \
            --workers "$(getconf _NPROCESSORS_ONLN)"
    fi
    export DATA_PATH
    echo "frontier: DATA_PATH=$DATA_PATH"
fi
[[ $command != one-gpu ]] || echo "one-gpu: $processes GPUs, $MAX_WALLCLOCK_SECONDS s of training"
[[ $command != check ]] || exec "$python" check.py "${@:2}"
# A submission folder has no check.py: the preflight belongs to the repository.
if [[ -f check.py && ${SKIP_CHECK:-0} != 1 ]] && ! "$python" check.py --quiet; then
    echo "error: not started; correct the errors above, or SKIP_CHECK=1 starts all the same" >&2
    exit 1
fi

count_processes
if ((processes == 1)); then
    exec "$python" train_gpt.py
fi
exec "$python" launch.py "$processes" train_gpt.py    # like torchrun, but keeps the exit code and adds no words
