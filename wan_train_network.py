"""Train a one-frame LoRA on cached images. Worked examples: docs/one_frame.md, docs/training.md"""

from utils import cli
from utils.foreign_flags import TRAINING_IGNORED, TRAINING_REFUSED
from wan.frame_table import ExplainConfig
from wan.memory import TrainingMemoryConfig
from wan.models import AttentionSwitches, CLIPConfig, DiTConfig, ReleaseConfig, T5Config, VAEConfig
from wan.network_options import NetworkConfig
from wan.optimizers import OptimizerConfig
from wan.preview import PreviewConfig
from wan.processes import DeviceConfig
from wan.request import SamplingConfig
from wan.samples import SampleConfig
from wan.timestep_plot import TimestepPlotConfig
from wan.timesteps import NoiseConfig
from wan.tracking import TrackingConfig
from wan.training_options import MetadataConfig, RunConfig, SaveConfig, TrainingOptions
from wan.validation import ValidationConfig

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
    options = TrainingOptions(*(cli.build(section, args) for section in _OPTIONS), dit=dit.dit, vae=vae.vae)

    from wan import training_run  # late: it imports accelerate, which --help does not need

    if args.show_timesteps:
        training_run.show_timesteps(options, args.show_timesteps)
    elif args.explain:
        training_run.explain(training_run.TrainingModels(*models), options)
    else:
        training_run.run(training_run.TrainingModels(*models), options)


if __name__ == "__main__":
    cli.run(main)
