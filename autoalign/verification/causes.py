"""Causes: why two modules stop computing the same: weights, configuration, code, or rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Reshape
from autoalign.verification.compare import ACTIVATIONS, Compared, Finding
from autoalign.verification.run import Call, Recording

Cause = Literal["weights", "configuration", "code", "missing", "precision"]

# Attributes of modules that have no effect in evaluation, or that the shapes of tensors show
_IRRELEVANT = frozenset(
    "affine attention_dropout bias call_super_init config device drop_prob dropout dtype dump_patches "  # noqa: SIM905
    "elementwise_affine embedding_dim gradient_checkpointing in_channels in_features index inplace layer_id layer_idx "
    "max_norm momentum name num_embeddings num_features out_channels out_features p scale_grad_by_freq sparse training "
    "transposed weight".split()
)
_SAME = dict.fromkeys(("variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps"), "eps")
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
_MOVING = frozenset(  # functions of torch that move values or make masks, and compute nothing
    "T __get__ __getitem__ __setitem__ _assert_async arange cat chunk clone contiguous cpu data detach "  # noqa: SIM905
    "dropout dropout_ empty expand expand_as feature_dropout flatten float full lift_fresh masked_fill masked_fill_ "
    "movedim narrow ones permute repeat reshape select split squeeze stack swapaxes tensor to transpose tril triu type "
    "type_as unbind unflatten unsqueeze view view_as zeros zeros_like".split()
)
_SPELLINGS = {  # of functions that do the same
    "+": "add add_ __add__ __iadd__ __radd__",
    "*": "mul mul_ __mul__ __imul__ __rmul__",
    "-": "sub sub_ __sub__ __rsub__",
    "/": "div div_ __truediv__ __itruediv__",
    "matmul": "__matmul__ bmm",
    "relu": "relu_",
}
_ALIASES = {name: canonical for canonical, names in _SPELLINGS.items() for name in names.split()}
_MAX_LISTED = 4  # differences that are named
_MAX_AROUND = 2  # modules around a place whose settings are compared


def setting_differences(source: nn.Module, target: nn.Module) -> list[str]:
    """List the settings in which two modules differ, the source's first; of inner modules without tensors too.

    >>> setting_differences(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-6))
    ['eps 1e-05 / 1e-06']
    """
    own, other = _settings(source), _settings(target)
    found = [f"{name} {own[name]!r} / {other[name]!r}" for name in own if name in other and own[name] != other[name]]
    inner = [
        {name: child for name, child in module.named_children() if not list(child.state_dict())}
        for module in (source, target)
    ]
    for name, child in inner[0].items():
        partner = inner[1].get(name)
        if partner is None or not (computes(child) or computes(partner)):
            continue
        if described(child) != described(partner):
            found.append(f"{name} {described(child)} / {described(partner)}")
    return found


def _settings(module: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in vars(module).items():
        name = _SAME.get(name, name)
        if name.startswith("_") or name in _IRRELEVANT:
            continue
        if isinstance(value, tuple | list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if isinstance(value, bool | int | float | str | torch.Size) or value is None:
            found[name] = value
        elif callable(value) and not isinstance(value, nn.Module | Tensor) and hasattr(value, "__name__"):
            found[name] = value.__name__
    return found


def computes(module: nn.Module) -> bool:
    """Return True if a module without tensors of its own and inside changes values in evaluation."""
    names = type(module).__name__.lower()
    return (
        not any(True for _ in module.children())
        and not any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, _PASSING)
        and "drop" not in names
    )


def described(module: nn.Module) -> str:
    """Write a module without tensors in one line.

    >>> described(nn.ReLU(inplace=True))
    'ReLU()'
    """
    text = str(module).splitlines()[0]
    for part in ("inplace=True", "inplace=False"):
        text = text.replace(f", {part}", "").replace(part, "")
    return text


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place, in the order of execution, at which two networks stop computing the same."""

    source_module: str  # "" for the whole network
    target_module: str
    difference: float  # the largest there, as a share of the largest value
    cause: Cause
    detail: str  # what is known of the cause, in words
    keys: tuple[str, ...] = ()  # the target's tensors that are at fault or under suspicion
    between: tuple[str, str] | None = None  # the target's modules between which it arose, if it was in neither

    def __str__(self) -> str:
        where = f"{self.target_module or 'the model itself'} (source: {self.source_module or 'the model itself'})"
        return f"{where}, by {self.difference:.1e}: {self.cause}. {self.detail}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of two networks where the cause of a difference is looked for."""

    models: tuple[nn.Module, nn.Module]  # source and target, as everywhere here
    compared: Compared
    matches: Mapping[str, Match]  # what fills the target
    wrong: Mapping[str, str]  # target keys that hold other values than the alignment gives -> what they hold
    unfilled: Collection[str]  # target keys that the alignment fills with nothing

    @property
    def recordings(self) -> tuple[Recording, Recording]:
        """The calls of both."""
        return self.compared.source, self.compared.target

    def owner(self, key: str) -> str:
        """Return the target's module of a key; that of the whole if unknown."""
        return self.compared.owners.get(key, ("", True))[0]

    def is_from(self, key: str, source: str) -> bool:
        """Return True if a key is filled from tensors of a module of the source, or of one inside it."""
        return not source or any(name.startswith(f"{source}.") for name in self.matches[key].sources)

    def partner(self, module: str, finding: Finding) -> str:
        """Return the source's module that does what one of the target does, or else that of the finding."""
        return self.compared.pairs[module].source if module in self.compared.pairs else finding.source


