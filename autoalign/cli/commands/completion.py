"""``autoalign completion``: scripts that let a shell complete commands, options and paths."""

from __future__ import annotations

import argparse

from autoalign.cli.options import COMPLETE, PATHS, Commands, command

SHELLS = ("bash", "zsh", "fish")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "completion",
        "print a script that completes commands and options in a shell",
        "Print a script that completes commands, options and paths. "
        'bash: put eval "$(autoalign completion bash)" into ~/.bashrc. '
        "zsh: autoalign completion zsh > DIR/_autoalign, with a DIR of your fpath. "
        "fish: autoalign completion fish > ~/.config/fish/completions/autoalign.fish.",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import shtab

    for each in _parsers(options.whole):
        for action in each._actions:
            if action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(options.whole, options.shell))
    return COMPLETE


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:  # the short help, since shells show one line
                action.choices[choice.dest].description = choice.help
            found += [inner for each in action.choices.values() for inner in _parsers(each)]
    return found
