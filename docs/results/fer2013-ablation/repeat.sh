#!/usr/bin/env bash
# Trains every row of the table and compares it with the plain network; `fer2013/` is where the data is.
set -euo pipefail
here=$(dirname "$0")

evaluate() { # name of the run, then options
  emoexport evaluate --model-path "runs/$1" --split public_test --out "reports/$1" "${@:2}"
  cp "reports/$1/evaluation.json" "$here/$1.json"
}

row() { # name, then settings
  local name=$1 settings=() setting
  shift
  for setting; do settings+=(--set "$setting"); done
  emoexport train --data fer2013 --config "$here/plain.toml" "${settings[@]}" --out "runs/$name"
  evaluate "$name" --against runs/plain
}

architecture=(model.pyramid_channels=96 'model.attention=["se", "eca", "cbam"]' model.channel_calibration=true
  'model.pooling=["avg", "max", "gem", "attention"]' 'model.hidden=[128]')
augmentation=(training.emotion_specific=true 'training.phases=[0.2, 0.4, 0.6, 0.8, 1.0]')
averages=(training.ema_decay=0.998 training.swa_from=5)

emoexport train --data fer2013 --config "$here/plain.toml" --out runs/plain
evaluate plain
row seed training.seed=1
row small-backbone 'model.backbone_args.channels=[16, 32, 64, 128]'
row balance training.balance=3500
row architecture "${architecture[@]}"
row averages "${averages[@]}"
row distillation "${averages[@]}" training.distill_from=3
row augmentation "${augmentation[@]}"
row votes training.soft_labels=0.5
row everything training.balance=3500 "${architecture[@]}" "${averages[@]}" training.distill_from=3 "${augmentation[@]}"

# The preset, and the same length of training with everything on.
emoexport train --data fer2013 --preset cpu --out runs/cpu
emoexport train --data fer2013 --preset cpu --set training.balance=3500 --set training.distill_from=12 \
  --set training.augmentation=0.8 --set model.feature_dropout=0.2 --set model.head_dropout=0.3 --out runs/everything-24
evaluate cpu --ensemble --against runs/everything-24

python "$here/table.py"
