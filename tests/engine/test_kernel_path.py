"""Runs `kernel_path_checks.py` under TRITON_INTERPRET=1, in a process of its own; and how graphs are sized."""

from pathlib import Path

from support.checks import run_checks

from loramux.server.engine.graphs import graph_sizes

CHECKS = Path(__file__).with_name("kernel_path_checks.py")


def test_the_engine_on_interpreted_kernels() -> None:
    run_checks(CHECKS, interpreted=True, timeout=900)


def test_graph_sizes_hold_every_batch_with_little_padding() -> None:
    for most in (1, 3, 64, 100, 256, 512):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes), reverse=True)
        assert sizes[0] == most
        for rows in range(4, most + 1):
            size = min(size for size in sizes if size >= rows)
            assert size <= rows + max(3, rows // 4)
