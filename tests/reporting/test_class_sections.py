"""Reports of classifiers: what a section shows, means over seeds, and pictures of both kinds."""

import json
import re

from classifier_runs import build_classifier
from page import read

from vlm_distill.evaluation.seed_statistics import t_interval
from vlm_distill.reporting import class_plots
from vlm_distill.reporting.report import write_report
from vlm_distill.reporting.run_folder import load_run
from vlm_distill.reporting.seeds import name_trainings, one_seed, seed_board


def scores(run, who="student"):
    return json.loads((run / "evaluation" / "test" / who / "scores.json").read_text())


def text_of(page):
    """What stands on the page itself, without style and script."""
    text = page.text[page.text.index("vlm-distill ·") : page.text.index("Written by vlm-distill")]
    return re.sub(r"\s+", " ", text)


def test_one_run(tmp_path):
    run = build_classifier(tmp_path / "kd", n=120)
    page = read(write_report([run]))
    headings = ("Accuracy on test", "Measures", "By class", "Calibration and confusions", "Gallery", "Curves")
    for heading in headings:
        assert heading in page.headings
    for heading in ("Seeds", "On the same images", "Scores on test", "By question type", "By severity"):
        assert heading not in page.headings
    text = text_of(page)
    found = scores(run)
    assert f"classifies {found['exact']:.1%}".replace("%", " %") in text
    assert "of 120 images right; the teacher classifies" in text
    for key in ("exact", "top5", "ece", "agreement"):
        assert f"{found[key]:.1%}".replace("%", " %") in text
    assert f"{found['nll']:.3f}" in text
    assert f"{found['kl']:.3f}" in text
    assert "All models: left out of the scores 2 × image is broken." in text
    assert "Images per second (median)" in text
    assert "Waiting for data (median)" in text
    assert "3.0 %" in text
    assert "vlm-distill classify kd/config.yaml" in text
    assert "question" not in text.lower()
    assert page.scripts == 1


def test_pictures_that_are_no_files_are_in_the_gallery(tmp_path):
    page = read(write_report([build_classifier(tmp_path / "kd", n=120)]))
    assert "no picture file" not in page.text
    assert len(page.alts) >= 18
    assert all(alt.startswith("Test image ") for alt in page.alts)
    assert all(address.startswith("data:image/png") for address in page.addresses)


def test_two_runs_are_compared_on_the_same_images(tmp_path):
    runs = [build_classifier(tmp_path / name, skill, n=120, loss=name) for name, skill in (("kd", 2.5), ("ce", 1.0))]
    page = read(write_report(runs))
    assert "On the same images" in page.headings
    assert "paired bootstrap over 120 images" in text_of(page)
    assert any(heading.startswith("Accuracy") for heading in page.headings)


def test_of_many_classes_the_best_and_worst_are_shown(tmp_path):
    names = [f"kind {k:02d}" for k in range(30)]
    run = build_classifier(tmp_path / "kd", 2.0, names=names, n=300)
    path = write_report([run])
    page = read(path)
    text = text_of(page)
    assert "best of 30 classes" in text
    assert "worst of 30 classes" in text
    assert 'class="confusion' not in path.read_text()
    ranked = sorted(scores(run)["by_type"].items(), key=lambda item: -item[1]["exact"])
    table = text[text.index("best of 30 classes") : text.index("Calibration and confusions")]
    assert {name for name, _ in ranked[:5] + ranked[-5:]} == set(re.findall(r"kind \d\d", table))


