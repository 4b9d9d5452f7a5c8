"""The parts of the recipe, one by one."""

import numpy as np
import pytest
import torch

from emoexport.errors import UsageError
from emoexport.train.batches import FaceBatches, soft_targets
from emoexport.train.config import TrainingConfig, load_config, preset_names
from emoexport.train.dataset import Faces
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.lightning_module import MemberTraining
from emoexport.train.standing import Candidate, podium


def candidate(epoch: int, accuracy: float, weights: str = "network") -> Candidate:
    return Candidate(epoch=epoch, weights=weights, accuracy=accuracy)


def test_the_best_of_distinct_epochs_win():
    entered = [candidate(1, 0.3), candidate(2, 0.6), candidate(2, 0.7, "ema"), candidate(3, 0.5), candidate(4, 0.1)]
    assert podium(entered, 3) == [candidate(2, 0.7, "ema"), candidate(3, 0.5), candidate(1, 0.3)]


def test_the_swa_model_competes_for_one_place():
    entered = [candidate(4, 0.9, "swa"), candidate(5, 0.8, "swa"), candidate(5, 0.2), candidate(4, 0.5)]
    assert podium(entered, 5) == [candidate(4, 0.9, "swa"), candidate(5, 0.2)]


def test_of_equals_the_earlier_epoch_wins():
    assert podium([candidate(3, 0.5), candidate(1, 0.5), candidate(2, 0.5)], 2) == [
        candidate(1, 0.5),
        candidate(2, 0.5),
    ]


