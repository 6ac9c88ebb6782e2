"""Record what the project does, seen from outside, and compare two recordings: the safety net of a restructuring.

    python tests/characterise.py prepare INPUTS --tree OLD              once: the data and models of all recordings
    python tests/characterise.py record FOLDER --inputs INPUTS --tree OLD
    python tests/characterise.py record OTHER --inputs INPUTS --tree NEW
    python tests/characterise.py compare FOLDER OTHER                   exits with 1 where behaviour differs

A tree is a checkout of this project, by default the one that this file lies in. The scenarios are in characterise.yaml:
public commands, run as from a shell and on the CPU, each in a process of its own. It is forked from one that has
imported PyTorch and the like, which would take most of the time, and nothing of the project. A recording takes about
five minutes on two cores. ``--only students,mistakes`` records or compares those chains alone.

A recording has in ``records`` a JSON file a scenario, one value a line: the exit code, standard output, and what the
command wrote: metrics, configurations, the checksum of every tensor and of every other file. Warnings and mistakes are
recorded too, but may be reworded. ``files`` keeps what is text, so that ``compare`` can show the lines that differ. The
commands ran in ``work``.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import struct
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from string import Template
from typing import Any

import yaml
from characterise_inputs import write_inputs

# Old names and those that replaced them, so that what is only called differently compares equal: metrics, and keys of
# configurations by their path without the numbers of list items, as "data.train.path".
RENAMED_METRICS: dict[str, str] = {}
RENAMED_KEYS: dict[str, str] = {}

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = Path(__file__).with_suffix(".yaml")
# Values that the clock and the machine's load decide. So do checksums of checkpoints, which hold a run's seconds, and
# what is made of them: the identity of a model's answers. The files' own checksums are recorded anyway.
CLOCK = (
    *("seconds", "started", "finished", "waiting", "peak_bytes", "on_policy/time"),
    *("tokens_per_second", "images_per_second", "answers_per_second", "flops_per_second"),
    *("checkpoint", "by"),
)
# The same in texts, and lines about them: of libraries on standard output, and of reports.
TIMES = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d|\d+ images per second")
LIBRARY_LINES = re.compile(r"^\[\d{4}-.*\n", re.MULTILINE)
TIMED_LINES = re.compile(r"second|waiting|memory|<th[^>]*>Time<", re.IGNORECASE)
# Files named by a time or holding a process's number, and what this script writes itself.
UNRECORDED = re.compile(r"^events\.out\.tfevents|\.lock$|\.std(out|err)$")
# Names drawn at random.
RANDOM_NAME = re.compile(r"[0-9a-f]{32}(?=\.(data|index)$)")
TEXT = frozenset({".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".html", ".txt", ".jinja"})
SECONDS = 600  # at most, for a command


# Recording


class Recording:
    """Runs the scenarios of a tree and writes down what they do.

    Args:
        folder: of the recording; chains that are in it already are recorded again.
        inputs: what ``prepare`` wrote.
        tree: the checkout whose commands are run.
    """

    def __init__(self, folder: Path, inputs: Path, tree: Path) -> None:
        self.folder, self.inputs, self.tree = folder.resolve(), inputs.resolve(), tree.resolve()
        self.plan = yaml.safe_load(SCENARIOS.read_text())
        self.places = {str(self.folder / "work"): "WORK", str(self.inputs): "INPUTS", str(self.tree): "TREE"}
        # The tree says where its command is: it need not be the one that is installed.
        scripts = tomllib.loads((self.tree / "pyproject.toml").read_text())["project"]["scripts"]
        self.entry_point = scripts["vlm-distill"]
        os.environ |= self.plan["environment"] | {"PYTHONPATH": str(self.tree)}
        self.turn = threading.Lock()
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(self.plan["imported"])

    def run(self, only: set[str]) -> None:
        """Run all chains, or those named."""
        mistakes = {
            name: f"vlm-distill {command} {words}"
            for command, group in self.plan["mistakes"].items()
            for name, words in group.items()
        }
        alone = {"two_ranks": self.plan["two_ranks"]}
        for chains, at_once in ((self.plan["chains"] | {"mistakes": mistakes}, 2), (alone, 1)):
            with ThreadPoolExecutor(at_once) as pool:
                chosen = [(name, chain) for name, chain in chains.items() if not only or name in only]
                list(pool.map(lambda item: self.run_chain(*item), chosen))

    def run_chain(self, chain: str, scenarios: Mapping[str, Any]) -> None:
        """Run the scenarios of a chain in their order, where one was prepared in a copy of its folder."""
        work, prepared = self.folder / "work" / chain, self.inputs / "prepared" / "work" / chain
        for kind in ("work", "records", "files"):
            shutil.rmtree(self.folder / kind / chain, ignore_errors=True)
        if prepared.is_dir():
            shutil.copytree(prepared, work, symlinks=True)
        else:
            work.mkdir(parents=True)
            (work / "inputs").symlink_to(self.inputs)
            (work / "vlm.yaml").write_text(yaml.safe_dump(self.plan["vlm.yaml"]))
        (self.folder / "records" / chain).mkdir(parents=True)
        for name, scenario in scenarios.items():
            began = time.monotonic()
            record = self._run_scenario(work, f"{chain}/{name}", scenario)
            text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
            (self.folder / "records" / chain / f"{name}.json").write_text(text + "\n")
            print(f"{chain}/{name}: exit code {record['exit']}, {time.monotonic() - began:.1f} s", flush=True)

    def _run_scenario(self, work: Path, name: str, scenario: Any) -> dict[str, Any]:
        """Run a command and return its record. What a stopped command has written depends on the clock."""
        stops = isinstance(scenario, Mapping)
        command = shlex.split(self._filled(scenario["stop"] if stops else scenario, name.rpartition("/")[2]))
        before = _stamps(work)
        streams = [work / f"{name.rpartition('/')[2]}.{stream}" for stream in ("stdout", "stderr")]
        arguments = (command, self.entry_point, self.tree, work, streams)
        process = self.processes.Process(target=_run_command, args=arguments)
        self._wait(process, work / scenario["after"] if stops else None)
        output, errors = (stream.read_text() for stream in streams)
        record: dict[str, Any] = {"exit": process.exitcode}
        if not stops:
            record["messages"] = _messages(self._normalised(errors), process.exitcode)
            record["output"] = self._normalised(output).splitlines()
            written = [path for path, stamp in _stamps(work).items() if before.get(path) != stamp]
            record["files"] = {_name(path, work): self._content(path, work, name) for path in written}
        return record

    def _wait(self, process: BaseProcess, stop_after: Path | None) -> None:
        """Run a process to its end, which SIGTERM brings once a file has something in it, and SIGKILL if it hangs.

        Chains take turns: whoever starts or looks at a process looks at all of them, and their exit codes come once.
        """
        with self.turn:
            process.start()
        until = time.monotonic() + SECONDS
        while True:
            with self.turn:
                if not process.is_alive():
                    return
                if stop_after is not None and stop_after.is_file() and stop_after.stat().st_size:
                    process.terminate()
                    stop_after = None
                if time.monotonic() > until:
                    process.kill()
            time.sleep(0.02)

    def _filled(self, command: str, name: str) -> str:
        """Return a command with its $WORDS filled in, which may hold others."""
        words = {"NAME": name, "TREE": str(self.tree), **self.plan["words"]}
        while "$" in command:
            command = Template(command).substitute(words)
        return command

    def _normalised(self, text: str) -> str:
        """Return a text without the paths of this recording and without what a clock decides."""
        text = LIBRARY_LINES.sub("", text)
        for place, name in self.places.items():
            text = text.replace(place, name)
        keys = "|".join(map(re.escape, CLOCK))
        return TIMES.sub("*", re.sub(rf'("(?:{keys})": )[^,}}\n]+', r"\1*", text))

    def _content(self, path: Path, work: Path, scenario: str) -> Any:
        """Return what a file holds: values, or a checksum."""
        if path.name == "metrics.jsonl":
            return metrics_of(path)
        if path.name in ("config.yaml", "run.json"):
            return yaml.safe_load(self._normalised(path.read_text()))
        if path.name == "manifest.json":
            return "sizes and checksums of the files beside it"
        if path.suffix == ".onnx":
            return graph_of(path)
        if path.suffix == ".safetensors":
            return tensors_of(path)
        if path.suffix in (".xlsx", ".pt"):
            return members_of(path)
        if path.suffix not in TEXT:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        text = self._normalised(path.read_text())
        if path.suffix == ".html":
            text = "".join(line for line in text.splitlines(keepends=True) if not TIMED_LINES.search(line))
        copy = self.folder / "files" / scenario / path.relative_to(work)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        return hashlib.sha256(text.encode()).hexdigest()


def _run_command(command: list[str], entry_point: str, tree: Path, work: Path, streams: list[Path]) -> None:
    """Become the process of a command: ``python -m MODULE ...`` or ``vlm-distill ...``."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(work)
    sys.path[0] = str(tree)  # in place of this file's folder
    if command[0] == "python":
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        module, _, function = entry_point.partition(":")
        sys.exit(getattr(import_module(module), function)())


