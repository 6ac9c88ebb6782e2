"""WebDataset shards give the conversations in their records, with the images of the same sample and no others."""

import base64
import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from data.batch import Processor
from data.collate import Collator
from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.opening import open_source
from data.workers import make_loader


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            if not isinstance(content, bytes):
                content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def asked(question="Colour?", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}], **more}


def reds(sample):
    return [load_image(image).getpixel((0, 0))[0] for image in sample.images]


def test_records_captions_and_their_images(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        [
            ("000.json", asked("<image>\nColour?", image="coco/train2017/0.jpg")),  # the name before it was packed
            ("000.jpg", png(10)),
            ("sub/001.png", png(20)),
            ("sub/001.txt", " a red picture \n"),
            ("002.0.png", png(1)),
            ("002.1.png", png(2)),
            ("002.json", asked("<image> or <image>?")),
            ("003.left.png", png(3)),
            ("003.right.png", png(4)),
            ("003.json", asked("<image><image>", images=["right.png", "left.png"])),
            ("004.json", asked()),  # text alone
            ("README", "a note of the packer"),
            ("005.jpg", png(9)),  # an image of which nothing is said
        ],
    )
    source = open_source(path)
    assert len(source) == 5
    assert [reds(source[i]) for i in range(5)] == [[10], [20], [1, 2], [4, 3], []]
    assert source[1].messages == (
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red picture"}]},
    )
    assert [source.line(i) for i in range(5)] == [1, 2, 3, 4, 5]
    assert source.size(1) == len(" a red picture \n")
    assert source.sizes().tolist() == [source.size(i) for i in range(5)]
    copy = pickle.loads(pickle.dumps(source))
    assert reds(copy[2]) == [1, 2]


