"""What the flags of the trained network mean, and which values are refused."""

import pytest

import wan.lora.options
from utils.errors import ConfigError
from wan.lora.options import NetworkArguments, NetworkConfig


def extra(*args) -> NetworkArguments:
    return NetworkConfig(network_args=args).extra


def test_defaults_are_rank_4_with_alpha_1_and_nothing_else():
    config = NetworkConfig()
    assert (config.rank, config.alpha, config.kind, config.loraplus_lr_ratio) == (4, 1.0, "lora", 1.0)
    assert config.extra == NetworkArguments()
    assert config.arguments == {}


def test_alpha_0_means_the_rank():
    assert NetworkConfig(network_dim=16, network_alpha=0).alpha == 16.0
    assert NetworkConfig(network_dim=16, network_alpha=0).rank_and_alpha("blocks.0.ffn.0") == (16, 16.0)


def test_every_key_of_network_args_is_understood():
    found = extra(
        "exclude_patterns=['.*ffn.*']",
        "include_patterns=[]",
        r"module_ranks={'.*\.q': 8}",
        "module_alphas={'.*k': 2, '.*v': 0.5}",
        "rank_dropout=0.1",
        "module_dropout=0",
        "loraplus_lr_ratio=16",
        "conv_dim=4",
        "conv_alpha=1",
        "verbose=True",
    )
    assert [pattern.pattern for pattern in found.exclude_patterns] == [".*ffn.*"]
    assert found.include_patterns == ()
    assert [(pattern.pattern, rank) for pattern, rank in found.module_ranks] == [(r".*\.q", 8)]
    assert [(pattern.pattern, alpha) for pattern, alpha in found.module_alphas] == [(".*k", 2.0), (".*v", 0.5)]
    assert (found.rank_dropout, found.module_dropout, found.loraplus_lr_ratio) == (0.1, 0.0, 16.0)
    assert (found.conv_dim, found.conv_alpha, found.verbose) == (4, 1.0, True)
    assert extra("verbose=false").verbose is False


def test_an_argument_is_split_at_its_first_equals_sign():
    (pattern,) = extra("exclude_patterns=['(?=.*ffn).*']").exclude_patterns
    assert pattern.pattern == "(?=.*ffn).*"
    assert NetworkConfig(network_args=("exclude_patterns=['a=b']",)).arguments == {"exclude_patterns": "['a=b']"}


def test_the_first_matching_pattern_gives_rank_and_alpha():
    config = NetworkConfig(
        network_dim=4, network_args=(r"module_ranks={'.*\.ffn\..*': 8, '.*': 2}", r"module_alphas={'.*\.q': 0}")
    )
    assert config.rank_and_alpha("blocks.0.ffn.0") == (8, 1.0)
    assert config.rank_and_alpha("blocks.0.self_attn.q") == (2, 2.0)
    part = NetworkConfig(network_args=("module_ranks={'blocks': 8}", "module_alphas={'blocks': 8}"))
    assert part.rank_and_alpha("blocks.0.self_attn.q") == (4, 1.0), "part of a name is not enough"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rank_dropuot=0.1", "rank_dropuot: unknown key; did you mean 'rank_dropout'?"),
        ("colour=red", "colour: unknown key; known: exclude_patterns, include_patterns"),
        ("loraplus_lr_ratio", "loraplus_lr_ratio: must be key=value"),
        ("=3", "=3: must be key=value"),
        ("loraplus_lr_ratio=fast", "loraplus_lr_ratio=fast: is not a Python value"),
        ("loraplus_lr_ratio=0", "loraplus_lr_ratio=0: must be above 0"),
        ("loraplus_lr_ratio=True", "loraplus_lr_ratio=True: must be a number"),
        ("loraplus_lr_ratio=1e999", "loraplus_lr_ratio=1e999: must be a number"),
        (f"loraplus_lr_ratio={10**400}", f"loraplus_lr_ratio={10**400}: must be a number"),
        ("rank_dropout=1", "rank_dropout=1: must be at least 0 and below 1"),
        ("module_dropout=-0.1", "module_dropout=-0.1: must be at least 0 and below 1"),
        ("exclude_patterns=.*ffn.*", "exclude_patterns=.*ffn.*: is not a Python value"),
        ("exclude_patterns='.*ffn.*'", "exclude_patterns='.*ffn.*': must be a list of regular expressions"),
        ("include_patterns=['(']", "include_patterns=['(']: '(' is not a regular expression"),
        ("include_patterns=[3]", "include_patterns=[3]: 3 is not a regular expression"),
        ("module_ranks=[8]", "module_ranks=[8]: must be {regular expression: number}"),
        ("module_ranks={'.*': 0}", "module_ranks={'.*': 0}: must be a whole number of at least 1"),
        ("module_ranks={'.*': 2.5}", "module_ranks={'.*': 2.5}: must be a whole number of at least 1"),
        ("module_ranks={'[': 2}", "module_ranks={'[': 2}: '[' is not a regular expression"),
        ("module_alphas={'.*': -1}", "module_alphas={'.*': -1}: must be 0 (same as the rank) or above"),
        ("module_alphas={'.*': 'a'}", "module_alphas={'.*': 'a'}: must be a number"),
        ("conv_dim=x", "conv_dim=x: is not a Python value"),
        ("verbose=maybe", "verbose=maybe: must be True or False"),
        ("factor=8", "factor: is for lokr, not for lora"),
        ("algo=loha", "algo: is for --network_module lycoris.kohya"),
    ],
)
def test_wrong_network_args_are_refused_with_key_and_value(argument, message):
    with pytest.raises(ConfigError) as error:
        NetworkConfig(network_args=(argument,))
    assert str(error.value).startswith(f"--network_args {message}")


