"""One rank alone; several are in `tests/orchestrator/test_ranks.py`, which needs Ray."""

from pare.workers.ranks import Ranks
from pare.workers.run import cost_together


def test_one_rank_needs_no_process_group_and_asks_only_itself() -> None:
    ranks = Ranks.here()

    assert (ranks.rank, ranks.count, ranks.is_first) == (0, 1, True)
    assert ranks.sum(1.5, 2) == [1.5, 2]
    assert ranks.first({"a": 1}) == {"a": 1}
    assert ranks.all("x") == ["x"]


def test_what_ranks_cost_together() -> None:
    costs = [
        {"wall_s": 2.0, "cpu_s": 1.0, "load_s": 0.5, "memory_start_bytes": 10, "peak_rss_bytes": 100, "peak_gpu_bytes": 7},
        {"wall_s": 3.0, "cpu_s": 2.0, "load_s": 0.2, "memory_start_bytes": 20, "peak_rss_bytes": 90, "peak_gpu_bytes": 9},
    ]
    both = {"wall_s": 3.0, "cpu_s": 3.0, "load_s": 0.5, "memory_start_bytes": 30, "peak_rss_bytes": 190, "peak_gpu_bytes": 9}

    assert cost_together(costs) == both | {"slot_s": 6.0}
    assert cost_together(costs[:1]) == costs[0]
