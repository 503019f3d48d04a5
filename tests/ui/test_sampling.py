"""The queue of images and the process that draws them."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_train import mini
from zimage_train.commands.sample import command_for
from zimage_train.config.load import read_config
from zimage_train.errors import ZImageTrainError
from zimage_train.report.preview_images import drawn_by, request_of
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.machine import read_machine
from zimage_train.ui.sample_request import SampleLora, SampleRequest, previews_of_run, resolve
from zimage_train.ui.sampling import Sampler
from zimage_train.ui.sampling_memory import memory_needs, needed_bytes
from zimage_train.ui.workspace import Workspace

from helpers import environment
from try_browser import copy_of_runs, drawn, pixels, sampler_for, trained_runs, wait_for

PYTHON = sys.executable
"""It imports anew what it needs."""
pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def runs(shared_cache: Path, tmp_path: Path) -> Path:
    return copy_of_runs(trained_runs(shared_cache), tmp_path / "runs")


def asked_as_preview(runs: Path, number: int, **changes) -> SampleRequest:
    """The request by which the page draws preview `number` of the run again."""
    request = previews_of_run(Workspace(runs, ()), "tiny")[number]
    values = {name: getattr(request, name) for name in ("prompt", "negative", "seed", "width", "height")}
    return SampleRequest(run="tiny", **values | changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "int8", "ema"])
def test_image_equals_last_preview(kind, shared_cache, tmp_path):
    """What was seen in training is what comes out: with the LoRA the last preview, without it the first."""
    runs = copy_of_runs(trained_runs(shared_cache, kind), tmp_path / "runs")
    samples = runs / "tiny" / "samples"
    with sampler_for(runs) as sampler:
        images = [sampler.submit(asked_as_preview(runs, number, base=True)) for number in (0, 1)]
        drawn(sampler, *images)
        for number, sample in enumerate(images):
            image, base = sampler.image_path(sample), sampler.image_path(sample, is_base=True)
            last, first = samples / f"000004-{number:02d}.png", samples / f"000000-{number:02d}.png"
            assert pixels(image) == pixels(last)
            assert pixels(base) == pixels(first)
            assert pixels(image) != pixels(base)
            assert request_of(image) == request_of(last) == sample.drawing.sampling
            assert "tiny.safetensors=1" in drawn_by(image)
            assert "no LoRA" in drawn_by(base)


@pytest.mark.slow
def test_image_equals_that_of_sample(runs, tmp_path):
    """The page draws what the command that a run prints at its end draws."""
    config = read_config(runs / "tiny" / "config.yaml")
    words = shlex.split(command_for(config, runs / "tiny" / "lora" / "tiny.safetensors"))
    words = [sys.executable, "-m", "zimage_train", *words[words.index("sample") :], "-o", str(tmp_path / "by-command")]
    subprocess.run(words, env=environment(), check=True, capture_output=True)
    with sampler_for(runs) as sampler:
        sample = sampler.submit(asked_as_preview(runs, 0))
        drawn(sampler, sample)
        (by_command,) = (tmp_path / "by-command").glob("*.png")
        assert pixels(sampler.image_path(sample)) == pixels(by_command)


@pytest.mark.slow
def test_queue_shows_places_and_cancels(runs):
    with sampler_for(runs) as sampler:
        first, second, third, fourth = (sampler.submit(asked_as_preview(runs, 0, steps=900)) for _ in range(4))
        assert [sampler.place(sample) for sample in (first, second, third, fourth)] == [None, 1, 2, 3]
        assert sampler.active() == [first, second, third, fourth]
        sampler.cancel(third.id)
        assert [sampler.place(sample) for sample in (second, third, fourth)] == [1, None, 2]
        wait_for(lambda: first.done > 2)
        assert (first.phase, first.total) == ("drawing", 900)
        sampler.cancel(first.id)
        wait_for(lambda: second.status == "drawing" and second.done > 0)
        assert [sample.status for sample in (first, second, third, fourth)] == [
            *("cancelled", "drawing", "cancelled", "waiting")
        ]
        assert not sampler.image_path(first).exists()
        assert sampler.finished(9) == []


@pytest.mark.slow
def test_error_is_shown_and_next_is_drawn(runs):
    """A LoRA that does not fit and a model that is not there fail as problems, and the queue goes on."""
    with sampler_for(runs, Path(mini.__file__).parent) as sampler:
        missing = sampler.submit(SampleRequest(model="/nowhere/model.safetensors", prompt="a zorb"))
        # Step 2 of the run, under the name of a LoRA: a checkpoint.
        checkpoint = next((runs / "tiny" / "checkpoints").glob("*.safetensors"))
        broken = sampler.submit(asked_as_preview(runs, 0, loras=[SampleLora(file=str(checkpoint))]))
        good = sampler.submit(asked_as_preview(runs, 0))
        drawn(sampler, good)
        assert (missing.status, broken.status) == ("failed", "failed")
        assert "/nowhere/model.safetensors" in str(missing.problems)
        assert checkpoint.name in str(broken.problems)
        assert [sample.id for sample in sampler.finished(9)] == [good.id, broken.id, missing.id]


@pytest.mark.slow
def test_killed_worker_fails_its_image(runs):
    with sampler_for(runs) as sampler:
        lost = sampler.submit(asked_as_preview(runs, 0, steps=900))
        after = sampler.submit(asked_as_preview(runs, 0))
        wait_for(lambda: lost.phase == "drawing")
        assert sampler._process is not None
        sampler._process.kill()
        drawn(sampler, after)
        assert lost.status == "failed"
        assert [problem["code"] for problem in lost.problems] == ["worker-lost"]


@pytest.mark.slow
def test_images_outlive_the_page(runs):
    """A page that starts again shows the images with their settings, and can delete them."""
    with sampler_for(runs) as sampler:
        sample = sampler.submit(asked_as_preview(runs, 1, base=True, loras=[SampleLora(file="tiny", weight=0.5)]))
        drawn(sampler, sample)
    with sampler_for(runs) as later:
        (found,) = later.finished(9)
        assert (found.asked, found.drawing, found.status) == (sample.asked, sample.drawing, "done")
        assert found.drawing.loras == [(str(runs / "tiny/lora/tiny.safetensors"), 0.5)]
        later.remove(found.id)
        assert later.finished(9) == []
        assert list(later.folder.glob("*.png")) == []
        with pytest.raises(ZImageTrainError, match="does not exist"):
            later.get(found.id)


@pytest.mark.slow
def test_gpu_is_given_back_to_a_run(runs):
    """The model stays loaded between images, but not while a run trains on the same GPU."""
    with sampler_for(runs, gpus=("0",)) as sampler:
        first = sampler.submit(asked_as_preview(runs, 0))
        drawn(sampler, first)
        sampler.tick()
        process = sampler._process
        assert process is not None
        second = sampler.submit(asked_as_preview(runs, 0))
        drawn(sampler, second)
        assert sampler._process is process
        hold(runs / "other")
        sampler.tick()
        assert sampler._process is None
        assert process.poll() == 0


def hold(folder: Path) -> None:
    """Make a run that is training, as far as its folder shows."""
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 10}\n")
    (folder / "run.holder").write_text(f"process {os.getpid()} on {socket.gethostname()}")


@pytest.mark.slow
def test_worker_ends_when_idle_or_left(tmp_path):
    code = "from zimage_train.ui import sampling_worker as worker; worker.IDLE_SECONDS = 0.1; worker.main()"
    idle = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment())
    assert idle.wait(60) == 0
    assert idle.stdin is not None
    idle.stdin.close()
    left = subprocess.run([PYTHON, "-m", "zimage_train.ui.sampling_worker"], input=b"", env=environment(), timeout=60)
    assert left.returncode == 0


@pytest.mark.slow
def test_training_beside_is_told(runs):
    """The memory of an image is predicted, larger for a larger one, and the run beside it is named."""
    workspace = Workspace(runs, ())
    queue = JobQueue(workspace, [])
    small, large = (resolve(asked_as_preview(runs, 0, width=side, height=side), workspace) for side in (64, 512))
    assert 0 < needed_bytes(small, is_gpu=False) < needed_bytes(large, is_gpu=False) < needed_bytes(large, is_gpu=True)
    machine = read_machine(runs)
    alone = memory_needs(small, queue, machine, "cpu")
    assert (alone.training, alone.is_tight, alone.is_downloaded) == ((), False, True)
    hold(runs / "other")
    assert memory_needs(small, queue, machine, "cpu").training == ("other",)
    unknown = resolve(SampleRequest(model="nobody/never-published", prompt=""), workspace)
    assert memory_needs(unknown, queue, machine, "cpu").needed_bytes is None


@pytest.mark.slow
def test_run_gives_what_its_previews_have(runs):
    """A run gives model, precision, sizes, trigger and its newest LoRA; what is asked for comes first."""
    workspace = Workspace(runs, ())
    drawing = resolve(SampleRequest(run="tiny", prompt="A [trigger]"), workspace)
    assert drawing.model["path"] == str(mini.TURBO)
    assert (drawing.model["dtype"], drawing.model["adapter"]) == ("fp32", None)
    assert drawing.loras == [(str(runs / "tiny/lora/tiny.safetensors"), 1.0)]
    request = drawing.sampling
    assert (request.prompt, request.width, request.steps, request.guidance) == ("A zorb", 64, 8, 0.0)
    own = resolve(SampleRequest(run="tiny", prompt="", width=128, steps=3, guidance=1.5, loras=[]), workspace)
    assert own.loras == []
    assert (own.sampling.width, own.sampling.steps, own.sampling.guidance) == (128, 3, 1.5)
    base = resolve(SampleRequest(model="base", prompt=""), workspace)
    assert (base.sampling.steps, base.sampling.shift, base.model["dtype"]) == (30, 6.0, "bf16")


def test_auto_quantization_is_of_the_run(tmp_path, make_config):
    config = make_config(model={"quantize": "auto"}, sample={"every": None})
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    (folder / "run.json").write_text(json.dumps({"plan": {"kind": "nf4"}}))
    drawing = resolve(SampleRequest(run="tiny", prompt=""), Workspace(tmp_path / "runs", ()))
    assert drawing.model["quantize"] == "nf4"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (SampleRequest(run="nobody", prompt=""), "run nobody: has no config.yaml"),
        (SampleRequest(run="../x", prompt=""), "is no name of a run"),
        (SampleRequest(model="", prompt=""), "model: is empty"),
        (SampleRequest(loras=[SampleLora(file="/etc/passwd")]), "is outside the folders"),
        (SampleRequest(loras=[SampleLora(file="../secret.safetensors")]), "is outside the folders"),
        (SampleRequest(loras=[SampleLora(file="gone.safetensors")]), "does not exist"),
        (SampleRequest(loras=[SampleLora(file="")]), "LoRA: is empty"),
    ],
)
def test_wrong_requests_are_refused(asked, found, tmp_path):
    with sampler_for(tmp_path / "runs") as sampler:
        with pytest.raises(ZImageTrainError, match=found):
            sampler.submit(asked)
        assert sampler.active() == []


def test_ids_are_in_order(tmp_path):
    sampler = Sampler(Workspace(tmp_path, ()), JobQueue(Workspace(tmp_path, ()), []))
    ids = [sampler._new_id() for _ in range(50)]
    assert ids == sorted(ids)
