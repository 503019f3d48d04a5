"""`train.method` trajectory_imitation and de_distill: the model is trained on what it draws itself."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.diffusion import flow
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.diffusion.sampler import sample_latents, sample_trajectory
from zimage_train.errors import ConfigError, DataError, Stopped, ZImageTrainError
from zimage_train.lora import lora_file, swap
from zimage_train.models import text_encoder
from zimage_train.models.components import ExtrasPaths
from zimage_train.planning.preflight import check_run
from zimage_train.training import loop
from zimage_train.training.batches import load_batch
from zimage_train.training.loss import losses as losses_of
from zimage_train.training.self_distill import GeneratedData
from zimage_train.training.state import TrainState

from helpers import folder, losses, stop_after

CPU = torch.device("cpu")
TURBO_SIGMAS = [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0]


@pytest.fixture
def broken(make_config) -> Path:
    """A LoRA that was trained on Turbo itself."""
    config = make_config(name="broken", model={"adapter": None}, train={"steps": 6}, optimizer={"lr": 1e-2})
    run_training(config, fresh=False)
    return folder(config) / "lora" / "broken.safetensors"


def imitating(make_config, broken: Path, **changes: object) -> Config:
    own = {
        "name": "repaired",
        "model": {"adapter": None},
        "lora": {"init_from": str(broken)},
        "train": {"method": "trajectory_imitation", "steps": 3, "batch_size": 2},
        "teacher": {"steps": 12, "guidance": 1.0},
    }
    values = make_config(**{**own, **changes})
    entries = [entry.model_copy(update={"caption_dropout": 0.0}) for entry in values.data]
    return values.model_copy(update={"data": entries})


def request_of(run: TrainState, item: TrainItem) -> SamplingRequest:
    return GeneratedData(run.config, ()).request(item)


def first_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> TrainState:
    """The run as the loop gets it."""
    seen = []
    from zimage_train.commands import train

    monkeypatch.setattr(loop, "train", lambda run, metrics, events: seen.append(run))
    monkeypatch.setattr(train, "dry_run", lambda run: run)
    monkeypatch.setattr(train, "write_report", lambda run: None)
    run_training(config, fresh=True)
    return seen[0]


@pytest.mark.slow
def test_target_is_the_mean_velocity(make_config, broken: Path, monkeypatch) -> None:
    """The target is the teacher's mean velocity over the interval.

    It is computed again by Euler steps of the bare equations in fp64, on a newly loaded model, from the request alone.
    """
    config = imitating(make_config, broken)
    run = first_run(config, monkeypatch)
    samples = run.micro_batches(1)[0]
    batch = load_batch(config, run.dataset, samples)
    found = batch.noise - batch.x0
    mixture = flow.interpolate(batch.x0, batch.noise, batch.sigma)
    assert {round(float(sigma), 4) for sigma in batch.sigma} <= {round(sigma, 4) for sigma in TURBO_SIGMAS[:-1]}
    assert torch.equal(batch.weight, torch.ones(len(samples)))

    model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model.eval()
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    with swap.with_lora(model, lora_file.read_lora(broken)):
        for index, sample in enumerate(samples):
            recipe = request_of(run, sample.item)
            assert (recipe.steps, recipe.guidance, recipe.prompt) == (12, 1.0, sample.prompt)
            embeds = dict(encoder.encode_all([recipe.prompt, ""], lambda done, total: None))
            positive, empty = embeds[recipe.prompt], embeds[""]
            raw = [1 - i / 12 for i in range(13)]
            grid = sorted({round(3 * r / (1 + 2 * r), 12) for r in raw} | {round(s, 12) for s in TURBO_SIGMAS})[::-1]
            shape = (1, 16, recipe.height // 8, recipe.width // 8)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(recipe.seed)).double()
            at = {1.0: x}
            for here, after in itertools.pairwise(grid):
                with torch.no_grad():
                    pos, neg = (
                        -torch.stack(model(list(x.float().unsqueeze(2)), torch.tensor([1 - here]), [one])[0]).squeeze(2)
                        for one in (positive, empty)
                    )
                x = x + (after - here) * (pos + 1.0 * (pos - neg)).double()
                at[after] = x
            sigma = min(TURBO_SIGMAS[:-1], key=lambda one: abs(one - float(batch.sigma[index])))
            following = TURBO_SIGMAS[TURBO_SIGMAS.index(sigma) + 1]
            here, after = (at[round(one, 12)] for one in (sigma, following))
            expected = (after - here) / (following - sigma)
            assert torch.allclose(mixture[index], here[0].float(), atol=2e-3)
            assert torch.allclose(found[index], expected[0].float(), atol=2e-2), (
                (found[index] - expected[0]).abs().max()
            )


@pytest.mark.slow
def test_imitation_trains_its_first_lora(make_config, broken: Path, monkeypatch):
    """Imitation trains the LoRA that it began with towards its own result with many steps.

    The loss on the teacher's path falls, and 8 steps come nearer to where many would lead.
    """
    config = imitating(
        make_config,
        broken,
        train={"method": "trajectory_imitation", "steps": 60, "batch_size": 8},
        optimizer={"lr": 2e-3},
    )
    run = first_run(config, monkeypatch)
    items = run.order.items[:6]
    ends = {item: run.dataset.latents(item)[-1] for item in items}

    def far(lora) -> float:
        model = run.frozen.model.eval()
        with swap.replaced_lora(model, lora):
            total = 0.0
            for item in items:
                eight = request_of(run, item).__class__.from_json(
                    request_of(run, item)
                    .to_json()
                    .replace('"steps": 12', '"steps": 8')
                    .replace('"guidance": 1.0', '"guidance": 0.0')
                )
                embeds = {eight.prompt: run.dataset.embeds(eight.prompt)}
                drawn = sample_latents(model, [eight], embeds, lambda done, total: None)[0]
                total += float((drawn - ends[item]).square().mean())
        return total / len(items)

    before = far(lora_file.read_lora(broken))
    monkeypatch.undo()
    run_training(config, fresh=True)
    after = far(lora_file.read_lora(folder(config) / "lora" / "repaired.safetensors"))
    values = losses(config)
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:10])
    assert after < 0.8 * before


@pytest.mark.slow
def test_de_distill_trains_on_turbo(make_config, monkeypatch) -> None:
    """`de_distill` trains on latents that Turbo draws in eight steps."""
    config = make_config(name="adapter", model={"adapter": None}, train={"method": "de_distill", "steps": 3})
    run = first_run(config, monkeypatch)
    model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model.eval()
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    for sample in run.micro_batches(1)[0]:
        recipe = request_of(run, sample.item)
        assert (recipe.steps, recipe.guidance) == (8, 0.0)
        embeds = dict(encoder.encode_all([recipe.prompt], lambda done, total: None))
        drawn = sample_latents(model, [recipe], embeds, lambda done, total: None)[0]
        assert torch.allclose(run.dataset.latents(sample.item), drawn, atol=1e-4)
    batch = load_batch(config, run.dataset, run.micro_batches(1)[0])
    assert len(list(losses_of(run.frozen.model, batch, config))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trajectory_imitation", "de_distill"])
def test_stopped_run_draws_nothing_twice(make_config, broken: Path, monkeypatch, method: str):
    """A stopped run continues bit for bit, and draws nothing twice."""

    def config(name: str) -> Config:
        settings = {"method": method, "steps": 4, "batch_size": 2}
        if method == "trajectory_imitation":
            return imitating(make_config, broken, name=name, train=settings, optimizer={"lr": 1e-2})
        return make_config(name=name, model={"adapter": None}, train=settings, optimizer={"lr": 1e-2})

    whole, parts = config("whole"), config("parts")
    run_training(whole, fresh=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run_training(parts, fresh=False)
    run_training(parts, fresh=False)
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4
    log = (folder(parts) / "log.txt").read_text()
    assert "own images: 16 found, 0 drawn" in log and "model.adapter is null" not in log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"method": "de_distill"}, "model": {"adapter": "v2"}}, "set model.adapter: null"),
        ({"train": {"method": "trajectory_imitation"}}, "needs lora.init_from"),
        ({"train": {"method": "de_distill"}, "data": [{"folder": "x", "flip": True}]}, "leave data.0.flip out"),
        (
            {
                "train": {"method": "trajectory_imitation"},
                "lora": {"init_from": "x"},
                "data": [{"folder": "x", "caption_dropout": 0.1}],
            },
            "leave data.0.caption_dropout out",
        ),
        (
            {"train": {"method": "trajectory_imitation"}, "lora": {"init_from": "x"}, "model": {"variant": "base"}},
            "set model.variant: turbo",
        ),
    ],
)
def test_settings_against_the_method(changes: dict, said: str) -> None:
    """Settings that do not go with a method are refused."""
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"name": "a", "data": [{"folder": "x"}], **changes})


def test_defaults_of_the_method() -> None:
    """Settings that are left out are as the method needs them."""
    least = {"name": "a", "data": [{"folder": "x"}]}
    imitation = {"train": {"method": "trajectory_imitation"}, "lora": {"init_from": "x"}}
    found = Config.model_validate(least | imitation)
    assert (found.model.adapter, found.data[0].caption_dropout) == (None, 0.0)
    assert Config.model_validate(least).model.adapter == "v2"
    assert Config.model_validate(least | {"train": {"method": "de_distill"}}).model.adapter is None
    assert sample_trajectory is not None


# Prompts without images


def from_prompts(make_config, path: Path, **changes: object) -> Config:
    values = make_config(
        **{"name": "bare", "model": {"adapter": None}, "train": {"method": "de_distill", "steps": 3}, **changes}
    )
    return values.model_copy(update={"data": [DataEntry(prompts=str(path), resolution=[64, 96])]})


@pytest.mark.slow
def test_prompts_alone_are_enough(make_config, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbfa red circle on a blue background\r\n\r\n# not this\r\na green star, white background\r\n"
    )
    config = from_prompts(make_config, path)
    checked = check_run(config)
    assert [(one.image.prompts, one.size.width, one.size.height) for one in checked.items] == [
        (("a red circle on a blue background",), 64, 64),
        (("a red circle on a blue background",), 96, 96),
        (("a green star, white background",), 64, 64),
        (("a green star, white background",), 96, 96),
    ]
    run_training(config, fresh=False)
    assert len(losses(config)) == 3
    assert "own images: 0 found, 4 drawn" in (folder(config) / "log.txt").read_text()


@pytest.mark.slow
def test_changed_prompt_is_noticed(make_config, tmp_path: Path) -> None:
    """A prompt that changes is noticed by a run that continues."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na green star\n")
    run_training(from_prompts(make_config, path), fresh=False)
    path.write_text("a red circle\na blue star\n")
    with pytest.raises(ZImageTrainError, match=r"data"):
        run_training(from_prompts(make_config, path, train={"method": "de_distill", "steps": 4}), fresh=False)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "prompts.txt: is not a file"),
        (b"\n# nothing\n", "holds no prompt"),
        (b"a red circle\na [trigger] there\n", r"prompts.txt:2: its caption has \[trigger\], but no trigger is set"),
        ("a".encode("utf-16"), "is UTF-16"),
    ],
)
def test_prompt_file_is_refused(make_config, tmp_path: Path, content: bytes | None, what: str) -> None:
    """A prompt file that is missing or invalid is refused."""
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=what):
        check_run(from_prompts(make_config, path))


def test_prompt_given_twice(make_config, tmp_path: Path) -> None:
    """A prompt that is given twice is drawn once, with a note."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na green star\na red circle\n")
    checked = check_run(from_prompts(make_config, path))
    assert len(checked.items) == 4
    (note,) = [note for note in checked.notes if note.code == "same-prompt"]
    assert "prompts.txt:3: the same prompt as in line 1" in note.text


def test_prompts_are_for_methods_that_draw(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndata: [{prompts: x.txt}]\n")
    with pytest.raises(ConfigError, match="has no images to train on; give folder"):
        read_config(path, [])
