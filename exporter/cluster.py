"""Ray: shards given to actors until every one has its part. Scheduling, retries and back-pressure are Ray Data's."""

import json
import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from emoexport import errors
from emoexport.engines.machine import usable_cores
from emoexport.errors import BadBundle, BadInput, EmoexportError, MissingRuntime, UsageError
from emoexport.runtime import load
from emoexport.score_record import ScoreRecord, require_begun
from emoexport.shard_scoring import Tally, score_shard, tally_of, write_part
from emoexport.shards import Shard, Source
from emoexport.storage import Storage
from emoexport.temporaries import sweep_beside, temporary_directory

__all__ = ["Division", "Work", "call_there", "connect", "divide", "import_ray", "score_on"]

_OBJECT_STORE = 256 * 2**20
"""Bytes of a Ray of our own. Shards and tallies go through it, and no pictures."""
_CORES_A_WORKER = 4
"""If nobody says how many workers there are to be."""
_ANSWERS_WITHIN = 10.0
"""Seconds in which a cluster takes a connection."""
_RETRIES = 5
"""Of a shard whose workers die; then it is taken for the cause."""


class Work(NamedTuple):
    """What every worker is told."""

    bundle: str
    """The bundle's directory, on every machine."""
    settings: Mapping[str, Any]
    """Of `load`, but the threads."""
    source: Source
    """Where the pictures are."""
    out: Storage
    """Where parts are written to."""
    record: ScoreRecord
    """What was begun there."""


class Division(NamedTuple):
    """Who does the work."""

    workers: int
    threads: int
    """Of each; Ray keeps as many cores for it."""
    gpus: int
    """Of each."""


def import_ray() -> Any:
    """Ray, quiet.

    Raises:
        MissingRuntime: if it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415 (an extra)
        import ray.data  # noqa: PLC0415
    except ImportError as err:
        raise MissingRuntime("Ray is not installed here.", hint="pip install 'emoexport[score]'") from err
    return ray


@contextmanager
def connect(address: str | None, cores: int = 0) -> Iterator[list[Mapping[str, float]]]:
    """Be connected to a cluster, or to a Ray of our own on this machine until the end.

    Args:
        address: of a cluster; None for this machine.
        cores: that the workers on this machine are to have, if that is more than it has.

    Returns:
        What each machine has, by Ray's names: `CPU`, `GPU`, `memory`.

    Raises:
        MissingRuntime: if Ray is not installed, or there is no cluster.
    """
    ray = import_ray()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    own: dict[str, Any] = {}
    with ExitStack() as stack:
        if not address:
            files = Path(tempfile.gettempdir()).resolve() / "ray"
            sweep_beside(files)  # a Ray whose command was killed
            own = {
                "num_cpus": max(cores, usable_cores()),
                "object_store_memory": _OBJECT_STORE,
                "include_dashboard": False,
                "_temp_dir": str(stack.enter_context(temporary_directory(files))),
            }
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(redirect_stdout(nowhere))  # there Ray tells of every worker that dies
        stack.callback(ray.shutdown)
        with _hushed(), _errors_of_start(address):
            _require_answer(address)
            ray.init(address=address or "local", **quiet, **own)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _require_answer(address: str | None) -> None:
    """Before Ray, which waits for minutes: whether anything answers there at all."""
    host, _, port = (address or "").rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN).close()


def divide(
    machines: Sequence[Mapping[str, float]], *, workers: int | None, threads: int | None, on_gpu: bool
) -> Division:
    """Say how many workers of how many threads.

    Args:
        machines: what each has, as `connect` tells.
        workers: how many; if none one a GPU for engines that run there, or one for every four cores.
        threads: of each; if none the cores divided by the workers, but no more than a machine has.
        on_gpu: whether the engine runs on a GPU; then each worker has one.

    Raises:
        UsageError: if it needs a GPU and there is none.
    """
    cores, gpus = (sum(int(one.get(kind, 0)) for one in machines) for kind in ("CPU", "GPU"))
    if on_gpu and not gpus:
        raise UsageError("the engine runs on a GPU, and Ray finds none.", hint="--engine names another")
    workers = workers or max(1, gpus if on_gpu else cores // _CORES_A_WORKER)
    largest = max((int(one.get("CPU", 0)) for one in machines), default=0)
    return Division(workers, threads or max(1, min(cores // workers, largest)), int(on_gpu))


def call_there(function: Callable[..., Any], *arguments: Any, gpus: int = 0) -> Any:
    """Call a function on a machine of the cluster that has as many GPUs; its errors are as if it were called here."""
    ray = import_ray()
    try:
        return ray.get(ray.remote(num_gpus=gpus)(function).remote(*arguments))
    except ray.exceptions.RayTaskError as err:
        if isinstance(err.cause, EmoexportError):
            raise err.cause from None
        raise


def score_on(division: Division, shards: Sequence[Shard], work: Work) -> Iterator[tuple[Tally, str]]:
    """Give shards to workers, and tell of each that has its part.

    A worker that dies is replaced by Ray, and its shard is scored again as a whole: its part has the same name, so that
    there is one in the end.

    Args:
        division: who does it.
        shards: what is left of the work.
        work: the rest of what workers must know.

    Returns:
        What was decided about each, in the order in which they are ready; and where the worker that did it stands in
        for one that died, its name.

    Raises:
        MissingRuntime: if a worker cannot open the engine, or a shard's workers died again and again.
        EmoexportError: as a worker raised it.
    """
    ray = import_ray()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as errors is raised too
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([{"shard": one.model_dump_json()} for one in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 is to have another way to say how often a task is tried
        answers = rows.map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=division.workers, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(
                work.bundle,
                {**work.settings, "threads": division.threads},
                work.source,
                work.out.root,
                work.record.to_json(),
            ),
            num_cpus=division.threads,
            num_gpus=division.gpus,
            max_task_retries=_RETRIES,
        )
    try:
        for row in answers.iter_rows():
            if row["error"]:
                raise _from_text(row["error"])
            yield Tally.model_validate_json(row["tally"]), row["replaced"]
    except ray.exceptions.RayActorError as err:
        raise _death(err) from None


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray's C++ part from writing to standard error, unless its level is set: what matters is raised here."""
    level = "RAY_BACKEND_LOG_LEVEL"
    if level in os.environ:
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.environ[level] = "fatal"
    os.dup2(nowhere, 2)  # that the level was set is written there too
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        del os.environ[level]


