"""What a run does when student and teacher have different tokenizers, before its first step."""

import pytest
import tiny

from data.collate import Collator
from data.errors import UserError
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.opening import open_source
from data.workers import make_loader
from vlm_distill import models
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.inspection import Inspection
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.compatibility import pair_vocabularies
from vlm_distill.training.terms import build_terms


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_data(folder / "data")
    tiny.write_pieces_teacher(folder / "teacher")
    return folder


def configure(material, *losses, labelled=True):
    plain = tiny.config(
        material / "run", material / "data" / "data.jsonl", material / "teacher", loss=[{"name": n} for n in losses]
    )
    plain["student"]["tokenizer"] = str(material / "teacher" / "student")
    plain["data"]["train"][0]["labelled"] = labelled
    return RunConfig.model_validate(plain)


def paired(config, student_tokenizer=None):
    teacher = models.load_vlm(config.teacher.path)
    student = models.build_vlm(tiny.settings(), tokenizer=student_tokenizer or tiny.pieces_tokenizer("student"))
    return student, teacher, pair_vocabularies(config, student, ModelTeacher(teacher), build_terms(config))


def test_uld_and_images_are_compared_with_heads_of_their_own(material):
    names = ("uld", "cross_entropy", "uld", "vision_features", "alm", "overlap_kl")
    student, teacher, grouped = paired(configure(material, *names))
    assert grouped
    for model in (student, teacher):
        with model.head.weight() as weight:
            assert len(weight) == len(model.processor.tokenizer)
    assert student.head.vocabulary != teacher.head.vocabulary


@pytest.mark.parametrize("others", [("taid",), ("forward_kl", "diagnostics"), ("hidden_states", "minilm")])
def test_what_compares_token_by_token_is_refused_by_name(material, others):
    wanted = f"need the same tokenizer: .*by uld, alm or overlap_kl alone, without {', '.join(others)}$"
    with pytest.raises(UserError, match=wanted) as told:
        paired(configure(material, "uld", *others))
    assert "\n" not in str(told.value)


def test_a_teacher_that_no_loss_learns_from_may_have_any_tokenizer(material):
    assert not paired(configure(material, "cross_entropy"))[2]


def test_placeholders_have_no_groups(material):
    with pytest.raises(UserError, match=r"loss uld reads the answers where tokenizers differ, and .*data.jsonl is not"):
        paired(configure(material, "uld", labelled=False))


def test_the_same_tokenizer_needs_no_groups(material):
    student, teacher, grouped = paired(configure(material, "uld", "taid"), tiny.pieces_tokenizer("teacher"))
    assert not grouped
    assert student.head.vocabulary == teacher.head.vocabulary
    with pytest.raises(UserError, match="need the same tokenizer"):
        paired(configure(material, "taid"), make_tokenizer(tiny.WORDS))


def test_a_step_counts_groups_and_tokens(material):
    student, teacher = tiny.pieces_tokenizer("student"), models.load_vlm(str(material / "teacher"))
    student = models.build_vlm(tiny.settings(), tokenizer=student)
    source = open_source(str(material / "data" / "data.jsonl"))
    steps = StepDataset(
        Mixture([source], [1.0], seed=0, batch_size=24, window=0),
        Collator(student.processor, teacher.processor, 64, grouped=True),
        StepSplit(micro_batch_size=8, accumulation=3),
    )
    (step,) = make_loader(steps, 0, 1)
    # Six times red, green, blue, black: in 2, 2, 2 and 1 pieces for the student, 2, 2, 1 and 2 for the teacher, each
    # colour one group, and an end token.
    assert sum(len(batch.teacher_targets) for batch in step.batches) == 6 * (2 + 2 + 1 + 2 + 4)
    counts = step.counts()
    assert (counts["supervised"], counts["distilled"]) == (6 * (2 + 2 + 2 + 1 + 4), 6 * (4 + 4))
    assert counts["images"] == counts["image_samples"] == 24
    assert all(batch.distilled.all() for batch in step.batches)


def test_inspection_shows_the_groups(material):
    samples = Inspection(configure(material, "uld")).shown(24)
    assert [sample.problem for sample in samples] == [None] * 24
    shown = {sample.groups[0] for sample in samples}
    assert shown == {("re·d", "r·ed"), ("gr·een", "gree·n"), ("bl·ue", "blue"), ("black", "bl·ack")}
    assert {sample.groups[1] for sample in samples} == {("<eos>", "<eos>")}
