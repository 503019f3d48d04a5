"""`caption`: by models of the real classes with random weights; what they say is nonsense, and all around it is not."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.caption import CaptionOptions, caption_folder
from zimage_train.config.triggers import has_trigger
from zimage_train.dataset import caption_prompts, captions
from zimage_train.dataset.caption_prompts import CAPTION_STYLES
from zimage_train.errors import ConfigError, DataError, WeightsError, ZImageTrainError
from zimage_train.models import captioner
from zimage_train.planning import devices
from zimage_train.report.console import Console

import vision_models


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return vision_models.qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(mini.IMAGES.glob("*.png"))[:4]:
        shutil.copy(path, folder)
    return folder


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return (getattr(done.exception, "exit_code", 1) if done.exception else 0), done.output + str(done.exception or "")


def wanted(model: Path | str, **changes) -> CaptionOptions:
    usual = {"style": "sentences", "kind": None, "trigger": None, "instruction": None, "extension": ".txt"}
    return CaptionOptions(model=str(model), **{**usual, "force": False, **changes})


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


# What becomes of an answer


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A red fox in tall grass.", "A red fox in tall grass."),
        ("<think>What is it?\nA fox.</think>\n\nA red fox.", "A red fox."),
        ("<think>It never came to an end", ""),
        ("Here is the caption:\n\nA red fox.", "A red fox."),
        ("Sure! Here's a caption for the image: A red fox.", "A red fox."),
        ('"A red fox."', "A red fox."),
        ("**A red fox**\nin   `grass`.", "A red fox in grass."),
        ("The image shows a red fox.", "A red fox."),
        ("This picture depicts a red fox.", "A red fox."),
        ("This image depicts two foxes.", "Two foxes."),
        ("The image quality is poor.", "The image quality is poor."),
        ("A fox.\x00\x07 Its \ufffdtail.", "A fox. Its tail."),
        ("  \n ", ""),
    ],
)
def test_answer_is_cut_to_the_caption(answer, caption):
    """Only the caption of an answer is kept."""
    assert caption_prompts.clean_answer(answer, "sentences", True, None) == caption


def test_answer_cut_off_is_shortened():
    """An answer that was cut off ends at its last whole sentence or tag."""
    text = "A fox, 3.5 m long. It runs! And then it sud"
    assert caption_prompts.clean_answer(text, "sentences", False, None) == "A fox, 3.5 m long. It runs!"
    assert caption_prompts.clean_answer("no end at all", "sentences", False, None) == "no end at all"
    assert caption_prompts.clean_answer("fox, grass, eveni", "tags", False, None) == "fox, grass"


def test_tags_are_lower_case_and_said_once():
    assert (
        caption_prompts.clean_answer("Fox, grass; fox\n- Evening light., ,", "tags", True, None)
        == "fox, grass, evening light"
    )


@pytest.mark.parametrize(
    ("answer", "style", "caption"),
    [
        ("A photo of zorb at sea.", "sentences", "A photo of zorb at sea."),
        ("A man at sea.", "sentences", "zorb A man at sea."),
        ("A zorblike man.", "sentences", "zorb A zorblike man."),
        ("man, sea", "tags", "zorb, man, sea"),
        ("", "sentences", ""),
    ],
)
def test_a_trigger_is_in_every_caption_once(answer, style, caption):
    assert caption_prompts.clean_answer(answer, style, True, "zorb") == caption


@given(st.text(), st.sampled_from(list(CAPTION_STYLES)), st.booleans(), st.sampled_from([None, "zorb"]))
def test_answer_reads_back_as_one_line(answer, style, is_whole, trigger):
    """Any answer becomes a single line, which is read back unchanged and contains the trigger."""
    text = caption_prompts.clean_answer(answer, style, is_whole, trigger)
    assert text == captions.clean_text(text) and text.isprintable()
    assert text == "" or trigger is None or has_trigger(text, trigger)


@pytest.mark.parametrize("kind", [None, *caption_prompts.OMITTED_TRAITS])
@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_instruction_names_the_trigger(style, kind):
    """The instruction names the trigger for kinds with a thing that can be called so."""
    text = caption_prompts.caption_instruction(style, kind, "zorb")
    assert text.startswith(CAPTION_STYLES[style].instruction)
    assert ("zorb" in text) == (kind in ("character", "product", "concept"))
    assert (kind is None) or caption_prompts.OMITTED_TRAITS[kind] in text


def test_kinds_have_omitted_traits():
    """Every kind that `init` knows has traits for captions to leave out."""
    from zimage_train.config.templates import SUBJECT_KINDS

    assert set(caption_prompts.OMITTED_TRAITS) == set(SUBJECT_KINDS)


# The models


@pytest.mark.parametrize("make", [vision_models.qwen, vision_models.llava])
def test_model_answers_depend_on_image(tmp_path, make):
    """A model gives the same answer for the same image and instruction, and others for others."""
    model = captioner.load_captioner(make(tmp_path), torch.device("cpu"))
    seen = [Image.open(path).convert("RGB") for path in sorted(mini.IMAGES.glob("*.png"))[:6]]
    said = [model.answer(image, "Describe.", 12) for image in seen]
    assert said == [model.answer(image, "Describe.", 12) for image in seen]
    assert len({text for text, _ in said}) > 1, "it does not look"
    assert model.answer(seen[0], "Say nothing of the sky.", 12) != said[0], "it does not listen"


def test_qwen_processor_equals_its_own(qwen):
    """The inputs of a Qwen are those that its own processor makes, which needs torchvision."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(qwen)
    image = Image.open(images_of(mini.IMAGES)[0]).convert("RGB").resize((150, 90))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}]
    there = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    here = captioner._qwen_inputs(qwen)[0](image, "Describe.")
    assert set(here) == set(there)
    for name in there:
        assert torch.allclose(torch.as_tensor(here[name]).float(), there[name].float(), atol=0.02), name