def test_a_key_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--network_args rank_dropout: is given twice"):
        NetworkConfig(network_args=("rank_dropout=0.1", "rank_dropout=0.2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_dim": 0}, "--network_dim 0: must be at least 1"),
        ({"network_alpha": -1.0}, "--network_alpha -1.0: must be 0"),
        ({"network_alpha": float("nan")}, "--network_alpha nan: must be 0"),
        ({"network_dropout": 1.0}, "--network_dropout 1.0: must be at least 0 and below 1"),
        ({"scale_weight_norms": 0.0}, "--scale_weight_norms 0.0: must be above 0"),
        ({"dim_from_weights": True}, "--dim_from_weights needs --network_weights"),
        ({"network_module": "networks.lora_wam"}, "networks.lora_wam: not supported; did you mean 'networks.lora_wan'"),
        ({"network_module": "x"}, "--network_module x: not supported; use one of networks.lora_wan, "),
    ],
)
def test_impossible_settings_are_refused_with_their_flag(settings, message):
    with pytest.raises(ConfigError) as error:
        NetworkConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "factor"), [("-1", -1), ("8", 8)])
def test_the_factor_of_lokr_is_a_size_or_minus_1(text, factor):
    assert NetworkConfig(network_module="networks.lokr", network_args=(f"factor={text}",)).extra.factor == factor
    with pytest.raises(ConfigError, match="factor=0: must be a whole number"):
        NetworkConfig(network_module="networks.lokr", network_args=("factor=0",))


@pytest.mark.parametrize(
    ("module", "args", "kind"),
    [
        ("wan.lora", (), "lora"),
        ("networks.loha", (), "loha"),
        ("networks.lokr", ("factor=-1", "decompose_both=1", "full_matrix=False"), "lokr"),
        ("lycoris.kohya", (), "lora"),
        ("lycoris.kohya", ("algo=LoKr", "factor=8"), "lokr"),
        ("lycoris.kohya", ("algo=locon", "loraplus_lr_ratio=4"), "lora"),
    ],
)
def test_the_module_and_algo_name_the_kind_of_network(module, args, kind):
    assert NetworkConfig(network_module=module, network_args=args).kind == kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_dropout": 0.1}, "--network_dropout: is for networks.lora_wan, not for loha"),
        ({"network_args": ("loraplus_lr_ratio=4",)}, "--network_args loraplus_lr_ratio: is for lora, not for loha"),
        ({"network_args": ("factor=4",)}, "--network_args factor: is for lokr, not for loha"),
        (
            {"network_module": "lycoris.kohya", "network_args": ("algo=boft",)},
            "algo=boft: is not supported; use one of",
        ),
    ],
)
def test_settings_that_a_kind_of_network_lacks_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        NetworkConfig(**{"network_module": "networks.loha"} | settings)
    assert message in str(error.value)


def test_without_the_package_its_networks_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(wan.lora.options, "find_spec", lambda name: None)
    for module in ("networks.loha", "networks.lokr"):
        with pytest.raises(ConfigError, match=f"--network_module {module}: needs the package lycoris-lora"):
            NetworkConfig(network_module=module).check()
    NetworkConfig(network_module="lycoris.kohya").check()
