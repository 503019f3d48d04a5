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
        ("This image depicts two foxes.", "Two foxes."),
        ("The image quality is poor.", "The image quality is poor."),
        ("A fox.\x00\x07 Its \ufffdtail.", "A fox. Its tail."),
        ("  \n ", ""),
    ],
)
def test_of_an_answer_only_the_caption_stays(answer, caption):
    assert caption_prompts.clean_answer(answer, "sentences", True, None) == caption


def test_an_answer_that_was_cut_off_ends_at_its_last_whole_sentence_or_tag():
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
def test_any_answer_becomes_one_line_that_is_read_back_as_it_is(answer, style, is_whole, trigger):
    text = caption_prompts.clean_answer(answer, style, is_whole, trigger)
    assert text == captions.clean_text(text) and text.isprintable()
    assert text == "" or trigger is None or captions.trigger_pattern(trigger).search(text)


@pytest.mark.parametrize("kind", [None, *caption_prompts.OMITTED_TRAITS])
@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_the_instruction_names_the_trigger_where_there_is_a_thing_to_call_so(style, kind):
    text = caption_prompts.caption_instruction(style, kind, "zorb")
    assert text.startswith(CAPTION_STYLES[style].instruction)
    assert ("zorb" in text) == (kind in ("character", "product", "concept"))
    assert (kind is None) or caption_prompts.OMITTED_TRAITS[kind] in text


def test_every_kind_that_init_knows_has_something_to_leave_out():
    from zimage_train.config.templates import SUBJECT_KINDS

    assert set(caption_prompts.OMITTED_TRAITS) == set(SUBJECT_KINDS)


# The models


@pytest.mark.parametrize("make", [vision_models.qwen, vision_models.llava])
def test_a_model_says_the_same_of_the_same_image_and_something_else_of_another(tmp_path, make):
    model = captioner.load_captioner(make(tmp_path), torch.device("cpu"))
    seen = [Image.open(path).convert("RGB") for path in sorted(mini.IMAGES.glob("*.png"))[:6]]
    said = [model.answer(image, "Describe.", 12) for image in seen]
    assert said == [model.answer(image, "Describe.", 12) for image in seen]
    assert len({text for text, _ in said}) > 1, "it does not look"
    assert model.answer(seen[0], "Say nothing of the sky.", 12) != said[0], "it does not listen"


def test_what_a_qwen_reads_is_what_its_own_processor_makes(qwen):
    """Only where torchvision is: without it transformers cannot make that processor."""
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


def test_an_answer_that_comes_to_an_end_is_known_from_one_that_is_cut_off(qwen):
    model = captioner.load_captioner(qwen, torch.device("cpu"))
    image = Image.open(images_of(mini.IMAGES)[0]).convert("RGB")
    _, is_whole = model.answer(image, "Describe.", 5)
    assert not is_whole
    inner = model._model
    inner.lm_head.weight.data.zero_()  # all words are alike likely, so the first one is taken
    inner.generation_config.eos_token_id = [7, 0]
    assert model.answer(image, "Describe.", 5)[1]


def test_large_images_are_read_smaller_and_keep_their_shape():
    assert captioner._limit_pixels(Image.new("RGB", (4000, 1000))).size == (2048, 512)
    assert captioner._limit_pixels(Image.new("RGB", (640, 480))).size == (640, 480)


# The command


def test_captions_are_written_for_those_that_have_none(qwen, images):
    first, second, *others = images_of(images)
    own = "  my own words\r\n"
    first.with_suffix(".txt").write_bytes(own.encode())
    second.with_suffix(".txt").write_text("\n")
    said = caption_folder(images, wanted(qwen, trigger="zorb"), Console())
    found = texts(images)
    assert set(found) == {path.with_suffix(".txt").name for path in (first, second, *others)}
    assert first.with_suffix(".txt").read_bytes() == own.encode()
    assert all(re.match(r"zorb .+\n$", text) for name, text in found.items() if name != first.with_suffix(".txt").name)
    assert said == [f"3 captions written to {images}; read them: what they say is learned"]


