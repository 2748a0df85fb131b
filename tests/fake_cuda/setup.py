"""Sets up an environment whose torch is built for CUDA, on a machine without a GPU; see make test-fake-cuda.

    python tests/fake_cuda/setup.py FOLDER [--torch FILE.whl]

In FakeTensorMode, torch computes the shape, dtype and device of each tensor, but no values. Fake tensors on a
GPU, and their gradients, need a build of torch for CUDA, but no GPU. NVIDIA's libraries (gigabytes) are
replaced by stand-ins, in which each function does nothing and returns 0, for success. They report one device,
an H100. Only fake tensors can be computed with.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.11.0"
NEED_TORCH = ["accelerate", "peft"]  # installed without dependencies, as torch would bring NVIDIA's libraries
PACKAGES = [
    "filelock",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "networkx",
    "psutil",
    "pyarrow",
    "pydantic",
    "pytest",
]
PACKAGES += ["ruamel.yaml", "setuptools<82", "sympy", "transformers==5.17.*", "typing_extensions"]
FUNCTION = r"_*(?:cu|nccl|nv)\w*"  # the names of NVIDIA's functions begin like those of its libraries
# Functions that return a value through a pointer, which torch uses when it initializes a device.
SPECIAL = """\
#include <stdlib.h>
#include <string.h>
struct properties {
    char name[256], ids[28];
    size_t bytes, shared;
    int registers, warp;
    size_t pitch;
    int threads, sizes[6];
    size_t constant;
    int major, minor;
    size_t alignments[2];
    int processors;
};
int is_hidden() { char *visible = getenv("CUDA_VISIBLE_DEVICES"); return visible && !*visible; }
int cudaGetDeviceCount(int *count) { *count = !is_hidden(); return is_hidden() * 100; } /* 100: no device */
int cudaGetDevice(int *device) { *device = 0; return is_hidden() * 100; }
int cudaGetDeviceProperties(struct properties *of) {
    strcpy(of->name, "NVIDIA H100");
    of->bytes = 80ul << 30, of->warp = 32, of->major = 9, of->processors = 132;
    return 0;
}
int cudaMalloc(void **memory, size_t bytes) { *memory = malloc(bytes); return 0; }
static char *pinned[1 << 16], **last = pinned;
static size_t sizes[1 << 16];
int cudaHostAlloc(char **memory, size_t bytes) {
    sizes[last - pinned] = bytes, *last++ = *memory = malloc(bytes);
    return 0;
}
int cudaPointerGetAttributes(int *kind, char *at) { /* 1: pinned */
    *kind = 0;
    for (char **part = pinned; part < last; part++)
        *kind |= *part <= at && at < *part + sizes[part - pinned];
    return 0;
}
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 80ul << 30; return 0; }
int cudaGetDriverEntryPointByVersion(char *name, void **function) { *function = cudaGetDevice; return 0; }
char *cudaGetErrorString() { return "no CUDA: a stand-in"; }
char *cudaGetErrorName() { return "no CUDA: a stand-in"; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", default=TORCH, help="a downloaded wheel, instead of 530 MB from the index")
    options = parser.parse_args()
    python = options.folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", options.folder], check=True)
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-deps", options.torch, *NEED_TORCH], check=True)
    subprocess.run([*install, *PACKAGES], check=True)
    write_stand_ins(next(options.folder.glob("lib/python*/site-packages/torch/lib")))
    subprocess.run(
        [python, "-c", "import torch; assert torch.cuda.device_count() == 1, torch.__version__"], check=True
    )


def write_stand_ins(folder: Path) -> None:
    """Compiles a library with all functions under each name that torch's libraries in ``folder`` need."""
    paths = [path for path in sorted(folder.glob("*.so*")) if not re.fullmatch(FUNCTION, path.name[3:])]
    symbols = read("readelf", "--wide", "--dyn-syms", *map(str, paths))
    sections = read("readelf", "--wide", "--dynamic", "--version-info", *map(str, paths))
    functions = set(re.findall(rf" UND ({FUNCTION})\b", symbols)) - set(re.findall(r"(\w+)\(.*\) {", SPECIAL))
    source = SPECIAL + "\n".join(f"int {name}() {{ return 0; }}" for name in functions)
    versions = dict(re.findall(r"File: (\S+) +Cnt: \d+\n.*Name: (\S+) ", sections))
    for library in set(re.findall(rf"\(NEEDED\).*\[(lib{FUNCTION}\.so\S*)\]", sections)):
        words = [
            "cc",
            "-x",
            "c",
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{library}",
            "-o",
            str(folder / library),
        ]
        if library in versions:
            script = folder / "version"
            script.write_text(f"{versions[library]} {{ *; }};\n")
            words.append(f"-Wl,--version-script,{script}")
        subprocess.run([*words, "-"], input=source, text=True, check=True)


def read(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
