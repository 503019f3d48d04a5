"""The readers of configs, captions, prompts and the records of runs, each with valid files to damage."""

import json
import shutil
from pathlib import Path
from typing import Any

from zimage_train import mini
from zimage_train.commands import compare
from zimage_train.commands.train import run_training
from zimage_train.compat.aitoolkit.convert import write_config
from zimage_train.compat.formats import AI_TOOLKIT, DATASET_TOML, read_job_as_config
from zimage_train.config.dataset import DataEntry
from zimage_train.config.foreign import register_format
from zimage_train.config.load import read_config, validate_config
from zimage_train.config.schema import Config
from zimage_train.dataset import captions
from zimage_train.dataset.scan import scan_entry
from zimage_train.diffusion.prompts import read_prompt_file
from zimage_train.errors import ZImageTrainError, collect_errors, raise_all
from zimage_train.planning import calibration
from zimage_train.planning.verdicts import run_verdicts
from zimage_train.report import page, preview_images
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.training.run_dir import RunDir, earlier_starts, read_facts, require_untouched
from zimage_train.ui import charts, config_text, run_state
from zimage_train.ui.findings import findings_of
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.submitted_config import check_submitted
from zimage_train.ui.workspace import Workspace

from dataset_folder import image
from fuzzing import FileReader
from mini_config import mini_values

ROOT = Path(__file__).parents[2]
NATIVE = b"""name: zorb  # a comment
seed: 7
model: {variant: turbo, adapter: v2}
data:
  - folder: &place "photos"
    resolution: [512, 768]
    trigger: zorb
    caption_dropout: 1e-1
  - {folder: *place, repeats: 2, mask: alpha}
lora: {type: lokr, factor: 8}
train: {steps: 1_000, batch_size: 2, beside: [a.safetensors=0.5]}
timesteps: {type: linear, min: 0.1, weight: [[0, 1.0], [1, 0]]}
optimizer: {name: prodigy, lr: 1, params: {d_coef: 2.0, betas: [0.9, 0.99]}}
schedule: {name: cosine, params: {end_factor: 0.1}}
sample: {prompts: ['a [trigger]', {prompt: 'a dog', seed: 3}], extra_loras: [{file: x}]}
"""
JSON = b'{\n\t"name": "zorb", // why\n\t"data": [{"folder": "photos \\ud83d\\ude00"}], /* and */ "lora": {"rank": 8}}\n'
JOB = b"""job: extension
config:
  name: zorb
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: zorb
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: bf16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - {folder_path: photos, caption_ext: txt, caption_dropout_rate: 0.05, resolution: [512, 768], flip_x: true}
      train:
        {batch_size: 1, steps: 2000, gradient_accumulation: 1, train_unet: true, train_text_encoder: false,
        noise_scheduler: flowmatch, optimizer: adamw8bit, lr: 1e-4, dtype: bf16, timestep_type: sigmoid,
        optimizer_params: {weight_decay: 1e-4}, lr_scheduler: constant_with_warmup,
        lr_scheduler_params: {num_warmup_steps: 10},
        ema_config: {use_ema: true, ema_decay: 0.99}, loss_type: mse}
      model: {name_or_path: Tongyi-MAI/Z-Image-Turbo, arch: 'zimage:turbo', quantize: true, qtype: qfloat8}
      sample:
        {sampler: flowmatch, sample_every: 250, width: 1024, height: 1024, seed: 42, guidance_scale: 1,
        sample_steps: 8, samples: [{prompt: 'a [trigger] in [name]', seed: 3}], neg: ''}
meta: {name: '[name]', version: '1.0'}
"""
KOHYA = b"""[general]
resolution = [768, 512]
enable_bucket = true
shuffle_caption = true
keep_tokens = 1
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "photos"  # a comment
  num_repeats = 10
  caption_extension = ".txt"
  class_tokens = 'zorb'
  flip_aug = true
"""
MUSUBI = b"""[general]
resolution = 768
caption_extension = ".txt"
[[datasets]]
image_directory = "photos"
cache_directory = "cache"
num_repeats = 2
[[datasets]]
image_jsonl_file = "list.jsonl"
"""
PROMPTS = b"""# prompts
a red zorb --n blurry --w 768 --h 512 --d 7 --s 8 --l 1
a blue zorb, on a hill
"""
PROMPTS_YAML = b"- a red zorb\n- {prompt: 'a [trigger]', negative: blurry, width: 512, height: 768, seed: 7}\n"
JSONL = (
    b'{"image": "a.png", "prompt": "a red zorb, \\u00e9"}\n'
    b'{"file_name": "b.png", "text": ["one", "two"]}\n\n{"image": "a.png", "caption": ""}\n'
)
CSV = b'image,prompt,extra\na.png,"a red zorb, large",1\r\nb.png,"two\nlines",2\n'


