"""Drawing of images one after another with whatever model is asked for."""

import threading

import pytest

from zimage_train import mini
from zimage_train.commands import image_renderer
from zimage_train.commands.image_renderer import ImageRenderer
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ConfigError

SMALL = SamplingRequest(prompt="a zorb", negative="", seed=3, width=64, height=64, steps=2, guidance=0.0, shift=3.0)


def miniature(dtype: str = "fp32", quantize: str | None = None) -> ModelSettings:
    values = {"path": str(mini.TURBO), "adapter": None, "dtype": dtype, "quantize": quantize}
    return ModelSettings.model_validate(values)


@pytest.mark.slow
def test_model_stays_until_another_is_asked(tmp_path, monkeypatch):
    """The same model and prompt are loaded and encoded once; another precision or format loads it anew."""
    calls: list[str] = []
    for name in ("load_frozen", "prompt_encoder"):
        original = getattr(image_renderer, name)

        def counted(*arguments, original=original, name=name):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(image_renderer, name, counted)
    renderer = ImageRenderer(threading.Lock())

    def draw(model: ModelSettings, name: str) -> list[str]:
        calls.clear()
        renderer.draw(model, [], SMALL, (tmp_path / name, None), lambda phase, done, total: None, False)
        return list(calls)

    assert draw(miniature(), "a.png") == ["prompt_encoder", "load_frozen"]
    assert draw(miniature(), "b.png") == []
    assert draw(miniature(quantize="int8"), "c.png") == ["load_frozen"]
    assert draw(miniature("bf16"), "d.png") == ["prompt_encoder", "load_frozen"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.slow
def test_progress_counts_and_may_end_it(tmp_path):
    renderer = ImageRenderer(threading.Lock())
    told: list[tuple[str, int, int]] = []

    def note(phase: str, done: int, total: int) -> None:
        told.append((phase, done, total))

    outputs = (tmp_path / "image.png", tmp_path / "base.png")
    renderer.draw(miniature(), [], SMALL, outputs, note, False)
    assert [entry for entry in told if entry[0] == "drawing"] == [("drawing", step, 4) for step in (1, 2, 3, 4)]

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "drawing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renderer.draw(miniature(), [], SMALL, (tmp_path / "stopped.png", None), stop, False)
    assert not (tmp_path / "stopped.png").exists()
    renderer.draw(miniature(), [], SMALL, (tmp_path / "again.png", None), note, False)
    assert (tmp_path / "again.png").read_bytes() == outputs[0].read_bytes()


@pytest.mark.slow
def test_little_memory_is_refused(tmp_path, monkeypatch):
    """Beside a run only what is free may be used, and the problem says how much is needed."""
    renderer = ImageRenderer(threading.Lock())
    monkeypatch.setattr(renderer, "_free_gb", lambda: 0.001)
    with pytest.raises(ConfigError, match=r"free memory in GB: is 0.001, and these images take .* wait until"):
        renderer.draw(miniature(), [], SMALL, (tmp_path / "x.png", None), lambda phase, done, total: None, True)
