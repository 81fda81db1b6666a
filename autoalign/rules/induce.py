r"""The shortest ordered list of rules for a plan.

Drafts of rules for whole keys stand in a tree of the keys' parts. A dynamic program over the tree finds the fewest
rules of which the first that matches a key is right for it. Then rules that differ in one word only, which they keep,
become one rule that captures the word. The result is applied to the plan's own shapes and corrected where it differs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autoalign.errors import listed
from autoalign.plan.keys import LEVELS
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Shape
from autoalign.rules.generalise import Draft, Move, Parts, drafts_of, moves_of, spelled_out
from autoalign.rules.rule import REFERENCE, Rule, reference
from autoalign.rules.rules import Rules

_DOT = r"\."
_END = "$"  # stands for the end of a key in the tree
_MAX_CORRECTIONS = 4
_IMPOSSIBLE = 1_000_000  # rules
_NUMBERS = re.compile(r"\(\d+(?:\|\d+)*\)|(?<![\d|(])\d+(?![\d|)])")  # particular ones, in a part of a pattern
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+(?![A-Za-z(])|(?<=\\\.)[A-Za-z]+(?![A-Za-z(])")
_MAX_PATTERN = 1000  # characters of one that is joined with others
_MAX_WORDS = 8  # in one rule; more would be no easier to read than several rules

_Way = tuple[int, Parts] | None  # replace the first parts of a key by these, or drop the key
_START: _Way = (0, ())
_NO_WAY: _Way = (-1, ())  # where the rule above a node comes too late for it
_Frame = tuple[str, str, str | None, str]  # a pattern around a word, and a replacement around it; None: dropped


def induced(plan: Plan) -> Rules:
    """Find the rules of a plan; see ``Alignment.rules``."""
    moves, kept = moves_of(plan)
    notes: tuple[str, ...] = ()
    if kept:
        names = listed([match.target for match in kept])
        notes = (f"Left out, since they keep values of the model: {len(kept)} ({names}).",)
    drafts = [_shallow(draft) for draft in drafts_of(moves)]
    shapes = {spec.key: spec.shape for spec in plan.source_specs}
    wanted = {match.target: match for match in plan.matches if match not in kept}
    best: Rules | None = None
    for shorten in (True, False):
        rules = ordered(drafts, shorten=shorten)
        for candidate in (worded(rules), rules):
            fixed = _corrected(candidate, moves, shapes, wanted)
            if fixed is not None and (best is None or len(fixed) < len(best)):
                best = fixed
            if best is not None and len(best) <= len(candidate):
                return replace(best, notes=notes)
    if best is None:
        spelled = ((_rule(spelled_out(move)), move) for move in moves)
        best = Rules(tuple(rule for rule, move in spelled if rule.operations or move.keys != move.names))
    return replace(best, notes=notes)


def _shallow(draft: Draft) -> Draft:
    """Leave the first parts of keys of more than ``LEVELS`` parts together."""

    def joined(parts: Parts, dot: str) -> Parts:
        beyond = len(parts) - LEVELS
        return parts if beyond <= 0 else (dot.join(parts[: beyond + 1]), *parts[beyond + 1 :])

    return replace(
        draft,
        sources=tuple(joined(parts, r"\.") for parts in draft.sources),
        plain=joined(draft.plain, "."),
        targets=tuple(joined(parts, ".") for parts in draft.targets),
    )


def _corrected(
    rules: Sequence[Rule], moves: Sequence[Move], shapes: dict[str, Shape], wanted: dict[str, Match]
) -> Rules | None:
    """Spell out, before all rules, what they get wrong; None where that does not correct it."""
    extra: dict[tuple[str, ...], Rule] = {}
    of_key = {key: move for move in moves for key in move.keys}
    for _ in range(_MAX_CORRECTIONS):
        result = Rules((*extra.values(), *rules))
        made, problems = result.attempt(shapes)
        got = {match.target: match for match in made}
        wrong = set(problems)
        for target in got.keys() | wanted.keys():
            pair = [match for match in (got.get(target), wanted.get(target)) if match is not None]
            if len(pair) < 2 or (pair[0].sources, pair[0].operation) != (pair[1].sources, pair[1].operation):
                wrong.update(key for match in pair for key in match.sources)
        if not wrong:
            used = {id(result.rule_of(key)) for key in shapes}
            return Rules(tuple(rule for rule in result.rules if id(rule) in used))
        extra.update((move.keys, _rule(spelled_out(move))) for move in map(of_key.__getitem__, sorted(wrong)))
    return None


def _rule(draft: Draft) -> Rule:
    return Rule(
        tuple(rf"^{_DOT.join(source)}$" for source in draft.sources),
        tuple(".".join(target) for target in draft.targets),
        draft.operations,
        tied=draft.tied,
    )


@dataclass(slots=True)
class _Node:
    """The keys that begin with the same parts."""

    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    leaf: Draft | None = None
    own: list[Rule] = field(default_factory=list)  # those with operations, at the node of their first source
    costs: dict[_Way, tuple[int, _Way]] = field(default_factory=dict)

    def walk(self) -> Iterator[_Node]:
        """Yield this node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def ordered(drafts: Sequence[Draft], *, shorten: bool) -> list[Rule]:
    """Shorten drafts to rules, in an order in which the first that matches is the right one."""
    suffixes = _dropped_names(drafts)
    root = _Node(0)
    groups: dict[object, Rule] = {}
    for draft in drafts:
        if draft.renames:
            if draft.targets or draft.sources[0][-1] not in suffixes or len(draft.sources[0]) < 2:
                _place(root, (*draft.sources[0], _END)).leaf = draft
            continue
        rule, parts = _shortened(draft) if shorten else (_rule(draft), (*draft.sources[0], _END))
        if (rule.sources, rule.targets, rule.operations) not in groups:
            groups[rule.sources, rule.targets, rule.operations] = rule
            _place(root, parts).own.append(rule)
    _cost(root, _START)
    drops = [Rule((rf"^.*\.{name}$",)) for name in suffixes]
    return [*drops, *_emitted(root, _START, ())]


