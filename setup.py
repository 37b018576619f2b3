"""Build of the compiled extension ``tokenflex_kernels._C``; everything else is in pyproject.toml.

The C++ half always builds. The CUDA half is added if an ``nvcc`` exists ($CUDA_HOME, then PATH,
then /usr/local/cuda), and the build prints one line that says which. Torch is not needed.

Environment:
    TOKENFLEX_CUDA                0: never use nvcc; 1: fail if there is no nvcc
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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, OptionError

ROOT = Path(__file__).resolve().parent
EXPORTS = ROOT / "csrc" / "exports.map"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")

# Ninja rebuilds an object file when its command line, its source or a header of it changes.
NINJA_RULES = """\
ninja_required_version = 1.5

rule cxx
  command = {cxx} -MMD -MF $out.d -c $in -o $out
  description = C++ $in
  depfile = $out.d
  deps = gcc

rule cuda
  command = {nvcc} -MD -MF $out.d -c $in -o $out
  description = CUDA $in
  depfile = $out.d
  deps = gcc

rule link
  command = {linker} -shared $in -o $out {link_flags}
  description = link $out
"""


def find_nvcc() -> str | None:
    """Return the nvcc to build with; None, after printing the reason, for a C++-only build."""
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


def choose_architectures(nvcc: str) -> list[str]:
    """Return the wanted architectures, or else those of ``ARCHITECTURES`` that nvcc supports."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = re.findall(r"\bsm_(\w+)", listed.stdout)
    if not set(known) & set(ARCHITECTURES):
        raise OptionError(
            f"{nvcc} builds for none of {', '.join(ARCHITECTURES)} (it lists: {' '.join(known)}); "
            "TOKENFLEX_CUDA=0 builds without it"
        )
    wanted = re.findall(r"[^;,\s]+", os.environ.get("TOKENFLEX_CUDA_ARCHITECTURES", ""))
    if unknown := [arch for arch in wanted if arch not in known]:
        raise OptionError(
            f"TOKENFLEX_CUDA_ARCHITECTURES asks for {', '.join(unknown)}, but {nvcc} knows "
            f"{', '.join(known)}"
        )
    return sorted(set(wanted), key=int) or [arch for arch in ARCHITECTURES if arch in known]


def find_ninja() -> str:
    """Return the ninja that pip installed for this build, or the one on PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ModuleNotFoundError:
        if on_path := shutil.which("ninja"):
            return on_path
        raise ExecError("building tokenflex needs ninja: pip install ninja") from None


def command_line(*parts: str) -> str:
    """Return words as one line of a ninja file, quoted for the shell."""
    return shlex.join(parts).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(sources: list[Path], objects: Path, output: Path, nvcc: str | None) -> str:
    """Return the build file for ninja: one object per source, and one shared library of them."""
    import pybind11

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    includes = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    linker, defines, cuda = [*cxx, *flags], [], ["false"]
    link_flags = ["-pthread", "-ldl", f"-Wl,--version-script={EXPORTS}"]
    if nvcc:
        architectures = choose_architectures(nvcc)
        # Machine code for each architecture, and PTX of the newest for later ones.
        targets = [f"sm_{arch}" for arch in architectures] + [f"compute_{architectures[-1]}"]
        print(f"tokenflex: building with CUDA for {', '.join(targets)}", flush=True)
        gencode = [f"-gencode=arch=compute_{t.split('_')[1]},code={t}" for t in targets]
        host_compiler = [f"-ccbin={cxx[-1]}"] if "CXX" in os.environ else []
        host_flags = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden")]
        cuda = [nvcc, "-std=c++17", "-O3", *host_compiler, *host_flags, "--threads=0", *gencode]
        defines = [f'-DTOKENFLEX_CUDA="{" ".join(targets)}"']
        linker = [nvcc, *host_compiler, "-cudart=static"]  # nvcc knows the path of its cudart
        link_flags = ["-lpthread", "-ldl", f"-Xlinker=--version-script={EXPORTS}"]
    elif sys.platform == "darwin":  # its linker has no version scripts
        link_flags = ["-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__C"]

    built = [ninja_path(objects / f"{source.name}.o") for source in sources]
    rules = NINJA_RULES.format(
        cxx=command_line(*cxx, *CXX_FLAGS, *includes, *defines, *flags),
        nvcc=command_line(*cuda),
        linker=command_line(*linker),
        link_flags=command_line(*link_flags),
    )
    lines = [
        f"build {target}: {'cuda' if source.suffix == '.cu' else 'cxx'} {ninja_path(source)}"
        for source, target in zip(sources, built, strict=True)
    ]
    link = f"build {ninja_path(output)}: link {' '.join(built)} | {ninja_path(EXPORTS)}"
    return "\n".join([rules, *lines, link]) + "\n"


class NinjaBuild(build_ext):
    """Builds the extension with ninja: in parallel, and only changed files."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        sources = [ROOT / source for source in ext.sources]
        if nvcc:
            sources += sorted((ROOT / "csrc").glob("*.cu"))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(sources, objects, output, nvcc))

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
