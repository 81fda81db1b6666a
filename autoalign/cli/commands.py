"""What the commands do: align, load-check, convert, rules, verify and demo; inspect and diff, which only look."""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from math import isfinite
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.api import AlignOptions, MatchOptions, align, convert, load, verify
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.checkpoints.stored import named_dtype
from autoalign.cli.inspection import run_inspect, tensor_json
from autoalign.cli.targets import model_of, side_of
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, complain, progress, show, show_json, width
from autoalign.errors import DependencyError, InputError, PatternError, ValueWarning
from autoalign.loading.values import Changed, Differences, differences
from autoalign.plan.specs import TensorSpec
from autoalign.reports.html import document
from autoalign.reports.rows import Row, escaped, fold, lay_out
from autoalign.reports.text import SCREEN, escape_markdown, markdown_code, markdown_table, render_markdown, render_text
from autoalign.rules.rules import Rules

_DEMO_SOURCE = "torchvision.models.regnet_y_400mf"
_DEMO_TARGET = "timm.create_model('regnety_004')"
_DEMO_TOLERANCE = 1e-3  # of the largest relative difference of two outputs that are called equal


def run_align(options: argparse.Namespace) -> int:
    """Report an alignment; nothing is loaded."""
    alignment = align(side_of(options.checkpoint), side_of(options.target), **align_options(options))
    _show_alignment(alignment, options)
    return _exit_code(alignment)


def run_load_check(options: argparse.Namespace) -> int:
    """Load into the model itself, and look at the values that it then has."""
    model = model_of(options.target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ValueWarning)  # the verdict and the notes of the report say the same
        alignment = load(model, options.checkpoint, strict=options.strict, **align_options(options))
    values = model.state_dict()
    odd = [
        match.target
        for match in alignment.matches
        if values[match.target].is_floating_point() and not bool(torch.isfinite(values[match.target].float()).all())
    ]
    verdict = f"Loaded {len(alignment.matches)} of {len(alignment.target_specs)} tensors into {type(model).__name__}"
    if odd:
        named = ", ".join(map(escaped, odd[:5])) + (", ..." if len(odd) > 5 else "")
        verdict += f"; {len(odd)} of them hold values that are not finite: {named}."
    else:
        verdict += "; all their values are finite."
    _show_alignment(alignment, options, verdict)
    return _exit_code(alignment)


def run_convert(options: argparse.Namespace) -> int:
    """Rewrite a checkpoint in a target's names."""
    metadata = {}
    for entry in options.metadata:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--metadata {entry!r} is not of the form KEY=VALUE. Nothing was written.")
        metadata[key] = value
    target = side_of(
        options.target, values=bool(options.adapt or options.merge_adapter)
    )  # which may keep values of the target's own
    with progress("Writing") as report:
        alignment = convert(
            side_of(options.checkpoint, values=True),
            target,
            options.output,
            format=options.output_format,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            metadata=metadata,
            strict=options.strict,
            overwrite=options.overwrite,
            progress=report,
            **align_options(options),
        )
    _show_alignment(alignment, options, f"Wrote {len(alignment.matches)} tensors to {escaped(options.output)}.")
    return _exit_code(alignment)


def _show_alignment(alignment: Alignment, options: argparse.Namespace, verdict: str = "") -> None:
    """Write the report of an alignment in the format that was asked for, and the verdict below it."""
    source, target = " ".join(options.checkpoint), options.target
    if options.format == "json":
        data = alignment.to_dict()
        data["source"]["name"], data["target"]["name"] = source, target
        show_json(data | {"remarks": [verdict] if verdict else []})
        return
    if options.format == "html":
        show(document(alignment, title=f"{source} -> {target}"), plain=True)
        return
    if options.format == "markdown":
        lines = [f"{markdown_code(escaped(source))} → {markdown_code(escaped(target))}", "", render_markdown(alignment)]
    else:
        limit = None if options.all else SCREEN
        report = render_text(alignment, width=width(), limit=limit, everything="--all", for_shell=True)
        lines = [f"{escaped(source)} -> {escaped(target)}", "", report]
    show("\n".join(lines + (["", verdict] if verdict else [])), plain=options.format == "markdown")