def test_answer_end_is_detected(qwen):
    """An answer that came to its end is told from an answer that was cut off."""
    model = captioner.load_captioner(qwen, torch.device("cpu"))
    image = Image.open(images_of(mini.IMAGES)[0]).convert("RGB")
    _, is_whole = model.answer(image, "Describe.", 5)
    assert not is_whole
    inner = model._model
    inner.lm_head.weight.data.zero_()  # all words are alike likely, so the first word is taken
    inner.generation_config.eos_token_id = [7, 0]
    assert model.answer(image, "Describe.", 5)[1]


def test_large_images_are_scaled_down():
    """Large images are scaled down for the model, and keep their shape."""
    assert captioner._limit_pixels(Image.new("RGB", (4000, 1000))).size == (2048, 512)
    assert captioner._limit_pixels(Image.new("RGB", (640, 480))).size == (640, 480)


# The command


@pytest.mark.slow
def test_captions_written_where_missing(qwen, images):
    """Captions are written for the images that have none."""
    first, second, *others = images_of(images)
    own = "  my own words\r\n"
    first.with_suffix(".txt").write_bytes(own.encode())
    second.with_suffix(".txt").write_text("\n")
    said = caption_folder(images, wanted(qwen, trigger="zorb"), Console())
    found = texts(images)
    assert set(found) == {path.with_suffix(".txt").name for path in (first, second, *others)}
    assert first.with_suffix(".txt").read_bytes() == own.encode()
    assert all(re.match(r"zorb .+\n$", text) for name, text in found.items() if name != first.with_suffix(".txt").name)
    assert said == [f"3 captions written to {images}; read them: training learns what they say"]


@pytest.mark.slow
def test_second_start_continues(qwen, images):
    """A second start continues, and needs no model if every image has a caption."""
    caption_folder(images, wanted(qwen), Console())
    before = texts(images)
    gone = images_of(images)[2].with_suffix(".txt")
    gone.unlink()
    caption_folder(images, wanted(qwen), Console())
    assert texts(images) == before, "the same model says the same"
    said = caption_folder(images, wanted("nowhere/nothing"), Console())
    assert said == [f"0 captions written to {images}"]


def test_interruption_keeps_captions(qwen, images, monkeypatch):
    """Captions written before an interruption are kept."""
    calls = []

    def answer(self, image, instruction, most):
        calls.append(instruction)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return "A fox.", True

    monkeypatch.setattr(captioner.CaptionModel, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        caption_folder(images, wanted(qwen), Console())
    assert texts(images) == {images_of(images)[0].with_suffix(".txt").name: "A fox.\n"}


@pytest.mark.slow
def test_force_writes_over(qwen, images):
    file = images_of(images)[0].with_suffix(".txt")
    file.write_text("old")
    caption_folder(images, wanted(qwen, force=True), Console())
    assert file.read_text() != "old"


@pytest.mark.slow
def test_unreadable_caption_is_kept(qwen, images):
    """A caption that cannot be read is not overwritten."""
    file = images_of(images)[0].with_suffix(".txt")
    content = "my words".encode("utf-16")
    file.write_bytes(content)
    with pytest.raises(DataError, match="UTF-16"):
        caption_folder(images, wanted(qwen), Console())
    assert file.read_bytes() == content and len(list(images.glob("*.txt"))) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extension", ".png"], "--extension: is '.png'"),
        (["--extension", ".x.JPG", "--force"], "--extension: is '.x.JPG'"),
        (["--trigger", "[trigger]"], "--trigger: is '[trigger]'"),
        (["--trigger", "a\nb"], "--trigger: is 'a\\nb'"),
    ],
)
def test_harmful_options_are_refused(qwen, images, words, said):
    """Options that would harm images or configs are refused."""
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    code, text = run("caption", images, "--model", qwen, *words)
    assert code == 2 and said in text
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_tags_and_instruction_reach_model(qwen, images, monkeypatch):
    """The style `tags` and the user's own instruction reach the model."""
    asked = []
    monkeypatch.setattr(
        captioner.CaptionModel,
        "answer",
        lambda self, image, text, most: asked.append((text, most)) or ("Fox, Sea", True),
    )
    caption_folder(images, wanted(qwen, style="tags", instruction="Which animals?"), Console())
    assert set(asked) == {("Which animals?", CAPTION_STYLES["tags"].max_tokens)}
    assert set(texts(images).values()) == {"fox, sea\n"}


