"""Processes that tokenise, and who says what they do next.

Workers are fresh interpreters that know nothing of the program that started them: no main module is imported
a second time (as `multiprocessing` would), no torch, no launcher's ranks. They die with their parent.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from llmtrain.config import UserError
from llmtrain.data.growing import Preparation
from llmtrain.data.tokenizing import Task, Tell, clear_dead, make, worked_at
from llmtrain.tokenizer import load_tokenizer
from llmtrain.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

NICE = 10
"""How far workers step back behind the training that they work beside."""
GRACE = 10.0
"""Seconds in which the order that training will want may be told, before any order is as good."""
LISTEN = 0.2
ELSEWHERE = 1.0
"""Seconds after which a part that another process had is looked at again."""
DEATHS = 2
"""A part that so many workers died of is not tried again."""
TYPICAL = 16 << 20
"""Bytes of a part whose size nobody knows."""
_PR_SET_PDEATHSIG = 1
_BOOT = "import sys; from llmtrain.data.workers import work; work(*sys.argv[1:])"
_ALONE = {  # a process a core: threads inside would only be in each other's way
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_IO_THREADS": "1",
}


# In the worker


def work(descriptor: str, parent: str, nice: str, tokenizer_directory: str, backend: str = "") -> None:
    """Make the parts that come over a connection until it ends; the main function of a worker.

    A scheduler's signals go to every process of a job. What they ask is the parent's to do.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _die_with(int(parent))
    os.nice(int(nice))
    tokenizer = _load_alone(Path(tokenizer_directory), backend or None)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), Connection(int(descriptor)) as connection:
        while True:
            connection.send(_answer(connection.recv(), tokenizer, connection))


def _answer(task: Task, tokenizer: Tokenizer, connection: Connection) -> tuple[Any, ...]:
    def tell(*more: int) -> None:
        connection.send(("progress", more))

    try:
        return ("done",) if make(task, tokenizer, tell) else ("elsewhere",)
    except UserError as error:
        return ("error", error.lines, error.exit_code)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise  # nobody is there to hear it
    except OSError as error:
        return (
            "error",
            [f"cache_dir: source {task.name} cannot be written to {task.directory}: {error}"],
            78,
        )
    except Exception as error:
        traceback.print_exc()
        return ("error", [f"preparing part {task.number} of {task.name} failed: {error!r}"], 1)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it is gone, however that came."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        os._exit(1)


def _load_alone(directory: Path, backend: str | None) -> Tokenizer:
    """The tokenizer, with as many threads as it takes where there is one core (SentencePiece counts them)."""
    if not hasattr(os, "sched_setaffinity"):
        return load_tokenizer(directory, backend)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return load_tokenizer(directory, backend)
    finally:
        os.sched_setaffinity(0, cores)


# In the process that has them


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    job: Job | None = None


@dataclass(frozen=True)
class Job:
    """A part to be made."""

    preparation: Preparation
    number: int

    @property
    def key(self) -> tuple[Path, int]:
        """Two names for one text have the same jobs."""
        return self.preparation.directory, self.number

    @property
    def size(self) -> int | None:
        """Bytes of input; None where nobody knows."""
        return self.preparation.parts[self.number].size