def _exit_code(alignment: Alignment) -> int:
    """Return 0 if all of the target is filled that was not left out on purpose, else 1."""
    return COMPLETE if set(alignment.missing_keys) <= alignment.excluded else INCOMPLETE


def run_rules(options: argparse.Namespace) -> int:
    """Print an alignment as rules, or in a form that other libraries read."""
    if not options.name.isidentifier():
        raise InputError(f"--name {options.name!r} is not a valid name of a Python function. Nothing was done.")
    alignment = align(side_of(options.checkpoint), side_of(options.target), **align_options(options))
    if set(alignment.missing_keys) - alignment.excluded:
        complain(
            f"note: the rules fill {len(alignment.matches)} of {len(alignment.target_specs)} tensors of the target; "
            "autoalign align says why."
        )
    show(_rules_text(alignment.rules(), options.format, options.name), plain=options.format != "text")
    return _exit_code(alignment)


def _rules_text(rules: Rules, form: str, name: str) -> str:
    match form:
        case "json":
            return rules.to_json()
        case "python":
            return rules.to_python(name).rstrip("\n")
        case "key_mapping":
            return pformat(rules.to_key_mapping(), width=100, sort_dicts=False)
        case "revise_keys":
            return pformat(rules.to_revise_keys(), width=100)
        case "transformers":
            return conversions_source(rules.to_transformers())
        case _:
            return str(rules)


def conversions_source(conversions: Sequence[Any]) -> str:
    """Write conversions of transformers as the Python that makes them, which their repr is not."""
    lines, names = [], set()
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        arguments = []
        for name in ("source_patterns", "target_patterns"):
            patterns = list(getattr(conversion, f"_original_{name}", None) or getattr(conversion, name))
            arguments.append(repr(patterns[0] if len(patterns) == 1 else patterns))
        if operations:
            arguments.append(f"operations=[{', '.join(map(_call_source, operations))}]")
        names |= {type(part).__name__ for part in (conversion, *operations)}
        lines.append(f"    {type(conversion).__name__}({', '.join(arguments)}),")
    imported = f"from transformers.core_model_loading import {', '.join(sorted(names))}\n\n" if names else ""
    return "\n".join([f"{imported}conversions = [", *lines, "]"])


def _call_source(operation: Any) -> str:
    defaults = {name: parameter.default for name, parameter in signature(type(operation)).parameters.items()}
    given = {name: getattr(operation, name) for name in defaults if hasattr(operation, name)}
    shown = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name] or name.startswith("dim")]
    return f"{type(operation).__name__}({', '.join(shown)})"


def run_verify(options: argparse.Namespace) -> int:
    """Run two models and compare what they compute."""
    torch.manual_seed(options.seed)
    inputs = example_inputs(options.input)
    source, target = model_of(options.source).eval(), model_of(options.target).eval()
    matching = match_options(options)
    if options.checkpoint:
        loaded = load(source, options.checkpoint, container=matching.pop("container"))
        if loaded.missing_keys:
            complain(
                f"note: the checkpoint fills {len(loaded.matches)} of {len(loaded.target_specs)} tensors of the source"
            )
    found = verify(source, target, inputs, **matching)
    if options.format == "json":
        divergence = found.first_divergence
        names = ("source_module", "target_module", "difference", "cause")
        first = divergence and {name: getattr(divergence, name) for name in names}
        result = {"equal": found.equal, "max_difference": found.max_difference, "first_divergence": first}
        covered = {"coverage": found.coverage, "uncovered": list(found.uncovered)}
        show_json({"source": options.source, "target": options.target, **result, **covered})
    else:
        show(str(found))
    return COMPLETE if found.equal else INCOMPLETE


