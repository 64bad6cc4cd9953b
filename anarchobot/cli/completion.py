"""`anarchobot completion`: completion of commands and flags in a shell, by argcomplete."""

import argparse
import os
from typing import Any

from anarchobot.cli.parser import Parser, add_command
from anarchobot.config.errors import UserError, did_you_mean

# Where each shell reads its configuration, and the line to add there.
SHELLS = {
    "zsh": ("~/.zshrc", 'autoload -U compinit && compinit && eval "$(anarchobot completion zsh)"'),
    "bash": ("~/.bashrc", 'eval "$(anarchobot completion bash)"'),
    "fish": ("~/.config/fish/config.fish", "anarchobot completion fish | source"),
}


def add_commands(commands: Any) -> None:
    lines = "\n".join(f"  {shell}: add to {file}:  {line}" for shell, (file, line) in SHELLS.items())
    completion = add_command(
        commands, "completion", _completion, "print a script that completes commands and flags", epilog=lines
    )
    completion.add_argument("shell", metavar="SHELL", help=f"your shell: {', '.join(SHELLS)}")


def _completion(args: argparse.Namespace) -> None:
    from argcomplete.shell_integration import shellcode

    if args.shell not in SHELLS:
        near = did_you_mean(args.shell, SHELLS) or f"; expected one of {', '.join(SHELLS)}"
        raise UserError(f"unknown shell '{args.shell}'{near}")
    print(shellcode(["anarchobot"], shell=args.shell))


def complete(parser: Parser) -> None:
    """Answers the shell and ends the process, if it was started to complete a command line."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
