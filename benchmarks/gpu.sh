#!/usr/bin/env bash
# What only a GPU can show, within ten minutes and without a network (make gpu):
#
#   build      the CUDA kernels, for this GPU (csrc/build_kernels.py)
#   check      every op at the shapes that are timed: bits on exact inputs; compiles their kernels
#   tests      pytest -m "(gpu or interpret or emulate) and not slow": the kernels' tests, and a decode
#              step as a CUDA graph
#   sanitizer  compute-sanitizer memcheck, racecheck, synccheck, once per op; contexts of one split
#              and more
#   bench      those shapes, in what time is left, appended to a CSV row by row
#   model      whole models of them beside bf16, the same way; not unless PARTS names it
#
# Settings, by environment:
#   LOWBIT_PYTHON      the Python to use, with torch, triton and pytest; lowbit need not be installed
#   PARTS              those to run, in order (default: all)
#   OPS SHAPES ROWS CONTEXTS   what is checked and timed
#   LIMIT              seconds for everything together
#   RESULTS LOGS       folders of the CSV and of each part's full output
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
PYTHON=${LOWBIT_PYTHON:-python3}
PARTS=${PARTS:-build check tests sanitizer bench}
OPS=${OPS:-kv_attention int_gemm weight_only_gemm hadamard_quant silu_mul_hadamard_quant \
    kv_attention_quant rmsnorm_quant kv_append hadamard quantize pack}
SHAPES=${SHAPES:-llama3-8b}
ROWS=${ROWS:-1 16 2048 8192}
CONTEXTS=${CONTEXTS:-32768}
LIMIT=${LIMIT:-570}
RESULTS=${RESULTS:-benchmarks/results}
LOGS=${LOGS:-build/gpu/logs}
JOBS=$(($(nproc) < 12 ? $(nproc) : 12))

# Not the folder that Python is started in, but what is found first: see below.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c "import lowbit.kernels" 2>/dev/null; then
    # lowbit.kernels lies in kernels/triton: where nothing is installed, links put it in its place.
    rm -rf build/gpu/site && mkdir -p build/gpu/site/lowbit
    ln -s "$ROOT"/lowbit/* build/gpu/site/lowbit/
    ln -s "$ROOT/kernels/triton" build/gpu/site/lowbit/kernels
    export PYTHONPATH=$ROOT/build/gpu/site:$PYTHONPATH
fi

NAME=$("$PYTHON" -c "
import torch
print(torch.cuda.get_device_name().removeprefix('NVIDIA ').lower().replace(' ', '-'))
" 2>/dev/null) || { echo "gpu.sh: $PYTHON finds no CUDA device, or no torch"; exit 2; }
mkdir -p "$RESULTS" "$LOGS"
CSV=$RESULTS/$NAME.csv
FAILED=""
export PYTHON SHAPES CONTEXTS CSV

# part NAME SECONDS LINES COMMAND...: at most SECONDS of what is left; the last LINES are shown
part() {
    local name=$1 limit=$2 lines=$3 start=$SECONDS left=$((LIMIT - SECONDS)) status
    shift 3
    limit=$((limit < left ? limit : left))
    if ((limit < 5)); then
        echo "== $name: no time left" && FAILED+=" $name"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
    status=$?
    tail -n "$lines" "$LOGS/$name.log"
    echo "== $name: $((SECONDS - start)) s, exit $status$( ((status == 124)) && echo " (time limit)")"
    ((status == 0)) || FAILED+=" $name"
}

build() {
    "$PYTHON" csrc/build_kernels.py || return
    [[ ! -d build/gpu/site ]] || ln -sf "$ROOT"/lowbit/*.so build/gpu/site/lowbit/
}

check() {
    # One process for each op and row count.
    for op in $OPS; do
        for M in $ROWS; do echo "$op $M"; done
    done | xargs -P "$JOBS" -L 1 bash -c \
        '"$PYTHON" -m benchmarks.check "$0" --M "$1" --shapes $SHAPES --context $CONTEXTS'
}

tests() {
    local parallel=""
    "$PYTHON" -c "import xdist" 2>/dev/null && parallel="-n $JOBS"
    "$PYTHON" -m pytest -q -m "(gpu or interpret or emulate) and not slow" --continue-on-collection-errors $parallel tests
}

bench() {
    "$PYTHON" -m lowbit.cli bench $OPS --shapes $SHAPES --M $ROWS --context $CONTEXTS --csv "$CSV"
}

model() {
    "$PYTHON" -m lowbit.cli bench model --shapes $SHAPES --csv "${CSV%.csv}-models.csv"
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    [[ -x $tool ]] || { echo "compute-sanitizer is not installed" && return 0; }
    # Each tensor in memory of its own, or an access past its end would fall into the pool.
    export TOOL=$tool PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck; do
        for op in $OPS; do echo "$tool $op"; done
    done | xargs -P "$JOBS" -L 1 bash -c \
        '"$TOOL" --tool "$0" --target-processes application-only --error-exitcode 9 \
            "$PYTHON" -m benchmarks.check "$1" --context 64 600 || { echo "$0 $1: FAILED"; exit 1; }'
}

export -f build check tests bench model sanitizer
export ROOT OPS ROWS JOBS
for name in $PARTS; do
    case $name in
    build) part build 180 3 bash -c build ;;
    check) part check 130 40 bash -c check ;;
    tests) part tests 220 25 bash -c tests ;;
    sanitizer) part sanitizer 100 40 bash -c sanitizer ;;
    bench) part bench "$LIMIT" 100 bash -c bench ;;
    model) part model "$LIMIT" 100 bash -c model ;;
    *) echo "gpu.sh: no part $name" && FAILED+=" $name" ;;
    esac
done
echo "$SECONDS s; CSV: $CSV; full output: $LOGS; failed:${FAILED:- none}"
[[ -z $FAILED ]]
