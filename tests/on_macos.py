"""Runs a command of hf-clm as on macOS: without what only Linux has, and with workers that are spawned.

python on_macos.py train RECIPE ...
"""

import ctypes
import multiprocessing
import os
import sys
import sysconfig

import psutil  # these choose their implementation by sys.platform
import torch
import transformers

LINUX_FILES = ("/proc", "/sys", "/dev/shm", "/etc/os-release")
LINUX_CALLS = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create", "pidfd_open")
GLIBC_CALLS = ("mallopt", "malloc_trim")


def refuse_files(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: a file of Linux cannot be opened."""
    if event == "open" and str(arguments[0]).startswith(LINUX_FILES):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


class Library(ctypes.CDLL):
    """The C library without the functions of glibc."""

    def __getattr__(self, name: str) -> object:
        if name in GLIBC_CALLS:
            raise AttributeError(name)
        return super().__getattr__(name)


def become_macos() -> None:
    """Takes away what macOS lacks. A spawned worker imports this file, and so does the same."""
    assert psutil and torch and transformers and sysconfig.get_config_vars()  # of Linux, which it keeps
    for name in LINUX_CALLS:
        if hasattr(os, name):
            delattr(os, name)
    ctypes.CDLL = Library
    sys.platform = "darwin"
    sys.addaudithook(refuse_files)
    multiprocessing.set_start_method("spawn", force=True)


become_macos()

if __name__ == "__main__":
    from hf_clm.cli import main

    raise SystemExit(main(sys.argv[1:]))
