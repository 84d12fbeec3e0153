"""Measurements that can be compared: interleaved rounds, and a fresh process for every one of them.

Machines are never quiet. So candidates take turns (A B C, C B A, A B C ...), what is reported is the median
over the rounds, and speeds are compared as ratios within one run. Each candidate has a process of its own
that has imported what it needs and nothing more; every measurement runs in a fork of it, which nothing
survives: neither memory, nor threads, nor a crash.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

Result = dict[str, Any]
TIME_LIMIT = 300.0
"""Seconds that one measurement may take."""


class NotInstalledError(Exception):
    """The candidate needs a package that is not here."""


class FailedError(Exception):
    """The candidate went wrong; the text says how."""


@contextmanager
def failures_are_mistakes(what: str) -> Iterator[None]:
    """A measurement without which there is no comparison is one line, and an exit code of 1."""
    from llmtrain.config import UserError  # not in stations, whose memory is measured

    try:
        yield
    except (FailedError, NotInstalledError) as error:
        raise UserError(f"{what}: {error}", exit_code=1) from error


def require_one(results: Iterable[Mapping[str, Any]]) -> None:
    """FailedError where every candidate is missing or failed."""
    if all("missing" in result or "error" in result for result in results):
        raise FailedError("no candidate was measured; what was printed says why")


class Station:
    """A process that has imported `module` and calls functions of it, each call in a fork of its own.

    Arguments and results are JSON.
    """

    def __init__(self, module: str, needs: Sequence[str] = ()) -> None:
        self._module, self._needs = module, list(needs)
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: Path | None = None
        self._refusal: Exception | None = None

    def call(self, function: str, *arguments: Any, limit: float = TIME_LIMIT) -> Result:
        """What the function returns; NotInstalledError, or FailedError, also for what takes too long."""
        if self._refusal is not None:
            raise self._refusal
        process = self._start(limit) if self._process is None else self._process
        return _answer(process, [function, *arguments], limit, self._said)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._messages is not None:
            self._messages.unlink(missing_ok=True)
        self._process = self._messages = None

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, limit: float) -> subprocess.Popen[bytes]:
        descriptor, name = tempfile.mkstemp(prefix="llmtrain-bench-", suffix=".log")
        self._messages = Path(name)
        with os.fdopen(descriptor, "wb") as messages:
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
            )
        self._process = process
        try:
            _answer(process, [self._module, self._needs], limit, self._said)
        except (NotInstalledError, FailedError) as error:
            self._refusal = error
            raise
        return process

    def _said(self) -> str:
        """The last line that the process wrote as it ended."""
        assert self._messages is not None and self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2)  # it closes its output before it says why it ends
        lines = self._messages.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no message")


def _answer(process: subprocess.Popen[bytes], request: Any, limit: float, said: Callable[[], str]) -> Result:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([limit, request]).encode() + b"\n")
        process.stdin.flush()
    except OSError as error:
        raise FailedError(said()) from error
    ready, _, _ = select.select([process.stdout], [], [], limit + 30)  # the station itself watches its forks
    line = process.stdout.readline() if ready else b""
    if not line:
        raise FailedError(said())
    answer: Result = json.loads(line)
    if "missing" in answer:
        raise NotInstalledError(answer["missing"])
    if "error" in answer:
        raise FailedError(answer["error"])
    return answer


def serve() -> None:
    """The station's side: imports what the first line names, then forks for every further line."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever the candidates print is no answer
        module: ModuleType | None = None
        for line in sys.stdin:
            limit, request = json.loads(line)
            if module is None:
                answer, module = _import(*request)
            else:
                answer = _fork(module, request, limit)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _import(name: str, needs: Sequence[str]) -> tuple[Result, ModuleType | None]:
    for need in needs:
        try:
            importlib.import_module(need)
        except ModuleNotFoundError as error:
            return {"missing": error.name or need}, None
        except Exception as error:  # a peer's own trouble, whatever it is, is an entry of the table
            return {"error": f"import {need}: {_text(error)}"}, None
    return {}, importlib.import_module(name)


def _fork(module: ModuleType, request: Sequence[Any], limit: float) -> Result:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _call_and_exit(module, request, write)
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe:
            ready, _, _ = select.select([pipe], [], [], limit)
            content = pipe.read() if ready else b""
        if not ready:
            return {"error": f"no result in {limit:.0f} s"}
        return json.loads(content) if content else {"error": "the process died"}
    finally:
        _kill_group(child)
        os.waitpid(child, 0)


def _call_and_exit(module: ModuleType, request: Sequence[Any], write: int) -> None:
    """The fork's side; the process leaves without the clean-up of libraries that may hang."""
    os.setpgid(0, 0)  # so that processes a candidate starts end with it
    function, *arguments = request
    try:
        result = getattr(module, function)(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": _text(error)}
    with os.fdopen(write, "wb") as pipe:
        pipe.write(json.dumps(result).encode())
    os._exit(0)


def _kill_group(child: int) -> None:
    for kill in (os.killpg, os.kill):  # the group does not exist before the fork has made it
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# Rounds and numbers


def interleaved(
    candidates: Mapping[str, Callable[[], Result]], rounds: int
) -> dict[str, list[Result] | NotInstalledError | FailedError]:
    """The results of each candidate, one a round: A B C, then C B A; one that fails is not asked again."""
    results: dict[str, Any] = {name: [] for name in candidates}
    for number in range(rounds):
        order = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in order:
            if isinstance(results[name], list):
                try:
                    results[name].append(candidates[name]())
                except (NotInstalledError, FailedError) as error:
                    results[name] = error
    return results


def medians(results: Sequence[Result]) -> Result:
    """The median of every number, over the rounds; what is no number is taken from the first."""
    return {
        key: median([result[key] for result in results]) if isinstance(value, int | float) else value
        for key, value in results[0].items()
    }


def rate(steps: Iterator[int], seconds: float, warm_up: float) -> float:
    """Units a second, each item of `steps` being the number of units that were made just now.

    An item of 0 says that a candidate is at its end: the start over that follows is not counted.
    """
    done, spent, restarted = 0, -warm_up, False
    while spent < seconds:
        begin = time.perf_counter()
        units = next(steps)
        elapsed = time.perf_counter() - begin
        if not restarted and units:
            if spent < 0 <= spent + elapsed:
                done, spent = 0, 0.0
            else:
                done, spent = done + units, spent + elapsed
        restarted = not units
    return done / spent


def memory() -> dict[str, float]:
    """MB of this process: resident in all, and of these its own (no pages of files, which may be shared)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"rss": int(status["VmRSS"].split()[0]) / 1000, "own": int(status["RssAnon"].split()[0]) / 1000}


@contextmanager
def cpu_seconds(result: Result) -> Iterator[None]:
    """Puts into result["cpu_s"] what this process, and its children that ended meanwhile, spent on cores."""
    before = _cpu()
    yield
    result["cpu_s"] = _cpu() - before


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# Tables


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, its columns aligned for people who read it as text."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def number(value: float | None, digits: int = 3) -> str:
    """A number for people, with so many digits that say something; `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
