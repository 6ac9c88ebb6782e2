"""Trainings in forked processes, which start in a moment because this one has imported everything.

    python tests/support/forks.py

Reads requests from standard input, one JSON object a line, and answers each with one: ``{"codes": […], "told": "…"}``.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).parents[2]


class Forks:
    """The process that forks, as a test sees it."""

    def __init__(self):
        paths = os.pathsep.join(map(str, [_ROOT, Path(__file__).parent]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self, module, config, ranks=1, *, fault="", after=None, delay=0.0, number="SIGKILL", to=(0, 1), limit=None
    ):
        """Runs ``module`` with a configuration's path.

        Args:
            fault: what ``VLM_DISTILL_FAULT`` says.
            after: a text that the run must have told, after which the ranks ``to`` get a signal.
            delay: seconds that pass between the two.
            number: that signal.
            limit: bytes that a file of the ranks ``to`` may have.

        Returns:
            Each rank's exit code, negative for a signal, and what all have told.
        """
        asked = {"module": module, "config": str(config), "ranks": ranks, "fault": fault, "after": after}
        asked |= {"delay": delay, "number": number, "to": to, "limit": limit}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["codes"], answer["told"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def main():
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  with ZeRO, half of what a small training takes
    import torch.utils.tensorboard  # noqa: F401

    import vision.trainer  # noqa: F401
    import vlm_distill.trainer  # noqa: F401
    from vlm_distill.runtime.launch import reserved_port

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        place = {"VLM_DISTILL_FAULT": asked["fault"]} if asked["fault"] else {}
        with tempfile.TemporaryFile() as told, reserved_port() as port:
            if asked["ranks"] > 1:
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(asked["ranks"])}
            children = [fork(asked, place, rank, told) for rank in range(asked["ranks"])]
            codes = watch(asked, children, told)
            told.seek(0)
            print(json.dumps({"codes": codes, "told": told.read().decode(errors="replace")}), file=replies, flush=True)


def fork(asked, place, rank, told):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        os.environ.update(place)
        if asked["ranks"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if asked["limit"] and rank in asked["to"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], asked["limit"]))
        from importlib import import_module

        code = import_module(asked["module"]).main([asked["config"]])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def watch(asked, children, told):
    """Waits for all, sends what is asked for, and as a launcher kills the others when one has failed."""
    began, codes, due, sent = time.monotonic(), {}, None, asked["after"] is None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if not sent:
            if due is None and asked["after"] in Path(f"/proc/self/fd/{told.fileno()}").read_text(errors="replace"):
                due = time.monotonic() + asked["delay"]
            if due is not None and time.monotonic() >= due:
                sent = True
                signals(children, codes, getattr(signal, asked["number"]), asked["to"])
        # Ranks that were told to stop end by themselves, one after the other.
        if any(code not in (0, 130, 143) for code in codes.values()) or time.monotonic() - began > 300:
            signals(children, codes, signal.SIGKILL, range(len(children)))
        time.sleep(0.01)
    return [codes[child] for child in children]


def signals(children, codes, number, to):
    for rank, child in enumerate(children):
        if rank in to and child not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


if __name__ == "__main__":
    main()
