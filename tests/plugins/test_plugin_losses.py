"""Losses from outside: named by place, installed, or registered; and their mistakes."""

import sys

import pytest
import torch
from outside import install, module
from run_files import CLASSIFIER, write

from data.errors import UserError
from vision.build import build_terms as classifier_terms
from vision.config import ClassifierConfig
from vlm_distill import losses
from vlm_distill.config.file import load_config
from vlm_distill.losses import LossError
from vlm_distill.losses.plugins import load
from vlm_distill.training.terms import build_terms


def terms_of(folder, *terms, **changes):
    return build_terms(load_config(write(folder, {"loss": list(terms), **changes})))


def logits(rows=5, vocabulary=11):
    return torch.randn(2, rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_configuration_names_a_class_of_ones_own(here):
    reverse, again, entropy = terms_of(
        here,
        {"name": "my_losses:Reverse", "temperature": 2, "weight": 0.5},
        {"name": "my_losses:Reverse"},
        {"name": "cross_entropy"},
    )
    assert [reverse.name, again.name, entropy.name] == ["Reverse", "Reverse_2", "cross_entropy"]
    assert (reverse.loss.temperature, reverse.weight) == (2, 0.5)
    torch.nn.ModuleDict({term.name: term.loss for term in (reverse, again)})


def test_a_divergence_needs_its_definition_alone(here):
    for given in ({}, {"temperature": 2.0}, {"standardise": True}):
        student, teacher = (x.requires_grad_() for x in logits())
        mine = losses.on_logits(losses.build("my_losses:Defined", **given), student, teacher.detach())
        ours = losses.on_logits(losses.build("reverse_kl", **given), student, teacher.detach())
        torch.testing.assert_close(mine.loss, ours.loss)
        gradients = [torch.autograd.grad(sums.loss, student)[0] for sums in (mine, ours)]
        torch.testing.assert_close(*gradients)


def test_a_divergence_of_ones_own_serves_taid_and_top_k_teachers(here):
    student, teacher = logits()
    for name in ("taid", "overlap_kl"):
        mine, ours = (losses.build(name, divergence=each) for each in ("my_losses:Defined", "reverse_kl"))
        if name == "taid":
            results = [loss.loss_and_grad(student.clone(), teacher.clone(), grad=True) for loss in (mine, ours)]
            torch.testing.assert_close(results[0].loss, results[1].loss)
            torch.testing.assert_close(results[0].grad, results[1].grad)
    scaled = losses.build("taid", divergence={"name": "my_losses:Scaled", "scale": 3.0})
    torch.testing.assert_close(
        scaled(student, teacher), 3 * losses.build("taid", divergence="reverse_kl")(student, teacher)
    )
    assert losses.build("my_losses:Defined").takes_topk


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("my_lossses:Reverse", {}, "there is no module my_lossses; install its package, or start in the folder"),
        ("json.nothing:Reverse", {}, "there is no module json.nothing"),
        ("my_losses:Revers", {}, "has no Revers (did you mean 'Reverse'?)"),
        (
            "my_losses.py:Reverse",
            {},
            "'my_losses.py:Reverse' does not name a plug-in; write package.module:Name",
        ),
        ("my_losses/Reverse:", {}, "does not name a plug-in; write package.module:Name"),
        ("my_losses:NotALoss", {}, "is the class NotALoss, not a loss; name a class derived from"),
        ("my_losses:function", {}, "is a function, not a loss"),
        ("my_losses:Labels", {}, "needs is frozenset({'labels'}); make it a set of 'teacher', 'targets', both or none"),
        ("my_losses:Reverse", {"temprature": 1}, "has no parameter 'temprature' (did you mean 'temperature'?); it has"),
        ("my_losses:Reverse", {"temperature": -1}, "loss Reverse: temperature is -1; give a number above 0"),
        (
            "my_losses:Scaled",
            {"scale": 1.0, "sclae": 1},
            "has no parameter 'sclae' (did you mean 'scale'?); it has scale, temp",
        ),
        ("my_losses:Scaled", {}, "cannot be made with no parameters: "),
        ("wrong_syntax:X", {}, "wrong_syntax cannot be imported: SyntaxError: "),
        ("lacks_library:X", {}, "ModuleNotFoundError: No module named 'no_such_library' ("),
        ("ends:X", {}, "ends cannot be imported: SystemExit: 3"),
        ("taid", {"divergence": "my_losses:Mean"}, "loss taid: divergence my_losses:Mean is not a divergence; derive"),
        ("taid", {"divergence": "my_losses:Nothing"}, "has no Nothing"),
        (
            "taid",
            {"divergence": {"name": "my_losses:Scaled", "scale": 1, "temperature": 2}},
            "no temperature of its own",
        ),
        ("my_loss", {}, "no loss is called 'my_loss'; there are taid, "),
    ],
)
def test_mistakes_get_one_line(here, name, params, message):
    module(here / "wrong_syntax.py", "def f(:")
    module(here / "lacks_library.py", "import json\nimport no_such_library")
    module(here / "ends.py", "import sys\nsys.exit(3)")
    with pytest.raises(LossError) as caught:
        losses.build(name, **params)
    assert message in str(caught.value)
    assert name in str(caught.value) or "Reverse" in str(caught.value) or "divergence" in params
    assert "\n" not in str(caught.value)


