"""Makes libraries in which every function of CUDA's that torch's own libraries mention exists and does nothing.

`import torch` of the wheel on PyPI loads libtorch_cuda.so, and with it 3.4 GB of CUDA's libraries, on machines without a GPU too. Nothing in them
is ever called there, so empty functions of the same names (and versions of names) will do. Usage: stubs.py <torch/lib> <where to>
"""

import collections
import pathlib
import re
import subprocess
import sys

# The light install has these.
REAL = {"libcudart.so.13", "libcupti.so.13"}
# The driver must stay missing: torch asks for it to find out whether there is a GPU.
DRIVER = "libcuda.so.1"


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mentioned(libraries):
    """What the libraries need: the libraries, the versions of names in each, the names of each version."""
    needed, versions, names = set(), collections.defaultdict(set), collections.defaultdict(set)
    for library in libraries:
        needed.update(re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library)))
        file = None
        for line in output("readelf", "-VW", library).splitlines():
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            elif file and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions[file].add(found[1])
        for line in output("readelf", "--dyn-syms", "-W", library).splitlines():
            fields = line.split()
            if len(fields) >= 8 and fields[6] == "UND":
                name, _, version = fields[7].partition("@")
                names[version].add(name)
    return needed, versions, names


def make(path, names_of_versions):
    names = {name for names in names_of_versions.values() for name in names}
    source = "".join(f"void {name}(void) {{}}\n" for name in sorted(names))
    command = ["gcc", "-w", "-fno-builtin", "-shared", "-x", "c", "-", "-o", path, f"-Wl,-soname,{path.name}"]
    script = path.with_suffix(".map")
    versioned = {version: names for version, names in names_of_versions.items() if version}
    if versioned:
        lines = [f"{version} {{ global: {' '.join(name + ';' for name in sorted(names))} }};" for version, names in versioned.items()]
        script.write_text("\n".join(lines))
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, input=source, text=True, check=True)
    script.unlink(missing_ok=True)


def main():
    folder, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    target.mkdir(exist_ok=True)
    libraries = list(folder.glob("*.so*"))
    needed, versions, names = mentioned(libraries)
    missing = needed - {library.name for library in libraries} - REAL - {DRIVER}
    for library in sorted(name for name in missing if re.match("lib(cu|nv|nccl)", name)):
        make(target / library, {version: names[version] for version in versions[library]})
    # Names without a version may be in any library.
    make(target / "libcusparseLt.so.0", {"": {name for name in names[""] if re.match("cu|nccl|nvrtc", name)}})


main()
