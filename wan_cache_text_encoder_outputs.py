"""Encode the captions of a dataset with T5, one cache file per item. Worked example: docs/one_frame.md"""

from utils import cli
from wan.caching import explain
from wan.caching.run import CachingConfig, run_texts
from wan.frames import table
from wan.models.device import DeviceConfig, init_processes
from wan.models.options import ReleaseConfig, T5Config


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, CachingConfig, ReleaseConfig, T5Config, DeviceConfig, table.ExplainConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run = cli.build(CachingConfig, args)
    t5 = cli.build(ReleaseConfig, args).fill(cli.build(T5Config, args))
    if cli.build(table.ExplainConfig, args).explain:
        t5.check()
        print(*explain.explain_texts(run.dataset_config, run.batch_size, t5.t5_tokenizer, t5.t5), sep="\n")
        return
    processes, device = init_processes(cli.build(DeviceConfig, args))
    cli.quiet_unless(processes.is_main)
    run_texts(run, t5, device, processes)


if __name__ == "__main__":
    cli.run(main)
