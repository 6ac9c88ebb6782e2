"""Nothing in the tests reaches for the network, and no process takes more than its share of the cores."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Each worker gets its share of the cores: oversubscribed OpenMP threads are many times slower.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if "VLM_DISTILL_GPU_TESTS" not in os.environ else "cuda")


RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def no_rank_is_left():
    """A process that a test has made a rank is none for the next module, nor for what that one starts."""
    yield
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()
    for name in RANK:
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def processes():
    """One rank; a second one in this process would wait for the first one's port."""
    from vlm_distill.runtime.processes import Processes

    opened = Processes("cpu")
    yield opened
    opened.close()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``vlm-distill WORDS`` in this process; gives the exit code, standard output and standard error."""
    from vlm_distill import cli

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vlm-distill", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run