def _dropped_names(drafts: Sequence[Draft]) -> list[str]:
    """List the last parts of keys that are dropped wherever they occur, in several kinds of places."""
    dropped = Counter(draft.sources[0][-1] for draft in drafts if not draft.targets and len(draft.sources[0]) > 1)
    for draft in drafts:
        if draft.targets:
            for source in draft.sources:
                dropped.pop(source[-1], None)
    return [name for name, count in dropped.items() if count > 1 and "(" not in name]


def _place(root: _Node, parts: Parts) -> _Node:
    node = root
    for part in parts:
        node = node.children.setdefault(part, _Node(node.depth + 1))
    return node


def _shortened(draft: Draft) -> tuple[Rule, Parts]:
    """Leave out the last parts of a draft with operations that are the same in all its keys."""
    count = 0
    shortest = min(map(len, (*draft.sources, *draft.targets)))
    first = draft.sources[0]
    while count + 1 < shortest and "(" not in first[-count - 1]:
        place = -count - 1
        if {source[place] for source in draft.sources} != {first[place]}:
            break
        if {target[place] for target in draft.targets} != {draft.plain[place]}:
            break
        count += 1
    if not count:
        return _rule(draft), (*first, _END)
    sources = tuple(f"^{_DOT.join(source[:-count])}{_DOT}" for source in draft.sources)
    targets = tuple(".".join(target[:-count]) + "." for target in draft.targets)
    return Rule(sources, targets, draft.operations, tied=draft.tied), first[:-count]


def _ways(node: _Node) -> list[_Way]:
    """List the ways of a rule at a node that would be right for some key below it."""
    below_it = list(node.walk())
    ways: dict[_Way, None] = {}
    is_dropped = not any(below.own or (below.leaf and below.leaf.targets) for below in below_it)
    if is_dropped and node.children.keys() != {_END}:
        ways[None] = None  # the whole key is named, or a sibling's tensors would be dropped unseen
    for below in below_it:
        if below.leaf is None or not below.leaf.targets:
            continue
        (target,), plain = below.leaf.targets, below.leaf.plain
        rest = plain[node.depth :]
        head = target[: len(target) - len(rest)]
        fits = len(rest) <= len(target) and target[len(head) :] == rest and (rest or below is node)
        captured = sum(part.count("(") - part.count(r"\(") for part in below.leaf.sources[0][: node.depth])
        if fits and max(map(int, REFERENCE.findall(".".join(head))), default=0) <= captured:
            ways[node.depth, head] = None
    return list(ways)


def _right(way: _Way, draft: Draft) -> bool:
    if way is None or not draft.targets:
        return way is None and not draft.targets
    depth, head = way
    return depth >= 0 and draft.targets[0] == (*head, *draft.plain[depth:])


