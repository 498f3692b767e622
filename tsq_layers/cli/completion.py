"""`tsq completion`: a script for bash, zsh or fish, made from the parser itself.

eval "$(tsq completion bash)"                              # in ~/.bashrc; zsh the same, in ~/.zshrc
tsq completion fish > ~/.config/fish/completions/tsq.fish
"""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tsq_layers.cli.output import write

Parser = argparse.ArgumentParser
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Option:
    """An option of a command: its names, what may follow it, and what it is for.

    Attributes:
        takes: words to choose from; ``None`` for nothing, an empty tuple for anything, such as a file.
    """

    names: tuple[str, ...]
    takes: tuple[str, ...] | None
    text: str


@dataclass(frozen=True)
class Command:
    """A command, and what may stand behind it."""

    name: str
    text: str
    options: tuple[Option, ...]
    words: tuple[str, ...]


def add(command: Parser, parser: Callable[[], Parser]) -> None:
    """Add the arguments of the command; ``parser`` makes that of the program, which is described."""
    command.add_argument("shell", choices=SHELLS, help="whose script is printed")
    command.set_defaults(run=lambda arguments: write(script(parser(), arguments.shell)))


def script(parser: Parser, shell: str) -> str:
    """Return the script of a shell.

    Args:
        parser: of the program, with sub-commands.
        shell: one of :data:`SHELLS`.

    Example:
        >>> parser = argparse.ArgumentParser(prog="tool")
        >>> command = parser.add_subparsers().add_parser("run", help="it")
        >>> _ = command.add_argument("--how", choices=("fast", "well"))
        >>> script(parser, "fish").splitlines()[-1]
        "complete -c tool -n '__fish_seen_subcommand_from run' -l how -x -a 'fast well' -d ''"
    """
    subcommands = list(commands(parser))
    if shell == "fish":
        return "\n".join(_fish(parser.prog, subcommands))
    lines = list(_bash(parser.prog, subcommands))
    return "\n".join(
        ["autoload -U +X bashcompinit && bashcompinit", *lines] if shell == "zsh" else lines
    )


def commands(parser: Parser) -> Iterator[Command]:
    """Yield the commands of a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield Command(
                    name, texts.get(name, ""), tuple(_options(inner)), tuple(_words(inner))
                )


def _options(parser: Parser) -> Iterator[Option]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            choices = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            yield Option(tuple(action.option_strings), choices, text)


def _words(parser: Parser) -> Iterator[str]:
    for action in parser._actions:
        if not action.option_strings and action.choices:
            yield from map(str, action.choices)


def _bash(prog: str, subcommands: Sequence[Command]) -> Iterator[str]:
    """Yield the lines of a function that looks at the command, the word before and the present one."""
    yield f"_{prog}() {{"
    yield '  local present="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""'
    yield '  case "${COMP_WORDS[1]} $before" in'
    for command in subcommands:
        for option in command.options:
            if option.takes is not None:
                pattern = "|".join(f'"{command.name} {name}"' for name in option.names)
                words = f'words="{" ".join(option.takes)}"' if option.takes else "return"
                yield f"    {pattern}) {words} ;;"
    yield "  esac"
    yield '  if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f'    words="{" ".join(command.name for command in subcommands)}"'
    yield '  elif [ -z "$words" ]; then'
    yield '    case "${COMP_WORDS[1]}" in'
    for command in subcommands:
        dashed = " ".join(name for option in command.options for name in option.names)
        plain = f' || words="{" ".join(command.words)}"' if command.words else ""
        yield f'      {command.name}) [[ "$present" == -* ]] && words="{dashed}"{plain} ;;'
    yield "    esac"
    yield "  fi"
    yield '  [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$present"))'
    yield "}"
    yield f"complete -o default -o bashdefault -F _{prog} {prog}"


def _fish(prog: str, subcommands: Sequence[Command]) -> Iterator[str]:
    names = " ".join(command.name for command in subcommands)
    for command in subcommands:
        description = f"-a {command.name} -d {shlex.quote(command.text)}"
        yield f"complete -c {prog} -f -n 'not __fish_seen_subcommand_from {names}' {description}"
    for command in subcommands:
        condition = f"complete -c {prog} -n '__fish_seen_subcommand_from {command.name}'"
        if command.words:
            yield f"{condition} -f -a {shlex.quote(' '.join(command.words))}"
        for option in command.options:
            flags = " ".join(map(_fish_flag, option.names))
            text = shlex.quote(option.text)
            yield f"{condition} {flags}{_fish_argument(option)} -d {text}"


def _fish_flag(name: str) -> str:
    return f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"


def _fish_argument(option: Option) -> str:
    if option.takes is None:
        return ""
    if not option.takes:
        return " -r"
    return f" -x -a {shlex.quote(' '.join(option.takes))}"