def test_standing_by_epochs_equals_standing_of_all():
    """What loses a place once does not return: candidates may be forgotten as they lose."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        entered = [
            [candidate(epoch, float(rng.random()), name) for name in ("network", "ema")] for epoch in range(1, 12)
        ]
        standing: list[Candidate] = []
        for epoch in entered:
            standing = podium([*standing, *epoch], 5)
        assert standing == podium([one for epoch in entered for one in epoch], 5)


def faces_with_votes(votes: np.ndarray | None) -> Faces:
    return Faces(
        images=np.zeros((3, 32, 32, 1), np.uint8),
        labels=np.array([0, 3, 6]),
        flagged=np.zeros(3, bool),
        votes=votes,
    )


def test_votes_soften_the_target_where_there_are_any():
    votes = np.full((3, 7), np.nan, np.float32)
    votes[1] = [0, 0, 0, 0.5, 0, 0.5, 0]
    targets = soft_targets(faces_with_votes(votes), 0.4)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[1], [0, 0, 0, 0.8, 0, 0.2, 0], rtol=1e-6)
    np.testing.assert_array_equal(targets[[0, 2]], np.eye(7)[[0, 6]])


@pytest.mark.parametrize("votes", [None, np.full((3, 7), 1 / 7, np.float32)])
def test_without_votes_or_weight_the_target_is_the_label(votes):
    np.testing.assert_array_equal(soft_targets(faces_with_votes(votes), 0.0), np.eye(7)[[0, 3, 6]])


def test_two_processes_have_no_face_in_common():
    faces = Faces(
        images=np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(32, 1).repeat(32, 2),
        labels=np.zeros(20, np.int64),
        flagged=np.zeros(20, bool),
    )

    class Rank:
        world_size = 2
        current_epoch = 0

        def __init__(self, global_rank: int) -> None:
            self.global_rank = global_rank

    def shown(rank: int, epoch: int) -> list[int]:
        batches = FaceBatches(faces, faces, batch_size=5, soft_labels=0.0, seed=7)
        batches.trainer = Rank(rank)
        loader = batches.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [int(face[0, 0, 0]) for batch in loader for face in batch[0]]

    first, second = shown(0, 1), shown(1, 1)
    assert sorted(first + second) == list(range(20))
    assert shown(0, 1) == first
    assert shown(0, 2) != first


GUIDE = {
    "backbone": "convnext_large",
    "batch_size": 48,
    "learning_rate": 1e-4,
    "epochs": 400,
    "head_dropout": 0.6,
    "feature_dropout": 0.4,
    "weight_decay": 1e-3,
    "balance": 8000,
    "swa_from": 40,
    "distill_from": 30,
    "members": 5,
}


def test_the_guide_preset_has_exactly_the_guides_numbers():
    config = load_config("guide")
    found = {**config.model.model_dump(), **config.training.model_dump()}
    assert {name: found[name] for name in GUIDE} == GUIDE
    assert len(config.training.phases) == 5
    assert len(config.views) == 16
    assert config.training.restart_epochs > 0
    assert config.training.ema_decay > 0
    assert config.training.label_smoothing > 0
    assert config.training.emotion_specific
    assert config.model.attention == ("se", "eca", "cbam")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_can_be_read(preset):
    assert load_config(preset).training.members == 5


def test_single_settings_are_toml():
    config = load_config("tiny", settings=["model.attention=[]", "model.backbone=resnet10t", "training.seed = 3"])
    assert config.model.attention == ()
    assert config.model.backbone == "resnet10t"
    assert config.training.seed == 3


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.ema_decya=0.9", "did you mean 'ema_decay'"),
        ("training.epochs=none", "epochs"),
        ("epochs", "is no setting"),
        ("model.backbone.name=x", "is no table"),
        ("model.pooling=[]", "pooling"),
        ("training.phases=[]", "phases"),
    ],
)
def test_a_wrong_setting_is_a_sentence(setting, said):
    with pytest.raises(UsageError, match=said):
        load_config("tiny", settings=[setting])


def test_distillation_needs_a_teacher():
    with pytest.raises(ValueError, match="needs averaged weights"):
        TrainingConfig(distill_from=3)
    with pytest.raises(ValueError, match="needs averaged weights"):
        TrainingConfig(distill_from=3, swa_from=4)
    TrainingConfig(distill_from=4, swa_from=4)


@pytest.fixture
def training(config_file) -> MemberTraining:
    torch.manual_seed(0)
    config = load_config(
        file=config_file,
        settings=["training.ema_decay=0.9", "training.swa_from=2", "training.distill_from=1", "training.phases=[0, 1]"],
    )
    made = MemberTraining(config, ConvNeXtEmoteNet(config.model))
    pixels = torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8)
    made._training_faces = lambda: iter([pixels])  # a trainer's loader, in truth
    return made


def test_swa_is_the_mean_of_the_epochs(training, monkeypatch):
    seen = []
    for epoch in range(4):
        monkeypatch.setattr(type(training), "current_epoch", epoch)
        with torch.no_grad():
            for parameter in training.network.parameters():
                parameter.add_(torch.randn_like(parameter))
        training.on_validation_epoch_start()
        if epoch >= 1:
            seen.append([parameter.detach().clone() for parameter in training.network.parameters()])
    for index, averaged in enumerate(training.swa.module.parameters()):
        torch.testing.assert_close(
            averaged, torch.stack([one[index] for one in seen]).mean(dim=0), rtol=1e-4, atol=1e-5
        )


def test_the_teacher_is_ema_until_swa_has_begun(training, monkeypatch):
    monkeypatch.setattr(type(training), "current_epoch", 0)
    assert training.teacher is training.ema.module
    monkeypatch.setattr(type(training), "current_epoch", 1)
    training.on_validation_epoch_start()
    assert training.teacher is training.swa.module


def test_a_network_that_agrees_with_its_teacher_pays_nothing(training):
    training.network.eval()
    training.ema.module.load_state_dict(training.network.state_dict())
    pictures = torch.rand(4, 1, 32, 32)
    logits = training.network(pictures)
    share = training.settings.distill_weight
    loss = training._distilled(torch.tensor(2.0), logits, pictures, training.ema.module)
    assert loss.item() == pytest.approx((1 - share) * 2.0, abs=1e-5)
    other = training._distilled(torch.tensor(2.0), logits + torch.randn_like(logits), pictures, training.ema.module)
    assert other.item() > loss.item()


def test_averages_learn_nothing_by_themselves(training):
    assert not any(parameter.requires_grad for parameter in training.ema.parameters())
    assert not any(parameter.requires_grad for parameter in training.swa.parameters())


def test_phases_cut_the_training_into_equal_parts(training, monkeypatch):
    found = []
    for epoch in range(training.settings.epochs):
        monkeypatch.setattr(type(training), "current_epoch", epoch)
        found.append(training.phase)
    assert found == [0] * 5 + [1] * 5