def example_inputs(texts: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Make random inputs of the shapes that are asked for.

    >>> [tuple(tensor.shape) for tensor in example_inputs(["1,3,8,8", "2:int64"])]
    [(1, 3, 8, 8), (2,)]
    """
    made = [_example_input(text) for text in texts]
    names = [name for name, _ in made if name]
    if names and (len(names) < len(made) or len(set(names)) < len(names)):
        raise InputError("Either all --input have names, all different, or none has one. Nothing was done.")
    return dict(made) if names else tuple(tensor for _, tensor in made)


def _example_input(text: str) -> tuple[str, Tensor]:
    found = re.fullmatch(r"(?:(\w+)=)?([0-9]+(?:,[0-9]+)*)?(?::(\w+)(?::([0-9]+))?)?", text)
    dtype = named_dtype(found[3] or "float32") if found else None
    if found is None or dtype is None or not text:
        raise InputError(
            f"--input {text!r} is not a valid shape, such as 1,3,224,224 or input_ids=1,16:int64. Nothing was done."
        )
    shape = [int(size) for size in found[2].split(",")] if found[2] else []
    if dtype.is_floating_point or dtype.is_complex:
        return found[1] or "", torch.randn(shape, dtype=torch.float32).to(dtype)
    return found[1] or "", torch.randint(0, int(found[4] or 2), shape).to(dtype)


def run_demo(_: argparse.Namespace) -> int:
    """Load one library's RegNet from a file into another's, and compare what they compute; nothing is downloaded."""
    from rich.console import Console

    try:
        import timm
        import torchvision
        from safetensors.torch import save_file
    except ImportError as error:
        raise DependencyError(
            f"The demonstration needs timm and torchvision, and {error.name} is not installed. "
            "Nothing was loaded. Install them with: pip install timm torchvision"
        ) from error
    with Console(stderr=True).status(f"Loading {_DEMO_SOURCE} into {_DEMO_TARGET}"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Noise of large and small scale: in mere pixel noise, all images are alike once they are averaged.
            noise = nn.functional.interpolate(torch.randn(4, 3, 7, 7), 224, mode="bicubic")
            images = noise + torch.randn(4, 3, 224, 224)
            source = _with_random_norms(torchvision.models.regnet_y_400mf(weights=None), images)
            target = timm.create_model("regnety_004").eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "regnet_y_400mf.safetensors"
            save_file(source.state_dict(), path)
            alignment = load(target, path)
        with torch.inference_mode():
            wanted, got = source(images), target(images)
    difference = float((got - wanted).abs().max() / wanted.abs().max())
    is_equal = not alignment.missing_keys and difference <= _DEMO_TOLERANCE
    show(
        f"{_DEMO_SOURCE} -> {_DEMO_TARGET}\n\n{alignment}\n\n"
        f"Largest relative difference of the outputs: {difference:.1e} "
        f"({'equal' if is_equal else 'NOT equal'}, at a tolerance of {_DEMO_TOLERANCE:.0e})"
    )
    return COMPLETE if is_equal else INCOMPLETE


def _with_random_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """Randomise the gains and biases of every BatchNorm, and give it the statistics of images, in place.

    As they are initialised they are all alike, so that a misplaced one would not show, and a deep network's output
    would hardly depend on its input.
    """
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0  # the statistics of the next batch are all that counts
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def match_options(options: argparse.Namespace) -> MatchOptions:
    """Return the parsed options of matching as arguments of ``autoalign.align``."""
    rules = []
    for rule in options.rule:
        first, equals, second = rule.rpartition("=")  # a regex may contain equals signs
        if not (first and equals and second):
            raise PatternError(f"--rule {rule!r} is not of the form A=B. Nothing was aligned.")
        rules.append((first, second))
    return {
        "rules": rules,
        "include": options.include,
        "exclude": options.exclude,
        "adapt": options.adapt,
        "min_confidence": options.min_confidence,
        "container": options.container,
        "dequantise": options.dequantise,
        "merge_adapter": options.merge_adapter,
    }


def align_options(options: argparse.Namespace) -> AlignOptions:
    """Return the parsed options of matching, with the code of the checkpoint."""
    chosen: AlignOptions = {**match_options(options)}  # type: ignore[typeddict-item]
    name = options.source_model
    return {**chosen, "source_model": name if name in (None, "auto") else model_of(name, values=False)}


def run_diff(options: argparse.Namespace) -> int:
    """Show in what two checkpoints differ under the same keys."""
    first = checkpoint_of(side_of(options.first, values=True), container=options.container)
    second = checkpoint_of(side_of(options.second, values=True), container=options.other_container)
    with progress("Comparing") as report:
        found = differences(first, second, report)
    if not set(first) & set(second):
        complain("note: the two have no key in common; autoalign align shows which of them correspond")
    if options.format == "json":
        show_json({"first": options.first, "second": options.second, **_differences_json(found)})
    else:
        show("\n".join(_difference_lines(found, options.first, options.second, markdown=options.format == "markdown")))
    return COMPLETE if found.none else INCOMPLETE


def _difference_lines(found: Differences, first: str, second: str, *, markdown: bool) -> list[str]:
    same_kind = [item for item in found.changed if item.first.kind == item.second.kind]
    other_kind = [item for item in found.changed if item.first.kind != item.second.kind]
    sections = {
        f"Only in {escaped(first)}": _rows_of_one_side(found.only_first),
        f"Only in {escaped(second)}": _rows_of_one_side(found.only_second),
        "Other shapes or dtypes, and the largest difference of the values": _changed_rows(other_kind),
        "Values that differ, the largest difference, and its share of the largest value": _changed_rows(same_kind),
    }
    lines = [f"Equal: {found.equal:,} tensors"]
    for title, rows in sections.items():
        if not rows:
            continue
        count = sum(row.tensors for row in rows)
        if markdown:
            lines += ["", f"### {escape_markdown(title)} ({count:,})", "", *markdown_table(rows)]
        else:
            lines += ["", f"{title}: {count:,}"]
            lines += [line.rstrip() for row_lines in lay_out(rows, width()) for line in row_lines]
    return lines


def _rows_of_one_side(specs: Sequence[TensorSpec]) -> list[Row]:
    folds = fold([((escaped(spec.key),), spec.kind) for spec in specs])
    return [Row(row.texts, (row.fields,), len(row.members)) for row in folds]


def _changed_rows(items: Sequence[Changed]) -> list[Row]:
    rows = []
    entries = []
    for item in items:
        kinds = " -> ".join(dict.fromkeys((item.first.kind, item.second.kind)))
        entries.append(((escaped(item.key),), (kinds, item.difference is None)))
    for row in fold(entries):
        members = [items[member] for member in row.members]
        most = max(members, key=lambda item: item.difference or 0.0)
        if most.difference is None:
            values = ""
        elif not most.difference:
            values = "equal values"
        else:
            share = f" ({most.difference / most.magnitude:.2g})" if most.magnitude else ""
            where = f" in {escaped(most.key)}" if len(members) > 1 else ""
            values = f"{most.difference:.3g}{share}{where}"
        rows.append(Row(row.texts, (row.fields[0], values), len(members)))
    return rows


def _differences_json(found: Differences) -> dict[str, object]:
    def number(value: float | None) -> float | str | None:  # JSON has no infinity
        return value if value is None or isfinite(value) else str(value)

    return {
        "equal": found.equal,
        "only_first": [tensor_json(spec) for spec in found.only_first],
        "only_second": [tensor_json(spec) for spec in found.only_second],
        "changed": [
            {
                "key": item.key,
                "first": tensor_json(item.first),
                "second": tensor_json(item.second),
                "difference": number(item.difference),
                "magnitude": number(item.magnitude),
            }
            for item in found.changed
        ],
    }


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": run_inspect,
    "align": run_align,
    "load-check": run_load_check,
    "convert": run_convert,
    "rules": run_rules,
    "diff": run_diff,
    "verify": run_verify,
    "demo": run_demo,
}  # and completion, which needs nothing but the parser
