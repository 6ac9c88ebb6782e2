"""Files for code hosts and container builders agree with the project; nothing else in the suite reads them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_has_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["title"] == PROJECT["name"]
    assert citation["authors"] == [{"name": "The vlm-distill authors"}]


@pytest.mark.parametrize("path", [form for form in FORMS if form.name != "config.yml"], ids=lambda path: path.stem)
def test_an_issue_form_asks_for_the_version(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]) <= 5
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    if path.stem in ("bug", "question"):
        assert "`vlm-distill --version`" in fields["version"]["attributes"]["description"]


def test_the_workflow_runs_the_tests_on_the_oldest_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test JOBS=4"]
    assert job["strategy"]["matrix"]["python"][0] == PROJECT["requires-python"].removeprefix(">=")


def test_the_image_installs_this_version_and_pins_every_dependency():
    dockerfile = (ROOT / "Dockerfile").read_text()
    (extras, version) = re.search(r'"vlm-distill\[(.*)\]==(.*)"', dockerfile).groups()
    assert version == PROJECT["version"]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    wanted = [*PROJECT["dependencies"], *(w for e in extras.split(",") for w in PROJECT["optional-dependencies"][e])]
    names = {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - pinned == set()


def test_the_image_is_built_from_what_the_wheel_needs():
    """A folder of packages that .dockerignore or the Dockerfile leaves out would be missing in the wheel."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {*(name.rstrip("*") for name in packages), "configs", "pyproject.toml", "README.md", "LICENSE"}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert needed <= set(" ".join(copied).split())
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert needed | {"docker/constraints.txt"} <= allowed
