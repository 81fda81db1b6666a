"""What the commands do, each a function whose signature has its arguments and options.

They import what needs torch when they run, so that help needs none of it.
"""

from __future__ import annotations

import gc
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

import typer

import autoalign
from autoalign.cli.arguments import (
    Checkpoints,
    CheckpointsOrModel,
    Container,
    Everything,
    Form,
    Model,
    OpenPage,
    ReportForm,
    Strict,
    TableForm,
    Target,
    command,
    complete_models,
    in_options,
    model_of,
    side,
    side_of,
)
from autoalign.cli.terminal import COMPLETE, INCOMPLETE, complain, progress, show, show_json, show_lines
from autoalign.errors import DependencyError, InputError, ValueWarning
from autoalign.plan.options import AlignOptions, MatchOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

_DEMO_SOURCE = "torchvision.models.regnet_y_400mf"
_DEMO_TARGET = "timm.create_model('regnety_004')"
_DEMO_TOLERANCE = 1e-3  # of the largest relative difference of two outputs that are called equal
_DIFFERENT = "exit codes: 0 no difference; 1 some difference; 2 an error, reported on stderr"
_UNEQUAL = "exit codes: 0 equal; 1 not equal, or not all is loaded; 2 an error, reported on stderr"


@command(exits="exit codes: 0 shown; 2 an error, reported on stderr")
def inspect(
    checkpoint: CheckpointsOrModel,
    depth: Annotated[int | None, typer.Option(metavar="N", help="levels of modules to show (default: all)")] = None,
    container: Container = None,
    form: TableForm = "text",
) -> int:
    """Show what a checkpoint holds.

    Shown is the tree of modules of a checkpoint of any format, with repeated blocks folded, and with shapes, dtypes
    and sizes; which container of several is taken; and prefixes that a wrapper may have put before the names. No tensor
    data is read.
    """
    is_collecting = gc.isenabled()
    gc.disable()  # all that is made is kept, and to look for garbage in it takes a third of the time
    try:
        from autoalign.checkpoints.checkpoint import checkpoint_of
        from autoalign.cli.reports import show_checkpoint

        opened = checkpoint_of(side_of(checkpoint), container=container)
        return show_checkpoint(opened, " ".join(checkpoint), form, depth=depth)
    finally:
        if is_collecting:
            gc.enable()


@command(exits="exit codes: 0 the architecture is known, or one is near; 1 unknown; 2 an error, reported on stderr")
def identify(checkpoint: Checkpoints, container: Container = None, form: Form = "text") -> int:
    """Name the architecture that a checkpoint is of.

    The shapes of its tensors are compared with those of the architectures of torchvision, timm, transformers and
    mmpretrain, whatever they are called and in whatever order they are. Said are also the wrapper, copies inside, the
    classes of the head, whether it was trained, and how to load it.
    """
    found = autoalign.identify(side_of(checkpoint), container=container)
    if form == "json":
        show_json({"checkpoint": " ".join(checkpoint), **found.to_dict()})
    else:
        show_lines(str(found))
    return COMPLETE if found.best else INCOMPLETE


@command()
def align(
    checkpoint: Checkpoints,
    target: Target,
    form: ReportForm = "text",
    everything: Everything = False,
    open_page: OpenPage = False,
    **options: Unpack[AlignOptions],
) -> int:
    """Report what would be loaded from where, and what would not.

    No tensor data is read and nothing is written.
    """
    alignment = autoalign.align(side_of(checkpoint), side_of(target), **options)
    from autoalign.cli.reports import show_alignment

    return show_alignment(alignment, checkpoint, target, form, everything=everything, open_page=open_page)


@command(exits="exit codes: 0 explained; 2 an error, reported on stderr")
def explain(
    checkpoint: Checkpoints,
    target: Target,
    key: Annotated[str, typer.Argument(metavar="KEY", help="of the target or of the checkpoint")],
    form: Form = "text",
    **options: Unpack[AlignOptions],
) -> int:
    """Explain why a key is filled from what it is, or is not, and what would change that."""
    explanation = autoalign.align(side_of(checkpoint), side_of(target), **options).explain(key)
    if form == "json":
        from autoalign.cli.reports import name_sides

        data = explanation.to_dict()
        if data["choice"]:
            name_sides(data["choice"], " ".join(checkpoint), target)
        show_json(data)
    else:
        show_lines(in_options(str(explanation)))
    return COMPLETE


