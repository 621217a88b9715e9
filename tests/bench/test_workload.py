from __future__ import annotations

from pathlib import Path

import pytest

from engine.bench.workload import Item, Load, Synthetic, WorkloadError, read_workload
from engine.sampling import SamplingParams
from tests.conftest import ROOT


def write(folder: Path, *lines: str) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_file_gives_its_requests_in_order_with_their_sampling(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt_ids": [5, 6], "max_tokens": 3, "temperature": 0, "ignore_eos": true}',
        "",
        '{"prompt": "Once", "top_p": 0.5}',
        '{"messages": [{"role": "user", "content": "Hello"}]}',
    )
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    assert read_workload(path) == (
        Item([5, 6], greedy),
        Item("Once", SamplingParams(top_p=0.5)),
        Item([{"role": "user", "content": "Hello"}], SamplingParams()),
    )


def test_bad_lines_are_named_by_their_numbers(tmp_path: Path) -> None:
    good = '{"prompt": "Once"}'
    path = write(tmp_path, good, "{", "", '{"prompt": "a", "prompt_ids": [1]}', good, '{"t": 1}')
    with pytest.raises(WorkloadError) as raised:
        read_workload(path)
    lines = str(raised.value).splitlines()
    assert [line.removeprefix(f"{path}:")[:2] for line in lines] == ["2:", "4:", "6:"]


def test_many_bad_lines_are_counted_instead_of_listed(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"and 95 more$"):
        read_workload(write(tmp_path, *["{"] * 100))


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="has no requests"):
        read_workload(write(tmp_path, "", "  "))


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "output_tokens"),
    [("single", 1, 128, 128), ("decode16", 16, 1024, 2048), ("mixed64", 64, 17407, 7874)],
)
def test_the_named_workloads_are_what_their_documentation_says(
    name: str, requests: int, prompt_tokens: int, output_tokens: int
) -> None:
    items = read_workload(ROOT / "benchmarks" / "workloads" / f"{name}.jsonl")
    assert len(items) == requests
    assert sum(len(item.prompt) for item in items) == prompt_tokens
    assert sum(item.required_tokens or 0 for item in items) == output_tokens


def test_a_count_of_tokens_is_required_only_if_nothing_else_can_end_the_answer() -> None:
    def required(**fields: object) -> int | None:
        return Item("", SamplingParams(**fields)).required_tokens  # type: ignore[arg-type]

    assert required(max_tokens=7, ignore_eos=True) == 7
    assert required(max_tokens=7) is None
    assert required(ignore_eos=True) is None
    assert required(max_tokens=7, ignore_eos=True, stop=("x",)) is None
    assert required(max_tokens=7, ignore_eos=True, stop_token_ids=(1,)) is None


def test_a_seed_names_a_synthetic_workload() -> None:
    drawn = Synthetic(num_requests=3, input_len=10, output_len=4, shared_prefix=6, seed=1)
    items = drawn.items(1000)
    assert items == drawn.items(1000)
    assert items != Synthetic(**{**vars(drawn), "seed": 2}).items(1000)
    # Figures in docs/benchmarks were measured with these prompts; a change makes new ones.
    assert items[0].prompt == (37, 235, 908, 72, 767, 905, 715, 645, 847, 960)


def test_synthetic_prompts_share_exactly_the_prefix_asked_for() -> None:
    drawn = Synthetic(num_requests=8, input_len=40, output_len=4, shared_prefix=25)
    prompts = [item.prompt for item in drawn.items(50_000)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({tuple(prompt[:25]) for prompt in prompts}) == 1
    assert len({prompt[25] for prompt in prompts}) == 8
    assert all(item.required_tokens == 4 for item in drawn.items(50_000))


def test_token_ids_stay_inside_the_vocabulary() -> None:
    items = Synthetic(num_requests=50, input_len=50).items(7)
    assert {token for item in items for token in item.prompt} == set(range(7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_requests": 0}, "--num-requests is 0; it must be at least 1"),
        ({"output_len": -1}, "--output-len is -1"),
        ({"input_len": 8, "shared_prefix": 8}, "--shared-prefix is 8, but prompts have 8"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**32}, "must be below 2"),
    ],
)
def test_a_synthetic_workload_that_makes_no_sense_is_refused(
    fields: dict[str, int], message: str
) -> None:
    with pytest.raises(WorkloadError, match=message):
        Synthetic(**fields)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    assert Load().arrivals(5) is None
    times = Load(request_rate=20.0, seed=3).arrivals(20_000)
    assert times is not None
    assert times == Load(request_rate=20.0, seed=3).arrivals(20_000)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    # An exponential's deviation is its mean; four standard errors of 20,000 samples.
    assert mean == pytest.approx(1 / 20, rel=4 / 20_000**0.5)
    within_mean = sum(gap < 1 / 20 for gap in gaps) / len(gaps)
    assert within_mean == pytest.approx(1 - 1 / 2.718281828, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"concurrency": 2, "request_rate": 1.0}, "exclude each other"),
        ({"concurrency": 0}, "--concurrency is 0"),
        ({"request_rate": 0.0}, "--request-rate is 0.0"),
        ({"request_rate": float("inf")}, "--request-rate is inf"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        Load(**fields)  # type: ignore[arg-type]
