"""Train a one-frame LoRA on cached images. Worked examples: docs/one_frame.md"""

from dataset.config import read_config
from dataset.loader import TrainingSet
from utils import cli
from utils.files import require_writable_dir
from utils.foreign_flags import TRAINING_IGNORED, TRAINING_REFUSED
from wan.metadata import MetadataConfig
from wan.models import AttentionSwitches, CLIPConfig, DeviceConfig, DiTConfig, T5Config, VAEConfig
from wan.optimizers import OptimizerConfig
from wan.request import SamplingConfig
from wan.samples import SampleConfig
from wan.timesteps import NoiseConfig
from wan.training_options import NetworkConfig, RunConfig, SaveConfig, TrainingOptions

_MODELS = (DiTConfig, VAEConfig, T5Config, CLIPConfig, DeviceConfig, AttentionSwitches)
_OPTIONS = (
    *(RunConfig, NetworkConfig, OptimizerConfig, NoiseConfig, SaveConfig),
    *(SampleConfig, SamplingConfig, MetadataConfig),
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, *_MODELS, *_OPTIONS)
    cli.refuse(parser, TRAINING_REFUSED)
    cli.ignore(parser, TRAINING_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    dit, vae, t5, clip, device, _ = (cli.build(section, args) for section in _MODELS)
    options = TrainingOptions(*(cli.build(section, args) for section in _OPTIONS), dit=dit.dit, vae=vae.vae)

    # Everything that can be wrong is looked at before anything slow begins.
    task = dit.check()
    options.run.compute_dtype(dit.dit_dtype)
    require_writable_dir(options.save.output_dir, "--output_dir")
    datasets = read_config(options.run.dataset_config, need_sources=False)
    requests = options.samples.requests(task, options.sampling)
    if requests:
        for model in (t5, clip):
            model.check(dit.spec)
        vae.check()

    from wan import training
    from wan.pipeline import Pipeline
    from wan.samples import Sampler

    accelerator = training.build_accelerator(device.device)
    cli.quiet_unless(accelerator.is_main_process)
    seed = training.shared_seed(options.run.seed)
    training_set = TrainingSet(datasets, seed, options.noise.num_timestep_buckets)
    training_set.check_widths(clip=dit.spec.image_dim, text=dit.spec.text_dim)
    merger = training.base_merger(dit, options.network)

    sampler = None
    if requests:
        pipeline = Pipeline(vae, t5, clip, accelerator.device)
        share = (accelerator.process_index, accelerator.num_processes)
        sampler = Sampler(requests, pipeline, options.save.output_dir / "sample", options.save.output_name, share)
    model, network = training.load_trainable(dit, options, accelerator.device, seed, merger)
    training.Trainer(accelerator, model, network, datasets, training_set, task, options, sampler).run()


if __name__ == "__main__":
    cli.run(main)
