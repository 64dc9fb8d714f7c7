#!/usr/bin/env bash
# Usage:
#   ./run.sh                          the record run: train, quantize, score; one process per GPU
#   ./run.sh demo                     the same pipeline on a small CPU model and text that Python ships, minutes
#   ./run.sh test [pytest arguments]  the tests
#   ./run.sh --help                   this text
#
# Every setting of the record run is stated below; a variable that is set outside wins:
#   SEED=0 RUN_ID=seed0 DATA_PATH=shards TOKENIZER_PATH=my.model NPROC_PER_NODE=4 ./run.sh
# `python train_gpt.py --help` explains each one. NPROC_PER_NODE is the number of GPUs when not given: 1, 2, 4 or 8.
#
# The record run uses PYTHON, else python3. demo and test use PYTHON, else an environment in .venv that they make.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

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
         "an interpreter that has requirements.txt and requirements-test.txt" >&2
    return 2
}

# Set `python` to an interpreter that has requirements.txt and requirements-test.txt.
use_environment() {
    python=${PYTHON:-.venv/bin/python}
    [[ -z ${PYTHON:-} ]] || return 0
    local wanted base
    wanted=$(cat requirements.txt requirements-test.txt)
    if "$python" -c '' 2>/dev/null && [[ -f .venv/installed && $(<.venv/installed) == "$wanted" ]]; then
        return
    fi
    base=$(find_python)
    echo "environment: making .venv with $("$base" --version) and installing requirements.txt, requirements-test.txt"
    if ! command -v nvidia-smi >/dev/null && [[ $(uname) == Linux ]]; then
        echo "environment: no GPU here; the plain torch wheel brings CUDA libraries, README.md names a smaller one"
    fi
    "$base" -m venv --clear .venv
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
    echo "$wanted" > .venv/installed
    echo "environment: done, $("$python" -c 'import torch; print("torch", torch.__version__)')"
}

case ${1:-} in
    "") ;;
    demo) use_environment; shift; exec "$python" demo.py "$@" ;;
    test) use_environment; shift; exec "$python" -m pytest -q "$@" ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown command '$1'" >&2; usage >&2; exit 2 ;;
esac

outside=$(export -p)                  # put back below, so that what the caller exported wins

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

eval "$outside"

python=${PYTHON:-python3}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=${NPROC_PER_NODE:-$((gpus ? gpus : 1))}
if [[ ! $processes =~ ^[1248]$ ]]; then
    echo "error: $processes processes (found $gpus GPUs): expected 1, 2, 4 or 8, because one optimizer step is 8 rows" \
         "dealt evenly; set NPROC_PER_NODE" >&2
    exit 2
fi
if ((processes == 1)); then
    exec "$python" train_gpt.py
fi
exec "$python" launch.py "$processes" train_gpt.py    # like torchrun, but keeps the exit code and adds no words
