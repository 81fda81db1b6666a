"""Completion in a shell: of commands and options by typer, of the names of models by the libraries that have them."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

COMPLETION_VARIABLE = "_AUTOALIGN_COMPLETE"  # of the environment, by which a shell asks for words
_BASH = """\
_autoalign_completion() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT}
    local word=${line##* } before
    local words=(${line// /$'\\n'})  # not those of bash, which ends words at colons
    [[ -n $word ]] && before=$((${#words[@]} - 1)) || before=${#words[@]}
    COMPREPLY=($(COMP_WORDS=$line COMP_CWORD=$before _AUTOALIGN_COMPLETE=complete_bash "$1"))
    [[ $word == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*:}"}"}")
}
complete -o default -F _autoalign_completion autoalign
"""


def complete_models(incomplete: str) -> list[str]:
    """List the models of a library that a text such as ``timm:res`` begins; of anything else a shell completes files.

    >>> complete_models("resnet.pt")
    []
    """
    library, colon, start = incomplete.partition(":")
    return [f"{library}:{name}" for name in (model_names(library) if colon else ()) if name.startswith(start)]


def model_names(library: str) -> list[str]:
    """List the names of a library's models, which are kept in a file, since importing a library takes seconds."""
    with suppress(PackageNotFoundError, OSError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoalign"
        file = folder / f"{library}-{version(library)}.txt"
        if not file.exists():
            from autoalign.checkpoints.named_models import LIBRARIES, names_in

            if library not in LIBRARIES:
                return []
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(names_in(library)), encoding="utf-8")
        return file.read_text(encoding="utf-8").splitlines()
    return []


def complete(app: typer.Typer, instruction: str) -> int:
    """Answer a shell: print the words that complete a line, or with ``source_SHELL`` the script that asks for them."""
    if instruction == "source_bash":
        print(_BASH, end="")
        return 0
    from typer import completion, main

    completion.get_completion_inspect_parameters()  # which makes the shells known
    return completion.shell_complete(main.get_command(app), {}, "autoalign", COMPLETION_VARIABLE, instruction)
