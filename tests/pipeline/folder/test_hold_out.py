"""Images that are held out: a share of every class, groups together."""

import numpy as np
import pytest
import torch

from trm_pipeline.folder.hold_out import hold_out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "classes", "known"), [(10, 4, 1.0), (40, 8, 0.4), (200, 6, 0.2), (30, 1, 0.5)])
def test_hold_out_shares_every_class(count, classes, known, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, classes, generator=generator) < 0.2).float()
    targets[torch.rand(count, classes, generator=generator) >= known] = -1
    held = hold_out(targets, 0.2, seed=seed)
    assert torch.equal(held, hold_out(targets, 0.2, seed=seed))
    assert not (held & (targets == -1).all(dim=1)).any()
    total = int((targets != -1).any(dim=1).sum())
    assert round(0.2 * total) - 1 <= held.sum() <= max(1, total // 2, round(0.2 * total))
    for c in range(classes):
        present = int((targets[:, c] == 1).sum())
        kept, out = (int((targets[part][:, c] == 1).sum()) for part in (~held, held))
        assert kept >= min(1, present)
        if count >= 40 and present >= 2:  # there is room enough
            assert 1 <= out <= max(2, 0.5 * present + 1)


@pytest.mark.parametrize("seed", range(8))
def test_hold_out_keeps_groups_together(seed):
    rng = np.random.default_rng(seed)
    groups = [f"scene {g}" for g in rng.integers(0, 20, 100)]
    of_scene = {name: (rng.random(4) < 0.4).astype(float) for name in sorted(set(groups))}
    targets = torch.tensor(np.array([np.where(rng.random(4) < 0.7, of_scene[name], -1) for name in groups]))
    held = hold_out(targets, 0.2, seed=seed, groups=groups).tolist()
    sides = {name: {side for side, other in zip(held, groups, strict=True) if other == name} for name in of_scene}
    assert all(len(side) == 1 for side in sides.values())
    assert 10 <= sum(held) <= 35
    for c in range(4):
        having = {groups[i] for i in range(100) if targets[i, c] == 1}
        assert len(having) < 4 or {True, False} == set().union(*(sides[name] for name in having))
    for names in (["all"] * 100, ["one", *["other"] * 99]):  # nothing that could be spared
        assert not hold_out(targets, 0.2, groups=names)[1:].any()


def test_hold_out_of_next_to_nothing():
    assert hold_out(torch.tensor([[1.0, 0.0]]), 0.2).tolist() == [False]
    assert hold_out(torch.full((5, 2), -1.0), 0.2).sum() == 0
    assert hold_out(torch.tensor([[1.0], [1.0], [0.0]]), 0.0).sum() == 0
    assert hold_out(torch.eye(3) * 2 - 1, 0.3).sum() == 0  # the only present label of a class is for training
    assert hold_out(torch.tensor([[1.0], [1.0], [0.0]]), 0.3).sum() == 1


def test_a_class_keeps_a_present_label_for_training_whatever_the_others_ask_for():
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        images, classes = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((4, 12), (2, 8)))
        present = torch.rand(images, classes, generator=generator) < 0.25
        held = hold_out(present.float(), 0.5, seed=seed)
        assert torch.equal(present.any(dim=0), present[~held].any(dim=0)), seed
