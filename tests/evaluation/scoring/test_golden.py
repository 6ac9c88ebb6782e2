"""Every scorer gives what the reference gave, and the checker that says so can fail."""

import json

import pytest


def test_the_reference_agrees(checker, golden_file):
    cases = [case for case in checker.read_cases(golden_file) if not checker.left_out(case)]
    if not any(map(checker.built, cases)):
        pytest.skip("not built")
    wrong = [f"{case.where}: {found}" for case in cases if (found := checker.fault(case)) is not None]
    assert not wrong, "\n".join(wrong)


def test_hardly_anything_is_left_out(checker):
    cases = [case for file in sorted(checker.GOLDEN.glob("*.jsonl")) for case in checker.read_cases(file)]
    assert len(cases) > 4000
    assert sum(map(checker.left_out, cases)) <= 0.001 * len(cases)


def test_every_fault_that_decides_a_case_is_in_the_docs(checker):
    lines = [line for file in sorted(checker.GOLDEN.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    names = {name for line in lines for name in json.loads(line).get("quirks", ())}
    docs = (checker.GOLDEN.parents[2] / "docs" / "evaluation.md").read_text("utf-8")
    assert len(names) > 10
    assert not {name for name in names if f"`{name}`" not in docs}


def write(folder, name, **case):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text(json.dumps(case) + "\n", "utf-8")


def test_the_command_fails_on_a_wrong_value(command, tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    given = {"rules": "vlmevalkit", "scorer": "yes_no", "input": {"prediction": "Yes."}}
    write(good, "a", **given, expected={"extracted": "Yes"})
    write(bad, "b", **given, expected={"extracted": "No"})
    assert command(["scoring", str(good)]) == 0
    assert command(["scoring", str(bad), str(good)]) == 1
    assert "FAIL b:1: gave {'extracted': 'Yes'}" in capsys.readouterr().out


def test_the_command_lists_what_is_not_built(command, tmp_path, capsys):
    write(tmp_path, "a", rules="vlmevalkit", scorer="telepathy", input={}, expected={})
    assert command(["scoring", str(tmp_path)]) == 0
    assert "not built" in capsys.readouterr().out


def test_an_empty_folder_is_no_success(command, tmp_path):
    assert command(["scoring", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("got", "want", "equal"),
    [
        (0.5, 0.5 + 1e-12, True),
        (0.5, 0.5001, False),
        (float("nan"), "NaN", True),
        (1.0, "NaN", False),
        (float("inf"), "Infinity", True),
        (1, True, False),
        (0.0, False, False),
        (None, None, True),
        (0.0, None, False),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        (["a"], ["a", "b"], False),
        ("1", 1, False),
    ],
)
def test_values_are_compared_strictly(checker, got, want, equal):
    assert checker.same(got, want) == equal


def test_a_crash_is_no_refusal(checker):
    case = checker.Case("here", "vlmevalkit", "mme", {}, {"error": "KeyError"})
    assert "raised KeyError" in checker.fault(case)


def test_swapped_images_are_seen(checker, tmp_path):
    file = checker.GOLDEN / "data" / "GoldPublicMMMU.tsv"
    swapped = file.read_text("utf-8").replace(
        "<image 1> Compare it with <image 2>", "<image 2> Compare it with <image 1>"
    )
    (tmp_path / file.name).write_text(swapped, "utf-8")
    given = {"file": str(tmp_path / file.name), "kind": "mmmu"}
    prompt = checker.ADAPTERS["vlmevalkit", "load_tsv"](given)["rows"][0]["prompt"]
    assert [part["value"] for part in prompt if part["type"] == "image"] == ["1_1.png", "1_0.png"]
