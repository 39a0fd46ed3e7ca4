"""Check what an installation needs before anything is installed; `make` runs this file as its first step.

Only the standard library, and only syntax of old Python 3 versions, so that a wrong Python gets an answer
and no traceback. Each problem is one line that names the Debian package which mends it; exit code 2.
"""

import argparse
import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig

OLDEST, NEWEST = (3, 11), (3, 13)
# What builds and runs the RTL: program -> Debian package.
PROGRAMS = {"c++": "g++", "make": "make", "perl": "perl"}
ROOMS = ("arch", "mappers", "rtl", "sim", "workloads")


def version_problem(version: tuple) -> str:
    """One line if tilewright does not run on Python `version`, else an empty text.

    >>> version_problem((3, 11, 2)), version_problem((3, 13, 0))
    ('', '')
    >>> version_problem((3, 9, 2))
    'Python must be 3.11 to 3.13, not 3.9: apt-get install python3.11 (then: make PYTHON=python3.11)'
    """
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return ""
    wanted = "python{}.{}".format(*(OLDEST if tuple(version[:2]) < OLDEST else NEWEST))
    return (
        "Python must be {}.{} to {}.{}, not {}.{}: apt-get install {wanted} (then: make PYTHON={wanted})"
    ).format(*OLDEST, *NEWEST, *version[:2], wanted=wanted)


def has_libpython() -> bool:
    """Whether this Python exists as a shared library, which cocotb loads into the simulator."""
    name = "python{}.{}".format(*sys.version_info[:2])
    names = [str(sysconfig.get_config_var(v)) for v in ("INSTSONAME", "LDLIBRARY")]
    names.append("lib" + name + ".so.1.0")
    folders = [sysconfig.get_config_var(v) for v in ("LIBDIR", "LIBPL")]
    folders.append(os.path.join(sys.base_prefix, "lib"))
    files = [os.path.join(f, n) for f in folders if f for n in names if ".so" in n]
    return any(os.path.exists(f) for f in files) or ctypes.util.find_library(name) is not None


def links_problem(package: str) -> str:
    """One line if the rooms under `package` are not links to folders, else an empty text."""
    for room in ROOMS:
        link = os.path.join(package, room)
        if not os.path.isdir(link):
            return f"{link} is not a link to a folder: git config core.symlinks true, then check out again"
    return ""


def problems(rtl: bool) -> list:
    """One line for each thing that is missing; with `rtl`, what co-simulation needs as well."""
    dot = "{}.{}".format(*sys.version_info[:2])
    out = [
        version_problem(tuple(sys.version_info)),
        links_problem(os.path.dirname(os.path.abspath(__file__))),
    ]
    if any(importlib.util.find_spec(m) is None for m in ("venv", "ensurepip")):
        out.append(f"Python's venv module is missing: apt-get install python{dot}-venv")
    if rtl:
        if not has_libpython():
            out.append(f"the shared library of Python {dot} is missing: apt-get install libpython{dot}")
        for program, package in PROGRAMS.items():
            if shutil.which(program) is None:
                out.append(f"{program} is not on PATH: apt-get install {package}")
    return [line for line in out if line]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what an installation of tilewright needs.")
    parser.add_argument("--rtl", action="store_true", help="also what co-simulation of the RTL needs")
    found = problems(parser.parse_args().rtl)
    for line in found:
        print("set-up: " + line, file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