def _messages(errors: str, code: int | None) -> list[str]:
    """Return the warnings on standard error, and the last line of a command that failed."""
    lines = [line.strip("│ ") for line in errors.splitlines() if any(map(str.isalpha, line))]
    return [line for line in lines if line.startswith("warning:")] + (lines[-1:] if code else [])


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return when each file below a folder was written, and its size."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not UNRECORDED.search(path.name)]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def _name(path: Path, work: Path) -> str:
    """Return a file's place in the folder in which the command ran."""
    return RANDOM_NAME.sub("*", str(path.relative_to(work)))


def metrics_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return a run's metrics by kind, step and data, without those of the clock."""
    found = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        where = " ".join(str(values.pop(key)) for key in ("kind", "step", "data") if key in values)
        found[where] = {key: value for key, value in values.items() if key not in CLOCK}
    return found


def tensors_of(path: Path) -> dict[str, str]:
    """Return dtype, shape and checksum of every tensor of a file in safetensors' format."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found = {"metadata": json.dumps(header.pop("__metadata__", None))}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        digest = hashlib.sha256(content[start + low : start + high]).hexdigest()
        found[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return found


def graph_of(path: Path) -> str:
    """Return the checksum of an ONNX model without the places in the source that its nodes come from."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def members_of(path: Path) -> dict[str, str] | str:
    """Return the checksums of the files in one of Excel's or PyTorch's: of a checkpoint, of its tensors together.

    PyTorch's archives may have no checksums of their own, so that they cannot be read as others are.
    """
    found, tensors = {}, hashlib.sha256()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if path.suffix == ".xlsx" and not entry.filename.startswith("docProps/"):  # who wrote it, and when
                found[entry.filename] = hashlib.sha256(archive.read(entry)).hexdigest()
            elif "/data/" in entry.filename:
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                file.seek(name + extra, os.SEEK_CUR)
                tensors.update(file.read(entry.file_size))
    return found or tensors.hexdigest()