def test_captions_with_placeholder_count(qwen, images):
    """Captions with a placeholder for the trigger count as captions."""
    for path in images_of(images):
        path.with_suffix(".txt").write_text("[trigger] at sea")
    assert caption_folder(images, wanted("nowhere/nothing"), Console()) == [f"0 captions written to {images}"]


def test_bad_images_are_named_last(qwen, images, monkeypatch):
    """Bad images are named after the good images have got their captions."""
    _, twin, silent, _ = images_of(images)
    (images / "broken.png").write_bytes(b"no image")
    Image.open(twin).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(twin.with_suffix(".jpg"))
    answers = iter(["A fox.", "", "A cat."])
    monkeypatch.setattr(captioner.CaptionModel, "answer", lambda *words: (next(answers), True))
    with pytest.raises(ZImageTrainError) as caught:
        caption_folder(images, wanted(qwen), Console())
    assert caught.value.exit_code == DataError.exit_code
    text = str(caught.value)
    assert "broken.png" in text and twin.with_suffix(".jpg").name in text and silent.name in text
    assert sorted(texts(images).values()) == ["A cat.\n", "A fox.\n"]


@pytest.mark.parametrize("make", ["none", "language", "damaged", "pickle"])
def test_model_unfit_is_refused(tmp_path, qwen, images, make):
    """A folder without such a model is refused in a single line."""
    model = tmp_path / "model"
    if make == "language":
        shutil.copytree(mini.TURBO / "text_encoder", model)
    elif make == "none":
        model.mkdir()
    else:
        shutil.copytree(qwen, model)
        weights = model / "model.safetensors"
        if make == "damaged":
            weights.write_bytes(weights.read_bytes()[:5000])
        else:
            torch.save({}, model / "pytorch_model.bin")
            weights.unlink()
    with pytest.raises(WeightsError) as caught:
        caption_folder(images, wanted(model), Console())
    assert len(str(caught.value).splitlines()) == 1 and str(model) in str(caught.value)
    assert texts(images) == {}


def test_model_too_large_is_refused(qwen, images, monkeypatch):
    """A model that is too large for the machine is refused before it is read."""
    monkeypatch.setattr(devices, "device_limits", lambda device: type("Device", (), {"limit_bytes": 1000.0}))
    monkeypatch.setattr(captioner, "load_captioner", None)
    with pytest.raises(ConfigError, match="2B"):
        caption_folder(images, wanted(qwen), Console())


@pytest.mark.parametrize("there", [True, False])
def test_accelerator_is_chosen(qwen, images, monkeypatch, there):
    """An accelerator is used where it is present, and not where torch only knows its name.

    `mps` stands for any accelerator: every torch knows the name, so no device is needed.
    """
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *words, **more: torch.device("mps"))
    taken = []
    monkeypatch.setattr(
        captioner, "load_captioner", lambda folder, device: taken.append(device.type) or captioner.CaptionModel(0, 0, 0)
    )
    monkeypatch.setattr(captioner.CaptionModel, "answer", lambda *words: ("A fox.", True))
    caption_folder(images, wanted(qwen), Console())
    assert taken == ["mps" if there else "cpu"]


@pytest.mark.slow
def test_the_command_line(qwen, images):
    code, text = run("caption", images, "--model", qwen, "--trigger", "zorb", "--kind", "character")
    assert code == 0 and "4 captions written" in text and "zorb" in text, text
    code, text = run("caption", images, "--style", "poems", "--kind", "cat", "--trigger", " ", "--extension", "txt")
    assert code == 2
    assert [line.split(":")[0] for line in text.splitlines()] == ["--kind", "--style", "--trigger", "--extension"]
    assert run("caption", images / "nothing", "--model", qwen)[0] == 3
