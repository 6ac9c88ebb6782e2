"""A thousand mutated samples and images through real readers and workers: each is used or counted; none crashes."""

import base64
import csv
import io
import json
import os
import random
import resource
import signal
import tarfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial

import mutants
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import EITHER, GOOD

from data.classification import open_images
from data.collate import Collator
from data.errors import BadSample, UserError, one_line
from data.images import load_image
from data.layouts import LAYOUTS, to_conversation
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.opening import open_source, open_text
from data.tsv import TsvTable
from data.workers import make_loader
from vision.augmentation import Augmentation
from vision.inputs import InputSettings
from vision.loader import ImageSteps, ViewSettings
from vlm_distill.demo import make_tokenizer
from vlm_distill.models.composed_processor import ComposedProcessor
from vlm_distill.models.image_transform import ImageTransform

# Of a worker, beyond what it begins with. One image within the limit of pixels is 270 MB decoded, and as much again
# while it changes its mode; a bomb would be many gigabytes.
MEMORY = 400 << 20
SECONDS = 8  # of a processor, for a step
HANGS = 60  # by the clock, for one file
BATCH = 16
REASONS = {
    *("not an image", "image is broken", "image file is empty", "image is too large", "image is too narrow"),
    *("image has no pixels", "image of floating-point values", "image of 32-bit values"),
}


class Watched(torch.utils.data.Dataset):
    """Another data set's steps with the seconds each took and how far its worker's memory grew."""

    def __init__(self, steps):
        self.steps, self.first = steps, None

    def __getitem__(self, index):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.first = self.first or before
        began = time.process_time()  # a machine with other work is no fault
        step = self.steps[index]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.first
        return step, time.process_time() - began, 1024 * grown


@contextmanager
def limited(seconds):
    """Raise in code that hangs."""

    def end(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def processor():
    """Of an assembled model, whose image transform takes the middle of an image."""
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3, resize="crop")
    return ComposedProcessor(make_tokenizer(tiny.WORDS), transform, 4)


