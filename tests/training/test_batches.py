"""What is drawn for the samples of a batch: sigma in its part, by the size of the image, and noise with an offset."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import Sample, make_items, make_sample_order
from zimage_train.dataset.scan import ImageRecord
from zimage_train.training import batches, validation

SHAPE = torch.Size((16, 64, 64))


def made_config(**timesteps: Any) -> Config:
    return Config.model_validate({"name": "a", "data": [{"folder": "p"}], "timesteps": timesteps})


def samples(config: Config, count: int, epoch: int = 0, side: int = 512) -> list[Sample]:
    """A sample of each of `count` square images, at one resolution."""
    images = [ImageRecord(Path(f"{index}"), f"digest {index}", side, side, ("a",)) for index in range(count)]
    items = make_items(config, [images])
    order = make_sample_order(config, [item for item in items if item.resolution == 512])
    return [order.sample(item, epoch) for item in order.concept.items]


def test_sigmas_of_a_stratified_epoch():
    """Every epoch has one sigma in each n-th of the density, up to a turn; independent draws have none of this."""
    for epoch in (0, 1, 7):
        counts = {}
        for stratified in (True, False):
            config = made_config(type="sigmoid", shift=2.0, stratified=stratified)
            sigmas = [float(batches.sample_sigma(config, one)) for one in samples(config, 400, epoch)]
            odds = [sigma / (1 - sigma) / 2.0 for sigma in sigmas]
            shares = [0.5 * math.erfc(-math.log(odd) / math.sqrt(2)) for odd in odds]
            counts[stratified] = [sum(int(share * 20) == twentieth for share in shares) for twentieth in range(20)]
        assert max(abs(count - 20) for count in counts[True]) <= 2
        assert max(abs(count - 20) for count in counts[False]) > 4


def test_independent_draws_are_kept():
    """Leaving stratified out, or writing false, draws the same bits."""
    plain, written = made_config(type="linear"), made_config(type="linear", stratified=False, offset_noise=0.0)
    for one, other in zip(samples(plain, 20), samples(written, 20), strict=True):
        assert torch.equal(batches.sample_sigma(plain, one), batches.sample_sigma(written, other))
        assert torch.equal(batches.sample_noise(plain, one, SHAPE), batches.sample_noise(written, other, SHAPE))


def test_sigma_by_the_size_of_an_image():
    """The same draw becomes another sigma at another size, by the factors of both."""
    config = made_config(type="sigmoid", shift="flux")
    (small,), (large,) = samples(config, 1, side=256), samples(config, 1, side=512)
    sigmas = [float(batches.sample_sigma(made_config(type="sigmoid"), one)) for one in (small, large)]
    shifted = [float(batches.sample_sigma(config, one)) for one in (small, large)]
    for plain, found, log_of_s in zip(sigmas, shifted, (0.5, 0.63), strict=True):
        assert found / (1 - found) == pytest.approx(math.exp(log_of_s) * plain / (1 - plain), rel=1e-9)


def test_offset_of_the_noise():
    """Each channel has an offset with the given deviation, another for each image; the rest is the noise of before."""
    config, factor = made_config(offset_noise=0.2), 0.2
    offsets = []
    for one in samples(config, 60):
        plain, noise = batches.sample_noise(made_config(), one, SHAPE), batches.sample_noise(config, one, SHAPE)
        difference = (noise - plain).double()
        assert float(difference.std(dim=(1, 2)).max()) < 1e-6
        offsets.append(difference.mean(dim=(1, 2)))
    found = torch.stack(offsets)
    n = found.numel()
    assert float(found.mean()) == pytest.approx(0.0, abs=4 * factor / math.sqrt(n))
    assert float(found.std()) == pytest.approx(factor, rel=4 / math.sqrt(2 * n))
    assert len(set(found[:, 0].tolist())) == 60


def test_target_has_the_offset():
    """The noise with the offset is what the image is mixed with and what the target holds, since a batch has one."""
    config = made_config(offset_noise=0.2)
    chosen = tuple(samples(config, 2))
    latents = [torch.zeros(SHAPE)] * 2
    batch = batches.make_batch(config, chosen, latents, [], batches.BatchExtras())
    assert torch.equal(batch.noise[1], batches.sample_noise(config, chosen[1], SHAPE))


def test_loss_weight_of_a_batch():
    """A batch has the weights that the settings name."""
    config = made_config(type="linear", weight=[[0.0, 2.0], [1.0, 4.0]])
    batch = batches.make_batch(config, tuple(samples(config, 8)), [torch.zeros(SHAPE)] * 8, [], batches.BatchExtras())
    assert batch.weight.tolist() == pytest.approx([2.0 + 2.0 * sigma for sigma in batch.sigma.tolist()], rel=1e-6)


def test_validation_of_new_densities():
    """The loss is measured at sigmas that training draws: each of a list once, and by the resolution of validation."""
    grid = validation.validation_sigmas(made_config(type="turbo_grid"))
    assert sorted(grid.trained) == pytest.approx(sorted(grid.turbo))
    fixed = made_config(type="fixed", sigmas=[0.9, 0.5, 0.1])
    assert validation.validation_sigmas(fixed).trained == [0.9, 0.5, 0.1]
    flux = validation.validation_sigmas(made_config(type="sigmoid", shift="flux"))
    assert flux.trained[4] == pytest.approx(1 / (1 + math.exp(-0.63)))  # 512 px
