"""Encode the images of a dataset with the VAE and CLIP, one cache file per item. Worked example: docs/one_frame.md"""

from utils import cli
from wan.caching import explain
from wan.caching.run import LatentCachingConfig, run_latents
from wan.frames import table
from wan.models.device import DeviceConfig, init_processes
from wan.models.options import CLIPConfig, ReleaseConfig, VAEConfig

_IGNORED = {
    "--i2v": "one-frame caches always hold the conditioning",
    "--vae_cache_cpu": "our VAE keeps no feature cache",
    **dict.fromkeys(("--console_width", "--console_back", "--console_num_images"), "there is no --debug_mode"),
}
_REFUSED = {"--debug_mode": "is not supported; look at the images themselves"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, LatentCachingConfig, ReleaseConfig, VAEConfig, CLIPConfig, DeviceConfig)
    cli.add_fields(parser, table.ExplainConfig)
    cli.ignore(parser, _IGNORED)
    cli.refuse(parser, _REFUSED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    files = cli.build(ReleaseConfig, args)
    run = cli.build(LatentCachingConfig, args)
    vae, clip = (files.fill(cli.build(section, args)) for section in (VAEConfig, CLIPConfig))
    if cli.build(table.ExplainConfig, args).explain:
        vae.check()
        clip.check()
        weights = (vae.vae, clip.clip)
        print(
            *explain.explain_latents(run.dataset_config, run.one_frame_layout, run.batch_size, weights),
            sep="\n",
        )
        return
    processes, device = init_processes(cli.build(DeviceConfig, args))
    cli.quiet_unless(processes.is_main)
    run_latents(run, vae, clip, device, processes)


if __name__ == "__main__":
    cli.run(main)
