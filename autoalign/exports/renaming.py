r"""Rules as lists of regex renamings, which others apply one after another to every key.

A rule here takes a key once; in those lists, every pattern that occurs in what a key has become is replaced. Where a new
name might be taken by a later pattern, it carries a mark until the end, which no pattern begins with.

mmengine's ``revise_keys`` are applied by ``re.sub``. transformers' ``key_mapping`` makes a ``WeightRenaming`` of each
item, which replaces the first occurrence of what was found and knows ``\1`` only: a rule with more captures becomes one
renaming for each text that changes, and the key carries another mark meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from autoalign.errors import RulesError
from autoalign.indices import Arithmetic, tokens_of
from autoalign.rules import Rule, Rules

DONE, PENDING = "=", "~"  # marks at the beginning of a key; regexes take both literally
_CAPTURE = re.compile(r"(?<!\\)\((?!\?)(?:[^()\\]|\\.)*\)")  # a group without groups in it
Renaming = tuple[str, str]  # pattern, replacement


def revise_keys(rules: Rules) -> list[Renaming]:
    """Write rules as renamings that ``re.sub`` applies in order; see ``Rules.to_revise_keys``."""
    _refuse_others(rules, "revise_keys")
    return _marked(rules, lambda rule, mark: [(rule.sources[0], mark + _sub_replacement(rule.targets[0]))])


def key_mapping(rules: Rules) -> dict[str, str]:
    """Write rules as renamings of transformers; see ``Rules.to_key_mapping``."""
    _refuse_others(rules, "key_mapping")
    return dict(_marked(rules, stepwise))


def stepwise(rule: Rule, mark: str) -> list[Renaming]:
    r"""Write a rule as renamings with one capture each.

    >>> stepwise(Rule((r"^layer(\d+)\.(\d+)\.bn\.",), (r"stages.\1.blocks.\2.norm.",)), "")
    [('^layer(\\d+\\.)(?=\\d+\\.bn\\.)', '~stages.\\1blocks.'), ('^~(stages\\.\\d+\\.blocks\\.\\d+\\.)bn\\.', '\\1norm.')]
    """
    source, target = rule.sources[0], rule.targets[0]
    texts, groups = _taken_apart(source)
    tokens = [token for token in tokens_of(target)]
    others = [""]
    for token in tokens:
        if isinstance(token, str):
            others[-1] += token
        else:
            others.append("")
    if len(groups) < 2:
        (pattern,), (replacement,) = (source,), (mark + _sub_replacement(target),)
        return [(pattern, replacement)]
    raise NotImplementedError(texts, others)


def _refuse_others(rules: Rules, form: str) -> None:
    """Raise for rules that do more than rename."""
    refused = [rule for rule in rules.rules if not rule.renames or rule.has_arithmetic]
    if refused:
        listed = "\n".join(f"  {rule}" for rule in refused)
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules do more than rename, which {form} cannot say. Nothing was exported. "
            f"Use to_python, or apply.\n{listed}"
        )


def _sub_replacement(target: str) -> str:
    """Write a replacement as ``re.sub`` reads it."""
    return "".join(_sub_token(token) for token in tokens_of(target))


def _sub_token(token: str | int | Arithmetic) -> str:
    if isinstance(token, str):
        return token.replace("\\", r"\\")
    return f"\\g<{token if isinstance(token, int) else token.groups[0]}>"
