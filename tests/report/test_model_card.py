"""What a model card says beside what `publish` shows of a whole run."""

from pathlib import Path

from zimage_train.report.model_card import CardContent, model_card


def test_card_names_loras_of_previews(make_config, tmp_path: Path):
    """Images that further LoRAs drew, too, are not shown as those of this LoRA alone, and no folder is named."""
    extra = [f"{tmp_path / 'alice' / 'style one.safetensors'}=0.5", "distillpatch"]
    with_extra, alone = make_config(sample={"extra_loras": extra}), make_config()
    cards = []
    for config in (with_extra, alone):
        cards.append(model_card(CardContent(config, "tiny.safetensors", 4, [], None, 16), "mit", None))
    assert "| previews drawn with | this LoRA and style one.safetensors at 0.5, distillpatch at 1 |" in cards[0]
    assert "alice" not in cards[0] and "previews drawn with" not in cards[1]


def test_card_names_loss_and_guidance(make_config):
    """What changes the loss is on the card, and nothing is where nothing was changed."""
    config = make_config(loss={"type": "huber", "delta": 0.5}, guidance={"differential": 3.0})
    card = model_card(CardContent(config, "tiny.safetensors", 4, [], None, 16), "mit", None)
    assert "| loss | type huber, delta 0.5 |" in card and "| guidance | differential 3.0 |" in card
    plain = model_card(CardContent(make_config(), "tiny.safetensors", 4, [], None, 16), "mit", None)
    assert "| loss |" not in plain and "| guidance |" not in plain
