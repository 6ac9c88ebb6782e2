"""Only the files inside a local folder of tables are read, whatever its descriptions say."""

import json
import socket

import datasets
import pytest

from data.errors import UserError
from data.opening import open_source

ROWS = [{"question": "Colour?", "answer": "Red."}]
SECRET = [{"question": "Secret?", "answer": "Yes."}]


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """Fail on any attempt to connect."""

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "secret.parquet", SECRET)
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def asked(path, **options):
    source = open_source(path, **options)
    return [source[i].question for i in range(len(source))]


def rows(*texts):
    return [{"question": text, "answer": "!"} for text in texts]


@pytest.mark.parametrize(
    "files",
    ["../secret.parquet", "http://127.0.0.1:9/x.parquet", "hf://datasets/a/b/x.parquet", "{outside}/secret.parquet"],
)
def test_a_hostile_readme_changes_nothing(folder, files):
    write(folder / "train-00000-of-00001.parquet", ROWS)
    files = files.replace("{outside}", str(folder.parent))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {files}\n---\n"
    (folder / "README.md").write_text(card)
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {"train": {"name": files}}}}))
    (folder / f"{folder.name}.py").write_text("raise SystemExit('run')")
    for options in ({}, {"split": "train"}, {"config": "default", "split": "train"}):
        assert asked(folder, **options) == ["Colour?"]
    assert asked(folder / "train-00000-of-00001.parquet") == ["Colour?"]
    (folder / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="holds no parquet or arrow file"):
        open_source(folder)


def test_links_out_of_the_folder_are_refused(folder):
    write(folder / "here.parquet", ROWS)
    (folder / "inside.parquet").symlink_to(folder / "here.parquet")
    assert asked(folder) == ["Colour?"] * 2
    (folder / "outside.parquet").symlink_to(folder.parent / "secret.parquet")
    with pytest.raises(UserError, match=r"outside\.parquet is a link out of"):
        open_source(folder)


def test_a_saved_data_set_names_no_files_elsewhere(folder):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(folder)
    datasets.Dataset.from_list(SECRET).save_to_disk(folder.parent / "other")
    assert asked(folder, split="train") == ["Colour?"]
    state = json.loads((folder / "train" / "state.json").read_text())
    for name in ("../../other/data-00000-of-00001.arrow", str(folder.parent / "other" / "data-00000-of-00001.arrow")):
        (folder / "train" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        for path in (folder, folder / "train"):
            with pytest.raises(UserError, match="names files outside its folder"):
                open_source(path)
    for splits in (["../other"], ["train", 5], "train", [""]):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        with pytest.raises(UserError, match="does not list splits by name"):
            open_source(folder)
    (folder / "dataset_dict.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_source(folder)


def test_splits_are_told_by_names_of_files_and_folders(folder):
    for number, name in enumerate(("a-00000-of-00002", "a-00001-of-00002", "test", "my_dev_rows"), 1):
        write(folder / f"{name}.parquet", rows(str(number)))
    write(folder / "Train" / "x.parquet", rows("5"))
    expected = {"a": ["1", "2"], "test": ["3"], "validation": ["4"], "val": ["4"], "dev": ["4"], "train": ["5"]}
    assert {split: asked(folder, split=split) for split in expected} == expected
    with pytest.raises(UserError, match="set `split` to one of a, test, train, validation"):
        open_source(folder)


def test_files_without_a_split_are_for_training(folder):
    for name in ("b", "a"):
        write(folder / f"{name}.parquet", rows(name))
    assert asked(folder) == asked(folder, split="train") == ["a", "b"]
    with pytest.raises(UserError, match="no split 'test'"):
        open_source(folder, split="test")


def test_a_config_is_a_folder(folder):
    for config in ("iam(cauldron)", "b [x]*"):
        write(folder / config / "train-00000-of-00001.parquet", rows(config))
    for config in ("iam(cauldron)", "b [x]*"):
        assert asked(folder, config=config, split="train") == [config]
    with pytest.raises(UserError, match=r"several folders of data; set `config` to one of b \[x\]\*, iam\(cauldron\)"):
        open_source(folder)
    for config in ("c", "../set", "/etc"):
        with pytest.raises(UserError, match="config"):
            open_source(folder, config=config)
