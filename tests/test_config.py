"""The config is read strictly: what is wrong is refused by its full name, with the way out.

Sizes are compared with exact fractions, not with floats as the reader may use.
"""

from __future__ import annotations

import copy
import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import (
    Architecture,
    Config,
    ConfigError,
    RopeScaling,
    resolve_disk_path,
    resolve_source,
)
from engine.config_file import from_tree, load, parse_size

ROPE_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 64,
}
ARCHITECTURE = {
    "family": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position": 512,
    "rope_theta": 10000.0,
}
SMALLEST = {"model": {"source": "model.gguf"}, "cache": {"num_blocks": 8}}


def _tree(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The smallest config's tree with values set by dotted key."""
    tree: dict[str, Any] = copy.deepcopy(SMALLEST)
    for key, value in changes:
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = copy.deepcopy(value)
    return tree


def _full() -> dict[str, Any]:
    return _tree(("model.architecture", {**ARCHITECTURE, "rope_scaling": ROPE_SCALING}))


def _error(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_tree(tree)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("model: {source: model.gguf}\ncache: {num_blocks: 8}\n")
    return path


def test_the_smallest_config_has_a_source_and_a_cache_size() -> None:
    config = from_tree(copy.deepcopy(SMALLEST))
    assert config.model.source == "model.gguf"
    assert config.cache.num_blocks == 8
    assert (config.server.host, config.server.port) == ("127.0.0.1", 50051)


def test_a_full_architecture_is_read_into_values() -> None:
    expected = Architecture(
        family="llama",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
        ),
    )
    assert from_tree(_full()).model.architecture == expected


def test_a_config_can_not_be_written_to() -> None:
    config = from_tree(_full())
    for value in (config, config.model, config.cache, config.model.architecture):
        assert dataclasses.is_dataclass(value)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modle", "unknown key modle; did you mean model?"),
        ("path", "unknown key path; known: model, mesh, cache"),
        ("model.dtyp", "unknown key model.dtyp; did you mean model.dtype?"),
        ("mesh.tensors", "unknown key mesh.tensors; did you mean mesh.tensor?"),
        ("cache.blocksize", "unknown key cache.blocksize; did you mean cache.block_size?"),
        ("scheduler.x", "unknown key scheduler.x; known: max_num_seqs, max_step_tokens"),
        ("buckets.prefill", "unknown key buckets.prefill; did you mean buckets.prefill_"),
        ("attention.backends", "did you mean attention.backend?"),
        ("server.hosts", "did you mean server.host?"),
        ("model.architecture.layers", "did you mean model.architecture.num_layers?"),
        (
            "model.architecture.rope_scaling.factr",
            "did you mean model.architecture.rope_scaling.factor?",
        ),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_known_one(key: str, message: str) -> None:
    tree = _full()
    section = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = 1
    assert message in _error(tree)


def test_an_unknown_key_that_is_not_text_is_still_named() -> None:
    tree = _tree()
    tree[7] = 1  # pyrefly: ignore[unsupported-operation] - YAML allows it
    assert "unknown key 7" in _error(tree)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.source", 3),
        ("model.source", None),
        ("model.dtype", "float16"),
        ("model.max_model_len", "long"),
        ("model.max_model_len", 4096.5),
        ("model.architecture", {"family": "llama"}),
        ("model.architecture.family", "gpt"),
        ("mesh.tensor", "all"),
        ("cache.prefix_reuse", 1),
        ("cache.isolation", "tenant"),
        ("cache.observability", "closed"),
        ("cache.dtype", "int4"),
        ("cache.scales", 1),
        ("model.dtype", "int8"),
        ("scheduler.max_num_seqs", True),
        ("scheduler.max_num_seqs", "many"),
        ("scheduler", [1]),
        ("buckets.decode_seqs", 64),
        ("buckets.decode_seqs", ["a"]),
        ("attention.backend", "cuda"),
        ("server.port", "http"),
        ("server.host", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_full_key(key: str, value: Any) -> None:
    assert key in _error(_tree((key, value)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cache.block_size", 12, "cache.block_size is 12; it must be a power of two from 8 to 256"),
        ("cache.block_size", 4, "power of two from 8 to 256"),
        ("cache.block_size", 512, "power of two from 8 to 256"),
        ("cache.num_blocks", 0, "cache.num_blocks is 0; it must be at least 1"),
        ("model.max_model_len", 0, "model.max_model_len is 0; it must be at least 1"),
        ("scheduler.max_num_seqs", 0, "scheduler.max_num_seqs is 0; it must be at least 1"),
        ("scheduler.max_waiting", 0, "scheduler.max_waiting is 0; it must be at least 1"),
        ("mesh.data", -1, "mesh.data is -1; it must be at least 1"),
        ("mesh.tensor", 0, "mesh.tensor is 0; it must be at least 1"),
        ("server.max_message", 0, "server.max_message is 0; it must be at least 1"),
        ("server.max_concurrent", 0, "server.max_concurrent is 0; it must be at least 1"),
        ("server.port", -1, "server.port is -1; it must be from 0 to 65535"),
        ("server.port", 65536, "server.port is 65536; it must be from 0 to 65535"),
        (
            "scheduler.max_step_tokens",
            63,
            "scheduler.max_step_tokens (63) is below max_num_seqs (64)",
        ),
    ],
)
def test_a_value_out_of_range_says_the_limit(key: str, value: int, message: str) -> None:
    assert message in _error(_tree((key, value)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers is 0; it must be at least 1"),
        ("vocab_size", -5, "vocab_size is -5; it must be at least 1"),
        ("num_kv_heads", 3, "4 query heads can't share 3 KV heads evenly"),
        ("head_dim", 7, "head_dim is 7; rotary positions need it even"),
    ],
)
def test_an_architecture_that_can_not_be_is_refused(field: str, value: int, message: str) -> None:
    assert message in _error(_tree(("model.architecture", {**ARCHITECTURE, field: value})))


@pytest.mark.parametrize("cache", [{}, {"num_blocks": 8, "memory": "1GiB"}])
def test_the_cache_size_is_given_exactly_once(cache: dict[str, Any]) -> None:
    message = "give the cache's size as either cache.num_blocks or cache.memory"
    assert message in _error({**SMALLEST, "cache": cache})


def test_a_cache_size_in_bytes_is_read() -> None:
    tree = {**SMALLEST, "cache": {"memory": "1.5GiB"}}
    assert from_tree(tree).cache.memory == 3 * 2**29


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"disk_path": "blocks"},
            "cache.disk_path is given, but a disk tier takes cache.disk_size",
        ),
        ({"disk_size": "1GiB"}, "cache.disk_size is given, but a disk tier takes cache.disk_path"),
        ({"disk_path": "blocks", "disk_size": -1}, "cache.disk_size is -1; it must be at least 0"),
        ({"disk_path": "blocks", "disk_size": "1GiB"}, "give cache.host_memory too, or leave"),
        ({"swap": "never"}, "cache.swap is 'never'; it must be one of auto, always"),
    ],
)
def test_a_disk_tier_takes_a_folder_a_size_and_a_host_tier(
    changes: dict[str, Any], message: str
) -> None:
    assert message in _error(_tree(*((f"cache.{key}", value) for key, value in changes.items())))