@command()
def load_check(
    checkpoint: Checkpoints,
    target: Model,
    strict: Strict = False,
    form: ReportForm = "text",
    everything: Everything = False,
    open_page: OpenPage = False,
    **options: Unpack[AlignOptions],
) -> int:
    """Load a checkpoint into a model, read every value, and report.

    The model is built and loaded as autoalign.load does, and tensors with values that are not finite are named.
    Nothing is written.
    """
    from autoalign.cli.reports import show_alignment
    from autoalign.reports.rows import escaped

    model = model_of(target, hint=" The model comes last: autoalign load-check CKPT TARGET.")
    given = checkpoint if len(checkpoint) > 1 else checkpoint[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ValueWarning)  # the verdict and the notes of the report say the same
        alignment = autoalign.load(model, given, strict=strict, progress=progress("Loading"), **options)
    values = model.state_dict()
    odd = [
        match.target
        for match in alignment.matches
        if values[match.target].is_floating_point() and not values[match.target].float().isfinite().all()
    ]
    verdict = f"Loaded {len(alignment.matches)} of {len(alignment.target_specs)} tensors into {type(model).__name__}"
    if odd:
        named = ", ".join(map(escaped, odd[:5])) + (", ..." if len(odd) > 5 else "")
        verdict += f"; {len(odd)} of them hold values that are not finite: {named}."
    else:
        verdict += "; all their values are finite."
    return show_alignment(
        alignment, checkpoint, target, form, verdict=verdict, everything=everything, open_page=open_page
    )


@command()
def convert(
    checkpoint: Checkpoints,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="NAME.safetensors, or a folder")],
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TARGET",
            help="what to write it for, as in align (default: a copy under its own names)",
            autocompletion=complete_models,
        ),
    ] = None,
    unwrap: Annotated[
        bool, typer.Option("--unwrap", help="without --to: take wrappers such as module. out of the names")
    ] = False,
    output_format: Annotated[
        Literal["safetensors", "dcp"],
        typer.Option(help="dcp is a folder of torch.distributed.checkpoint, new or empty"),
    ] = "safetensors",
    dtype: Annotated[
        str | None, typer.Option(help="what floating-point tensors become, such as bfloat16 (default: as they are)")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="of a file of safetensors; what is larger is sharded")
    ] = "50GB",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="an entry for the file's metadata")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an output that is there")] = False,
    strict: Strict = False,
    form: ReportForm = "text",
    everything: Everything = False,
    open_page: OpenPage = False,
    **options: Unpack[AlignOptions],
) -> int:
    """Rewrite a checkpoint in a target's names, or in its own, as safetensors or a distributed checkpoint.

    Shapes and layout are the target's too; it is written tensor by tensor, and appears when it is complete.
    """
    parted = [entry.partition("=") for entry in metadata or ()]
    if wrong := ["".join(entry) for entry in parted if not entry[1]]:
        raise InputError(f"--metadata {wrong[0]!r} is not of the form KEY=VALUE. Nothing was written.")
    shown, written = progress("Writing"), 0

    def report(done: int, total: int) -> None:
        nonlocal written
        written = done
        shown(done, total)

    alignment = autoalign.convert(
        side_of(checkpoint, values=True),
        # which may keep values of the target's own
        target and side_of(target, values=bool(options.get("adapt") or options.get("merge_adapter"))),
        output,
        format=output_format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        metadata={key: value for key, _, value in parted},
        strict=strict,
        overwrite=overwrite,
        unwrap=unwrap,
        progress=report,
        **options,
    )
    from autoalign.cli.reports import show_alignment
    from autoalign.reports.rows import escaped

    verdict = f"Wrote {written} tensors to {escaped(output)}."
    return show_alignment(
        alignment, checkpoint, target or output, form, verdict=verdict, everything=everything, open_page=open_page
    )


@command()
def rules(
    checkpoint: Checkpoints,
    target: Target,
    form: Annotated[
        Literal["text", "json", "key_mapping", "revise_keys", "transformers", "python"],
        typer.Option("--format", help="of the result"),
    ] = "text",
    name: Annotated[str, typer.Option(help="of the function, with --format python")] = "checkpoint_filter_fn",
    **options: Unpack[AlignOptions],
) -> int:
    """Print the renamings and operations that lead from a checkpoint to a target.

    It is the shortest list of them, to read, or for others: key_mapping (of from_pretrained in transformers),
    revise_keys (mmengine), transformers (WeightRenaming and WeightConverter), or python: a function that needs torch
    alone.
    """
    if not name.isidentifier():
        raise InputError(f"--name {name!r} is not a valid name of a Python function. Nothing was done.")
    alignment = autoalign.align(side_of(checkpoint), side_of(target), **options)
    from autoalign.cli.reports import rules_text

    is_complete = set(alignment.missing_keys) <= alignment.excluded
    if not is_complete:
        complain(
            f"note: the rules fill {len(alignment.matches)} of {len(alignment.target_specs)} tensors of the target; "
            "autoalign align says why."
        )
    show(rules_text(alignment.rules(), form, name), plain=form != "text")
    return COMPLETE if is_complete else INCOMPLETE


