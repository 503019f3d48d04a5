"""Claims of `prove`: each holds on the miniature, and fails for a program that is wrong in the place that it names."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zimage_train import mini
from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.lora import training_adapter, verify
from zimage_train.measure import budgets
from zimage_train.measure.budgets import BudgetCase
from zimage_train.measure.proofs import encoders, plans, results, runs, step, times, weights
from zimage_train.measure.proofs.claims import Claim, largest
from zimage_train.measure.proofs.plans import Budget
from zimage_train.measure.proofs.proof import ClaimRow
from zimage_train.measure.proofs.subject import Subject, choose_model
from zimage_train.measure.speed import StepTimes
from zimage_train.models import locate, vae
from zimage_train.models.text_encoder import TextEncoder
from zimage_train.planning import calibration, forecast, memory
from zimage_train.training.step_runner import StepRunner


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The miniature in the quick form, with caches of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return choose_model(None, is_quick=True, work=tmp_path / "work")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As `prove` has it on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def verdicts(claims: Iterator[Claim]) -> dict[str, str]:
    return {claim.promise: claim.verdict(is_miniature=True) for claim in claims}


def test_verdicts():
    """Only a number at or below its bound holds, and the miniature's bounds refute nothing elsewhere."""
    within, beyond = Claim("a", 1.0, bound=1.0, bound_from="fp64"), Claim("a", 1.1, bound=1.0, bound_from="miniature")
    assert within.verdict(True) == "holds" and beyond.verdict(True) == "fails"
    assert beyond.verdict(False) == "outside what the miniature showed"
    assert replace(beyond, bound_from="fp64").verdict(False) == "fails"
    for value in (math.nan, math.inf, None):
        assert replace(within, value=value).verdict(True) == "fails"
    assert replace(within, bound=None).verdict(True) == "reported"
    assert replace(within, is_tried=False).verdict(True) == "not tried"
    for bound in (math.inf, math.nan):
        with pytest.raises(ValueError, match="the bound of 'a' is"):
            replace(within, bound=bound)
    row = ClaimRow.of(replace(within, value=math.inf, note="x"), True)
    assert (row.value, row.note, row.verdict) == (None, "inf was measured; x", "fails")
    assert row.claim.verdict(True) == "fails" and ClaimRow.of(within, True).claim == within


def test_largest():
    """A NaN is not smaller than any value, wherever it stands."""
    assert largest([0.1, 0.3, 0.2]) == 0.3
    for position in range(3):
        values = [0.1, 0.2, 0.3]
        values[position] = math.nan
        assert math.isnan(largest(values))


