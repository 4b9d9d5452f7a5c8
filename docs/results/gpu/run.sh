#!/usr/bin/env bash
# All that needs a GPU, in the order of its worth. A step that fails or takes too long stops none after it.
#
#   docs/results/gpu/run.sh            from the root of a clone, in its environment; minutes to an hour
#   OUT=there DATA=fer2013.csv FULL=no docs/results/gpu/run.sh
#
# OUT gets the reports (docs/results/gpu/<device> if none). Where the package is not installed, PYTHONPATH=build/links
# after `make links` is enough. TensorRT and ONNX Runtime's providers are used where they are installed.
set -uo pipefail
python=${PYTHON:-python3}
work=${WORK:-$(mktemp -d)}
data=${DATA:-synthetic:5600}
export NVIDIA_TF32_OVERRIDE=0 # for FP32 to be FP32 in ONNX Runtime's TensorRT provider too

emoexport() { "$python" -m emoexport "$@"; }

step() { # seconds, name of the log, command
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" bash -c "$(declare -f emoexport); python=$python; \"\$@\"" _ "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  tail -n 3 "$OUT/$name.log"
  echo "$name: exit code $status, $((SECONDS - started)) s" | tee -a "$OUT/steps.txt"
}

bundle() { # run, bundle, layout, precisions and the like
  local run=$1 name=$2 layout=$3
  shift 3
  step 900 "build-$name" emoexport build "$run" -o "$work/$name" --layout "$layout" "$@"
  for runtime in tensorrt tensorrt-rtx; do
    if "$python" -c "import ${runtime/-/_}" 2>/dev/null; then
      step 900 "build-$name-$runtime" emoexport build "$work/$name" --engine "$runtime" --opt-batch 1 --opt-batch 16
    fi
  done
}

report() { # bundle
  local folder=$OUT/$1
  mkdir -p "$folder"
  cp "$work/$1"/reports/* "$work/$1"/engines/*.passport.json "$folder/" 2>/dev/null
}

device=$("$python" -c 'import sys; from emoexport.engines.cuda import find_cuda as ask; found = ask()
sys.exit(found.problem) if found.problem else print(found.devices[0].name.replace(" ", "-"))') || exit 3
OUT=${OUT:-docs/results/gpu/$device}
mkdir -p "$OUT"
step 60 doctor emoexport doctor --json
step 300 tests "$python" -m pytest -q -m gpu -p no:cacheprovider

step 600 train emoexport train --data "$data" --preset cpu --out "$work/run" --force
for layout in branches stacked; do
  bundle "$work/run" "$layout" "$layout" --fp16 --bf16 --int8-fp16 --fp8 --keep-rejected
  step 300 "verify-$layout" emoexport verify "$work/$layout" --limit 1000
  step 600 "bench-$layout" emoexport bench "$work/$layout" --device cuda
  report "$layout"
done

if [ "${FULL:-yes}" = yes ]; then # five ConvNeXt-Large, drawn at random: 16 GB on disk
  step 300 full-run "$python" docs/results/fold-full-size/untrained_run.py guide "$work/full-run"
  bundle "$work/full-run" full branches --fp16 --bf16 --calib-random --calib-size 7 --max-batch 8
  step 900 bench-full emoexport bench "$work/full" --device cuda --batch 1 --batch 8 --rounds 5
  report full
fi
cat "$OUT/steps.txt"