def test_no_file_beside_the_tar_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_bytes(png(99))
    parts = [{"type": "image", "path": "secret.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]
    source = open_source(
        tar(
            tmp_path / "a.tar",
            [
                ("0.json", {"messages": messages}),
                ("0.png", png(5)),
                ("1.json", asked("<image>", image="secret.png")),
                ("2.json", {"messages": messages, "images": ["secret.png"]}),
            ],
        )
    )
    assert reds(source[0]) == [5]
    for i in (1, 2):
        with pytest.raises(BadSample, match="image count mismatch"):
            source[i]


@pytest.mark.parametrize(
    ("members", "names"),
    [
        (("0.a.png", "0.b.png"), ("b.png", "a.png")),
        (("0.a.PNG", "0.b.PNG"), ("b.PNG", "a.PNG")),
        (("0.a.PNG", "0.b.PNG"), ("0.b.PNG", "0.a.PNG")),
        (("train/0.a.png", "train/0.b.png"), ("train/0.b.png", "train/0.a.png")),
    ],
)
def test_images_are_in_the_order_in_which_the_record_names_them(tmp_path, members, names):
    record = asked("<image> or <image>?", images=list(names))
    key = members[0].partition(".")[0]
    path = tar(tmp_path / "a.tar", [(members[0], png(1)), (members[1], png(2)), (f"{key}.json", record)])
    assert reds(open_source(path)[0]) == [2, 1]


def test_frames_of_a_video_are_members(tmp_path, monkeypatch):
    """Images that a record names are looked up in the tar only, not in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(png(200))
    content = [{"type": "image"}, {"type": "video", "frames": ["0.jpg", "1.jpg"]}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    record = {"messages": messages, "image": "a.jpg"}
    images = [("s.0.jpg", png(1)), ("s.1.jpg", png(2)), ("s.a.jpg", png(3))]
    path = tar(tmp_path / "a.tar", [*images, ("s.json", record), ("t.json", record)])
    source = open_source(path)
    assert reds(source[0]) == [3, 1, 2]
    with pytest.raises(BadSample, match="image count mismatch"):
        source[1]


ANSWER = {"role": "assistant", "content": "Red."}


@pytest.mark.parametrize(
    "record",
    [
        asked("<video>", video="a.mp4"),
        asked("What?", videos=["0.mp4"]),
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "/a.mp4"}]}, ANSWER]},
    ],
)
def test_no_file_of_a_video_is_looked_for_beside_the_tar(tmp_path, record):
    source = open_source(tar(tmp_path / "a.tar", [("0.json", record)]))
    with pytest.raises(BadSample, match="video in a tar"):
        source[0]


def test_broken_members_are_bad_samples(tmp_path):
    members = [("0.json", b"{"), ("1.json", b"\xff"), ("2.json", [1, 2]), ("3.json", asked()), ("4.txt", b"\xff")]
    source = open_source(tar(tmp_path / "a.tar", members))
    for i, reason in ((0, "invalid JSON"), (1, "invalid UTF-8"), (2, "not a JSON object"), (4, "invalid UTF-8")):
        with pytest.raises(BadSample) as caught:
            source[i]
        assert caught.value.reason == reason
    assert reds(source[3]) == []


def test_shards_are_named_by_folder_pattern_and_split(tmp_path):
    for number in range(4):
        split = "train" if number < 3 else "val"
        tar(
            tmp_path / "set" / f"mix-{split}-{number:04}.tar",
            [(f"{number}.json", asked()), (f"{number}.png", png(number))],
        )

    def found(path, **options):
        source = open_source(path, **options)
        return [reds(source[i])[0] for i in range(len(source))]

    assert found(tmp_path / "set", split="train") == [0, 1, 2]
    assert found(tmp_path / "set", split="validation") == [3]
    assert found(tmp_path / "set" / "mix-train-{0001..0002}.tar") == [1, 2]
    assert found(tmp_path / "set" / "mix-train-*.tar", limit=2) == [0, 1]
    with pytest.raises(UserError, match="split"):
        open_source(tmp_path / "set")
    with pytest.raises(UserError, match=r"no samples found in .*only\.tar: none of its members is a record"):
        open_source(tar(tmp_path / "only.tar", [("0.png", png(1))]))
    with pytest.raises(UserError, match="leave it out"):
        open_source(tmp_path / "only.tar", images=tmp_path)


class Reader(Processor):
    """A processor that encodes an image's red and nothing else."""

    has_vision = takes_videos = one_row = False

    def encode(self, conversation, images):
        import torch

        from data.batch import Encoded

        ids = torch.tensor([images[0].getpixel((0, 0))[0], 1])
        return Encoded(ids, torch.tensor([False, True]), torch.tensor([False, False]))

    def collate(self, samples):
        import torch

        from data.batch import ModelInputs

        return ModelInputs(input_ids=torch.stack([sample.input_ids for sample in samples]))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_any_number_of_ranks_and_workers_reads_the_same(tmp_path, world, workers):
    for number in range(5):
        tar(
            tmp_path / f"{number}.tar",
            [m for i in range(4) for m in ((f"{i}.json", asked()), (f"{i}.png", png(4 * number + i)))],
        )
    expected = None
    for ranks in (1, world):
        seen = [[] for _ in range(5)]
        for rank in range(ranks):
            mixture = Mixture([open_source(tmp_path)], seed=3, batch_size=4)
            dataset = StepDataset(mixture, Collator(Reader(), None, 9), StepSplit(4 // ranks, 1, rank, ranks))
            for step in make_loader(dataset, 2, 5, workers=workers):
                seen[step.index] += step.batches[0].student.inputs["input_ids"][:, 0].tolist()
        expected = expected or seen
        assert seen == expected
    flat = [row for step in expected for row in step]
    assert sorted(flat) != flat


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "b.png"},
        {"type": "image_url", "image_url": {"url": "file:///data/0.b.png"}},
        {"type": "image", "image": {"file_name": "b.png"}},
        {"type": "video", "video": ["b.png"]},
    ],
)
def test_members_are_found_by_a_name_in_any_shape(tmp_path, part):
    other = {"type": "image", "path": "a.png"}
    record = {"messages": [{"role": "user", "content": [part, other, {"type": "text", "text": "?"}]}, ANSWER]}
    path = tar(tmp_path / "a.tar", [("0.a.png", png(1)), ("0.b.png", png(2)), ("0.json", record)])
    assert reds(open_source(path)[0]) == [2, 1]


def test_a_record_may_hold_an_image_itself(tmp_path):
    own = f"data:image/png;base64,{base64.b64encode(png(7)).decode()}"
    members = [
        ("0.json", asked("<image> or <image>?", images=[own, "a.png"])),
        ("0.a.png", png(1)),
        ("1.json", asked("<image>", image={"url": own})),
        ("2.json", asked("<image>", image=own)),
        ("2.a.png", png(1)),
    ]
    source = open_source(tar(tmp_path / "a.tar", members))
    assert [reds(source[i]) for i in range(2)] == [[7, 1], [7]]
    with pytest.raises(BadSample, match="image count mismatch"):
        source[2]


def test_columns_of_records_in_a_tar(tmp_path):
    record = {"q": "Colour?", "a": "Red.", "image_path": "coco/0.png", "rating": 1}
    path = tar(tmp_path / "a.tar", [("0.json", record), ("0.png", png(4)), ("1.txt", "red"), ("1.png", png(5))])
    source = open_source(path, columns={"question": "q", "answer": "a"})
    assert (source[0].question, reds(source[0]), reds(source[1])) == ("Colour?", [4], [5])
    # The members are the images: their name before packing does not matter.
    assert set(source.not_read) == {"image_path", "rating"}
    with pytest.raises(UserError, match="no record has the key b; there are q, a"):
        open_source(path, columns={"answer": "b"})


def sized(name, size, kind=tarfile.REGTYPE):
    """A header with an arbitrary size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def with_size(header, raw):
    """Return the header with other bytes for its size, and the matching checksum."""
    header[124:136] = raw
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.DIRTYPE, b"S"])
@pytest.mark.parametrize(
    "raw", [b"\xff" * 11 + b"\x00", b"\xff" * 12, b"\xff" + bytes(11), b"\x80" + bytes(6) + b"\x05" + bytes(4)]
)
def test_a_tar_with_a_false_size_ends_in_one_line(tmp_path, kind, raw):
    path = tmp_path / "a.tar"
    path.write_bytes(with_size(sized("0.json", 0, kind), raw) + bytes(2048))
    with pytest.raises(UserError, match=r"a\.tar is truncated, broken or compressed|no samples found"):
        open_source(path)


def test_a_member_with_holes_is_a_bad_sample(tmp_path):
    """A sparse file of 20 GB."""
    size = 20 << 30
    with (tmp_path / "a.tar").open("wb") as file:
        for name in ("0.json", "1.png"):
            file.write(sized(name, size))
            file.truncate(file.seek(size, 1))
            file.seek(0, 2)
        for name, content in (
            ("1.json", json.dumps(asked("<image>")).encode()),
            ("2.json", json.dumps(asked()).encode()),
        ):
            file.write(sized(name, len(content)) + content.ljust(512, b"\0"))
        file.write(bytes(1024))
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 3
    for i in range(2):
        with pytest.raises(BadSample, match="tar member is too large: 21,474,836,480 bytes"):
            source[i]
    assert source[2].question == "Colour?"