def given(*contents: bytes) -> Any:
    """Seeds that need no files."""
    return lambda root: list(contents)


def _config(path: Path) -> None:
    for foreign in (AI_TOOLKIT, DATASET_TOML):
        register_format(foreign)
    read_config(path)
    read_config(path, ["lora.rank=8", "data.0.resolution=[64]", "optimizer.params.eps=1e-8"])


def _job(path: Path) -> None:
    converted = read_job_as_config(path)
    text = write_config(converted.config, converted.notes, path)
    again = path.with_name("again.yaml")
    again.write_text(text)
    assert read_config(again) == converted.config


def _editor(path: Path) -> None:
    """Read the text of the page's editor, which is text already, and change a setting in it."""
    text = path.read_bytes().decode("utf-8", "replace")
    config_text.check_text(text)
    for change in (
        lambda: config_text.set_setting(text, "lora.rank", 8),
        lambda: config_text.set_setting(text, "data.*.resolution", 512),
        lambda: config_text.remove_value(text, ("data", 0, "trigger")),
        lambda: config_text.convert_foreign("job.yaml", text),
        lambda: config_text.parse_value(text),
        lambda: check_submitted(text, path.parent / "runs"),
    ):
        try:
            change()
        except ZImageTrainError as error:
            str(error).encode()
    queue = JobQueue(Workspace(path.parent / "runs", ()), [])
    for order in (path.parent / "runs" / ".queue").glob("*"):
        order.unlink()
    (path.parent / "runs" / ".queue").mkdir(parents=True, exist_ok=True)
    shutil.copy(path, path.parent / "runs" / ".queue" / "order.json")
    queue.waiting()


def _caption(path: Path) -> None:
    entry = DataEntry(folder="x", trigger="zorb", shuffle_tags=True, tag_dropout=0.5, caption_lines=True)
    captions.read_lines(path)
    for prompt in captions.prompts_of((captions.read_caption(path),), entry):
        captions.sample_prompt((prompt,), entry, lambda *key: 0.3)


def _table(path: Path) -> None:
    for name in "ab":
        if not (path.parent / f"{name}.png").exists():
            image(path.parent / f"{name}.png", (ord(name), 1, 2))
    raise_all(scan_entry(DataEntry(metadata=str(path), trigger="zorb"), "data.0").errors)


def _prompts(path: Path) -> None:
    with collect_errors([]):
        scan_entry(DataEntry(prompts=str(path), trigger="zorb"), "data.0")
    read_prompt_file(path)


CONFIGS = [
    FileReader("config", "c.yaml", _config, given(NATIVE, JOB, KOHYA, MUSUBI)),
    FileReader("config_json", "c.json", _config, given(JSON)),
    FileReader("job", "job.yaml", _job, given(JOB)),
    FileReader("dataset_toml", "photos.toml", _job, given(KOHYA, MUSUBI)),
    FileReader("editor", "c.yaml", _editor, given(NATIVE, JOB)),
    FileReader("caption", "a.txt", _caption, given(b"a red zorb, on a hill\r\n\xc3\xa9, x", b"\xef\xbb\xbfzorb")),
    FileReader("metadata_jsonl", "list.jsonl", _table, given(JSONL)),
    FileReader("metadata_csv", "list.csv", _table, given(CSV)),
    FileReader("prompts", "prompts.txt", _prompts, given(PROMPTS)),
    FileReader("prompts_yaml", "prompts.yaml", _prompts, given(PROMPTS_YAML)),
]


# Records of runs


def trained(root: Path) -> Config:
    """A run of the miniature with previews, validation and averages, in `root`."""
    values = mini_values(
        root / "runs",
        root / "cache",
        train={"steps": 2, "batch_size": 1},
        ema={"decay": 0.9},
        save={"every": 1},
        sample={"every": 1, "width": 64, "height": 64, "prompts": ["a red zorb", "a dog"]},
        validation={"folder": str(mini.IMAGES), "resolution": 64, "every": 1},
    )
    config, problems = validate_config(values, str)
    assert config is not None, problems
    if not (root / "runs" / config.name / "report.html").exists():
        run_training(config, fresh=False)
    return config