def test_seeds_are_summed_up(tmp_path):
    runs = [
        build_classifier(tmp_path / loss / f"seed{k}", skill + 0.2 * k, n=80, loss=loss, seed=k)
        for loss, skill in (("taid", 2.5), ("ce", 1.5))
        for k in range(3)
    ]
    page = read(write_report(runs, tmp_path / "report.html"))
    assert "Seeds" in page.headings
    text = text_of(page)
    assert "ce/seed2" in text
    found = [scores(run)["exact"] for run in runs[:3]]
    mean, half = t_interval(found)
    assert f"{mean * 100:.1f} % ± {half * 100:.1f}" in text
    # Single images are those of one seed; all runs against each other would be five comparisons.
    assert len(re.findall("McNemar", text)) == 1
    loaded = [load_run(run, f"{run.parent.name}/{run.name}", "c0") for run in runs]
    assert name_trainings(loaded) == ["taid", "ce"]
    assert [run.label for run in one_seed(loaded)] == ["taid/seed0", "ce/seed0"]
    board = seed_board(loaded, "test")
    assert [(group.name, list(group.scores)) for group in board["groups"]] == [("taid", [0, 1, 2]), ("ce", [0, 1, 2])]
    assert [pair.found.n for pair in board["pairs"]] == [3]
    assert seed_board(loaded[::3], "test") is None


def test_corruptions_stand_by_severity(tmp_path):
    run = build_classifier(tmp_path / "kd", n=60)
    folder = run / "evaluation" / "ImageNet-C" / "student"
    folder.mkdir(parents=True)
    found = {
        "kind": "classification",
        "n": 40,
        "exact": 0.4375,
        "top5": 0.6,
        "nll": 2.5,
        "ece": 0.1,
        "by_type": {"fog": {"n": 20, "exact": 0.375}, "jpeg_compression": {"n": 20, "exact": 0.5}},
        "corruptions": {"fog": {"1": 0.5, "3": 0.25}, "jpeg_compression": {"2": 0.5}},
        "mce": 71.25,
    }
    (folder / "scores.json").write_text(json.dumps(found))
    page = read(write_report([run]))
    assert {"By severity", "By corruption"} <= set(page.headings)
    assert "71.2" in page.text
    assert "jpeg compression" in page.text


def test_text_from_outside_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    run = build_classifier(tmp_path / "kd", n=60, names=[f"{evil}{k}" for k in range(4)])
    page = read(write_report([run]))
    assert page.scripts == 1
    assert page.text.count("alert(1)") > 10


def test_a_classifier_without_an_image_or_a_likelihood_is_shown(tmp_path):
    run = build_classifier(tmp_path / "kd", n=60)
    path = run / "evaluation" / "test" / "student" / "scores.json"
    empty = dict.fromkeys(("exact", "top5", "interval", "nll", "ece"))
    path.write_text(json.dumps({"kind": "classification", "n": 0, **empty, "calibration": [], "by_type": {}}))
    path.with_name("predictions.jsonl").write_text("")
    assert "Accuracy on test" in read(write_report([run])).headings


def test_what_is_taken_for_what():
    names = ["cat", "dog"]
    pairs = [("cat", "cat"), ("cat", "dog"), ("cat", "dog"), ("dog", "dog"), ("dog", "owl")]
    text = str(class_plots.confusion("Answers", "c0", names, pairs))
    assert "cat answered as dog: 2 of 3" in text
    assert "dog answered as other: 1 of 2" in text
    assert "the most frequent mistake is cat answered as dog, 2 times" in text
    assert text.count("<rect") == 6
    assert text.count('class="hit"') == 2


def test_the_reliability_diagram_places_bins():
    bins = [{"n": 1, "confidence": 0.5, "exact": 0.5}, {"n": 3, "confidence": 1.0, "exact": 1.0}]
    text = str(class_plots.reliability([("kd", "c0", bins)]))
    ideal = re.search(r'class="ideal" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', text)
    x0, y0, x1, y1 = map(float, ideal.groups())
    assert f'points="{(x0 + x1) / 2:.1f},{(y0 + y1) / 2:.1f} {x1:.1f},{y1:.1f}"' in text
    assert text.count("<circle") == 2
    assert class_plots.reliability([("kd", "c0", [])]) == ""
