"""Sizes of images that a configuration sets: they reach each family's image processor, or are refused by name."""

import families
import pytest
import tiny
from PIL import Image

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.models.families import image_keys
from vlm_distill.training.loading import set_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory, make_tokenizer):
    """Each family's processor, loaded as a run loads it."""
    folder, maker = tmp_path_factory.mktemp("sizes"), families.Maker(make_tokenizer)

    def get(name):
        with families.num2words():
            if not (folder / name).exists():
                maker.write(name, folder / name)
            return load_vlm(folder / name).processor

    return get


def tokens(processor, size=(1024, 768)):
    return int(processor.image_tokens(processor.image_row([Image.new("RGB", size)])).sum())


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("smolvlm", {"longest_edge": 28}, {"longest_edge": 84}),
        ("idefics3", {"longest_edge": 28}, {"longest_edge": 84}),
        ("qwen2_vl", {"max_pixels": 1568}, {"min_pixels": 12544, "max_pixels": 12544}),
        ("qwen2_5_vl", {"max_pixels": 1568}, {"min_pixels": 12544, "max_pixels": 12544}),
        ("pixtral", {"longest_edge": 28}, {"longest_edge": 56}),
        ("mistral3", {"longest_edge": 28}, {"longest_edge": 56}),
        ("internvl", {"max_patches": 1}, {"max_patches": 6}),
        ("aya_vision", {"max_patches": 1}, {"max_patches": 6}),
        ("phi4_multimodal", {"dynamic_hd": 1}, {"dynamic_hd": 4}),
    ],
)
def test_more_pixels_are_more_tokens(processor, name, less, more):
    small, large = processor(name), processor(name)
    small.set_image_sizes(less, "student.image")
    large.set_image_sizes(more, "student.image")
    assert tokens(small) < tokens(large)


def test_what_is_saved_has_them(processor, tmp_path):
    made = processor("qwen2_vl")
    made.set_image_sizes({"max_pixels": 1568}, "student.image")
    made.save_pretrained(tmp_path)
    made.set_image_sizes({"max_pixels": 6272}, "student.image")
    from transformers import AutoImageProcessor

    assert AutoImageProcessor.from_pretrained(tmp_path).size.longest_edge == 1568


def test_the_processor_it_was_copied_from_keeps_its_own(processor):
    import copy

    teacher = processor("smolvlm")
    student, before = copy.copy(teacher), tokens(teacher)
    student.set_image_sizes({"longest_edge": 28}, "student.image")
    assert tokens(teacher) == before > tokens(student)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "paligemma", "gemma3"])
def test_a_size_that_the_vision_encoder_fixes_is_refused(processor, name):
    with pytest.raises(UserError, match=r"teacher.image: \w+ makes images of one size, .* leave it out"):
        processor(name).set_image_sizes({"longest_edge": 336}, "teacher.image")


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("smolvlm", {"max_pixels": 1000}, "student.image: unknown key 'max_pixels'; known keys: longest_edge"),
        ("qwen2_vl", {"max_pixel": 1000}, "student.image: unknown key 'max_pixel'; did you mean 'max_pixels'?"),
        ("smolvlm", {"longest_edge": 0}, "student.image.longest_edge: expected a whole number from 1 to 268,435,456"),
        ("smolvlm", {"longest_edge": "512"}, "got '512'"),
        ("smolvlm", {"longest_edge": True}, "got True"),
        ("smolvlm", {"longest_edge": 280}, "280 makes 10 rows of tiles of 28 pixels"),
        ("qwen2_vl", {"min_pixels": 100_000}, "min_pixels is 100,000 and max_pixels"),
        ("qwen2_vl", {"min_pixels": 1, "max_pixels": 100}, "an image takes 28 × 28 pixels; set 784 or more"),
        ("internvl", {"min_patches": 5}, "min_patches is 5 and max_patches 4"),
        ("pixtral", {"longest_edge": 112}, "the vision encoder has positions for 56"),
    ],
)
def test_what_a_family_cannot_take_is_refused(processor, name, settings, says):
    with pytest.raises(UserError) as refused:
        processor(name).set_image_sizes(settings, "student.image")
    assert says in str(refused.value)


def test_a_model_from_parts_says_where_its_size_is_set(tmp_path):
    model = load_vlm(tiny.write_teacher(tmp_path / "teacher"))
    with pytest.raises(UserError, match=r"set vision_encoder.image_size, and leave it out"):
        model.processor.set_image_sizes({"longest_edge": 512}, "student.image")
    language = load_vlm(tiny.write_language_model(tmp_path / "language"))
    with pytest.raises(UserError, match="this model sees no images"):
        language.processor.set_image_sizes({"longest_edge": 512}, "student.image")


def test_a_configuration_sets_the_students_and_the_teachers(processor, tmp_path):
    plain = tiny.config(tmp_path / "run", tmp_path / "data.jsonl", tmp_path / "teacher")
    plain["student"] = {"path": "somewhere", "image": {"longest_edge": 28}}
    plain["teacher"]["image"] = {"max_pixels": 1568}
    config = RunConfig.model_validate(plain)
    student, teacher = processor("smolvlm"), processor("qwen2_vl")
    set_processor(student, config.student, "student")
    set_processor(teacher, config.teacher, "teacher")
    assert student.processor.image_processor.size.longest_edge == 28
    assert teacher.processor.image_processor.size.longest_edge == 1568


def test_every_key_is_one_that_the_image_processor_reads():
    import transformers as hf

    for kind in ("GotOcr2", "Idefics2", "Idefics3", "Phi4Multimodal", "Pixtral", "Qwen2VL", "SmolVLM"):
        images = getattr(hf, f"{kind}ImageProcessor")()
        for place in image_keys(type(images).__name__).values():
            owner, _, name = place.rpartition(".")
            assert getattr(getattr(images, owner) if owner else images, name) is not None