def diverged(scene: Scene, finding: Finding) -> Divergence:
    """Find the cause of a difference: weights first, then configuration, then code.

    If it is the weights of a module, those of one that is called before it may be wrong too, and show in nothing.
    """
    divergence = _diverged(scene, finding)
    if not any(key in scene.wrong for key in divergence.keys):
        return divergence
    used = scene.compared.target.first_use
    first = scene.owner(min(scene.wrong, key=lambda key: used.get(key, finding.until[1])))
    return _of_weights(scene, finding, first, [key for key in scene.wrong if scene.owner(key) == first])


def _diverged(scene: Scene, finding: Finding) -> Divergence:
    module = finding.call.module
    pair = scene.compared.pairs.get(module)
    own = [key for key in scene.compared.owners if scene.owner(key) == module]
    wrong = [key for key in own if key in scene.wrong]

    def found(cause: Cause, text: str, keys: Sequence[str] = ()) -> Divergence:
        return Divergence(finding.source, module, finding.difference, cause, text, tuple(keys))

    if finding.kind == "grown":
        return found("precision", "The difference grew little by little: rounding, or many small differences.")
    if finding.kind in ("own", "inside", "mispaired") and wrong:
        return _of_weights(scene, finding, module, wrong)
    if finding.kind == "mispaired" and finding.source in finding.elsewhere:
        return _of_order(scene, finding) or _before(scene, finding)
    if finding.kind == "mispaired":
        filled = pair.match if pair else scene.matches[own[0]]
        others = ", ".join(finding.elsewhere[:2]) or "another module"
        text = (
            f"{filled.target} is filled from {' + '.join(filled.sources)}, but its inputs equal those of {others} in "
            "the source model."
        )
        return found("weights", text, own)
    if finding.kind in ("before", "inside"):
        return _before(scene, finding)
    if missing := [key for key in own if key in scene.unfilled]:
        return found("missing", f"{_listed(missing)} got nothing from the source.", missing)
    mixed = [key for key in own if key in scene.matches and not scene.is_from(key, finding.source)]
    if pair and (mixed := [*pair.mixed] if pair.is_mixed else mixed):
        fills = _listed([f"{key} from {' + '.join(scene.matches[key].sources)}" for key in mixed])
        text = f"Its tensors come from several modules: {fills}, the rest from {finding.source}."
        return found("weights", text, mixed)
    modules = [model.get_submodule(n) for model, n in zip(scene.models, (finding.source, module), strict=True)]
    if settings := setting_differences(*modules):
        return found("configuration", f"{_listed(settings)} (source / target).")
    changed = [key for key in own if key in scene.matches and not isinstance(scene.matches[key].operation, Copy)]
    if changed:
        text = f"{changed[0]} is made by '{scene.matches[changed[0]].operation}', which may be the wrong layout."
        return found("weights", text, changed)
    kinds = [type(module).__name__ for module in modules]
    text = (
        f"Inputs and weights are equal; the code is that of {kinds[0]} in the source and of {kinds[1]} in the target."
    )
    return found("code", text)