def test_reading_a_configuration_imports_nothing(here):
    module(here / "loud.py", "raise RuntimeError('imported')")
    path = write(here, {"loss": [{"name": "loud:Loss", "anything": 1}], "evaluation": {"benchmarks": ["loud:B"]}})
    config = load_config(path, ["data.train.0.layout=loud:read"])
    assert "loud" not in sys.modules
    with pytest.raises(
        UserError, match=r"^loss loud:Loss: loud cannot be imported: RuntimeError: imported \(.*line 1\)$"
    ):
        build_terms(config)


@pytest.mark.parametrize(
    ("term", "drop", "message"),
    [
        ({"name": "my_losses:Reverse"}, ("teacher",), "loss my_losses:Reverse needs a teacher"),
        ({"name": "my_losses:Reverse", "match": "pool"}, (), "compares no image tokens; leave match: pool out"),
        ({"name": "my_losses:Batch"}, (), "loss my_losses:Batch compares the images of a batch, for classifiers"),
        ({"name": "my_losses:Reverse", "scale": 1}, (), "loss my_losses:Reverse has no parameter 'scale'"),
        ({"name": "my_losses:Counting", "on": "images"}, (), "loss my_losses:Counting reads the right tokens"),
    ],
)
def test_what_a_class_needs_is_checked_once_it_is_imported(here, term, drop, message):
    config = load_config(write(here, {"loss": [term, {"name": "cross_entropy"}]}, drop))
    with pytest.raises(UserError, match=message):
        build_terms(config)
    # From then on, reading the configuration is enough.
    if "Batch" not in message and "on" not in term:
        with pytest.raises(UserError, match=message):
            load_config(write(here, {"loss": [term, {"name": "cross_entropy"}]}, drop))


def test_a_class_without_a_teacher_and_one_that_matches_are_taken(here):
    (counting,) = terms_of(here, {"name": "my_losses:Counting"}, teacher=None)
    assert counting.loss.needs == {"targets"}
    (images,) = terms_of(here, {"name": "my_losses:Images", "match": "pool"})
    assert images.match == "pool"


def test_classifiers_take_losses_of_ones_own(here):
    terms = [{"name": f"my_losses:{name}"} for name in ("Reverse", "Batch", "Counting")]
    config = load_config(write(here, {"loss": terms}, good=CLASSIFIER), (), ClassifierConfig)
    assert [type(term).__name__ for term in classifier_terms(config)] == ["Term", "BatchTerm", "Term"]
    del sys.modules["my_losses"]
    config = load_config(write(here, {"loss": terms}, ("teacher",), good=CLASSIFIER), (), ClassifierConfig)
    with pytest.raises(UserError, match="loss my_losses:Reverse needs a teacher"):
        classifier_terms(config)


