import json

from vlm_distill.runtime.tracking import Tracker


def track(folder, start, lines):
    with Tracker(folder, 10, start, first=True, settings={}) as tracker:
        for step, loss in lines:
            tracker.log("train", step, {"loss": loss})


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    track(tmp_path, 0, [(1, 0.9), (2, 0.8), (3, 0.7)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # the line that a crash cut off
    track(tmp_path, 2, [(3, 0.71)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.9), (2, 0.8), (3, 0.71)]


def test_the_last_evaluation_is_told_again(tmp_path):
    track(tmp_path, 0, [(10, 0.9)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 9}\n{"kind": "eval", "step": 10}\n')
    track(tmp_path, 10, [])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 10), ("eval", 9)]


def test_tensorboard_is_written(tmp_path):
    track(tmp_path, 0, [(1, 0.9)])
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(tmp_path, 10, 0, first=False, settings={}) as tracker:
        tracker.log("train", 1, {"loss": 1.0})
        tracker.show(1, "loss 1")
        tracker.say("hello")
    assert list(tmp_path.iterdir()) == []


def test_square_brackets_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "run [bold] [x]"
    folder.mkdir()
    with Tracker(folder, 10, 0, first=True, settings={}) as tracker:
        tracker.say("[/red] written to [data] :smile:")
        tracker.warn("no [/] such")
        tracker.show(10, "a[/] 1")
    told = capsys.readouterr().err
    assert "[/red] written to [data] :smile:" in told
    assert "warning: no [/] such" in told
    assert "a[/] 1" in told


def test_in_a_log_a_message_is_one_line(tmp_path, capsys):
    long = "evaluation.limit: " + "is for evaluations during training, " * 5
    with Tracker(tmp_path, 10, 0, first=True, settings={}) as tracker:
        tracker.say(long)
        tracker.warn(long)
        tracker.show(10, long)
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        f"{before}{long}".strip() for before in ("", "warning: ", "step 10/10  ")
    ]
