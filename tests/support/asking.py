"""`evaluate` with its groups of settings written flat, as most tests of it want them."""

from dataclasses import fields

from vlm_distill.evaluation import answering
from vlm_distill.evaluation.answering import Asking, Feedback
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.runtime.rank_share import RankShare


def evaluate(model, source, *, out=None, resume=None, about=None, **settings):
    folder = None if out is None else AnswerFolder(out, identity=resume, about=about)
    return answering.evaluate(
        model,
        source,
        picked(Asking, settings),
        ranks=picked(RankShare, settings),
        feedback=picked(Feedback, settings),
        folder=folder,
        **settings,
    )


def picked(group, settings):
    """Takes a group's settings out of the dict."""
    return group(**{field.name: settings.pop(field.name) for field in fields(group) if field.name in settings})
