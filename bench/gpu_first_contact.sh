#!/usr/bin/env bash
# The first ten minutes on a GPU: is it right, what does it take, which predictions hold.
#
#   bench/gpu_first_contact.sh [--rehearse] OUT [SECTION...]
#
# Every section has its seconds and ends in a file OUT/SECTION.txt, whatever becomes of it; sections.tsv says with which
# status and after how long. The last one, `verdict`, holds what was found against the predictions that are written in
# bench/first_contact.py. OUT/all.tar holds all files so far. Nothing is installed and no network is asked: $PYTHON
# (default: python3) needs torch, triton, numpy, safetensors and pytest. --rehearse: on a CPU in Triton's interpreter, at
# sizes that take seconds.
set -u

rehearse=""
if [ "${1:-}" = --rehearse ]; then rehearse=yes; shift; fi
if [ $# -lt 1 ]; then sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
chosen=" $* "
python=${PYTHON:-python3}

# The package as an installation lays it out: kernels/ is gemmascope.kernels.
path=$(mktemp -d) && mkdir "$path/gemmascope" || exit 2
child=""
trap 'rm -rf "$path"' EXIT
trap 'kill $child 2> /dev/null; exit 143' INT TERM
ln -s "$repository"/gemmascope/* "$repository/kernels" "$path/gemmascope/"
export PYTHONPATH="$path:$repository" PYTHONSAFEPATH=1 PYTHONWARNINGS=ignore
cd "$repository" || exit 2

tests="-m pytest --import-mode=append -p no:cacheprovider --tb=short -m gpu"
bench="-m bench run --suite step --only"
contact="-m bench.first_contact"
step="--shapes 2304x16384 --l0 64 --rounds 10"
entries="tests/kernels/test_entries.py tests/kernels/test_dense.py tests/kernels/test_encode.py"
sums="tests/kernels/test_residual.py tests/kernels/test_latents.py tests/kernels/test_update.py"
steps="tests/training/test_step.py tests/training/test_sparse_loss.py"
kinds="tests/kernels/test_topk.py tests/kernels/test_selection.py tests/training/test_gated.py tests/training/test_relu.py tests/training/test_topk.py tests/training/test_transcoder.py"
select="--shapes 2304x16384 --rounds 10 --no-memory"
suite="--ring-tokens 65536 --blocks 2"
wide131k="--shapes 3584x131072 --l0 64 --rounds 5 --no-memory"
if [ "$rehearse" ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 FIRST_CONTACT_REHEARSAL=1
    tests="-m pytest --import-mode=append -p no:cacheprovider --tb=short -k nothing"
    step="--shapes 16x64 --l0 4 --rounds 1 --tokens 24 --device cpu --no-memory" select=$step
    suite="--model tiny --device cpu --d-sae 64 --l0 6 --context 32 --ring-tokens 1024 --batch 128 --compute-dtype fp32"
    entries=tests/kernels/test_dense.py sums=tests/kernels/test_residual.py steps="" wide131k=$step
fi

section() { # NAME SECONDS COMMAND...: runs it if it is wanted, and keeps what it says
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    if [ "$rehearse" ]; then limit=600; fi  # a CPU may be busy with other things
    case "$chosen" in "  " | *" $name "*) ;; *) return ;; esac
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1 < /dev/null &
    child=$!
    wait $child
    status=$?
    if [ $status = 124 ]; then echo "first contact: stopped after $limit s" >> "$out/$name.txt"; fi
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" | tee -a "$out/sections.tsv"
    keep
}

keep() {
    (cd "$out" && tar -cf all.tar ./*.txt sections.tsv)
}

rm -f "$out/sections.tsv"
# What comes first matters most. 590 seconds in all.
section machine 15 "$python" $contact machine
section correctness 120 "$python" $tests $entries $steps
section units 60 "$python" $tests $sums
section step 45 "$python" $bench ours $step --determinism
section skew0 30 "$python" $bench ours $step --skew 0 --no-memory
section counters 50 ncu --csv --metrics "$("$python" $contact metrics)" --kernel-name 'regex:_(update|residual|encode_fwd.*)_kernel' \
    --launch-count 6 "$python" $contact one_step
section variants 80 "$python" $contact variants
section memcheck 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" $contact small_step
section wide131k 45 "$python" $bench ours $wide131k
section compiled 45 "$python" $bench dense_compiled $step --no-memory
section wide1m 50 "$python" $contact wide
# By name alone: the step with a first moment in Adam, to be asked for beside `step`, the other kinds of SAE, what TopK's
# selection takes, and a whole suite, which takes minutes.
case "$chosen" in *" beta1 "*) section beta1 45 "$python" $bench ours $step --beta1 0.7 ;; esac
case "$chosen" in *" kinds "*) section kinds 240 "$python" $tests $kinds ;; esac
case "$chosen" in *" topk "*) section topk 120 "$python" -m bench run --suite topk $select ;; esac
case "$chosen" in *" suite "*) section suite 420 "$python" -m bench.suite $suite ;; esac
"$python" $contact verdict "$out" | tee "$out/verdict.txt"
keep