class Crew:
    """Worker processes that make parts, those first that are wanted first.

    `run` works in the calling thread until all is done; `start` has a thread do it, in which an error is
    left for everybody who waits for a shard.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        tokenizer_directory: Path,
        workers: int,
        *,
        backend: str | None = None,
        nice: int = 0,
        tell: Tell | None = None,
        recheck: bool = False,
    ) -> None:
        self._jobs = {job.key: job for job in jobs}
        self._order = deque(self._jobs)
        self._wanted: deque[tuple[Path, int]] = deque()
        self._open = set(self._jobs)  # not yet done
        self._elsewhere: dict[tuple[Path, int], float] = {}
        self._worked_at: dict[tuple[Path, int], int] = {}
        self._deaths: Counter[tuple[Path, int]] = Counter()
        self._tokenizer_directory, self._backend = tokenizer_directory, backend
        self._count, self._nice = workers, nice
        self._tell: Tell = tell or (lambda *_: None)
        self._recheck = recheck
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._ordered, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        self.heard = 0
        """Grows as long as parts are being made, by these workers or, as one sees, by other processes."""
        self._fault: Preparation | None = None
        """Whose text was at fault, where it was one's."""

    def run(self) -> None:
        """Make all parts; UserError where one cannot be made."""
        try:
            self._hire()
            while self._open and not self._stopped.is_set():
                self._hand_out()
                self._listen()
        finally:
            self._dismiss()

    def start(self) -> None:
        """Make all parts in a thread."""
        self._thread = threading.Thread(target=self._pump, name="prepare", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def error(self) -> UserError | None:
        """Why no more parts are made, where that is so."""
        return self._error

    def close(self) -> None:
        """Stop at once: nobody is alive any more when this returns."""
        self._stopped.set()
        self._ordered.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=30)
        atexit.unregister(self.close)

    def check(self) -> None:
        """Raise if no more parts will be made."""
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise RuntimeError("the preparation was closed while its shards were still wanted")

    def need(self, preparation: Preparation, number: int) -> None:
        """This part is waited for."""
        self.want(preparation, [number])

    def want(self, preparation: Preparation, numbers: Sequence[int]) -> None:
        """These parts come first from now on, in this order."""
        keys = [(preparation.directory, int(number)) for number in numbers]
        with self._lock:
            chosen = [key for key in keys if key in self._open]
            rest = [key for key in self._wanted if key not in set(chosen)]
            self._wanted = deque(chosen + rest)
        self._ordered.set()

    def schedule(self, order: Mapping[str, Sequence[int]], weights: Mapping[str, float]) -> None:
        """Make parts in the order in which training comes to them: each source's `order`, and its share."""
        with self._lock:
            of_name = {job.preparation.name: job.preparation for job in self._jobs.values()}
            need: dict[tuple[Path, int], float] = {}
            for name, preparation in of_name.items():
                before, weight = 0, weights.get(name, 0.0)
                for number in map(int, order.get(name, range(len(preparation.parts)))):
                    when = before / weight if weight else float("inf")
                    need.setdefault((preparation.directory, number), when)
                    before += preparation.parts[number].size or TYPICAL
            later = float("inf")
            self._order = deque(sorted(self._order, key=lambda key: need.get(key, later)))
        self._ordered.set()

    # The thread

    def _pump(self) -> None:
        try:
            if self._recheck:
                for preparation in self._preparations():
                    self._fault = preparation
                    preparation.check(preparation.done())
            self._fault = None
            self.run()
        except UserError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("preparing failed")
            self._fail(UserError(f"preparing the data failed: {error!r}", exit_code=1))

    def _fail(self, error: UserError) -> None:
        self._error = error
        for preparation in [self._fault] if self._fault else self._preparations():
            with suppress(OSError):  # a full disk: those who wait in this process hear of it anyway
                if not preparation.complete:
                    preparation.fail(error)

    def _preparations(self) -> list[Preparation]:
        return list({job.preparation.directory: job.preparation for job in self._jobs.values()}.values())

    def _hire(self) -> None:
        for _ in range(min(self._count, len(self._open))):
            self._workers.append(self._new_worker())
        if self._thread is not None:
            self._ordered.wait(GRACE)

    def _new_worker(self) -> _Worker:
        """Started by the thread that stays until the end: a worker dies with that (see `_die_with`)."""
        ours, theirs = Pipe()
        arguments = [theirs.fileno(), os.getpid(), self._nice, self._tokenizer_directory, self._backend or ""]
        paths = [str(Path(path).absolute()) for path in sys.path]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C is for this process alone
            env={**os.environ, **_ALONE, "PYTHONPATH": os.pathsep.join(paths)},
        )
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.job is None and (job := self._next()) is not None:
                worker.job = job
                with suppress(BrokenPipeError, ConnectionResetError):  # it died: `_listen` will hear of it
                    worker.connection.send(job.preparation.task(job.number))

    def _next(self) -> Job | None:
        now = time.monotonic()
        busy = {worker.job.key for worker in self._workers if worker.job}
        with self._lock:
            for queue in (self._wanted, self._order):
                while queue:
                    key = queue.popleft()
                    if key in self._open and key not in busy and key not in self._elsewhere:
                        return self._jobs[key]
            for key, since in self._elsewhere.items():
                if now - since > ELSEWHERE:
                    del self._elsewhere[key]
                    return self._jobs[key]
        return None

    def _listen(self) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        if not busy:
            self._stopped.wait(LISTEN)
        for connection in wait(list(busy), LISTEN):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            try:
                self._hear(worker, *connection.recv())
            except (EOFError, ConnectionResetError):
                self._bury(worker)

    def _hear(self, worker: _Worker, kind: str, *content: Any) -> None:
        job = worker.job
        assert job is not None
        if kind == "progress":
            self._gets_on(*content[0])
            return
        worker.job = None
        if kind == "error":
            lines, exit_code = content
            self._fault = job.preparation
            raise UserError(*lines, exit_code=exit_code)
        if kind == "elsewhere":
            self._elsewhere[job.key] = time.monotonic()
            seen = worked_at(*job.key)
            if seen != self._worked_at.get(job.key, seen):
                self._gets_on()
            self._worked_at[job.key] = seen
            return
        self._gets_on()
        with self._lock:
            self._open.discard(job.key)
            finished = not any(directory == job.key[0] for directory, _ in self._open)
        if finished:
            self._fault = job.preparation
            job.preparation.finish(self._gets_on)
            self._fault = None

    def _gets_on(self, consumed: int = 0, documents: int = 0, text_bytes: int = 0, tokens: int = 0) -> None:
        self.heard += 1
        self._tell(consumed, documents, text_bytes, tokens)

    def _bury(self, worker: _Worker) -> None:
        job, code = worker.job, worker.process.wait()
        assert job is not None
        worker.connection.close()
        self._workers.remove(worker)
        self._deaths[job.key] += 1
        if self._deaths[job.key] >= DEATHS:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"data.sources.{job.preparation.name}: a process that tokenised part {job.number} ended"
                f" with {how}, {DEATHS} times; where memory ran out, lower data.workers or"
                " data.max_document_bytes",
                exit_code=1,
            )
        logger.warning("a process that tokenised %s died (%d); trying again", job.preparation.name, code)
        with self._lock:
            self._wanted.appendleft(job.key)
        self._workers.append(self._new_worker())

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
        self._workers = []
        if self._open:
            for preparation in self._preparations():
                clear_dead(preparation.directory)
