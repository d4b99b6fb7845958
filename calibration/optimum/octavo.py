"""`optimum-cli octavo quantize`: `octavo quantize` for those who live in optimum.

Installed as optimum.commands.register.octavo, where optimum-cli looks for commands; it is loaded at every start of it.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

_ABOUT = "Quantize a model to a folder that Octavo, vLLM, SGLang and transformers load, and measure what that costs."


class QuantizeCommand(BaseOptimumCLICommand):
    """Takes the flags of `octavo quantize`, and runs the same code."""

    COMMAND = CommandInfo(name="quantize", help=_ABOUT)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        from octavo.calibration.quantize_flags import add_flags

        parser.description = _ABOUT
        add_flags(parser)

    def run(self) -> None:
        from octavo.calibration.quantize_cli import run

        if self.args.out is None and not self.args.dry_run:
            self.parser.error("--out DIR is missing: give the folder to write to")
        sys.exit(run(self.args, prog=self.parser.prog))


class OctavoCommand(BaseOptimumCLICommand):
    """What Octavo's commands stand under."""

    COMMAND = CommandInfo(name="octavo", help="Octavo, the quantization-first serving engine.")
    SUBCOMMANDS = (CommandInfo(name="quantize", help=_ABOUT, subcommand_class=QuantizeCommand),)


REGISTER_COMMANDS = [OctavoCommand]
