"""Search for bytes that a reader takes badly, guided by which branches they reach: needs atheris.

    python tests/fuzz/run.py [TARGET ...] [--seconds 60]

What is found is written to tests/fuzz/corpus/TARGET, where tests read it from then on.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz the targets that are named, or all, each in a process of its own."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("make fuzz needs atheris, for Linux and CPython: pip install 'emoexport[fuzz]'")
    from targets import TARGETS, seeds_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    failed = []
    for name in options.targets:
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for number, seed in enumerate(seeds_of(name)):
                (Path(folder) / str(number)).write_bytes(seed)
            found = Path(__file__).parent / "corpus" / name
            found.mkdir(parents=True, exist_ok=True)
            limits = [f"-max_total_time={options.seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=8192"]
            command = [sys.executable, __file__, "--one", name, folder, f"-artifact_prefix={found}/", *limits]
            failed += [name] if subprocess.run([*command, "-print_final_stats=1"], check=False).returncode else []
            if not any(found.iterdir()):
                found.rmdir()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, until the time is over or something was found."""
    import atheris

    with atheris.instrument_imports(include=["emoexport", "PIL", "csv", "json"]):
        from targets import TARGETS

    from bundle_mutations import spoil_record

    from emoexport.errors import EmoexportError

    def read(data: bytes) -> None:
        try:
            TARGETS[name].run(data)
        except EmoexportError:
            return  # a sentence

    def mutate(data: bytes, most: int, number: int) -> bytes:
        if not TARGETS[name].is_json or number % 2:
            return atheris.Mutate(data, most)
        with tempfile.TemporaryDirectory() as folder:
            changed = spoil_record(data, Path(folder), number)
        return changed if len(changed) <= most else atheris.Mutate(data, most)

    atheris.Setup([sys.argv[0], *arguments], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--one"] else main()