def run_file(name: str) -> Any:
    """A seed: the file of this name in the folder of a run."""

    def read(root: Path) -> list[bytes]:
        config = trained(root)
        return [(Path(config.output_dir) / config.name / name).read_bytes()]

    return read


def _run(path: Path) -> None:
    """Read a run folder as the page, the report, `compare` and the start of a run do."""
    folder = RunDir(path.parent, "tiny")
    whole = trained(path.parents[1] / "seeds")
    if not folder.config.exists():
        shutil.copytree(Path(whole.output_dir) / whole.name, folder.root, dirs_exist_ok=True)
    run_state._files._entries.clear()
    state = run_state.read_run(folder.root)
    run_state.log_tail(folder.root, state.output)
    findings_of(state)
    for records in (run_state.records_of(folder.root), run_state.events_of(folder.root)):
        for name in ("loss", "lr", "drift"):
            points = charts.curve(records, name)
            charts.chart_options({name: points}, 0.5, True, name, False)
        [record for record in records if record["step"] > 1]
    _report(folder, whole)
    compare.run_facts(compare.FinishedRun("a", folder, {}))
    earlier_starts(folder)
    RecordWriter(path if path.suffix == ".jsonl" else None, 1).close()
    with collect_errors([]):  # its checkpoints are gone
        require_untouched(folder)


def _report(folder: RunDir, config: Config) -> None:
    """As `training.outputs.write_report`."""
    table = preview_images.PreviewTable([], [], {})
    verdicts = run_verdicts(config, read_records(folder.events))
    page.write_report_page(
        folder.report,
        config.name,
        read_facts(folder),
        folder.metrics,
        folder.events,
        table,
        "name: x",
        [str(verdict) for verdict in verdicts],
    )


def _run_config(path: Path) -> None:
    """Read the config of a run as the page and `compare` do."""
    if not (path.parent / "samples").exists():
        whole = trained(path.parents[1] / "seeds")
        shutil.copytree(Path(whole.output_dir) / whole.name / "samples", path.parent / "samples")
        (path.parent / "metrics.jsonl").write_bytes(run_file("metrics.jsonl")(path.parents[1] / "seeds")[0])
    run_state._files._entries.clear()
    run_state.read_run(path.parent)
    run_state.config_of(path.parent)
    runs = compare.open_runs([path.parent])
    compare.make_comparison(runs)
    compare.differing_settings([runs[0].settings, {"name": "x"}])


def _worker_lines(path: Path) -> None:
    state = run_state.read_run(path.parent)
    run_state._files._entries.clear()
    state = run_state.read_run(path.parent)
    run_state.log_tail(path.parent, state.output)


def _calibration(path: Path) -> None:
    calibration.calibration_factor(path, "a")
    calibration.record_measurement(path, calibration.Measurement("a", 12, 1.0, 1.0, None))


WORKER = "".join(
    json.dumps(event) + "\n"
    for event in (
        {"event": "note", "text": "a"},
        {"event": "warning", "text": "b", "verdict": "leaking"},
        {"event": "progress", "what": "captions", "done": 1, "total": 2},
        {"event": "error", "where": "a", "found": "b", "todo": "c", "exit_code": 143},
    )
)
MEASURED = {"device": "a", "steps": 12, "time_ratio": 1.0, "memory_ratio": None, "seconds": 2.0}
RECORDS = [
    FileReader("metrics", "metrics.jsonl", _run, run_file("metrics.jsonl")),
    FileReader("events", "events.jsonl", _run, run_file("events.jsonl")),
    FileReader("facts", "run.json", _run, run_file("run.json")),
    FileReader("run_config", "config.yaml", _run_config, run_file("config.yaml")),
    FileReader("worker_lines", "worker.jsonl", _worker_lines, given(WORKER.encode())),
    FileReader("worker", "worker.json", _worker_lines, given(b'{"pid": 12, "began": 7, "gpu": "0"}')),
    FileReader("calibration", "calibration.json", _calibration, given(json.dumps([MEASURED]).encode())),
]