class TestWeights:
    TENSORS = "the file has the tensors that diffusers' class of this shape has, by name and size"
    MERGE = "the merged weights are those of a calculation in fp64"

    def test_hold(self, subject: Subject):
        found = verdicts(weights.weight_claims(subject))
        assert found[self.TENSORS] == found[weights.ADAPTER] == found[self.MERGE] == "holds"
        assert sum(promise.startswith("sha256 of the") for promise in found) == 6
        assert set(found.values()) == {"holds", "reported"}

    def test_missing_tensor(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        shape, stored = locate.transformer_tensors(subject.paths.transformer)
        left = {name: tensor for name, tensor in stored.items() if name != "layers.3.attention.to_q.weight"}
        monkeypatch.setattr(locate, "transformer_tensors", lambda path: (shape, left))
        assert verdicts(weights.weight_claims(subject))[self.TENSORS] == "fails"

    def test_module_is_not_merged(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        load = training_adapter.load_adapter

        def without_one(*arguments: Any) -> training_adapter.TrainingAdapter:
            adapter = load(*arguments)
            adapter.lora.pop("layers.5.feed_forward.w2")
            return adapter

        monkeypatch.setattr(training_adapter, "load_adapter", without_one)
        assert verdicts(weights.adapter_claims(subject))[weights.ADAPTER] == "fails"

    def test_merge_is_a_little_too_strong(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        delta_of = training_adapter.TrainingAdapter.delta_of

        def stronger(self: Any, name: str, device: torch.device) -> Tensor | None:
            delta = delta_of(self, name, device)
            return None if delta is None else 1.0001 * delta

        monkeypatch.setattr(training_adapter.TrainingAdapter, "delta_of", stronger)
        assert verdicts(weights.adapter_claims(subject))[self.MERGE] == "fails"

    def test_merge_of_nothing_finite(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        merge = training_adapter.merge_adapter

        def broken(*given: Any) -> Iterator[tuple[str, Tensor]]:
            for number, (name, tensor) in enumerate(merge(*given)):
                yield name, tensor * math.nan if number == 7 else tensor

        monkeypatch.setattr(training_adapter, "merge_adapter", broken)
        assert verdicts(weights.adapter_claims(subject))[self.MERGE] == "fails"

    def test_known_digest_is_named(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        digest = next(weights.digest_claims(subject)).note.partition(":")[0]
        monkeypatch.setitem(weights.KNOWN_DIGESTS, digest, "Turbo, by someone")
        assert next(weights.digest_claims(subject)).note == f"{digest}: Turbo, by someone"


class TestText:
    def test_hold(self, subject: Subject):
        assert set(verdicts(encoders.text_claims(subject)).values()) == {"holds"}

    def test_other_tokens(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        tokens = TextEncoder.tokens
        monkeypatch.setattr(TextEncoder, "tokens", lambda self, prompt, *rest: tokens(self, prompt.strip(), *rest))
        assert verdicts(encoders.text_claims(subject))[encoders.IDS] == "fails"

    def test_cut_a_token_too_early(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        tokens = TextEncoder.tokens
        monkeypatch.setattr(TextEncoder, "tokens", lambda self, prompt, *rest: tokens(self, prompt, *rest)[:511])
        assert verdicts(encoders.text_claims(subject))[encoders.IDS] == "fails"

    def test_a_layer_too_few(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        layer = TextEncoder._layer
        monkeypatch.setattr(TextEncoder, "_layer", lambda self, index: layer(self, max(index, 1)))
        found = verdicts(encoders.text_claims(subject))
        assert found[encoders.EMBEDDINGS] == "fails" and found[encoders.IDS] == "holds"

    def test_first_layers(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """Where the reference does not fit, the first layers are compared, and the note says how many."""
        monkeypatch.setattr(encoders, "fits_in", lambda config, layers, finer, subject: layers <= 1)
        *_, claim = encoders.text_claims(subject)
        assert claim.verdict(True) == "holds" and ", the first 1 of " in claim.note
        monkeypatch.setattr(encoders, "fits_in", lambda *arguments: False)
        assert verdicts(encoders.text_claims(subject))[encoders.EMBEDDINGS] == "not tried"

    def test_single_file(self, subject: Subject):
        extras = replace(subject.paths.extras, text_encoder=mini.ADAPTER_V1)
        found = verdicts(encoders.text_claims(replace(subject, paths=replace(subject.paths, extras=extras))))
        assert set(found.values()) == {"not tried"}


class TestLatents:
    def test_hold(self, subject: Subject):
        assert verdicts(encoders.latent_claims(subject)) == {encoders.LATENTS: "holds"}

    def test_rounded_to_bf16(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        encode = vae.encode_images
        monkeypatch.setattr(vae, "encode_images", lambda *given: encode(*given).bfloat16().float())
        assert verdicts(encoders.latent_claims(subject)) == {encoders.LATENTS: "fails"}


class TestStep:
    def test_hold(self, subject: Subject):
        assert verdicts(step.step_claims(subject)) == {step.LOSS: "holds", step.GRADIENT: "holds"}

    def test_another_sigma(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        run = StepRunner.__call__

        def later(self: StepRunner, batch: Any, weight: float) -> Tensor:
            return run(self, replace(batch, sigma=batch.sigma + 1e-4), weight)

        monkeypatch.setattr(StepRunner, "__call__", later)
        assert verdicts(step.step_claims(subject)) == {step.LOSS: "fails", step.GRADIENT: "fails"}

    def test_gradient_of_one_matrix(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        ours = step.our_step

        def flipped(*given: Any) -> tuple[float, step.Gradients]:
            loss, gradients = ours(*given)
            name = sorted(gradients)[5]
            return loss, gradients | {name: -gradients[name]}

        monkeypatch.setattr(step, "our_step", flipped)
        assert verdicts(step.step_claims(subject)) == {step.LOSS: "holds", step.GRADIENT: "fails"}
        assert step.largest_distance({"a": torch.ones(1)}, {"b": torch.ones(1)}) == math.inf

    def test_first_blocks(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """Where the whole model does not fit, its first blocks are compared, and the note says how many."""
        two = replace(subject.shape, n_layers=2)
        room = step.reference_bytes(subject, two, "fp32")
        monkeypatch.setattr(Subject, "device_bytes", property(lambda self: room))
        loss, gradient = step.step_claims(replace(subject, is_quick=False))
        assert loss.verdict(True) == gradient.verdict(True) == "holds"
        assert loss.note == "64 px in fp32, the first 2 of 6 blocks, as all of them do not fit"
        assert gradient.note.startswith("28 matrices")
        assert next(step.step_claims(subject)).note == loss.note  # the quick form compares more than that
        monkeypatch.setattr(step, "QUICK_BLOCKS", 1)
        assert next(step.step_claims(subject)).note.endswith(", the first 1 of 6 blocks, in the quick form")
        monkeypatch.setattr(Subject, "device_bytes", property(lambda self: 1.0))
        assert set(verdicts(step.step_claims(subject)).values()) == {"not tried"}


class TestMemory:
    def test_hold(self, subject: Subject):
        """Every kind of weights, on the device and streamed, takes what was predicted."""
        claims = list(plans.memory_claims(replace(subject, is_quick=False)))
        assert len(claims) == 12 and {claim.verdict(True) for claim in claims} == {"holds"}
        assert sum("streamed" in claim.note for claim in claims) >= 4
        assert all(claim.value is not None and claim.value > 0.9 for claim in claims)

    def test_prediction_is_too_low(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        predict = memory.step_memory

        def lower(*given: Any) -> memory.MemoryEstimate:
            estimate = predict(*given)
            return replace(estimate, activations=int(0.8 * estimate.activations))

        monkeypatch.setattr(memory, "step_memory", lower)
        assert "fails" in verdicts(plans.memory_claims(subject)).values()

    @pytest.mark.parametrize(
        ("reserved", "verdict"), [(23.0, "holds"), (23.6, "fails")], ids=["within", "beyond the budget"]
    )
    def test_budget_of_a_card(self, subject: Subject, monkeypatch: pytest.MonkeyPatch, reserved: float, verdict: str):
        """What the allocator reserved, and CUDA's own memory, are within the budget."""
        on_card = replace(subject, device=torch.device("cuda"))
        case = BudgetCase(subject.shape, "bf16", 512, None, 24e9, 2)
        found = {"ran": True, "reserved_gb": reserved, "allocated_gb": 0.001}
        monkeypatch.setattr(plans, "run_apart", lambda case: found)
        fits, _ = plans.plan_claims(on_card, case, Budget("24 GB", 24e9))
        assert fits.promise == "a step fits its budget (24 GB, 512 px, bf16)" and fits.verdict(False) == verdict

    def test_out_of_memory(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """A step that was to fit and does not fails; one that was predicted not to fit keeps its word."""
        monkeypatch.setattr(budgets, "run_budget", lambda case, device: {"ran": False})
        case = BudgetCase(subject.shape, "fp32", 64, None, 1e9, 2)
        subject.work.mkdir()
        (claim,) = plans.plan_claims(subject, case, Budget("1 GB", 1e9))
        assert claim.verdict(False) == "fails"
        (claim,) = plans.plan_claims(subject, replace(case, budget_bytes=1e6), Budget("1 MB", 1e6))
        assert claim.verdict(False) == "holds"

    @pytest.mark.slow
    def test_process_of_its_own(self, subject: Subject):
        case = BudgetCase(subject.shape, "fp32", 64, "int8", 1e9, 2)
        found, here = plans.run_apart(case), budgets.run_budget(case, torch.device("cpu"))
        assert found["allocated_gb"] == here["allocated_gb"] and found["loss"] == here["loss"]

    def test_budgets_of_cards(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """The whole card, and the usual sizes that are smaller."""
        on_card = replace(subject, device=torch.device("cuda"), is_quick=False, is_miniature=False)
        monkeypatch.setattr(Subject, "device_bytes", property(lambda self: 16.6e9))
        labels = [budget.label for budget in plans.budgets_of(on_card, 512)]
        assert labels == ["this card", "16 GB", "12 GB", "8 GB"]
        assert len(plans.budgets_of(replace(on_card, is_quick=True), 512)) == 1
        assert len(plans.budgets_of(replace(on_card, is_miniature=True), 512)) == 1

    def test_interrupted(self, subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        """Cases that were measured are kept; one that failed is said, a claim that fails, and is measured again."""
        ran: list[int] = []

        def run(case: BudgetCase, device: torch.device) -> dict[str, Any]:
            ran.append(case.side)
            if len(ran) == 2:
                raise ZImageTrainError(Problem("budgets", "no driver in /home/someone", "", "command-failed"))
            return {"ran": True, "allocated_gb": 1e-3}

        monkeypatch.setattr(budgets, "run_budget", run)
        cases = [BudgetCase(subject.shape, "fp32", side, None, 1e9, 2) for side in (64, 128)]
        for number in range(2):
            claims = []
            for case in cases:
                claims += plans.plan_claims(subject, case, Budget("1 GB", 1e9))
            assert [claim.verdict(True) for claim in claims] == [("holds"), ("fails", "holds")[number]]
            assert "/home/someone" not in str(claims)
        assert ran == [64, 128, 128] and capsys.readouterr().out.count("no driver in /home/someone") == 1

    def test_miniature_on_a_card(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """Fixed costs are most of its memory, so that nothing is promised."""
        on_card = replace(subject, device=torch.device("cuda"))
        found = {"ran": True, "reserved_gb": 0.1, "allocated_gb": 0.1}
        monkeypatch.setattr(plans, "run_apart", lambda case: found)
        case = BudgetCase(subject.shape, "fp32", 64, None, 24e9, 2)
        fits, peak = plans.plan_claims(on_card, case, Budget("24 GB", 24e9))
        assert fits.verdict(True) == "holds" and peak.verdict(True) == "reported"


class TestTime:
    def slower(self, monkeypatch: pytest.MonkeyPatch, factor: dict[str, float]) -> None:
        """Let our steps take other seconds than they do, by the name of the case."""
        measure = times.time_steps

        def timed(shape: Any, plan: Any, case: Any, *rest: Any) -> StepTimes:
            found = measure(shape, plan, case, *rest)
            return replace(found, own=[factor.get(case.name, 1.0) * seconds for seconds in found.own])

        monkeypatch.setattr(times, "time_steps", timed)

    def test_hold(self, subject: Subject):
        found = verdicts(times.time_claims(replace(subject, is_quick=False)))
        assert list(found.values()).count("holds") == 3 and set(found.values()) == {"holds", "reported"}
        recorded = calibration.calibration_factor(
            forecast.calibration_file(subject.config), calibration.device_key("cpu", 1_538_880)
        )
        assert recorded is not None and recorded.runs == 2

    def test_slower(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        self.slower(monkeypatch, {"128 px, batch 1": 100.0})
        found = verdicts(times.time_claims(replace(subject, is_quick=False)))
        failed = {promise for promise, verdict in found.items() if verdict == "fails"}
        assert failed == {
            "a step at 128 px takes no longer than the forecast's interval",
            "a step at 128 px takes no longer than that of diffusers and peft",
        }

    def test_reference_does_not_fit(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(Subject, "device_bytes", property(lambda self: 1.0))
        (claim,) = times.reference_claims(subject, 64)
        assert claim.verdict(True) == "not tried"


class TestExactness:
    def run(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch, changed: str, starts: list[int], late: int = 0
    ) -> dict[str, str]:
        """Return the verdicts where the run `changed` ends with another byte, and the killed one has `starts`.

        `late` runs end before they are killed.
        """
        self.killed: list[bool] = []

        def train(subject: Subject, name: str, *rest: Any, **options: Any) -> Path:
            path = subject.work / name / "proved" / "lora" / "proved.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"12345" if name == changed else b"12346")
            (path.parent.parent / "run.json").write_text(f'{{"starts": {starts}}}')
            kills = options.get("kill_after") is not None
            self.killed.append(kills)
            steps = 12 if kills and sum(self.killed) <= late else 7
            (path.parent.parent / "metrics.jsonl").write_text("{}\n" * steps)
            return path

        monkeypatch.setattr(runs, "train", train)
        return verdicts(runs.exactness_claims(subject))

    @pytest.mark.parametrize(
        ("changed", "starts", "failed"),
        [
            ("none", [0, 6], set()),
            ("again", [0, 6], {runs.EQUAL}),
            ("killed", [0, 6], {runs.CONTINUED}),
            ("none", [0, 0], {runs.CONTINUED}),  # it began anew
            ("none", [0], {runs.CONTINUED}),  # it was not killed
        ],
    )
    def test_verdicts(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch, changed: str, starts: list[int], failed: set[str]
    ):
        found = self.run(subject, monkeypatch, changed, starts)
        assert {promise for promise, verdict in found.items() if verdict == "fails"} == failed
        assert set(found) == {runs.EQUAL, runs.CONTINUED} and sum(self.killed) == 1

    def test_an_earlier_lora_is_not_compared(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """A run that is as it should be is not measured against an earlier one that was not."""
        subject.work.mkdir(parents=True, exist_ok=True)
        (subject.work / "lora.safetensors").write_bytes(b"other")
        assert set(self.run(subject, monkeypatch, "none", [0, 6]).values()) == {"holds"}

    @pytest.mark.parametrize(("late", "kills"), [(1, 2), (2, 3), (9, 3)])
    def test_killed_too_late(self, subject: Subject, monkeypatch: pytest.MonkeyPatch, late: int, kills: int):
        """A run that ends before it is killed is begun again, a few times."""
        self.run(subject, monkeypatch, "none", [0, 6], late)
        assert sum(self.killed) == kills


class TestExport:
    DIFFUSERS = "diffusers' loader loads the change of every module"
    COMFYUI = "a transcription of ComfyUI's key map loads the change of every module"

    @pytest.fixture(autouse=True)
    def lora(self, subject: Subject) -> None:
        subject.work.mkdir()
        shutil.copyfile(mini.DISTILLPATCH, subject.work / "lora.safetensors")

    def test_hold(self, subject: Subject):
        assert verdicts(results.export_claims(subject)) == {self.DIFFUSERS: "holds", self.COMFYUI: "holds"}

    def test_key_is_dropped(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        load = verify.as_diffusers
        monkeypatch.setattr(verify, "as_diffusers", lambda *given: dict(list(load(*given).items())[1:]))
        assert verdicts(results.export_claims(subject)) == {self.DIFFUSERS: "fails", self.COMFYUI: "holds"}

    def test_change_is_scaled(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        load = verify.as_comfyui

        def scaled(*given: Any) -> Any:
            return {module: delta.times(1.001) for module, delta in load(*given).items()}

        monkeypatch.setattr(verify, "as_comfyui", scaled)
        assert verdicts(results.export_claims(subject)) == {self.DIFFUSERS: "holds", self.COMFYUI: "fails"}


class TestPictures:
    def draw(self, subject: Subject, monkeypatch: pytest.MonkeyPatch, apart: dict[str, int]) -> dict[str, str]:
        """Return the verdicts where the pictures of each name are so many levels apart."""

        def pair(subject: Subject, folder: Path, name: str, lora: Path | None) -> tuple[Path, Path]:
            assert (lora is None) == (name == "without")
            subject.work.mkdir(exist_ok=True)
            paths = subject.work / f"{name}-ours.png", subject.work / f"{name}-diffusers.png"
            Image.new("RGB", (8, 8), (100, 100, 100)).save(paths[0])
            theirs = Image.new("RGB", (8, 8), (100, 100, 100))
            theirs.putpixel((3, 3), (100, 100 + apart[name], 100))
            theirs.save(paths[1])
            return paths

        monkeypatch.setattr(results, "draw_pair", pair)
        monkeypatch.setattr(results, "PICTURES", {"without": None, "with": lambda subject: mini.DISTILLPATCH})
        return verdicts(results.picture_claims(subject))

    @pytest.mark.parametrize("wrong", ["without", "with"])
    def test_two_levels(self, subject: Subject, monkeypatch: pytest.MonkeyPatch, wrong: str):
        found = self.draw(subject, monkeypatch, {"without": 1, "with": 1, wrong: 2})
        other = {"without": "with", "with": "without"}[wrong]
        assert found == {
            f"a picture {wrong} the LoRA is that of ZImagePipeline": "fails",
            f"a picture {other} the LoRA is that of ZImagePipeline": "holds",
        }

    @pytest.mark.slow
    def test_without_scheduler(self, subject: Subject, tmp_path: Path):
        """A run downloads no scheduler, and the pipeline draws the same without its folder, over earlier pictures."""
        folder = shutil.copytree(mini.TURBO, tmp_path / "turbo", ignore=shutil.ignore_patterns("scheduler"))
        subject.work.mkdir()
        for name in ("without-ours.png", "without-diffusers.png"):
            Image.new("RGB", (64, 64)).save(subject.work / name)
        ours, theirs = results.draw_pair(subject, folder, "without", None)
        assert abs(results.pixels(ours) - results.pixels(theirs)).max() <= 1
        assert results.pixels(ours).any() and len(list(subject.work.glob("*.png"))) == 2

    def test_single_files(self, subject: Subject):
        paths = replace(subject.paths, transformer=mini.ADAPTER_V1)
        found = verdicts(results.picture_claims(replace(subject, paths=paths)))
        assert set(found.values()) == {"not tried"} and len(found) == 2


class TestDrift:
    def measure(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch, with_adapter: float, bare: float
    ) -> dict[str, str]:
        def train(subject: Subject, name: str, changes: dict[str, Any]) -> Path:
            assert ("adapter" in changes.get("model", {})) == (name == "bare")
            return Path(name)

        drifts = {Path("adapter"): with_adapter, Path("bare"): bare}
        monkeypatch.setattr(results, "train", train)
        monkeypatch.setattr(results, "measured_drift", drifts.__getitem__)
        return verdicts(results.drift_claims(subject))

    def test_hold(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        found = self.measure(subject, monkeypatch, 0.05, 0.06)
        assert found == {results.TURBO_KEPT: "holds", results.DRIFTS_LESS: "holds"}

    def test_adapter_does_not_help(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        assert self.measure(subject, monkeypatch, 0.06, 0.05)[results.DRIFTS_LESS] == "fails"

    def test_other_weights(self, subject: Subject, monkeypatch: pytest.MonkeyPatch):
        """Turbo's own drift is measured on the weights that are there: not on those of another model."""
        recorded = results.DriftMeter.measure

        def changed(self: Any, model: Any, progress: Any) -> float:
            recorded(self, model, progress)
            with torch.no_grad():
                model.layers[0].feed_forward.w2.weight[0].mul_(1.1)  # of all rows, a norm would undo it
            return recorded(self, model, progress)

        monkeypatch.setattr(results.DriftMeter, "measure", changed)
        assert self.measure(subject, monkeypatch, 0.05, 0.06)[results.TURBO_KEPT] == "fails"

    def test_other_variants(self, subject: Subject):
        config = subject.config.model_copy(
            update={"model": subject.config.model.model_copy(update={"variant": "base", "adapter": None})}
        )
        found = verdicts(results.drift_claims(replace(subject, config=config)))
        assert set(found.values()) == {"not tried"}


def test_bytes_that_differ(tmp_path: Path):
    for name, content in (("a", b"abcd"), ("b", b"abXd"), ("c", b"abX")):
        (tmp_path / name).write_bytes(content)
    assert [runs.different_bytes(tmp_path / "a", tmp_path / name) for name in "abc"] == [0, 1, 2]