def _of_weights(scene: Scene, finding: Finding, module: str, keys: Sequence[str]) -> Divergence:
    text = "; ".join(f"{key} {scene.wrong[key]}" for key in keys[:_MAX_LISTED]) + "."
    return Divergence(scene.partner(module, finding), module, finding.difference, "weights", text, tuple(keys))


def _of_order(scene: Scene, finding: Finding) -> Divergence | None:
    """Find what made the features that a module is given come in another order than in the source."""
    used, end = scene.compared.target.first_use, finding.until[1]
    before = sorted((key for key in scene.matches if used.get(key, end) < end), key=lambda key: -used[key])
    for key in before:
        if not isinstance(operation := scene.matches[key].operation, Copy | Reshape):
            module, taker = scene.owner(key), finding.call.module or "the output"
            text = f"{key} is made by '{operation}', and {taker} takes the features that it gives in another order."
            return Divergence(scene.partner(module, finding), module, finding.difference, "weights", text, (key,))
    return None


def _before(scene: Scene, finding: Finding) -> Divergence:
    """Find what happened between the last module at which both agreed and this one."""
    used, since, until = scene.compared.target.first_use, finding.since[1], finding.until[1]
    recent = sorted((key for key, time in used.items() if since < time <= until), key=lambda key: used[key])
    earlier = sorted((key for key, time in used.items() if time <= since), key=lambda key: used[key])
    for keys in (recent, earlier):
        if wrong := [key for key in keys if key in scene.wrong]:
            module = scene.owner(wrong[0])
            return _of_weights(scene, finding, module, [key for key in wrong if scene.owner(key) == module])
    if missing := [key for key in recent if key in scene.unfilled]:
        module = scene.owner(missing[0])
        text = f"{_listed(missing)} got nothing from the source."
        source = scene.partner(module, finding)
        return Divergence(source, module, finding.difference, "missing", text, tuple(missing))
    module = finding.call.module
    between = _module_before(scene.compared.target, since), module
    where = (
        f"It arises between {between[0] or 'the inputs'} and {module or 'the outputs'}, outside of modules with tensors"
    )
    suspects = tuple(key for key in recent if key in scene.matches)
    settings, functions = between_differences(scene, finding)
    doubts = [key for key in scene.matches if scene.matches[key].warnings and used.get(key, until) < until]

    def found(cause: Cause, text: str, keys: Sequence[str]) -> Divergence:
        return Divergence(finding.source, module, finding.difference, cause, f"{where}{text}", tuple(keys), between)

    if settings:
        return found("configuration", f": {_listed(settings)} (source / target).", suspects)
    if doubts:
        return found("weights", f". {doubts[0]}: {scene.matches[doubts[0]].warnings[0]}.", doubts)
    if functions:
        return found("code", f": {_listed(functions)} (source / target).", suspects)
    holders = {scene.owner(key) for key in suspects}
    if len(holders) == 1:  # nothing else was used in between
        (holder,) = holders
        text = (
            f"{where}, where only {_listed(suspects)} of {holder or 'the model itself'} is used: it is filled wrongly."
        )
        source = scene.partner(holder, finding)
        return Divergence(source, holder, finding.difference, "weights", text, suspects, between)
    if (order := _of_order(scene, finding)) is not None:
        return order
    text = f"{_listed(suspects)} may be filled wrongly" if suspects else "tensors used before it may be exchanged"
    return found("code", f", which call the same functions: {text}, or settings differ that no module shows.", suspects)


