"""The API for programs, asked over HTTP."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from zimage_train import mini
from zimage_train.ui.submitted_config import check_submitted

from try_browser import copy_of_runs, pixels, serving, trained_runs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]
PROMPT = "a red zorb on a blue background"


@pytest.fixture(scope="module")
def runs(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_runs(trained_runs(shared_cache), tmp_path_factory.mktemp("api") / "runs")


@pytest.fixture(scope="module")
def api(runs: Path) -> Iterator[httpx.Client]:
    with serving(runs) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def problems(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    return "\n".join(f"{one['where']}: {one['found']}; {one['todo']}" for one in answer.json()["problems"])


def test_image_is_drawn_by_api(api, runs):
    """A request gives an id, its state an address, and that the image: the last preview of the run."""
    answer = api.post("/api/sample", json={"run": "tiny", "prompt": PROMPT, "seed": 42, "base": True})
    assert answer.status_code == 202, answer.text
    asked = answer.json()
    assert asked["state"] == "drawing" and asked["memory"]["needed_gb"] > 0 and asked["memory"]["is_downloaded"]
    place = f"/api/sample/{asked['id']}"
    wait_for(lambda: api.get(place).json()["state"] == "done", api.get(place).text)
    done = api.get(place).json()
    for address, preview in ((done["image"], "000004-00.png"), (done["base_image"], "000000-00.png")):
        image = api.get(address)
        assert image.headers["content-type"] == "image/png"
        (runs / "got.png").write_bytes(image.content)
        assert pixels(runs / "got.png") == pixels(runs / "tiny" / "samples" / preview)
    assert api.get("/api/sample").json()[0]["id"] == asked["id"]


def test_images_wait_and_are_cancelled(api):
    long = {"run": "tiny", "prompt": PROMPT, "steps": 900}
    first, second = (api.post("/api/sample", json=long).json()["id"] for _ in range(2))
    assert api.get(f"/api/sample/{second}").json()["place"] == 1
    for sample_id in (second, first):
        assert api.delete(f"/api/sample/{sample_id}").json()["state"] == "cancelled"
    assert api.get(f"/api/sample/{second}").json()["place"] is None
    assert "has no such image" in problems(api.get(f"/api/sample/{first}/image"))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"width": 33}, "width: is 33; 33 is no multiple of 16"),
        ({"steps": 0}, "steps: is 0; input should be greater than or equal to 1"),
        ({"promt": "a"}, "promt: is 'a'; extra inputs are not permitted"),
        ({"loras": [{"file": "tiny", "weight": 1000}]}, "loras.0.weight: is 1000"),
        ({"loras": [{"file": "/etc/passwd"}]}, "is outside the folders of this page"),
        ({"run": "nobody"}, "run nobody: has no config.yaml"),
    ],
)
def test_wrong_requests_name_their_problems(api, body, found):
    assert found in problems(api.post("/api/sample", json=body))


def test_body_that_is_no_json_is_a_problem(api):
    assert "body: is no JSON" in problems(
        api.post("/api/sample", content=b"{", headers={"content-type": "application/json"})
    )


def test_runs_are_described(api):
    (run,) = [run for run in api.get("/api/runs").json() if run["name"] == "tiny"]
    assert (run["state"], run["step"], run["steps"]) == ("done", 4, 4)
    details = api.get("/api/runs/tiny").json()
    assert [Path(path).name for path in details["loras"]] == ["tiny.safetensors", "tiny-000002.safetensors"]
    assert details["config"].startswith("name: tiny")
    assert list(details["previews"]) == ["0", "2", "4"]
    assert api.get(details["previews"]["4"][0]).headers["content-type"] == "image/png"
    metrics = api.get("/api/runs/tiny/metrics", params={"after": 1, "limit": 2}).json()
    assert [record["step"] for record in metrics["records"]] == [2, 3]
    assert metrics["more"] is True
    events = api.get("/api/runs/tiny/metrics", params={"events": True}).json()["records"]
    assert events[-1]["event"] == "done"
    for address in ("/api/runs/nobody", "/api/runs/nobody/metrics", "/api/runs/.queue"):
        assert "nobody" in problems(api.get(address)) or "no name of a run" in problems(api.get(address))


def test_a_run_is_downloaded_whole(api, runs):
    """Its files as they are, without checkpoints and links; of no other folder."""
    (runs / "tiny" / "link.txt").symlink_to("/etc/hostname")
    answer = api.get("/media/archive", params={"run": "tiny"})
    (runs / "tiny" / "link.txt").unlink()
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        lora = archive.read("tiny/lora/tiny.safetensors")
    assert lora == (runs / "tiny" / "lora" / "tiny.safetensors").read_bytes()
    assert {"tiny/report.html", "tiny/config.yaml", "tiny/samples/000004-00.png"} <= names
    assert not [name for name in names if "checkpoints" in name or "link" in name]
    for name in ("..", ".queue", "nobody", "tiny/lora"):
        assert api.get("/media/archive", params={"run": name}).status_code == 404


def config_text(name: str, runs: Path) -> str:
    config = (runs / "tiny" / "config.yaml").read_text()
    lines = [line for line in config.splitlines() if not line.startswith("output_dir:")]
    return "\n".join(lines).replace("name: tiny", f"name: {name}").replace("steps: 4", "steps: 3000", 1)


def test_life_of_a_run(api, runs):
    """The whole life of a run, by programs alone."""
    answer = api.post("/api/runs", content=config_text("made", runs))
    assert (answer.status_code, answer.json()["state"]) == (202, "waiting"), answer.text
    wait_for(lambda: api.get("/api/runs/made").json()["state"] == "running", "it did not start")
    assert "is training" in problems(api.delete("/api/runs/made"))
    assert api.get("/api/machine").json()["free_disk_gb"] > 0
    wait_for(lambda: api.get("/api/runs/made").json()["step"] > 2, "it made no steps")
    beside = api.post("/api/sample/memory", json={"run": "tiny", "prompt": PROMPT}).json()
    assert beside["training"] == ["made"] and 0 < beside["needed_gb"] < beside["free_gb"]
    assert api.post("/api/runs/made/save").status_code == 202
    wait_for(lambda: any("made-0" in path for path in api.get("/api/runs/made").json()["loras"]), "it did not save")
    assert api.post("/api/runs/made/stop").status_code == 200
    wait_for(lambda: api.get("/api/runs/made").json()["state"] == "stopped", "it did not stop")
    assert api.post("/api/runs/made/continue").json()["state"] == "waiting"
    wait_for(lambda: api.get("/api/runs/made").json()["state"] in ("running", "starting"), "it did not continue")
    wait_for(lambda: api.get("/api/runs/made").json()["state"] == "running", "it did not continue")
    api.post("/api/runs/made/stop")
    wait_for(lambda: api.get("/api/runs/made").json()["state"] == "stopped", "it did not stop again")
    assert "is not training" in problems(api.post("/api/runs/made/preview"))
    trash = Path(api.delete("/api/runs/made").json()["trash"])
    assert trash.parent == runs / ".trash" and (trash / "config.yaml").exists()
    assert "made" not in [run["name"] for run in api.get("/api/runs").json()]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "body: is empty"),
        ("name: [", "config.yaml:1"),
        ("name: x\ndata: [{folder: y}]\ntrian: {}\n", "config.yaml:3: trian: unknown key; did you mean 'train'?"),
        ("name: x\ndata: [{folder: y}]\noutput_dir: /elsewhere\n", "output_dir: is /elsewhere"),
    ],
)
def test_wrong_configs_are_refused(api, text, found):
    assert found in problems(api.post("/api/runs", content=text))


def test_unknown_gpu_is_refused(api, runs):
    text = config_text("for_gpu", runs)
    assert "gpu: is '7'" in problems(api.post("/api/runs", content=text, params={"gpu": "7"}))


def test_submitted_run_goes_to_the_page(tmp_path):
    text = f"name: x\ndata: [{{folder: {mini.IMAGES}}}]\n"
    job = check_submitted(text, tmp_path)
    assert job.name == "x"
    assert job.text == f"output_dir: {json.dumps(str(tmp_path))}\n{text}"
    assert check_submitted(job.text, tmp_path).text == job.text


def test_description_is_whole(api):
    """Every route of the API is in /openapi.json with a description, and so is every field of a request."""
    schema = api.get("/openapi.json").json()
    assert set(schema["paths"]) >= {"/api/sample", "/api/sample/{sample_id}", "/api/runs/{name}/stop", "/api/machine"}
    assert {path for path in schema["paths"] if not path.startswith("/api/")} == set()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (path, method)
            assert "Problems" in json.dumps(operation["responses"]["422"]), (path, method)
    request = schema["components"]["schemas"]["SampleRequest"]
    undescribed = [name for name, field in request["properties"].items() if "description" not in field]
    assert undescribed == []
    assert "application/yaml" in schema["paths"]["/api/runs"]["post"]["requestBody"]["content"]


def test_other_sites_can_do_nothing(api):
    """A page of another site can neither draw nor stop anything, and no path leads out of the folder of samples."""
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for answer in (
        api.post("/api/sample", json={"run": "tiny", "prompt": ""}, headers=foreign),
        api.post("/api/runs/tiny/stop", headers=foreign),
        api.delete("/api/runs/tiny", headers=foreign),
    ):
        assert answer.status_code == 403
    for name in ("..%2Ftiny%2Fsamples%2F000004-00", "worker", "x/../../tiny"):
        assert api.get(f"/api/sample/{name}/image").status_code in (404, 422)
