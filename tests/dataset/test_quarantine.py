"""Bad images are moved out of the way with their captions and the reason, and nothing else is touched."""

import json
import shutil
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.config.load import dump_config
from zimage_train.dataset.quarantine import move_rejected
from zimage_train.planning import preflight


def test_bad_images_are_moved(make_config, tmp_path: Path):
    """Bad images are moved with their caption and the reason, and the rest is usable."""
    photos = tmp_path / "photos"
    shutil.copytree(mini.IMAGES, photos)
    (photos / "sub").mkdir()
    (photos / "sub" / "cut.png").write_bytes((photos / "zorb_01.png").read_bytes()[:500])
    (photos / "sub" / "cut.txt").write_text("a caption")
    (photos / "page.jpg").write_bytes(b"<html>not found</html>")
    Image.new("RGB", (4000, 70)).save(photos / "narrow.png")
    good = {path.name: path.read_bytes() for path in mini.IMAGES.iterdir()}
    config = make_config(data=[{"folder": str(photos), "resolution": [64], "trigger": "zorb"}])
    lines = move_rejected(config)
    assert len(lines) == 5 and lines[-2] == "3 bad images"
    rejected = photos / "_rejected"
    assert {path.relative_to(rejected).as_posix() for path in rejected.rglob("*") if path.is_file()} == {
        "sub/cut.png",
        "sub/cut.txt",
        "sub/cut.png.why.txt",
        "page.jpg",
        "page.jpg.why.txt",
        "narrow.png",
        "narrow.png.why.txt",
    }
    assert (rejected / "page.jpg.why.txt").read_text().startswith("a web page or SVG, not an image; replace it")
    assert (rejected / "sub" / "cut.txt").read_text() == "a caption"
    assert {path.name: path.read_bytes() for path in photos.iterdir() if path.is_file()} == good
    assert len(preflight.check_run(config).images[0]) == 16
    assert move_rejected(config)[-2] == "0 bad images"


def test_bad_images_of_one_name(make_config, tmp_path: Path):
    """Two bad images of the same name are both kept."""
    (tmp_path / "photos" / "_rejected").mkdir(parents=True)
    (tmp_path / "photos" / "_rejected" / "a.png").write_bytes(b"older")
    (tmp_path / "photos" / "a.png").write_bytes(b"newer")
    config = make_config(data=[{"folder": str(tmp_path / "photos"), "resolution": [64]}])
    move_rejected(config)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "photos" / "_rejected").iterdir()}
    assert kept.keys() == {"a.png", "a-2.png", "a-2.png.why.txt"}
    assert (kept["a.png"], kept["a-2.png"]) == (b"older", b"newer")


def test_broken_link_is_moved(make_config, tmp_path: Path):
    """A link that leads nowhere is moved as it is."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    config = make_config(data=[{"folder": str(tmp_path / "photos"), "resolution": [64]}])
    assert "does not exist; moved to" in move_rejected(config)[0]
    assert (tmp_path / "photos" / "_rejected" / "gone.png").is_symlink()
    assert not (tmp_path / "photos" / "gone.png").is_symlink()


def test_metadata_is_not_edited(make_config, tmp_path: Path):
    """A metadata file is not edited, and its images stay."""
    (tmp_path / "bad.png").write_bytes(b"")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "bad.png", "prompt": "x"}))
    config = make_config(data=[{"metadata": str(rows), "resolution": [64]}])
    assert f"not moved: take its line out of {rows}" in move_rejected(config)[0]
    assert (tmp_path / "bad.png").exists()


def test_the_command_moves_and_then_checks(make_config, tmp_path: Path):
    shutil.copytree(mini.IMAGES, tmp_path / "photos")
    (tmp_path / "photos" / "bad.png").write_bytes(b"bad")
    config = make_config(data=[{"folder": str(tmp_path / "photos"), "resolution": [64], "trigger": "zorb"}])
    (tmp_path / "a.yaml").write_text(dump_config(config))
    assert CliRunner().invoke(app, ["check", str(tmp_path / "a.yaml")]).exit_code != 0
    done = CliRunner().invoke(app, ["check", "--quarantine", str(tmp_path / "a.yaml")])
    assert done.exit_code == 0, done.output
    assert "1 bad images" in done.output and "tiny: no problems found" in done.output