def test_a_second_start_goes_on_and_needs_no_model_where_all_is_done(qwen, images):
    caption_folder(images, wanted(qwen), Console())
    before = texts(images)
    gone = images_of(images)[2].with_suffix(".txt")
    gone.unlink()
    caption_folder(images, wanted(qwen), Console())
    assert texts(images) == before, "the same model says the same"
    said = caption_folder(images, wanted("nowhere/nothing"), Console())
    assert said == [f"0 captions written to {images}"]


def test_what_was_written_before_an_interruption_is_there(qwen, images, monkeypatch):
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


def test_force_writes_over(qwen, images):
    file = images_of(images)[0].with_suffix(".txt")
    file.write_text("old")
    caption_folder(images, wanted(qwen, force=True), Console())
    assert file.read_text() != "old"


def test_a_caption_that_cannot_be_read_is_not_written_over(qwen, images):
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
def test_what_would_harm_images_or_configs_is_refused(qwen, images, words, said):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    code, text = run("caption", images, "--model", qwen, *words)
    assert code == 2 and said in text
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_tags_and_an_own_instruction_reach_the_model(qwen, images, monkeypatch):
    asked = []
    monkeypatch.setattr(
        captioner.CaptionModel,
        "answer",
        lambda self, image, text, most: asked.append((text, most)) or ("Fox, Sea", True),
    )
    caption_folder(images, wanted(qwen, style="tags", instruction="Which animals?"), Console())
    assert set(asked) == {("Which animals?", CAPTION_STYLES["tags"].most_tokens)}
    assert set(texts(images).values()) == {"fox, sea\n"}


def test_captions_with_a_placeholder_for_the_trigger_are_captions(qwen, images):
    for path in images_of(images):
        path.with_suffix(".txt").write_text("[trigger] at sea")
    assert caption_folder(images, wanted("nowhere/nothing"), Console()) == [f"0 captions written to {images}"]


def test_bad_images_are_named_after_the_good_ones_have_their_captions(qwen, images, monkeypatch):
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
def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, qwen, images, make):
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


def test_a_model_that_is_too_large_for_the_machine_is_refused_before_it_is_read(qwen, images, monkeypatch):
    monkeypatch.setattr(devices, "device_limits", lambda device: type("Device", (), {"limit_bytes": 1000.0}))
    monkeypatch.setattr(captioner, "load_captioner", None)
    with pytest.raises(ConfigError, match="2B"):
        caption_folder(images, wanted(qwen), Console())


@pytest.mark.parametrize("there", [True, False])
def test_an_accelerator_is_used_where_there_is_one_and_not_where_torch_only_could(qwen, images, monkeypatch, there):
    """`mps` stands for any: torch has the name everywhere, so that the choice can be seen without the device."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *words, **more: torch.device("mps"))
    taken = []
    monkeypatch.setattr(
        captioner, "load_captioner", lambda folder, device: taken.append(device.type) or captioner.CaptionModel(0, 0, 0)
    )
    monkeypatch.setattr(captioner.CaptionModel, "answer", lambda *words: ("A fox.", True))
    caption_folder(images, wanted(qwen), Console())
    assert taken == ["mps" if there else "cpu"]


def test_the_command_line(qwen, images):
    code, text = run("caption", images, "--model", qwen, "--trigger", "zorb", "--kind", "character")
    assert code == 0 and "4 captions written" in text and "zorb" in text, text
    code, text = run("caption", images, "--style", "poems", "--kind", "cat", "--trigger", " ", "--extension", "txt")
    assert code == 2
    assert [line.split(":")[0] for line in text.splitlines()] == ["--kind", "--style", "--trigger", "--extension"]
    assert run("caption", images / "nothing", "--model", qwen)[0] == 3