def test_a_disk_tier_s_folder_starts_at_the_config_s(tmp_path: Path) -> None:
    disk = {"host_memory": "1MiB", "disk_path": "../blocks", "disk_size": "1GiB"}
    tree = {**SMALLEST, "cache": {"num_blocks": 8, **disk}}
    config = from_tree(tree, path=str(tmp_path / "configs" / "a.yaml"))
    assert config.cache.disk_size == 2**30
    assert resolve_disk_path(config) == tmp_path / "blocks"
    assert resolve_disk_path(from_tree(SMALLEST)) is None


@pytest.mark.parametrize(
    ("name", "limit"), [("decode_seqs", 64), ("prefill_tokens", 512), ("prefill_seqs", 64)]
)
def test_buckets_rise_strictly_and_end_at_the_scheduler_s_limit(name: str, limit: int) -> None:
    key = f"buckets.{name}"
    good = from_tree(_tree((key, [1, 8, limit])))
    assert getattr(good.buckets, name) == (1, 8, limit)
    for wrong in ([1, 8], [8, 1, limit], [8, 8, limit], [0, limit], [limit, limit * 2]):
        assert f"{key} is {wrong}; it must rise strictly and end at {limit}" in _error(
            _tree((key, wrong))
        )


def test_buckets_follow_a_changed_limit() -> None:
    changes = (("scheduler.max_num_seqs", 8), ("buckets.decode_seqs", [2, 8]))
    assert from_tree(_tree(*changes)).buckets.decode_seqs == (2, 8)


# files and overrides


def test_a_file_is_read_and_remembered(file: Path) -> None:
    assert load(file) == dataclasses.replace(from_tree(copy.deepcopy(SMALLEST)), path=str(file))


def test_a_missing_file_points_to_the_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*none.yaml; see configs/"):
        load(tmp_path / "none.yaml")


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read config file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold a mapping"),
        (b"- model", "must hold a mapping"),
        (b"model: [", "is not valid YAML"),
        (b"model: \xff\xff", "is not valid YAML"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"model:\n", "model"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("model.dtype=float32", "model", "dtype", "float32"),
        ("model.max_model_len=2K", "model", "max_model_len", 2048),
        ("cache.prefix_reuse=false", "cache", "prefix_reuse", False),
        ("cache.isolation=none", "cache", "isolation", "none"),
        ("cache.observability=constant", "cache", "observability", "constant"),
        ("server.public_stats=true", "server", "public_stats", True),
        ("server.host=0.0.0.0", "server", "host", "0.0.0.0"),
        ("server.port=0", "server", "port", 0),
        ("buckets.decode_seqs=[1, 64]", "buckets", "decode_seqs", (1, 64)),
        ("model.name=a=b", "model", "name", "a=b"),
    ],
)
def test_an_override_replaces_one_value(
    file: Path, override: str, section: str, field: str, value: Any
) -> None:
    plain, changed = load(file), load(file, [override])
    assert getattr(getattr(changed, section), field) == value
    assert getattr(getattr(plain, section), field) != value
    restored = dataclasses.replace(changed, **{section: getattr(plain, section)})
    assert restored == plain