@pytest.fixture
def folders(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    return inside, outside


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drain(steps, count):
    """Every problem of ``count`` steps made by two workers, as a list, and how many samples were good."""
    problems, good = [], 0
    with limited(600):
        for step, seconds, grown in make_loader(Watched(steps), 0, count, workers=2):
            problems += step.problems
            good += sum(batch.samples for batch in step.batches)
            assert seconds < SECONDS
            assert grown < MEMORY
    return problems, good


def check(found, good, expected):
    """Each line of each source once: good, or with its reason."""
    total = sum(map(len, expected.values()))
    assert good + len(found) == total
    reasons = {(problem.source, problem.line): problem for problem in found}
    assert len(reasons) == len(found)
    for source, lines in expected.items():
        for line, mutant in lines.items():
            problem = reasons.pop((source, line), None)
            if mutant.expected is not EITHER:
                assert (problem.reason if problem else GOOD) == mutant.expected, (mutant.name, problem)
            if problem is not None:
                problem.detail.encode()  # whatever the data held, this can be written and shown
                assert len(problem.detail) <= 301
                assert one_line(problem.detail) == problem.detail
    assert not reasons


def steps_of(sources, processor, roots=(), **options):
    mixture = Mixture(sources, seed=3, batch_size=BATCH)
    load = partial(load_image, roots=roots)
    dataset = StepDataset(mixture, Collator(processor, processor, 1000), StepSplit(BATCH), load=load, **options)
    return dataset, mixture.steps_per_epoch


def write_images(folder, found):
    """The mutants as files; half of them have another format's name."""
    names = {}
    for number, mutant in enumerate(found):
        suffix = (mutant.name.split("_")[0], "jpg", "png")[number % 3]
        path = folder / f"{number}.{suffix}"
        path.write_bytes(mutant.content)
        names[path.name] = mutant
    return names


def test_conversations(folders, processor):
    inside, outside = folders
    pictures = write_images(inside, mutants.images(seed=1, count=330))
    astray = mutants.paths(inside, outside)
    control = processor.tokenizer.eos_token
    samples = mutants.records(2, 200, control)
    samples += [
        mutants.Mutant(m.name, mutants.chat("<image>what", image=name), m.expected) for name, m in pictures.items()
    ]
    samples += [mutants.Mutant(m.name, mutants.chat("<image>what", image=m.content), m.expected) for m in astray]
    lines = [m.content if isinstance(m.content, bytes) else json.dumps(m.content).encode() for m in samples]
    (inside / "chat.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    # The same shapes as one list, which holds no broken lines.
    whole = [m for m in mutants.records(4, 130, control) if not isinstance(m.content, bytes)]
    (inside / "list.json").write_text(json.dumps([m.content for m in whole]))
    sources = [open_source(inside / name) for name in ("chat.jsonl", "list.json")]
    expected = {"chat": dict(enumerate(samples, 1)), "list": dict(enumerate(whole, 1))}
    assert sum(map(len, expected.values())) > 600
    dataset, count = steps_of(sources, processor, roots=[inside])
    found, good = drain(dataset, count)
    check(found, good, expected)
    assert good > 200
    assert len({problem.reason for problem in found}) > 25


def test_webdataset(folders, processor):
    inside, _ = folders
    pictures = mutants.images(seed=7, count=100)
    records = mutants.records(8, 100, processor.tokenizer.eos_token)
    asked = json.dumps(mutants.chat("<image>what")).encode()
    members = [(f"{i:03}.{k}", c) for i, m in enumerate(pictures) for k, c in (("json", asked), ("jpg", m.content))]
    lines = [m.content if isinstance(m.content, bytes) else json.dumps(m.content).encode() for m in records]
    # Of records without an image beside them, what counts is that each has an end, and that none reads a file.
    members += [(f"r{i:03}.json", line) for i, line in enumerate(lines)]
    with tarfile.open(inside / "shard.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    either = [mutants.Mutant(m.name, b"", mutants.EITHER) for m in records]
    dataset, count = steps_of([open_source(inside / "shard.tar")], processor)
    problems, good = drain(dataset, count)
    check(problems, good, {"shard": dict(enumerate([*pictures, *either], 1))})


def test_rows_of_a_table(folders, processor):
    import datasets
    import pyarrow.parquet

    inside, outside = folders
    found = mutants.images(seed=5, count=130)
    images = [{"bytes": m.content, "path": None} for m in found]
    astray = mutants.paths(inside, outside)[:12]
    images += [{"bytes": None, "path": m.content} for m in astray]
    rows = found + astray + [mutants.Mutant("null", None, "image count mismatch")]
    columns = {"image": [*images, None], "question": ["<image>what"] * len(rows), "answer": ["red"] * len(rows)}
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    # By hand: the library would look for the images that are only named.
    table = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    pyarrow.parquet.write_table(table, inside / "rows.parquet")
    dataset, count = steps_of([open_source(inside / "rows.parquet")], processor, roots=[inside])
    problems, good = drain(dataset, count)
    check(problems, good, {"rows": dict(enumerate(rows, 1))})


def test_plain_text(folders, processor):
    inside, outside = folders
    texts = {
        "fine": (b"what color is it", GOOD),
        "bom": (b"\xef\xbb\xbfwhat color", GOOD),
        "end": (b"what <eos> color", GOOD),
        "nul": (b"what\0color", GOOD),
        "empty": (b" \n", "empty document"),
        "latin1": (b"caf\xe9 is it", "invalid UTF-8"),
        "zeros": (bytes(10), GOOD),
        "cut": ("what é".encode()[:-1], "invalid UTF-8"),
        "word": (b"red", GOOD),
        "z_link": (None, "file outside the folder"),
    }
    (outside / "secret.txt").write_text("what color")
    (inside / "z_link.txt").symlink_to(outside / "secret.txt")
    for name, (content, _) in texts.items():
        if content is not None:
            (inside / f"{name}.txt").write_bytes(content)
    os.mkfifo(inside / "pipe.txt")
    (inside / "folder.txt").mkdir()
    ordered = sorted(texts)
    expected = {line: mutants.Mutant(name, None, texts[name][1]) for line, name in enumerate(ordered, 1)}
    plain = ComposedProcessor(processor.tokenizer)
    dataset, count = steps_of([open_text(inside, 4000)], plain)
    problems, good = drain(dataset, count)
    check(problems, good, {"inside": expected})


def image_steps(source, roots):
    inputs = InputSettings((16, 16), (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0)
    mixture = Mixture([source], seed=3, batch_size=BATCH)
    views = [Augmentation(auto_augment="rand-m9-mstd0.5-inc1"), Augmentation(crop="center")]
    load = partial(load_image, roots=roots)
    return ImageSteps(mixture, inputs, ViewSettings(views), split=StepSplit(BATCH), load=load), mixture.steps_per_epoch


def test_class_folders_and_tars(folders):
    inside, outside = folders
    for name in ("cat", "dog"):
        (inside / name).mkdir()
    found = mutants.images(seed=6, count=150)
    names = [f"{'cat' if i % 2 else 'dog'}/{i:03}.{'jpg' if i % 3 else 'png'}" for i in range(len(found))]
    with tarfile.open(outside / "shard.tar", "w") as tar:
        for name, mutant in zip(names, found, strict=True):
            (inside / name).write_bytes(mutant.content)
            member = tarfile.TarInfo(name)
            member.size = len(mutant.content)
            tar.addfile(member, io.BytesIO(mutant.content))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)):
            member = tarfile.TarInfo(f"cat/special{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../../dog/up.png")
        tar.addfile(member)
    astray = {"cat/z_pipe.png": mutants.Mutant("pipe", "", "image not found")}
    os.mkfifo(inside / "cat" / "z_pipe.png")
    (inside / "cat" / "z_passwd.png").symlink_to("/etc/passwd")
    astray["cat/z_passwd.png"] = mutants.Mutant("passwd", "", "image outside the roots")
    by_name = dict(zip(names, found, strict=True)) | astray
    folder = open_images(inside)
    dataset, count = image_steps(folder, [inside])
    problems, good = drain(dataset, count)
    check(problems, good, {"inside": dict(enumerate((by_name[name] for name in sorted(by_name)), 1))})
    tar = open_images(outside / "shard.tar")
    dataset, count = image_steps(tar, [inside])
    problems, good = drain(dataset, count)
    packed = [*found, mutants.Mutant("up", b"", "image file is empty")]
    check(problems, good, {"shard": dict(enumerate(packed, 1))})


def test_a_list_of_images(folders):
    inside, outside = folders
    astray = [m for m in mutants.paths(inside, outside) if m.content.isprintable()]
    rows = [f"{m.content}\t{i % 2}" for i, m in enumerate(astray)]
    (inside / "list.txt").write_text("\n".join([*rows, "fine.png\t-1", "fine.png\t7e3", "fine.png\t"]) + "\n")
    wrong = [mutants.Mutant("label", "", "label outside the classes")] * 2 + [mutants.Mutant("label", "", "no label")]
    dataset, count = image_steps(open_images(inside / "list.txt"), [inside])
    problems, good = drain(dataset, count)
    check(problems, good, {"list": dict(enumerate([*astray, *wrong], 1))})


def test_a_benchmarks_table(folders):
    inside, _ = folders
    found = mutants.images(seed=7, count=120)
    cells = [base64.b64encode(m.content).decode() for m in found if len(m.content) > 60]
    cells += ["#" * 100, "A" * 101, "[" * 90, "['" + cells[0] + "', 5]", str(cells[:2])]
    with (inside / "bench.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer"])
        writer.writerows([i, cell, "what <script> \x00 <|im_end|>", "A"] for i, cell in enumerate(cells))
    table = TsvTable(inside / "bench.tsv")
    counts = Counter(_outcome(lambda row=row: [load_image(i) for i in table.images(row)]) for row in range(len(table)))
    assert counts[GOOD] > 30
    assert set(counts) <= REASONS | {GOOD, "image is not base64", "list of images is broken"}


def _outcome(read):
    with limited(HANGS):
        try:
            read()
        except BadSample as bad:
            return bad.reason
    return GOOD


def read_all(path, open_it, use):
    """Open a file and read all its samples, or raise a one-line ``UserError``. Return whether any is usable."""
    told = None
    with limited(HANGS):
        try:
            source = open_it(path)
            for row in range(len(source)):
                with suppress(BadSample):
                    use(source, row)
        except UserError as error:
            told = str(error)
    assert told is None or ("\n" not in told and path.name in told)
    return told is None


def test_files_that_are_broken_as_a_whole(folders):
    """Two hundred broken tables, tars, lists and JSON files open or are refused in one line."""
    inside, _ = folders
    picture = mutants.encode(mutants.noise(), "PNG")
    with tarfile.open(inside / "good.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("cat/a.png", "dog/" + "b" * 120 + ".png", "dog/é.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    rows = [["index", "image", "question"], *([i, base64.b64encode(picture).decode(), "what"] for i in range(3))]
    kinds = {
        "tar": ((inside / "good.tar").read_bytes(), open_images, lambda s, i: load_image(s[i].image)),
        "tsv": ("\n".join("\t".join(map(str, r)) for r in rows).encode(), TsvTable, lambda s, i: s.images(i)),
        "json": (json.dumps([mutants.chat()] * 3).encode(), open_source, lambda s, i: s[i]),
        "jsonl": ((json.dumps(mutants.chat()) + "\n").encode() * 3, open_source, lambda s, i: s[i]),
        "csv": (b"image,label\na.png,0\nb.png,1\n", open_images, lambda s, i: s[i]),
        "table.csv": (b'question,answer\n"what, then",red\nwhat,blue\n', open_source, lambda s, i: s[i]),
    }
    outcomes = Counter()
    rng = random.Random(8)
    for suffix, (content, open_it, use) in kinds.items():
        for number in range(40):
            path = inside / f"{suffix}{number}.{suffix}"
            path.write_bytes(mutants.broken(suffix, content, rng).content)
            outcomes[suffix, read_all(path, open_it, use)] += 1
    assert all(outcomes[suffix, True] > 2 for suffix in kinds)
    assert all(outcomes[suffix, False] > 2 for suffix in ("tar", "tsv", "json"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "parquet", "tar", "tsv", "csv"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_no_data(tmp_path, suffix, kind):
    path = tmp_path / f"data.{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    readers = {
        "tar": [open_images],
        "csv": [open_images, open_source],
        "tsv": [TsvTable, open_source],
        "txt": [open_images, lambda p: open_text(p, 100)],
    }
    for read in readers.get(suffix, [open_source, lambda p: open_text(p, 100)]):
        with limited(HANGS), pytest.raises(UserError, match=r"neither a file nor a folder|cannot tell the format"):
            read(path)


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_the_longest_image_becomes_a_small_one(resize):
    """The worst that passes the limits, through each way of resizing."""
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3, resize=resize)
    wide = load_image(mutants.encode(mutants.noise("L", (65_400, 327)), "PNG", compress_level=0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert transform(wide).shape == (3, 16, 16)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# Long.

WHOLE = mutants.whole_images()
KEYS = sorted({key for layout in LAYOUTS for key in layout.keys})
KEYS += ["role", "from", "content", "value", "type", "user", "assistant", "path", "bytes", "url", "image_url", "index"]
KEYS += ["tool_calls", "function_call", "name", "arguments", "function", "reasoning_content", "frames", "video"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "gpt", "tool", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=2000, suppress_health_check=list(HealthCheck))
@given(record=JSON)
def test_any_json_is_a_conversation_or_a_bad_sample(record, processor):
    with suppress(BadSample):
        sample = to_conversation(record)
        processor.encode(sample, [mutants.noise() for _ in sample.images])


@pytest.mark.slow
@settings(max_examples=20_000, deadline=5000, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_any_accident_leaves_an_image_or_a_reason(seed):
    rng = random.Random(seed)
    name, content = rng.choice(list(WHOLE.items()))
    mutant = mutants.broken(name, content, rng)
    assert _outcome(lambda: load_image(mutant.content)) in REASONS | {GOOD}
