# Sourced by the scripts of this folder, after `set -euo pipefail`: paths, the environment, messages and times.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=.venv
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
export PATH=$root/$venv/bin:$PATH
export CMAKE_BUILD_PARALLEL_LEVEL=$jobs PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p build

# A compiler cache is used if it is installed. With these settings build folders share objects.
if command -v ccache >/dev/null; then
  export CMAKE_C_COMPILER_LAUNCHER=${CMAKE_C_COMPILER_LAUNCHER-ccache}
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
  export CCACHE_BASEDIR=${CCACHE_BASEDIR-$root} CCACHE_NOHASHDIR=${CCACHE_NOHASHDIR-1}
fi

# fail CODE WHERE PROBLEM FIX: prints an error and exits
fail() {
  echo "[$2] $3. Fix: $4 (TITANS-$1)" >&2
  exit 1
}

# quietly LOG COMMAND...: shows the output only if the command fails
quietly() {
  local log=$1
  shift
  "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}

# part NAME COMMAND...: runs the command, and notes its time in build/times.txt
part() {
  local name=$1 start=$SECONDS
  shift
  "$@"
  printf '%3d min %02d s  %s\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)) "$name" >>build/times.txt
}

nvcc() {
  command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null
}
