#!/usr/bin/env bash
# Trains every row of the table and compares it with the plain network; `fer2013/` is where the data is.
set -euo pipefail
here=$(dirname "$0")

row() { # name, then settings
  local name=$1 settings=() setting
  shift
  for setting; do settings+=(--set "$setting"); done
  emoexport train --data fer2013 --config "$here/plain.toml" "${settings[@]}" --out "runs/$name"
  emoexport evaluate --model-path "runs/$name" --against runs/plain --split public_test --out "reports/$name"
  cp "reports/$name/evaluation.json" "$here/$name.json"
}

architecture=(model.pyramid_channels=96 'model.attention=["se", "eca", "cbam"]' model.channel_calibration=true
  'model.pooling=["avg", "max", "gem", "attention"]' 'model.hidden=[128]')
augmentation=(training.emotion_specific=true 'training.phases=[0.2, 0.4, 0.6, 0.8, 1.0]')
averages=(training.ema_decay=0.998 training.swa_from=5)

emoexport train --data fer2013 --config "$here/plain.toml" --out runs/plain
row seed training.seed=1
row small-backbone 'model.backbone_args.channels=[16, 32, 64, 128]'
row balance training.balance=3500
row architecture "${architecture[@]}"
row averages "${averages[@]}"
row distillation "${averages[@]}" training.distill_from=3
row augmentation "${augmentation[@]}"
row votes training.soft_labels=0.5
row everything training.balance=3500 "${architecture[@]}" "${averages[@]}" training.distill_from=3 "${augmentation[@]}"
python "$here/table.py"