# Comparing


def compare(one: Path, other: Path, only: set[str], expected: str) -> int:
    """Print all differences and return the exit code.

    Messages on standard error may be reworded, and a difference is meant where ``expected``, a regular expression, is
    found in its line.
    """
    records = [folder / "records" for folder in (one, other)]
    found = {path.relative_to(folder) for folder in records for path in folder.glob("*/*.json")}
    names = sorted(str(path.with_suffix("")) for path in found if not only or path.parts[0] in only)
    # The same difference of many runs is printed once.
    grouped: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for key, how in differences(name, one, other):
            grouped.setdefault((re.sub(r"(runs/|step_)\w+", r"\1*", key), how), []).append(name)
    behaviour = 0
    for (key, how), places in grouped.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        line = f"{places[0]}{more}: {key}: {how}"
        meant = "wording" if key == "messages" else ""
        if expected and re.search(expected, line):
            meant = "expected"
        behaviour += not meant
        print(f"[{meant}] {line}" if meant else line)
    print(f"{len(names)} scenarios: {behaviour} differences of behaviour, {len(grouped) - behaviour} others")
    return 1 if behaviour or not names else 0


def differences(name: str, one: Path, other: Path) -> Iterator[tuple[str, str]]:
    """Yield the keys of a scenario's records that differ, each with how."""
    records = [folder / "records" / f"{name}.json" for folder in (one, other)]
    missing = [str(record) for record in records if not record.is_file()]
    if missing:
        yield "record", f"{missing[0]} is missing"
        return
    contents = [json.loads(record.read_text()) for record in records]
    for key in ("output", "messages"):
        lines = [content.pop(key, []) for content in contents]
        if lines[0] != lines[1]:
            yield key, _changed(*lines)
    before, after = ({_renamed(path): value for path, value in flattened(content)} for content in contents)
    for path in sorted(before.keys() | after.keys()):
        old, new = (json.dumps(values[path]) if path in values else "nothing" for values in (before, after))
        if old != new:
            texts = [folder / "files" / name / path[-1] for folder in (one, other)]
            if all(text.is_file() for text in texts):
                one_text, other_text = (text.read_text().splitlines() for text in texts)
                yield ": ".join(path), _changed(one_text, other_text)
            else:
                yield ": ".join(path), f"{old} -> {new}"