def test_a_loss_of_one_number_is_refused(here):
    student, teacher = logits()
    for rows in (5, 1):
        with pytest.raises(LossError, match=rf"loss Mean: forward returned the shape \[\] for {rows} rows; return one"):
            losses.on_logits(losses.build("my_losses:Mean"), student[:rows], teacher[:rows])


def test_a_registered_loss_has_a_name(here, registered):
    Counting, NotALoss, Reverse = (load(f"my_losses:{name}") for name in ("Counting", "NotALoss", "Reverse"))
    losses.register("mine", Reverse)
    losses.register("mine", type("Reverse", (Reverse,), {"__module__": "my_losses"}))  # a cell that is run again
    assert terms_of(here, {"name": "mine"})[0].name == "mine"
    assert losses.available()["mine"] == "plug-in: my_losses:Reverse"
    assert "mine" in losses.available(losses.DistillationLoss)
    assert "mine" not in losses.available(losses.FeatureLoss)
    with pytest.raises(UserError, match=r"loss mine has no parameter 'beta'"):
        load_config(write(here, {"loss": [{"name": "mine", "beta": 1}]}))
    with pytest.raises(
        LossError, match="loss mine: my_losses:Counting cannot have this name, which my_losses:Reverse has"
    ):
        losses.register("mine", Counting)
    with pytest.raises(
        LossError, match=r"loss jsd: my_losses:Reverse cannot have this name, which vlm_distill.losses.jsd"
    ):
        losses.register("jsd", Reverse)
    with pytest.raises(LossError, match=r"loss mlkd: .* which vision.losses.mlkd:MLKD has; choose another"):
        losses.register("mlkd", Reverse)
    with pytest.raises(LossError, match="a name has letters, digits, _ and - only"):
        losses.register("my loss", Reverse)
    with pytest.raises(LossError, match="is the class NotALoss, not a loss"):
        losses.register("other", NotALoss)


def test_installed_losses_have_names(here, monkeypatch, command, registered):
    module(here / "broken.py", "raise RuntimeError('broken')")
    points = {
        "hers": "my_losses:Reverse",
        "broken": "broken:Loss",
        "taid": "my_losses:Reverse",
        "both": "my_losses:Mean",
    }
    install(here / "hers", monkeypatch, "hers", losses=points)
    install(here / "his", monkeypatch, "his", losses={"both": "my_losses:Reverse"})

    assert terms_of(here, {"name": "hers", "temperature": 3})[0].loss.temperature == 3
    assert type(losses.build("taid")).__module__ == "vlm_distill.losses.taid"
    with pytest.raises(LossError, match=r"^loss broken: broken cannot be imported: RuntimeError: broken"):
        losses.build("broken")
    with pytest.raises(
        LossError, match=r"loss both: .*my_losses:Mean of hers 1\.0.* have the same name; name one as mod"
    ):
        losses.build("both")
    with pytest.raises(LossError, match=r"no loss is called 'her' \(did you mean 'hers'\?\)"):
        losses.build("her")
    with pytest.raises(LossError, match=r"which my_losses:Reverse of hers 1\.0 has; choose another"):
        losses.register("hers", losses.ReverseKL)

    code, out, err = command("losses")
    assert code == 0
    listed = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "plug-in: my_losses:Reverse of hers 1.0" in listed["hers"]
    assert "broken:Loss of hers 1.0" in listed["broken"]
    assert "warning: loss taid: my_losses:Reverse of hers 1.0 cannot have this name, which vlm_distill" in err
    assert "loss both: my_losses" in err
    assert "broken" not in sys.modules
