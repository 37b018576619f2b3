"""Build of the compiled extension ``tokenflex_kernels._C``; everything else is in pyproject.toml.

The C++ half always builds. The CUDA half is added where an ``nvcc`` is found ($CUDA_HOME, then
PATH, then /usr/local/cuda), and the build says in one line which it is. Torch is not needed.

Environment:
    TOKENFLEX_CUDA                0: never use nvcc; 1: fail when there is no nvcc
    TOKENFLEX_CUDA_ARCHITECTURES  compute capabilities to build for, e.g. "90" or "80;90"
    CXX, CXXFLAGS                 the C++ compiler (default c++) and further flags
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, OptionError

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

# Object files are rebuilt when their command line, their source or a header of theirs changes.
NINJA_RULES = """\
ninja_required_version = 1.5

rule cxx
  command = {cxx} -MMD -MF $out.d {cxx_flags} -c $in -o $out
  description = C++ $in
  depfile = $out.d
  deps = gcc

rule cuda
  command = {nvcc} -MD -MF $out.d {nvcc_flags} -c $in -o $out
  description = CUDA $in
  depfile = $out.d
  deps = gcc

rule link
  command = {linker} -shared $in -o $out {link_flags}
  description = link $out
"""


@dataclass(frozen=True)
class Cuda:
    """An nvcc and the architectures to build for, e.g. ("80", "90"), oldest first."""

    nvcc: str
    architectures: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        """Machine code for each architecture, and PTX of the newest for those still to come."""
        return [f"sm_{arch}" for arch in self.architectures] + [f"compute_{self.architectures[-1]}"]

    @property
    def gencode(self) -> list[str]:
        return [
            f"-gencode=arch=compute_{target.split('_')[1]},code={target}" for target in self.targets
        ]


def find_nvcc() -> str | None:
    """The nvcc to build with, or None for a C++-only build; prints the reason for the latter."""
    wish = os.environ.get("TOKENFLEX_CUDA", "")
    if wish not in ("", "0", "1"):
        raise OptionError(f"TOKENFLEX_CUDA must be 0 or 1 where it is set, but is {wish!r}")
    if wish == "0":
        print("tokenflex: building without CUDA (TOKENFLEX_CUDA=0)", flush=True)
        return None
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if "CUDA_HOME" in os.environ:
        folders.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        missing = "there is no nvcc in $CUDA_HOME/bin, PATH or /usr/local/cuda/bin"
        if wish == "1":
            raise OptionError(f"TOKENFLEX_CUDA=1, but {missing}")
        print(f"tokenflex: building without CUDA ({missing})", flush=True)
    return nvcc


def choose_architectures(nvcc: str) -> tuple[str, ...]:
    """Those asked for, or else those of ``ARCHITECTURES`` that this nvcc knows, oldest first."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = re.findall(r"\bsm_(\w+)", listed.stdout)
    if not set(known) & set(ARCHITECTURES):
        raise OptionError(
            f"{nvcc} builds for none of {', '.join(ARCHITECTURES)} (it lists: {' '.join(known)}); "
            "TOKENFLEX_CUDA=0 builds without it"
        )
    asked = re.split(r"[;,\s]+", os.environ.get("TOKENFLEX_CUDA_ARCHITECTURES", "").strip("; ,"))
    if asked == [""]:
        return tuple(arch for arch in ARCHITECTURES if arch in known)
    unknown = [arch for arch in asked if arch not in known]
    if unknown:
        raise OptionError(
            f"TOKENFLEX_CUDA_ARCHITECTURES asks for {', '.join(unknown)}, but {nvcc} knows "
            f"{', '.join(known)}"
        )
    return tuple(sorted(set(asked), key=int))


def find_ninja() -> str:
    """The ninja that pip installed for this build, or the one on PATH."""
    try:
        import ninja
    except ModuleNotFoundError:
        on_path = shutil.which("ninja")
        if on_path is None:
            raise ExecError("building tokenflex needs ninja: pip install ninja") from None
        return on_path
    return os.path.join(ninja.BIN_DIR, "ninja")


def command_line(*parts: str | Path) -> str:
    """Words as one line of a ninja file, quoted for the shell."""
    return shlex.join(str(part) for part in parts).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(sources: list[Path], objects: Path, output: Path, cuda: Cuda | None) -> str:
    """The build as ninja reads it: one object per source, and one shared library of them all."""
    import pybind11

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    includes = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    exports = ROOT / "csrc" / "exports.map"
    rules: dict[str, str] = {"nvcc": "false", "nvcc_flags": ""}

    if cuda is None:
        defines: list[str] = []
        linker = [*cxx, *user_flags]
        link_flags = ["-pthread", f"-Wl,--version-script={exports}"]
        if sys.platform == "darwin":  # its linker has no version scripts
            link_flags = ["-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__C"]
    else:
        defines = [f'-DTOKENFLEX_CUDA="{" ".join(cuda.targets)}"']
        host_compiler = [f"-ccbin={cxx[-1]}"] if "CXX" in os.environ else []
        host_flags = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden")]
        rules["nvcc"] = command_line(cuda.nvcc)
        rules["nvcc_flags"] = command_line(
            "-std=c++17", "-O3", *host_compiler, *host_flags, "--threads=0", *cuda.gencode
        )
        # nvcc links, because it knows where its own cudart lies.
        linker = [cuda.nvcc, *host_compiler, "-cudart=static"]
        link_flags = ["-lpthread", f"-Xlinker=--version-script={exports}"]

    rules["cxx"] = command_line(*cxx)
    rules["cxx_flags"] = command_line(*CXX_FLAGS, *includes, *defines, *user_flags)
    rules["linker"] = command_line(*linker)
    rules["link_flags"] = command_line(*link_flags)

    lines = [NINJA_RULES.format(**rules)]
    built = [objects / f"{source.name}.o" for source in sources]
    for source, target in zip(sources, built, strict=True):
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {ninja_path(target)}: {rule} {ninja_path(source)}")
    inputs = " ".join(map(ninja_path, built))
    lines.append(f"build {ninja_path(output)}: link {inputs} | {ninja_path(exports)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Builds the extension with ninja: in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        cuda = None if nvcc is None else Cuda(nvcc, choose_architectures(nvcc))
        sources = [ROOT / source for source in ext.sources]
        if cuda is not None:
            print(f"tokenflex: building with CUDA for {', '.join(cuda.targets)}", flush=True)
            sources += sorted((ROOT / "csrc").glob("*.cu"))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(sources, objects, output, cuda))

        verbose = ["-v"] if self.verbose > 1 else []
        done = subprocess.run([find_ninja(), "-C", str(objects), *verbose], check=False)
        if done.returncode != 0:
            raise CompileError("building tokenflex_kernels._C failed: see the output above")


setup(
    ext_modules=[
        Extension(
            "tokenflex_kernels._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