def test_later_overrides_win_and_work_together(file: Path) -> None:
    overrides = ["cache.num_blocks=null", "cache.memory=1MiB", "cache.memory=2MiB"]
    config = load(file, overrides)
    assert (config.cache.num_blocks, config.cache.memory) == (None, 2 * 2**20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dtype", "--set takes key=value, such as model.dtype=float32, not 'model.dtype'"),
        ("=float32", "--set takes key=value"),
        ("model.dtpye=x", "--set model.dtpye=x: unknown key model.dtpye; did you mean model.dt"),
        ("modle.dtype=x", "--set modle.dtype=x: unknown key modle; did you mean model"),
        ("path=x", "--set path=x: unknown key path; known: model"),
        ("model.source.x=1", "source is a value, not a section"),
        ("model.dtpe=float32", "unknown key model.dtpe; did you mean model.dtype?"),
        ("model.dtype=int8", "model.dtype"),
    ],
)
def test_a_wrong_override_is_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, [override])
    assert message in str(caught.value)


def test_a_relative_source_starts_at_the_config_s_folder(file: Path) -> None:
    assert resolve_source(load(file)) == str((file.parent / "model.gguf").resolve())
    above = load(file, ["model.source=../models/m.gguf"])
    assert resolve_source(above) == str((file.parent.parent / "models/m.gguf").resolve())


@pytest.mark.parametrize("source", ["/models/m.gguf", "hf:org/name@main"])
def test_an_absolute_or_hub_source_is_taken_as_it_is(file: Path, source: str) -> None:
    assert resolve_source(load(file, [f"model.source={source}"])) == source


def test_a_source_without_a_file_stays_relative() -> None:
    assert resolve_source(from_tree(copy.deepcopy(SMALLEST))) == "model.gguf"


# sizes

UNITS = {"B": 1, "": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {_letter: 1024**_power, f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16 GiB", 16 * 2**30),
        ("32K", 32768),
        ("32KiB", 32768),
        ("32KB", 32000),
        ("1500MB", 1_500_000_000),
        ("1.5K", 1536),
        ("0.5MiB", 2**19),
        ("2T", 2**41),
        ("7B", 7),
        ("123", 123),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_number_is_a_size() -> None:
    assert parse_size(16) == 16


@pytest.mark.parametrize("text", ["", "GiB", "16Gib", "16gb", "1e3", "-5K", "1,5K", "0x10", "1PiB"])
def test_what_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number; write it like 4096, 512MiB or 32K"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0.1K", "1.5B", "0.3MiB"])
def test_a_size_that_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a whole number"):
        parse_size(text)


@settings(deadline=None)
@given(number=st.integers(0, 2**20), unit=st.sampled_from(sorted(UNITS)), gap=st.sampled_from(" "))
def test_a_written_size_reads_back(number: int, unit: str, gap: str) -> None:
    size = number * UNITS[unit]
    assert parse_size(f"{number}{unit}") == size
    if unit:
        assert parse_size(f"{number}{gap}{unit}") == size


@settings(deadline=None)
@given(
    number=st.decimals(0, 16, places=3),
    unit=st.sampled_from([unit for unit in sorted(UNITS) if unit]),
)
def test_a_fraction_is_read_exactly_or_refused(number: Decimal, unit: str) -> None:
    exact = number * UNITS[unit]
    if exact == int(exact):
        assert parse_size(f"{number}{unit}") == int(exact)
    else:
        with pytest.raises(ConfigError, match="not a whole number"):
            parse_size(f"{number}{unit}")


@settings(deadline=None)
@given(text=st.text(alphabet="0123456789. KMGTiB-+eE_", max_size=8))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ConfigError:
        return
    assert isinstance(size, int)
    assert size >= 0


def test_sizes_are_read_wherever_a_number_stands() -> None:
    config: Config = from_tree(
        _tree(
            ("model.max_model_len", "8K"),
            ("cache", {"memory": "1GiB"}),
            ("scheduler.max_step_tokens", "2K"),
            ("buckets.prefill_tokens", [256, "2K"]),
            ("server.max_message", "16MiB"),
        )
    )
    assert config.model.max_model_len == 8192
    assert config.cache.memory == 2**30
    assert config.buckets.prefill_tokens == (256, 2048)
    assert config.server.max_message == 16 * 2**20