@command(exits=_DIFFERENT)
def diff(
    first: Annotated[str, side("A", "a checkpoint of any format")],
    second: Annotated[str, side("B", "another")],
    other_container: Annotated[str | None, typer.Option(metavar="NAME", help="which of several in B")] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="T", help="largest change that is called close (default: that of rounding)")
    ] = None,
    form: ReportForm = "text",
    everything: Everything = False,
    open_page: OpenPage = False,
    **options: Unpack[MatchOptions],
) -> int:
    """Compare the values of two checkpoints, whatever their keys.

    Both are aligned, and what corresponds is compared: split, transposed, dequantised. Shown are the mean and largest
    changes of each block, and what was not compared: what is ambiguous, of other shapes, or in one of them only.
    """
    from autoalign.checkpoints.checkpoint import checkpoint_of
    from autoalign.cli.reports import show_difference

    other = checkpoint_of(side_of(second, values=True), container=other_container)
    one, report = side_of(first, values=True), progress("Comparing")
    found = autoalign.diff(one, other, tolerance=tolerance, progress=report, **options)
    return show_difference(found, first, second, form, everything=everything, open_page=open_page)


@command(exits=_UNEQUAL)
def verify(
    source: Annotated[str, side("SOURCE", "the model whose weights are loaded into TARGET")],
    target: Model,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[:DTYPE[:N]]",
            help="an example input, as 1,3,224,224 or input_ids=1,16:int64:1000 (integers below N, 2 by default); "
            "one for each argument of the models",
        ),
    ],
    checkpoint: Annotated[str | None, typer.Option(metavar="CKPT", help="loaded into the first model before")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of weights and inputs")] = 0,
    form: Form = "text",
    **options: Unpack[MatchOptions],
) -> int:
    """Load one model's weights into another and compare what they compute.

    Both are built and run on the same random inputs: they compute the same, or it is said from which module on they do
    not. The weights are those that --checkpoint gives the first model, else its initial ones.
    """
    import torch

    torch.manual_seed(seed)
    example = example_inputs(inputs)
    model, other = model_of(source).eval(), model_of(target).eval()
    container = options.pop("container", None)
    if checkpoint:
        loaded = autoalign.load(model, checkpoint, container=container, progress=progress("Loading"))
        if loaded.missing_keys:
            complain(
                f"note: the checkpoint fills {len(loaded.matches)} of {len(loaded.target_specs)} tensors of the source"
            )
    found = autoalign.verify(model, other, example, **options)
    if form == "json":
        divergence = found.first_divergence
        names = ("source_module", "target_module", "difference", "cause")
        first = divergence and {name: getattr(divergence, name) for name in names}
        result = {"equal": found.equal, "max_difference": found.max_difference, "first_divergence": first}
        covered = {"coverage": found.coverage, "uncovered": list(found.uncovered)}
        show_json({"source": source, "target": target, **result, **covered})
    else:
        show_lines(str(found))
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
    import torch

    from autoalign.checkpoints.stored import named_dtype

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


@command(exits="exit codes: 0 all is loaded and equal; 1 it is not; 2 an error, reported on stderr")
def demo() -> int:
    """Load torchvision's RegNet into timm's and compare what they compute.

    torchvision's regnet_y_400mf is saved with random weights and loaded into timm's regnety_004, whose keys have other
    names. Nothing is downloaded.
    """
    import torch

    try:
        import timm
        import torchvision
        from safetensors.torch import save_file
    except ImportError as error:
        raise DependencyError(
            f"The demonstration needs timm and torchvision, and {error.name} is not installed. "
            "Nothing was loaded. Install them with: pip install timm torchvision"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Noise of large and small scale: in mere pixel noise, all images are alike once they are averaged.
        noise = torch.nn.functional.interpolate(torch.randn(4, 3, 7, 7), 224, mode="bicubic")
        images = noise + torch.randn(4, 3, 224, 224)
        source = _with_random_norms(torchvision.models.regnet_y_400mf(weights=None), images)
        target = timm.create_model("regnety_004").eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regnet_y_400mf.safetensors"
        save_file(source.state_dict(), path)
        alignment = autoalign.load(target, path)
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
    import torch
    from torch import nn

    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0  # the statistics of the next batch are all that counts
    with torch.no_grad():
        model.train()(images)
    return model.eval()
