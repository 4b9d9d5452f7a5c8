#!/usr/bin/env bash
# All that needs a GPU, in the order of its worth. A step that fails or takes too long stops none after it; the exit
# code is 1 if one did.
#
#   docs/results/gpu/run.sh            from the root of a clone, in its environment; minutes to an hour
#   OUT=there DATA=fer2013.csv FULL=no docs/results/gpu/run.sh
#
# OUT gets the reports (docs/results/gpu/<device> if none). Where the package is not installed, PYTHONPATH=build/links
# after `make links` is enough. TensorRT and ONNX Runtime's providers are used where they are installed, TensorRT-RTX
# where the card is one of its own too.
set -uo pipefail
export python=${PYTHON:-python3}
work=${WORK:-$(mktemp -d)}
data=${DATA:-synthetic:5600}
full=${FULL:-yes}
failed=0
export NVIDIA_TF32_OVERRIDE=0 # for FP32 to be FP32 in ONNX Runtime's TensorRT provider too

emoexport() { "$python" -m emoexport "$@"; }
export -f emoexport

step() { # seconds, name of the log, command
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout -k 30 "$limit" bash -c '"$@"' _ "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  [ "$status" = 0 ] || failed=1
  tail -n 3 "$OUT/$name.log"
  echo "$name: exit code $status, $((SECONDS - started)) s" | tee -a "$OUT/steps.txt"
}

engines() { # name of the log, bundle, options
  local name=$1 bundle=$2
  shift 2
  for runtime in tensorrt tensorrt-rtx; do
    if "$python" -c "import sys; from emoexport.engines import BACKENDS as rows
sys.exit(not rows['$runtime'].is_usable())"; then
      step 900 "build-$name-$runtime" emoexport build "$work/$bundle" --engine "$runtime" "$@"
    fi
  done
}

report() { # folder, bundle
  mkdir -p "$OUT/$1"
  mv "$work/$2"/reports/* "$OUT/$1/" 2>/dev/null # so that none is taken for that of a later step
  cp "$work/$2"/engines/*.passport.json "$OUT/$1/" 2>/dev/null
}

small() { # layout: every precision, batches of 1 to 64
  step 900 "build-$1" emoexport build "$work/run" -o "$work/$1" --layout "$1" \
    --fp16 --bf16 --int8-fp16 --fp8 --keep-rejected
  engines "$1" "$1" --opt-batch 1 --opt-batch 16 --max-batch 64
  step 900 "bench-$1" emoexport bench "$work/$1" --device cuda
  report "$1" "$1"
}

full() { # precision, options of bench: an engine at a time, as each may take as long as it is given
  engines "full-$1" full "--$1" --opt-batch 1 --max-batch 8
  step 900 "bench-full-$1" emoexport bench "$work/full" --device cuda --precision "$1" --batch 1 --batch 8 --rounds 5 \
    "${@:2}"
  report "full-$1" full
}

device=$("$python" -c 'import sys; from emoexport.engines.cuda import find_cuda as ask; found = ask()
sys.exit(found.problem) if found.problem else print(found.devices[0].name.replace(" ", "-"))') || exit 3
OUT=${OUT:-docs/results/gpu/$device}
mkdir -p "$OUT"
step 60 doctor emoexport doctor --json
step 300 tests "$python" -m pytest -q -m gpu -p no:cacheprovider

step 600 train emoexport train --data "$data" --preset cpu --out "$work/run" --force
small branches
if [ "$full" = yes ]; then # five ConvNeXt-Large, drawn at random: 16 GB on disk
  step 300 full-run "$python" docs/results/fold-full-size/untrained_run.py guide "$work/full-run"
  step 900 build-full emoexport build "$work/full-run" -o "$work/full" \
    --fp16 --bf16 --calib-random --calib-size 7 --max-batch 8
  full fp16
fi
small stacked
for layout in branches stacked; do
  step 300 "verify-$layout" emoexport verify "$work/$layout" --max-drop 1 --max-disagreement 2
  report "$layout" "$layout"
done
if [ "$full" = yes ]; then
  full bf16 --no-rivals
fi
cat "$OUT/steps.txt"
exit "$failed"
