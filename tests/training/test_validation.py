"""Validation measures the same thing every time, at the noise levels it names, and disturbs nothing."""

import json
from pathlib import Path

import pytest
import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.errors import DataError, Stopped
from zimage_train.planning import preflight
from zimage_train.report.metrics import read_records
from zimage_train.training import validation

from helpers import facts, folder, losses, stop_after


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    place = tmp_path / "held_out"
    place.mkdir()
    for path in sorted(mini.IMAGES.glob("zorb_0[1-3].*")):
        (place / path.name).write_bytes(path.read_bytes())
    return place


def found(config) -> list[dict]:
    return [one for one in read_records(folder(config) / "events.jsonl") if one.get("event") == "validation"]


def settings(place: Path, every: int | None = 2) -> dict:
    return {"folder": str(place), "every": every, "resolution": 64}


def test_noise_levels(make_config):
    """The noise levels are the deciles of training, and those of Turbo."""
    linear = validation.validation_sigmas(make_config(timesteps={"type": "linear", "min": 0.2}))
    assert linear.trained == pytest.approx([0.2 + 0.8 * (1 - index / 10) for index in range(1, 10)])
    assert linear.turbo == pytest.approx([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3], abs=1e-4)
    biased = validation.validation_sigmas(make_config(timesteps={"type": "linear", "bias": "high_noise"}))
    assert biased.trained == pytest.approx([1 - (index / 10) ** 3 for index in range(1, 10)])


@pytest.mark.slow
def test_validation_steps(make_config, held_out, capsys):
    """Validation is measured before step 1, at its interval and after the last step."""
    config = make_config(validation=settings(held_out), train={"steps": 5})
    run_training(config, fresh=False)
    records = found(config)
    assert [one["step"] for one in records] == [0, 2, 4, 5]
    for one in records:
        values = dict(map(tuple, one["by_sigma"]))
        assert len(one["by_sigma"]) == 17
        assert one["loss"] == pytest.approx(sum(value for _, value in one["by_sigma"][:9]) / 9)
        assert one["loss_turbo"] == pytest.approx(sum(value for _, value in one["by_sigma"][9:]) / 8)
        assert all(value > 0 for value in values.values())
    assert len({one["loss"] for one in records}) == 4
    said = capsys.readouterr().out
    lowest = min(records, key=lambda one: one["loss"])
    assert f"lowest validation loss: {lowest['loss']:.4f} at step {lowest['step']}" in said


@pytest.mark.slow
def test_validation_loss_by_hand(make_config, held_out, monkeypatch):
    """The validation loss is the mean square of an independent calculation."""
    runs = []
    measure = validation.measure
    monkeypatch.setattr(validation, "measure", lambda run, at, step: (runs.append(run), measure(run, at, step))[1])
    config = make_config(validation=settings(held_out, every=1), train={"steps": 1}, lora={"dropout": 0.5})
    run_training(config, fresh=False)
    run = runs[-1]
    sigma, value = found(config)[-1]["by_sigma"][6]
    sigma = validation.validation_sigmas(config).trained[6]
    total = 0.0
    run.frozen.model.eval()
    for item in run.held_out:
        x0 = run.dataset.latents(item).float()
        noise = validation._noise(config, item, x0.shape)
        x = (1 - sigma) * x0.double() + sigma * noise.double()
        embeds = run.dataset.embeds(item.image.prompts[0])
        with torch.no_grad():
            given = ([x.float().unsqueeze(1)], torch.tensor([1 - sigma]), [embeds])
            raw = run.frozen.model(*given, return_dict=False)[0][0]
        total += float((raw.squeeze(1).double() - (x0 - noise).double()).square().mean())
    assert value == pytest.approx(total / 3, rel=1e-4)


def test_captions_as_in_the_first_entry(make_config, held_out):
    """Captions are read with the settings of the first `data` entry."""
    for path in held_out.glob("*.txt"):
        path.unlink()
    (held_out / "zorb_02.txt").write_text("a thing")
    checked = preflight.check_run(make_config(validation=settings(held_out)))
    prompts = [item.image.prompts for item in checked.held_out]
    assert prompts == [("zorb",), ("zorb a thing",), ("zorb",)]
    assert {(item.size.width * item.size.height <= 64 * 64, item.flip, item.repeat) for item in checked.held_out} == {
        (True, False, 0)
    }


def test_images_also_trained_on(make_config, held_out):
    """Images that are trained on, too, are pointed out."""
    notes = preflight.check_run(make_config(validation=settings(held_out))).notes
    (note,) = [note for note in notes if note.code == "held-out-is-trained"]
    assert "3 of its images are trained on too (zorb_01.png)" in note.text


