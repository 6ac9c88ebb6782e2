"""Files of videos: frames at even moments, records that name them, and files that are left out by name."""

import json
from collections import Counter
from pathlib import Path

import pytest
from clips import write_clip

from data.conversation import VideoFile, count_images
from data.errors import BadSample
from data.layouts import to_conversation
from data.opening import open_source
from data.sample_images import ImageLoader, load_images
from data.video import VideoLimits, moments, read_video

pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.mark.parametrize(
    ("seconds", "fps", "most", "found"),
    [
        (3.0, 1.0, 16, [0.0, 1.0, 2.0]),
        (3.0, 2.0, 4, [0.0, 0.75, 1.5, 2.25]),
        (0.1, 1.0, 16, [0.0]),
        (100.0, 1.0, 4, [0.0, 25.0, 50.0, 75.0]),
        (2.0, 0.5, 1, [0.0]),
    ],
)
def test_moments_are_even_and_no_more_than_allowed(seconds, fps, most, found):
    assert moments(seconds, VideoLimits(fps, most)) == pytest.approx(found)


def test_frames_are_those_shown_at_their_moments(clip):
    frames = read_video(VideoFile(str(clip)), 0, VideoLimits(fps=1), max_pixels=10**6)
    assert [frame.index for _, frame in frames] == [0, 10, 20]
    assert {(frame.fps, frame.total) for _, frame in frames} == {(10.0, 30)}
    # A frame's red is eight times its number; the codec is not exact.
    assert [image.getpixel((9, 9))[0] for image, _ in frames] == pytest.approx([0, 80, 160], abs=12)
    from_bytes = read_video(VideoFile(clip.read_bytes()), 0, VideoLimits(fps=1), max_pixels=10**6)
    assert [image.tobytes() for image, _ in from_bytes] == [image.tobytes() for image, _ in frames]


def test_far_moments_are_sought(tmp_path):
    long = write_clip(tmp_path / "long.mp4", seconds=100, step=1 / 5)
    frames = read_video(VideoFile(str(long)), 0, VideoLimits(max_frames=4), max_pixels=10**6)
    assert [frame.index for _, frame in frames] == [0, 250, 500, 750]
    assert [image.getpixel((9, 9))[0] for image, _ in frames] == pytest.approx([0, 50, 100, 150], abs=12)


def written(tmp_path, *parts):
    rows = []
    for part in parts:
        question = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        rows.append(json.dumps({"messages": [question, {"role": "assistant", "content": "red"}]}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    return open_source(str(tmp_path / "data.jsonl"), images=tmp_path)


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_a_part_names_a_file(clip, tmp_path, key):
    (sample,) = written(clip.parent, {"type": "video", key: clip.name})
    assert sample.images == (VideoFile(str(clip)),)
    assert count_images(sample.messages) == 1
    shown, images = load_images(sample, ImageLoader(video=VideoLimits(fps=1)))
    assert [part["type"] for part in shown.messages[0]["content"]] == ["image"] * 3 + ["text"]
    assert count_images(shown.messages) == len(images) == len(shown.images) == 3


VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


@pytest.mark.parametrize(
    ("value", "shown", "content"),
    [
        ("<video>\nWhat?", {"video": "a.mp4"}, [VIDEO, "\nWhat?"]),
        ("First <video>, then <video>?", {"videos": ["a.mp4", "b.mp4"]}, ["First ", VIDEO, ", then ", VIDEO, "?"]),
        ("What?", {"video": "a.mp4"}, [VIDEO, "What?"]),
        ("<image>\nWhat?", {"video": "a.mp4"}, [VIDEO, "\nWhat?"]),
        ("<image> or <video>?", {"video": "a.mp4", "image": "a.png"}, [IMAGE, " or ", VIDEO, "?"]),
        ("What?", {"video": "a.mp4", "image": "a.png"}, [IMAGE, VIDEO, "What?"]),
        ("What is <video>?", {}, ["What is <video>?"]),
    ],
)
def test_a_record_lists_its_videos(value, shown, content):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "red"}]
    sample = to_conversation({"conversations": turns, **shown}, images=Path("clips"))
    expected = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    assert sample.messages[0]["content"] == expected
    files = [VideoFile(f"clips/{name}") for name in ("a.mp4", "b.mp4")]
    videos = [one for one in sample.images if isinstance(one, VideoFile)]
    assert videos == files[: expected.count(VIDEO)]
    assert sample.images.index(videos[0]) == int("image" in shown) if videos else not sample.images


def test_a_part_may_stand_for_a_video_of_the_record():
    content = [{"type": "text", "text": "What is <video>?"}, {"type": "video"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    sample = to_conversation({"messages": turns, "videos": [{"path": "/a.mp4"}]})
    assert sample.messages[0]["content"] == [{"type": "text", "text": "What is <video>?"}, VIDEO]
    assert sample.images == (VideoFile("/a.mp4"),)


def test_without_the_section_a_file_is_a_bad_sample(clip):
    (sample,) = written(clip.parent, {"type": "video", "video": clip.name})
    with pytest.raises(BadSample, match=r"video file: set data\.video"):
        load_images(sample, ImageLoader())


def test_files_that_cannot_be_used_are_left_out_by_name(clip, tmp_path):
    whole = clip.read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"no video at all " * 50)
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    # A list of other files, which would be opened wherever they are.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n")
    write_clip(tmp_path / "hours.mp4", seconds=4000, rate=1, step=0)
    names = ["empty", "text", "half", "list", "hours", "missing"]
    source = written(tmp_path, *({"type": "video", "video": f"{name}.mp4"} for name in names))
    reasons = Counter()
    for row in range(len(source)):
        with pytest.raises(BadSample) as bad:
            load_images(source[row], ImageLoader(video=VideoLimits()))
        assert names[row] in bad.value.detail
        reasons[bad.value.reason] += 1
    assert reasons == {
        "video file is empty": 1,
        "video is broken": 3,
        "video is too long": 1,
        "video not found": 1,
    }


@pytest.mark.parametrize(
    ("limits", "max_pixels", "reason"),
    [
        (VideoLimits(max_seconds=2), 10**6, "video is too long"),
        (VideoLimits(timeout=1e-9), 10**6, "video takes too long to read"),
        (VideoLimits(), 3 * 64 * 48 - 1, "video is too large"),
    ],
)
def test_limits_of_time_and_memory(clip, limits, max_pixels, reason):
    with pytest.raises(BadSample) as bad:
        read_video(VideoFile(str(clip)), 0, limits, max_pixels=max_pixels)
    assert bad.value.reason == reason


def test_only_files_inside_the_roots_are_read(clip, tmp_path):
    with pytest.raises(BadSample, match="video outside the roots"):
        read_video(VideoFile(str(clip)), 0, VideoLimits(), roots=[tmp_path / "other"], max_pixels=10**6)
