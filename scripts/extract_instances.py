"""Write the hard instances of ``benchmark_verification.py hard`` from clones of the public repositories.

    python scripts/extract_instances.py VNNCOMP2021 VNNCOMP2022 FOLDER

VNNCOMP2021 is a clone of stanleybak/vnncomp2021, VNNCOMP2022 one of ChristopherBrix/vnncomp2022_benchmarks, bare or
not. FOLDER gets the files and ``hard.csv``, a table of onnx,vnnlib,seconds.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
from pathlib import Path

OVAL = "benchmarks/oval21/"
RESNET = "benchmarks/cifar10_resnet/"
PROPERTIES = RESNET + "vnnlib_properties_pgd_filtered/"
NETWORKS = {
    "oval_base": OVAL + "nets/cifar_base_kw.onnx",
    "oval_wide": OVAL + "nets/cifar_wide_kw.onnx",
    "oval_deep": OVAL + "nets/cifar_deep_kw.onnx",
    "resnet_2b": RESNET + "onnx/resnet_2b.onnx",
    "resnet_4b": RESNET + "onnx/resnet_4b.onnx",
    "mnist_256x4": "benchmarks/mnistfc/mnist-net_256x4.onnx",
}
"""Files of stanleybak/vnncomp2021."""
INSTANCES = [
    ("oval_base", "base_2908", 0, OVAL + "vnnlib/cifar_base_kw-img2908-eps0.019869281045751634.vnnlib"),
    ("oval_base", "base_2578", 1, OVAL + "vnnlib/cifar_base_kw-img2578-eps0.021176470588235297.vnnlib.gz"),
    ("oval_base", "base_3161", 1, OVAL + "vnnlib/cifar_base_kw-img3161-eps0.018562091503267972.vnnlib.gz"),
    ("oval_base", "base_8095", 1, OVAL + "vnnlib/cifar_base_kw-img8095-eps0.010457516339869282.vnnlib.gz"),
    ("oval_base", "base_6638", 0, OVAL + "vnnlib/cifar_base_kw-img6638-eps0.02065359477124183.vnnlib"),
    ("oval_wide", "wide_6762", 0, OVAL + "vnnlib/cifar_wide_kw-img6762-eps0.017908496732026144.vnnlib"),
    ("oval_wide", "wide_1075", 0, OVAL + "vnnlib/cifar_wide_kw-img1075-eps0.012679738562091505.vnnlib"),
    ("oval_deep", "deep_1052", 1, OVAL + "vnnlib/cifar_deep_kw-img1052-eps0.010718954248366015.vnnlib.gz"),
    ("resnet_2b", "resnet_2b_p10", 0, PROPERTIES + "resnet2b_pgd_filtered/prop_10_eps_0.008.vnnlib"),
    ("resnet_4b", "resnet_4b_p4", 0, PROPERTIES + "resnet4b_pgd_filtered/prop_4_eps_0.004.vnnlib"),
    ("mnist_256x4", "mnist_256x4_p9", 0, "benchmarks/mnistfc/prop_9_0.03.vnnlib"),
]
"""(network, name here, which of the two repositories, its path there)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, nargs=2, metavar="CLONE")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    wanted = {f"{name}.onnx": (options.clones[0], path) for name, path in NETWORKS.items()}
    wanted |= {f"{name}.vnnlib": (options.clones[number], path) for _, name, number, path in INSTANCES}
    contents = {}
    for name, (clone, path) in wanted.items():
        shown = subprocess.run(["git", "-C", clone, "show", f"HEAD:{path}"], capture_output=True)
        if shown.returncode:
            parser.error(
                f"{clone}: found no {path} ({shown.stderr.decode().strip()}); accepted: a clone with that file"
            )
        contents[name] = gzip.decompress(shown.stdout) if path.endswith(".gz") else shown.stdout
    contents["hard.csv"] = "".join(f"{net}.onnx,{name}.vnnlib,30\n" for net, name, *_ in INSTANCES).encode()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (options.folder / name).write_bytes(content)
    print(f"{len(INSTANCES)} instances: {options.folder / 'hard.csv'}")


if __name__ == "__main__":
    main()