def between_differences(scene: Scene, finding: Finding) -> tuple[list[str], list[str]]:
    """List what differs between two moments.

    Returns:
        Settings: modules without tensors, activation functions and what functions are given, settings of the modules
        around; and other functions.
    """
    bounds = list(zip(finding.since, finding.until, strict=True))
    modules, functions = [], []
    for model, recording, (start, end) in zip(scene.models, scene.recordings, bounds, strict=True):
        plain = [model.get_submodule(call.module) for call in recording.calls if start < call.start < end]
        modules.append(Counter(described(module) for module in plain if computes(module)))
        names = [_function(name) for time, name in recording.functions if start < time < end]
        functions.append(Counter(name for name in names if _base(name) not in _MOVING))
    settings = _exchanged(*modules)
    own, other = functions[0] - functions[1], functions[1] - functions[0]
    others = _exchanged(own, other)
    bases = {_base(name) for name in own}, {_base(name) for name in other}
    if others and bases[0] == bases[1]:
        settings, others = settings or others, []
    elif bases[0] != bases[1] and bases[0] | bases[1] <= ACTIVATIONS.keys():  # one side may have none
        settings, others = settings or [" / ".join(", ".join(side) or "no activation" for side in (own, other))], []
    around = [_around(recording, time) for recording, (_, time) in zip(scene.recordings, bounds, strict=True)]
    for name, partner in zip(*(names[: -_MAX_AROUND - 1 : -1] for names in around), strict=False):
        both = (model.get_submodule(n) for model, n in zip(scene.models, (name, partner), strict=True))
        settings += [f"{partner}.{text}".lstrip(".") for text in setting_differences(*both)]
    return settings or _odd_modules(scene, finding), others


def _odd_modules(scene: Scene, finding: Finding) -> list[str]:
    """Find modules without tensors of their own that are given the same on both sides and give something else.

    Tables that are no part of the state dict, such as the angles of rotary embeddings, show so.
    """
    calls: list[dict[tuple[str, int], Call]] = []
    for model, recording, end in zip(scene.models, scene.recordings, finding.until, strict=True):
        kinds: dict[tuple[str, int], Call] = {}
        for call in recording.calls:
            module = model.get_submodule(call.module)
            if 0 <= call.end < end and not list(module.state_dict()):
                kind = type(module).__name__
                kinds[kind, sum(known == kind for known, _ in kinds)] = call
        calls.append(kinds)
    odd = []
    for (kind, number), call in calls[1].items():
        partner = calls[0].get((kind, number))
        if partner is None or not (call.given_sums and partner.given_sums and call.given_sums.like(partner.given_sums)):
            continue
        if call.gave_sums and partner.gave_sums and not call.gave_sums.like(partner.gave_sums):
            odd.append(f"outputs of {partner.module} / of {call.module} from equal inputs")
    return odd[:1]


def _exchanged(own: Counter[str], other: Counter[str]) -> list[str]:
    """Describe what each of two sides has and the other lacks, if both have something."""
    less, more = own - other, other - own
    return [f"{', '.join(less)} / {', '.join(more)}"] if less and more else []


def _function(name: str) -> str:
    base, paren, given = name.partition("(")
    return _ALIASES.get(base, base) + paren + given


def _base(function: str) -> str:
    return function.partition("(")[0]


def _around(recording: Recording, time: int) -> list[str]:
    """List the modules that are running at a time, the outermost first."""
    return [call.module for call in recording.calls if call.start < time and (call.end > time or call.end < 0)]


def _module_before(recording: Recording, time: int) -> str:
    """Name the module that began or ended last before or at a time."""
    if time < 0:
        return ""
    moments = [
        (moment, call.module) for call in recording.calls for moment in (call.start, call.end) if 0 <= moment <= time
    ]
    return max(moments)[1] if moments else ""


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
