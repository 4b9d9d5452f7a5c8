"""PyTorch's compiler in a process of its own: `python -m emoexport.aot_compile PROGRAM PACKAGE`.

What PyTorch's compiler does hangs on what the process compiled before: passes that one call registers (those of
`torch.compile` that pack weights, for one) stay for the calls after it, whatever these ask for.
"""

import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from emoexport.files import new_file

__all__ = ["compile_apart"]

_OPTIONS = {
    "freezing": True,  # weights become constants: cast and folded once, here
    "cpp.weight_prepack": False,  # PyTorch 2.14 packs some FP32 weights so that they are read back as others
    "cpp.dynamic_threads": True,  # or the package would always use as many threads as were free here
    "aot_inductor.enable_line_tables": False,  # they name files of this machine
}


def compile_apart(program: Path, package: Path) -> None:
    """Compile in a new process.

    Args:
        program: file of `torch.export.save`.
        package: file to be written, `.pt2`.

    Raises:
        RuntimeError: the last line that the compiler left, if it failed.
    """
    command = [sys.executable, "-m", __name__, str(program), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"]
        raise RuntimeError(lines[-1])


def _main(program: Path, package: Path) -> None:
    """Compile here, and keep of the package what runs."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for CUDA, and says so
    with torch.no_grad():
        whole = torch._inductor.aoti_compile_and_package(
            torch.export.load(program), package_path=str(package.with_suffix(".whole.pt2")), inductor_configs=_OPTIONS
        )
    # The source that stands beside the machine code names folders of this machine, and nothing reads it.
    with zipfile.ZipFile(whole) as source, new_file(package) as file, zipfile.ZipFile(file, "w") as target:
        for item in source.infolist():
            if not item.filename.endswith(".cpp"):
                target.writestr(item, source.read(item))
    Path(whole).unlink()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
