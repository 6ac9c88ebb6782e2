"""The list of scorers, by name and rules; a benchmark names one of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from data.errors import UserError
from vlm_distill.losses.plugins import Plugins

from . import hallusion, mathvista, mmmu, mmvet, ocrbench, text_match, vqa, yes_no
from . import multiple_choice_lmms_eval as lmms_choice
from . import multiple_choice_vlmevalkit as kit_choice
from .scores import Rules, Scorer, Scores, Table


def _each(scorer: Scorer, *rules: Rules, **options: Any) -> dict[Rules, Scorer]:
    """Return one function for several rules, which it takes as an argument."""
    return {name: partial(scorer, rules=name, **options) for name in rules}


_BOTH: tuple[Rules, ...] = ("vlmevalkit", "lmms-eval")
_ALL: tuple[Rules, ...] = (*_BOTH, "official")

SCORERS: dict[str, dict[Rules, Scorer]] = {
    "vqa": _each(vqa.score_vqa, *_ALL),
    "textvqa": _each(vqa.score_vqa, *_ALL, textvqa=True),
    "anls": _each(text_match.score_anls, *_BOTH),
    "chartqa": _each(text_match.score_relaxed, *_BOTH),
    "gqa": _each(text_match.score_exact, *_BOTH),
    "ocrvqa": _each(text_match.score_exact, *_BOTH, best=True),
    "pope": _each(yes_no.score_pope, *_ALL),
    "mme": _each(yes_no.score_mme, *_BOTH),
    "hallusionbench": _each(hallusion.score_hallusion, *_BOTH),
    "ocrbench": _each(ocrbench.score_ocrbench, *_BOTH),
    "choice": {"vlmevalkit": kit_choice.score_choice},
    "mmbench": {"vlmevalkit": kit_choice.score_circular, "lmms-eval": lmms_choice.score_mmbench},
    "mmstar": {"vlmevalkit": kit_choice.score_choice, "lmms-eval": lmms_choice.score_mmstar},
    "ai2d": {"vlmevalkit": kit_choice.score_choice, "lmms-eval": lmms_choice.score_ai2d},
    "scienceqa": {"vlmevalkit": kit_choice.score_choice, "lmms-eval": lmms_choice.score_scienceqa},
    "seedbench": {"vlmevalkit": kit_choice.score_choice, "lmms-eval": lmms_choice.score_seedbench},
    "realworldqa": {"vlmevalkit": kit_choice.score_choice, "lmms-eval": lmms_choice.score_realworldqa},
    "mmmu": {
        "vlmevalkit": partial(kit_choice.score_choice, mmmu=True),
        "lmms-eval": partial(mmmu.score_mmmu, rules="lmms-eval"),
        "official": partial(mmmu.score_mmmu, rules="official"),
    },
    "mathvista": _each(mathvista.score_mathvista, *_BOTH),
    "mmvet": _each(mmvet.score_mmvet, *_ALL),
}


#: Scorers from outside, mostly named as ``module:function``.
PLUGINS = Plugins("scorer", "vlm_distill.scorers", UserError)
PLUGINS.reserve(dict.fromkeys(SCORERS, f"{__name__}:SCORERS"))


def scorers_of(name: str) -> dict[Rules, Scorer]:
    """Return a scorer's functions by their rules. A plug-in's is one function for all rules, which it may ignore.

    Raises:
        UserError: there is no such scorer.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name not in PLUGINS:
        raise UserError(
            f"there is no scorer {name!r}; there are {', '.join(SCORERS)}, and your own as package.module:function"
        )
    found = PLUGINS.find(name)
    if not callable(found):
        raise UserError(f"scorer {name}: is a {type(found).__name__}, not a function; name one that scores a table")
    return _each(found, *_ALL)


def rules_of(name: str) -> tuple[Rules, ...]:
    """Return the rules that a scorer has.

    Raises:
        UserError: there is no such scorer.
    """
    return tuple(scorers_of(name))


def score(name: str, table: Table, rules: str = "vlmevalkit", **options: Any) -> Scores:
    """Score a table.

    Args:
        name: a key of ``SCORERS``, or a plug-in's.
        table: rows with the columns that the rules need and ``prediction``.
        rules: whose rules to follow.
        options: of the scorer, for example ``split`` and ``meta`` of multiple choice.

    Raises:
        UserError: there is no such scorer or rules, or they cannot score this table.
    """
    known = rules_of(name)
    if rules not in known:
        raise UserError(f"{name} has no rules {rules!r}; it has {', '.join(known)}")
    try:
        return scorers_of(name)[rules](table, **options)
    except KeyError as lacking:
        raise UserError(f"{name}: a row has no column {lacking}, which the rules {rules!r} need") from None