class _Worker:
    """An actor: it opens the engine once, then scores one shard after the other."""

    def __init__(self, bundle: str, settings: Mapping[str, Any], source: Source, out: str, record: str) -> None:
        self._session = load(bundle, **settings)
        self._source, self._out = source, Storage(out)
        self._record = ScoreRecord.model_validate_json(record)
        if self._session.manifest.digest != self._record.bundle_digest:
            raise BadBundle(f"{bundle} was replaced since the work was planned.", hint="the same command again")
        context = import_ray().get_runtime_context()
        self._replaced = f"{context.get_node_id()} {os.getpid()}" if context.was_current_actor_reconstructed else ""

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        """Score the shard of one row and write its part.

        Returns:
            One row too: the tally; a name of this worker if it stands in for one that died; what went wrong, which as
            an exception would reach nobody but as a part of Ray's text.
        """
        (text,) = rows["shard"]
        try:
            tally = self._score(Shard.model_validate_json(text))
        except EmoexportError as err:
            return {"tally": [""], "replaced": [""], "error": [_to_text(err)]}
        except OSError as err:  # the disk is full, for one
            told = BadInput(f"{err.filename or self._out.root}: {err.strerror or err}.")
            return {"tally": [""], "replaced": [""], "error": [_to_text(told)]}
        return {"tally": [tally.model_dump_json()], "replaced": [self._replaced], "error": [""]}

    def _score(self, shard: Shard) -> Tally:
        table = score_shard(self._session, self._source, shard)
        tally = tally_of(table)
        require_begun(self._out, self._record)
        write_part(self._out, shard.part, table, tally)
        return tally


def _to_text(err: EmoexportError) -> str:
    return json.dumps([type(err).__name__, str(err), err.hint])


def _from_text(text: str) -> EmoexportError:
    kind, message, hint = json.loads(text)
    found: EmoexportError = getattr(errors, kind)(message, hint=hint)
    return found


def _death(err: Any) -> MissingRuntime:
    if err.actor_init_failed:
        kind, _, reason = str(err).strip().rpartition("\n")[2].partition(": ")  # the last line of its traceback
        return MissingRuntime(
            f"a worker cannot open the engine: {reason or kind}", hint="emoexport doctor, where it ran"
        )
    return MissingRuntime(
        f"{_RETRIES + 1} workers died, one after the other, with the same shard; memory may not suffice.",
        hint="the same command goes on, perhaps with fewer --workers",
    )


@contextmanager
def _errors_of_start(address: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as err:  # ConnectionError, ValueError, OSError and others, without a base of their own
        where = f"there is no Ray cluster at {address}" if address else "Ray does not start here"
        hint = "ray status" if address else "TMPDIR=/tmp emoexport score ..., if paths are long"
        raise MissingRuntime(f"{where}: {str(err).partition(chr(10))[0]}", hint=hint) from err