def _cost(node: _Node, way: _Way) -> int:
    """Count the rules needed at a node and below it, where a rule above it has the way ``way``."""
    if way in node.costs:
        return node.costs[way][0]
    best, choice = _below(node, way, way), way
    if best:
        for own in _ways(node):
            cost = 1 + _below(node, own, way)
            # of equally few rules those with shorter patterns, if nothing below them needs another one
            if own != way and (cost < best or (cost == best == 1 and node.depth > 0)):
                best, choice = cost, own
    node.costs[way] = best, choice
    return best


def _below(node: _Node, way: _Way, above: _Way) -> int:
    own = 0 if node.leaf is None or _right(way, node.leaf) else _IMPOSSIBLE
    return own + sum(_cost(child, _inherited(node, part, way, above)) for part, child in node.children.items())


def _inherited(node: _Node, part: str, way: _Way, above: _Way) -> _Way:
    """Return the way that holds for the keys below a child; none if rules of a more general sibling come before.

    A key that ends at a node is not taken by the node's own rule, whose pattern ends with a dot.
    """
    if part == _END:
        return above
    general = _NUMBERS.sub(r"(\\d+)", part)
    sibling = node.children.get(general)
    if general == part or sibling is None or sibling.children.keys().isdisjoint(node.children[part].children):
        return way
    return _NO_WAY


def _emitted(node: _Node, way: _Way, parts: Parts) -> list[Rule]:
    """List the rules below a node and then its own: fixed text comes before captured numbers."""
    choice = node.costs[way][1]
    result = []
    for part, child in sorted(node.children.items(), key=lambda item: item[0].count(r"\d")):
        result += _emitted(child, _inherited(node, part, choice, way), (*parts, part))
    result += node.own
    if choice != way:
        complete = parts[-1:] == (_END,)
        pattern = _DOT.join(parts[:-1]) + "$" if complete else "".join(part + _DOT for part in parts)
        targets: tuple[str, ...] = ()
        if choice is not None:
            head = ".".join(choice[1])
            targets = (head if complete or not head else f"{head}.",)
        result.append(Rule((f"^{pattern}",), targets))
    return result


def worded(rules: Sequence[Rule]) -> list[Rule]:
    r"""Join rules of one pattern and one replacement that differ in a word.

    >>> rules = [Rule((rf"^attn\.{word}\.",), (f"attention.{word}_proj.",)) for word in "qkv"]
    >>> print(*worded(rules))
    ^attn\.(q|k|v)\. -> attention.\1_proj.
    """
    result = list(rules)
    while True:
        groups: dict[tuple[_Frame, Rule], list[tuple[int, str]]] = {}
        for place, rule in enumerate(result):
            for frame, word in _frames(rule):
                groups.setdefault((frame, Rule((), (), rule.operations, tied=rule.tied)), []).append((place, word))
        joined = max(groups.items(), key=lambda item: len(item[1]), default=None)
        if joined is None or len(joined[1]) < 2:
            return result
        (frame, shared), members = joined
        members = members[:_MAX_WORDS]
        written = _written(frame, [word for _, word in members])
        last = members[-1][0]
        result[last] = Rule((written[0],), written[1], shared.operations, tied=shared.tied)
        for place, _ in reversed(members[:-1]):
            del result[place]


def _frames(rule: Rule) -> Iterator[tuple[_Frame, str]]:
    """Yield the words that a rule keeps, with the texts around each."""
    if len(rule.sources) != 1 or len(rule.targets) > 1 or len(rule.sources[0]) > _MAX_PATTERN:
        return
    (source,) = rule.sources
    for found in _WORD.finditer(source):
        word, first, last = found[0], source[: found.start()], source[found.end() :]
        if not rule.targets:
            yield (first, last, None, ""), word
        for target in rule.targets:
            for other in re.finditer(rf"(?<![A-Za-z]){word}(?![A-Za-z])", target):
                before, after = target[: other.start()], target[other.end() :]
                if before.count("{") == before.count("}"):
                    yield (first, last, before, after), word


def _written(frame: _Frame, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    first, last, before, after = frame
    source = f"{first}({'|'.join(words)}){last}"
    if before is None:
        return source, ()
    group = len(re.findall(r"(?<!\\)\((?!\?:)", first)) + 1
    moved = [
        REFERENCE.sub(lambda found: f"\\{int(found[1]) + (int(found[1]) >= group)}", text) for text in (before, after)
    ]
    return source, (f"{moved[0]}{reference(group, moved[1])}{moved[1]}",)
