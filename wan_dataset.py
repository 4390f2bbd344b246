"""Write a dataset file, and look at a dataset before it is cached and trained on. Worked examples: docs/dataset.md"""

from dataclasses import dataclass
from pathlib import Path

from dataset.check import CheckConfig, run_check
from dataset.draft import DraftConfig, draft
from utils import cli
from wan.caching.sheet import SheetConfig, run_sheet
from wan.models.device import DeviceConfig
from wan.models.options import ReleaseConfig, VAEConfig


@dataclass(frozen=True)
class SheetOptions:
    """The sections of the command `sheet`."""

    sheet: SheetConfig
    vae: VAEConfig
    device: DeviceConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help, group in (
        ("check", "list every problem of a dataset with its fix, and the sizes that images get", CheckConfig),
        ("sheet", "draw the items as the model will see them", SheetOptions),
    ):
        cli.add_fields(commands.add_parser(name, help=help, description=help), group)
    help = "write a dataset file, prompts and missing captions for two folders of pictures"
    init = commands.add_parser("init", help=help, description=help)
    init.add_argument("controls", type=Path, metavar="BEFORE", help="folder of the pictures to begin with")
    init.add_argument("targets", type=Path, metavar="AFTER", help="folder of what they should become, named alike")
    cli.add_fields(init, DraftConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    match args.command:
        case "init":
            print(*draft(args.controls, args.targets, cli.build(DraftConfig, args)), sep="\n")
        case "check":
            run_check(cli.build(CheckConfig, args))
        case "sheet":
            options = ReleaseConfig().fill(cli.build_group(SheetOptions, args))
            run_sheet(options.sheet, options.vae, options.device)


if __name__ == "__main__":
    cli.run(main)
