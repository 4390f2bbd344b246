"""Train a one-frame LoRA on cached images. Worked examples: docs/one_frame.md, docs/training.md"""

from utils import cli
from wan.foreign_flags import TRAINING_IGNORED, TRAINING_REFUSED
from wan.frames.table import ExplainConfig
from wan.models.options import ReleaseConfig
from wan.training.options import TrainingModels, TrainingOptions
from wan.training.timestep_plot import TimestepPlotConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    parser.read_options_from("--config_file")
    cli.add_fields(parser, ReleaseConfig, TrainingModels, TrainingOptions, TimestepPlotConfig, ExplainConfig)
    cli.refuse(parser, TRAINING_REFUSED)
    cli.ignore(parser, TRAINING_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    models = cli.build(ReleaseConfig, args).fill(cli.build_group(TrainingModels, args))
    options = cli.build_group(TrainingOptions, args)

    from wan.training import run  # late: it imports accelerate, which --help does not need

    if args.show_timesteps:
        run.show_timesteps(options, args.show_timesteps)
    elif args.explain:
        run.explain(models, options)
    else:
        run.run(models, options)


if __name__ == "__main__":
    cli.run(main)
