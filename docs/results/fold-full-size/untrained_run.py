"""Write a run of members that were never trained: for time, memory and exactness they serve as well as trained ones.

python docs/results/fold-full-size/untrained_run.py PRESET OUT
"""

import sys
from pathlib import Path

import torch

from emoexport.decision import Decision
from emoexport.files import write_text
from emoexport.train.checkpoint import DataRecord, FittedDecision, RunRecord, save_member
from emoexport.train.config import load_config
from emoexport.train.emotenet import ConvNeXtEmoteNet


def main(preset: str, out: Path) -> None:
    """Every weight is drawn so that it matters: layer scale begins at 1e-6, and would hide the blocks."""
    config = load_config(preset)
    names = []
    for number in range(1, config.training.members + 1):
        torch.manual_seed(number)
        network = ConvNeXtEmoteNet(config.model)
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                torch.nn.init.normal_(parameter, 0.2, 0.1)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        torch.nn.init.normal_(network.classifier.output.weight, std=0.1)
        names.append(save_member(out / "members", str(number), network, model=config.model, epoch=1, accuracy=0.0))
    record = RunRecord(
        config=config,
        data=DataRecord(
            source="synthetic:140",
            label_order="fer2013",
            seed=0,
            splits={"train": 98, "validation": 21, "test": 21},
            skipped=0,
            outside=0,
            train_faces=98,
            train_sha256="",
            validation_faces=21,
            validation_sha256="",
            validation_from="train",
        ),
        members=tuple(f"members/{name}" for name in names),
        batch_size=config.training.batch_size,
        accumulate=1,
        seconds=0.0,
        versions={},
    )
    write_text(out / "decision.json", FittedDecision(decision=Decision(labels=config.model.labels)).to_json())
    write_text(out / "run.json", record.to_json())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
