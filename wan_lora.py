"""Convert, look into, join, average, extract and resize LoRA files. Worked examples: docs/interop.md"""

from pathlib import Path

from utils import cli
from wan.lora import tools
from wan.lora.ema import EMAConfig, average
from wan.lora.keys import DIALECTS
from wan.models.device import DeviceConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *files: str) -> cli.Parser:
        made = commands.add_parser(name, help=help, description=help)
        for file in files:
            made.add_argument(file, type=Path, metavar=file.upper())
        return made

    convert = command("convert", "write a LoRA with the names that another tool expects", "source", "out")
    convert.add_argument("--to", choices=DIALECTS, required=True, help="whose names; for peft OUT is a folder")
    command("inspect", "print what a LoRA holds and how it was trained", "file")
    merge = command("merge", "join several LoRAs into one")
    merge.add_argument("loras", type=Path, nargs="+", metavar="LORA", help="one or more files")
    merge.add_argument("out", type=Path, metavar="OUT")
    merge.add_argument("--multiplier", type=float, nargs="+", default=(), help="one per file; default 1")
    ema = command("ema", "average several LoRAs of one training, later ones counting more (post-hoc EMA)")
    ema.add_argument("loras", type=Path, nargs="+", metavar="LORA", help="two or more files")
    ema.add_argument("--output_file", type=Path, required=True, metavar="OUT", help="the file to write")
    cli.add_fields(ema, EMAConfig)
    extract = command("extract", "make a LoRA of the difference of two DiT checkpoints", "base", "tuned", "out")
    resize = command("resize", "approximate a LoRA, LoHa or LoKr by a LoRA of another rank", "source", "out")
    for ranked in (extract, resize):
        ranked.add_argument("--rank", type=int, required=True, help="largest rank of a module")
        cli.add_fields(ranked, DeviceConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    match args.command:
        case "convert":
            tools.convert(args.source, args.out, args.to)
        case "inspect":
            print(*tools.inspect(args.file), sep="\n")
        case "merge":
            tools.merge(args.loras, args.multiplier, args.out)
        case "ema":
            average(args.loras, args.output_file, cli.build(EMAConfig, args))
        case "extract":
            device = cli.build(DeviceConfig, args).resolve()
            tools.extract(args.base, args.tuned, args.out, args.rank, device)
        case "resize":
            tools.resize(args.source, args.out, args.rank, cli.build(DeviceConfig, args).resolve())


if __name__ == "__main__":
    cli.run(main)