def test_missing_folder_is_refused(make_config, tmp_path):
    """A missing folder is refused, and not looked at if validation is off."""
    with pytest.raises(DataError, match="does not exist"):
        preflight.check_run(make_config(validation=settings(tmp_path / "none")))
    assert preflight.check_run(make_config(validation=settings(tmp_path / "none", every=None))).held_out == []


@pytest.mark.slow
def test_validation_is_mse_with_any_loss(make_config, held_out):
    """Validation and the logged loss of the first step are those of a run with the plain loss."""
    plain = make_config(name="plain", validation=settings(held_out), train={"steps": 1})
    other = make_config(validation=settings(held_out), train={"steps": 1}, loss={"type": "mae", "detail": 3.0})
    for config in (plain, other):
        run_training(config, fresh=False)
    assert found(other)[0] == found(plain)[0] and losses(other) == losses(plain)


@pytest.mark.slow
def test_resumed_run_measures_once(make_config, held_out, monkeypatch):
    """A run that continues measures nothing twice, with the same results."""
    whole = make_config(name="whole", validation=settings(held_out), train={"steps": 4})
    run_training(whole, fresh=False)
    stopped = make_config(validation=settings(held_out), train={"steps": 4})
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run_training(stopped, fresh=False)
    run_training(stopped, fresh=False)
    assert found(stopped) == found(whole) and losses(stopped) == losses(whole)
    assert facts(stopped)["starts"] == [0, 2]


@pytest.mark.slow
def test_tensorboard_shows_it(make_config, held_out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(validation=settings(held_out), train={"steps": 2}, log={"tensorboard": True})
    run_training(config, fresh=False)
    shown = EventAccumulator(str(folder(config) / "tensorboard"))
    shown.Reload()
    values = [(one.step, pytest.approx(one.value, rel=1e-6)) for one in shown.Scalars("validation/loss")]
    assert [(one["step"], one["loss"]) for one in found(config)] == values
    assert json.dumps(found(config)[0])


@pytest.mark.slow
def test_report_names_the_lowest(make_config, held_out):
    """The report draws the validation loss, and names the lowest."""
    config = make_config(validation=settings(held_out, every=1), train={"steps": 3}, preserve={"kind": "blank"})
    run_training(config, fresh=False)
    page = (folder(config) / "report.html").read_text()
    lowest = min(found(config), key=lambda one: one["loss"])
    assert f"Lowest at step {lowest['step']}: {lowest['loss']:.4f}" in page
    assert 'aria-label="Validation loss by step"' in page and 'aria-label="Preservation by step"' in page
    plain = make_config(name="plain", train={"steps": 3})
    run_training(plain, fresh=False)
    page = (folder(plain) / "report.html").read_text()
    assert "Validation loss" not in page and "Preservation" not in page


@pytest.mark.slow
def test_other_images_are_not_compared(make_config, held_out, capsys):
    """Losses of other held-out images are not compared."""
    first = make_config(validation=settings(held_out, every=1), train={"steps": 1})
    run_training(first, fresh=False)
    (held_out / "zorb_01.png").unlink()
    (held_out / "zorb_01.txt").unlink()
    capsys.readouterr()
    second = make_config(validation=settings(held_out, every=1), train={"steps": 3})
    run_training(second, fresh=False)
    said = capsys.readouterr().out
    assert len({one["of"] for one in found(second)}) == 2
    lowest = min((one for one in found(second) if one["of"] == found(second)[-1]["of"]), key=lambda one: one["loss"])
    assert f"lowest validation loss: {lowest['loss']:.4f} at step {lowest['step']}" in said


def test_out_of_memory_costs_no_step(make_config, held_out, monkeypatch, capsys):
    """Running out of memory in validation costs no step."""

    def full(run, at, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation, "measure", full)
    config = make_config(validation=settings(held_out), train={"steps": 2})
    run_training(config, fresh=False)
    assert found(config) == [] and "lower validation.resolution; training goes on" in capsys.readouterr().out


def test_captions_as_in_the_concept(make_config, held_out):
    """Captions are read with the settings of the concept's first folder."""
    (held_out / "zorb_02.txt").write_text("one\ntwo")
    own = {"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb", "caption_lines": True}
    of_class = {"folder": str(held_out), "resolution": [64], "regularization": True}
    checked = preflight.check_run(make_config(data=[of_class, own], validation=settings(held_out)))
    assert checked.held_out[1].image.prompts == ("zorb one", "zorb two")
