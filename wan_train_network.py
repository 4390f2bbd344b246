"""Train a one-frame LoRA on cached images. Worked examples: docs/one_frame.md, docs/training.md"""

from dataclasses import replace

from utils import cli
from wan.foreign_flags import TRAINING_IGNORED, TRAINING_REFUSED
from wan.frames.table import ExplainConfig
from wan.generation.preview import PreviewConfig
from wan.generation.request import SamplingConfig
from wan.lora.options import NetworkConfig
from wan.models.device import DeviceConfig
from wan.models.memory_options import TrainingMemoryConfig
from wan.models.options import AttentionSwitches, CLIPConfig, DiTConfig, ReleaseConfig, T5Config, VAEConfig
from wan.training.optimizers import OptimizerConfig
from wan.training.options import MetadataConfig, RunConfig, SaveConfig, TrainingOptions
from wan.training.samples import SampleConfig
from wan.training.timestep_plot import TimestepPlotConfig
from wan.training.timesteps import NoiseConfig
from wan.training.tracking import TrackingConfig
from wan.training.validation import ValidationConfig

_MODELS = (DiTConfig, VAEConfig, T5Config, CLIPConfig, DeviceConfig, AttentionSwitches)
_OPTIONS = (
    *(RunConfig, NetworkConfig, OptimizerConfig, NoiseConfig, TrainingMemoryConfig, SaveConfig),
    *(SampleConfig, SamplingConfig, PreviewConfig, ValidationConfig, TrackingConfig, MetadataConfig),
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    parser.read_options_from("--config_file")
    cli.add_fields(parser, ReleaseConfig, *_MODELS, *_OPTIONS, TimestepPlotConfig, ExplainConfig)
    cli.refuse(parser, TRAINING_REFUSED)
    cli.ignore(parser, TRAINING_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    files = cli.build(ReleaseConfig, args)
    models = [files.fill(cli.build(section, args)) for section in _MODELS]
    dit, vae = models[:2]
    options = replace(cli.build_group(TrainingOptions, args), dit=dit.dit, vae=vae.vae)

    from wan.training import run  # late: it imports accelerate, which --help does not need

    if args.show_timesteps:
        run.show_timesteps(options, args.show_timesteps)
    elif args.explain:
        run.explain(run.TrainingModels(*models), options)
    else:
        run.run(run.TrainingModels(*models), options)


if __name__ == "__main__":
    cli.run(main)
