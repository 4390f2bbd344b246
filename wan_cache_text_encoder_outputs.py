"""Encode the captions of a dataset with T5, one cache file per item. Worked example: docs/one_frame.md"""

from dataclasses import dataclass

from utils import cli
from utils.logs import quiet_unless
from wan.caching.explain import explain_texts
from wan.caching.run import CachingConfig, run_texts
from wan.frames.table import ExplainConfig
from wan.models.device import DeviceConfig, init_processes
from wan.models.options import ReleaseConfig, T5Config


@dataclass(frozen=True)
class Options:
    """The sections of this script, in the order of --help."""

    run: CachingConfig
    release: ReleaseConfig
    t5: T5Config
    device: DeviceConfig
    explain: ExplainConfig


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, Options)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = cli.build_group(Options, build_parser().parse_args(argv))
    run, t5 = options.run, options.release.fill(options.t5)
    if options.explain.explain:
        encoder = t5.resolve()
        print(*explain_texts(run.dataset_config, run.batch_size, encoder.tokenizer, encoder.path), sep="\n")
        return
    processes, device = init_processes(options.device)
    quiet_unless(processes.is_main)
    run_texts(run, t5, device, processes)


if __name__ == "__main__":
    cli.run(main)
