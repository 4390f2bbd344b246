"""Encode the images of a dataset with the VAE and CLIP, one cache file per item. Worked example: docs/one_frame.md"""

from dataclasses import dataclass

from utils import cli
from utils.logs import quiet_unless
from wan.caching.explain import explain_latents
from wan.caching.run import LatentCachingConfig, run_latents
from wan.frames.table import ExplainConfig
from wan.models.device import DeviceConfig, init_processes
from wan.models.options import CLIPConfig, ReleaseConfig, VAEConfig

_IGNORED = {
    "--i2v": "one-frame caches always hold the conditioning",
    "--vae_cache_cpu": "our VAE keeps no feature cache",
    **dict.fromkeys(("--console_width", "--console_back", "--console_num_images"), "there is no --debug_mode"),
}
_REFUSED = {"--debug_mode": "is not supported; `wan_dataset.py sheet` shows the images as the model sees them"}


@dataclass(frozen=True)
class Options:
    """The sections of this script, in the order of --help."""

    run: LatentCachingConfig
    release: ReleaseConfig
    vae: VAEConfig
    clip: CLIPConfig
    device: DeviceConfig
    explain: ExplainConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, Options)
    cli.ignore(parser, _IGNORED)
    cli.refuse(parser, _REFUSED)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = cli.build_group(Options, build_parser().parse_args(argv))
    options = options.release.fill(options)
    run, vae, clip = options.run, options.vae, options.clip
    if options.explain.explain:
        weights = vae.resolve().path, clip.resolve().path
        print(*explain_latents(run.dataset_config, run, run.batch_size, weights), sep="\n")
        return
    processes, device = init_processes(options.device)
    quiet_unless(processes.is_main)
    run_latents(run, vae, clip, device, processes)


if __name__ == "__main__":
    cli.run(main)
