"""Generate one-frame images with Wan2.1. Worked examples: docs/one_frame.md"""

import sys

from utils import cli
from utils.errors import ConfigError
from wan.foreign_flags import GENERATION_HINTS, GENERATION_IGNORED, GENERATION_REFUSED
from wan.frames.table import ExplainConfig
from wan.generation import start
from wan.generation.options import MergedModelConfig, write_merged_model
from wan.generation.prompt import PROMPT_LINE_HINTS, hint_where_cut
from wan.generation.recipe import parse_args
from wan.generation.start import GenerationModels, GenerationOptions
from wan.models.options import ReleaseConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, GenerationOptions, MergedModelConfig, ExplainConfig, ReleaseConfig, GenerationModels)
    cli.refuse(parser, GENERATION_REFUSED)
    cli.ignore(parser, GENERATION_IGNORED)
    parser.hint({**GENERATION_HINTS, **PROMPT_LINE_HINTS})
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except ConfigError as error:
        raise ConfigError(f"{error}{hint_where_cut(argv)}") from None


def run(argv: list[str]) -> None:
    args = parse_args(build_parser(), argv)
    models = cli.build(ReleaseConfig, args).fill(cli.build_group(GenerationModels, args))
    merged_path = cli.build(MergedModelConfig, args).save_merged_model
    if args.explain and (merged_path or args.latent_path or args.interactive):
        raise ConfigError("--explain needs --prompt or --from_file: otherwise there are no frames to explain")
    if merged_path:
        write_merged_model(merged_path, models.dit.resolve(), models.lora)
        return
    options = cli.build_group(GenerationOptions, args)
    if args.latent_path:
        start.decode_files(models, options)
    elif args.explain:
        start.explain(models, options)
    else:
        start.run(models, options)


if __name__ == "__main__":
    cli.run(main)