def flattened(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value with the keys that lead to it."""
    items = list(enumerate(value)) if isinstance(value, list) else value
    if not items or not isinstance(value, list | dict):
        yield path, value
        return
    for key, item in dict(items).items():
        yield from flattened(item, (*path, str(key)))


def _renamed(path: tuple[str, ...]) -> tuple[str, ...]:
    """Return a value's path with today's names of metrics and of configuration keys."""
    file = path[1] if path[0] == "files" and len(path) > 2 else ""
    if file.endswith("metrics.jsonl"):
        return (*path[:3], *(RENAMED_METRICS.get(name, name) for name in path[3:]))
    if file.endswith(("config.yaml", "run.json")):
        key = ".".join(part for part in path[2:] if not part.isdecimal() and part != "configuration")
        return (*path[:2], RENAMED_KEYS.get(key, key), *filter(str.isdecimal, path[2:]))
    return path


def _changed(before: list[str], after: list[str], most: int = 6) -> str:
    """Return the first lines that differ."""
    changed = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    shown = [line[:200] for line in changed[:most]] + ["..."] * (len(changed) > most)
    return "".join(f"\n    {line}" for line in shown)


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "record", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="compare: the second recording")
    parser.add_argument("--inputs", type=Path, help="record: the folder that prepare wrote")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout; default: this one")
    parser.add_argument("--only", default="", help="chains of characterise.yaml, commas between")
    parser.add_argument("--expected", default="", help="compare: a regular expression of differences that are meant")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    if options.command == "compare":
        if options.other is None:
            parser.error("compare: name two recordings")
        return compare(options.folder, options.other, only, options.expected)
    if options.command == "prepare":
        write_inputs(options.folder, options.tree)
        older = Recording(options.folder / "prepared", options.folder, options.tree)
        older.run_chain("older", older.plan["prepared"])
    elif options.inputs is None:
        parser.error("record: name the folder that prepare wrote (--inputs)")
    else:
        Recording(options.folder, options.inputs, options.tree).run(only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
