"""Train a one-frame LoRA on cached images. Worked examples: docs/one_frame.md, docs/training.md"""

from dataset.config import read_config
from dataset.loader import TrainingSet
from utils import cli
from utils.files import require_writable_dir, written_whole
from utils.foreign_flags import TRAINING_IGNORED, TRAINING_REFUSED
from wan.memory import TrainingMemoryConfig
from wan.metadata import MetadataConfig
from wan.models import AttentionSwitches, CLIPConfig, DeviceConfig, DiTConfig, T5Config, VAEConfig
from wan.network_options import NetworkConfig
from wan.optimizers import OptimizerConfig
from wan.request import SamplingConfig
from wan.samples import SampleConfig
from wan.state import remove_leftovers
from wan.timestep_plot import TimestepPlotConfig, show
from wan.timesteps import NoiseConfig
from wan.tracking import Tracker, TrackingConfig
from wan.training_options import RunConfig, SaveConfig, TrainingOptions
from wan.validation import ValidationConfig

_MODELS = (DiTConfig, VAEConfig, T5Config, CLIPConfig, DeviceConfig, AttentionSwitches)
_OPTIONS = (
    *(RunConfig, NetworkConfig, OptimizerConfig, NoiseConfig, TrainingMemoryConfig, SaveConfig),
    *(SampleConfig, SamplingConfig, ValidationConfig, TrackingConfig, MetadataConfig),
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    parser.read_options_from("--config_file")
    cli.add_fields(parser, *_MODELS, *_OPTIONS, TimestepPlotConfig)
    cli.refuse(parser, TRAINING_REFUSED)
    cli.ignore(parser, TRAINING_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    models = dit, vae, t5, clip, device, attention = tuple(cli.build(section, args) for section in _MODELS)
    sections = [cli.build(section, args) for section in _OPTIONS]
    options = TrainingOptions(*sections, dit=dit.dit, vae=vae.vae)

    # Everything that can be wrong is looked at before anything slow begins.
    datasets = read_config(options.run.dataset_config, need_sources=False)
    require_writable_dir(options.save.output_dir, "--output_dir")
    if args.show_timesteps:
        width, height = datasets.datasets[0].resolution
        path = options.save.output_dir / f"{options.save.output_name}-timesteps.png"
        show(options.noise, (height // 8, width // 8), args.show_timesteps, path)
        return
    task = dit.check()
    options.run.compute_dtype(dit.dit_dtype)
    options.tracking.check()
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
    options.memory.check(dit.spec, dit.stored_dtype, accelerator.device)
    state = training.find_state(options.save)
    seed = training.shared_seed(options.run.seed, state)
    training_set = TrainingSet(datasets, seed, options.noise.num_timestep_buckets, options.validation.validation_split)
    training_set.check_widths(clip=dit.spec.image_dim, text=dit.spec.text_dim)
    options.validation.check(training_set.validation)
    merger = training.base_merger(dit, options.network)
    weights = training.network_start(dit, options.network, state)
    if accelerator.is_main_process:
        remove_leftovers(options.save.output_dir, options.save.output_name)
        path = options.save.output_dir / f"{options.save.output_name}-settings.toml"
        with written_whole(path) as temporary:
            temporary.write_text(cli.to_toml(*models, *sections), encoding="utf-8")

    sampler = None
    if requests:
        pipeline = Pipeline(vae, t5, clip, accelerator.device)
        share = (accelerator.process_index, accelerator.num_processes)
        sampler = Sampler(requests, pipeline, options.save.output_dir / "sample", options.save.output_name, share)
    save = options.save
    step = state.progress.step if state else 0
    tracker = Tracker.open(
        options.tracking, save.output_dir, save.output_name, vars(args), step, main=accelerator.is_main_process
    )
    with tracker:
        model, network = training.load_trainable(
            dit, options, accelerator.device, seed, merger, weights, attention.function
        )
        job = training.TrainingJob(task, options, datasets, training_set, model, network, sampler, tracker)
        training.Trainer(accelerator, job, state).run()


if __name__ == "__main__":
    cli.run(main)
