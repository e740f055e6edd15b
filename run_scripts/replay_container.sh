#!/usr/bin/env bash
# Builds a stage of the Dockerfile with buildah where no registry of images is reached, runs it and checks what it is.
# The base image is replaced by a Debian made by debootstrap with this machine's Python: everything else is done as it is written.
# Usage, as root: bash run_scripts/replay_container.sh [cpu|cuda] [OPTION OF buildah bud...]      (Debian: apt install buildah debootstrap)
#   The stage cpu needs download.pytorch.org. Both need port 8000. An OPTION is needed for instance for a pip that reads a
#   mirror's settings: --volume /etc/pip.conf:/etc/pip.conf:ro
#   BUILT=1 in the environment: checks the image that an earlier call has built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${1:-cpu}
shift || true
base=$(grep -m1 -o 'python:[^ ]*' Dockerfile)
root=$(mktemp -d)
containers=()
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ ${#containers[@]} = 0 ] || buildah rm "${containers[@]}" >/dev/null
    rm -rf "$root"
}
trap finish EXIT

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    echo "base: Debian $(grep -o '[a-z]*$' <<<"$base") with $(python3 --version), for $base"
    debootstrap --variant=minbase \
        --include=ca-certificates,libssl3,libffi8,libsqlite3-0,libreadline8,libncursesw6,libuuid1,libexpat1 \
        "${base##*-}" "$root" >/dev/null
    version=$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    prefix=$(python3 -c 'import sys; print(sys.base_prefix)')
    tar -C "$prefix" --exclude='site-packages/*' --exclude=__pycache__ --exclude="lib/$version/test" -c "bin/$version" "lib/$version" \
        $(cd "$prefix" && ls lib/libpython*.so* 2>/dev/null) |
        tar -C "$root/usr/local" --no-same-owner -x
    ln -s "$version" "$root/usr/local/bin/python"
    chroot "$root" ldconfig
    chroot "$root" /usr/local/bin/python -m ensurepip >/dev/null
    ln -s pip3 "$root/usr/local/bin/pip"
    chroot "$root" apt-get clean
    empty=$(buildah from scratch)
    containers+=("$empty")
    buildah copy --quiet "$empty" "$root" / >/dev/null
    buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$empty"
    buildah commit --quiet "$empty" "$base" >/dev/null
fi

[ -n "${BUILT:-}" ] || buildah bud --isolation chroot --format docker --pull-never --layers=false --target "$target" --tag "evlgen:$target" "$@" .

image=$(buildah from --pull-never "evlgen:$target")
containers+=("$image")
inside() { buildah run --isolation chroot "$image" -- "$@"; }
settings=$(buildah inspect --type image "evlgen:$target")
words() { python3 -c 'import json, shlex, sys
value = json.loads(sys.argv[1])["Docker"]["config"]
for key in sys.argv[2].split("."):
    value = value[key]
print(shlex.join(word for word in value if word != "CMD"))' "$settings" "$1"; }

lists=(docker/requirements.txt)
[ "$target" = cpu ] || lists+=(docker/requirements-cuda.txt)

echo "user $(inside id -u), Python $(inside python -c 'import platform; print(platform.python_version())')"
test "$(inside id -u)" = 1000
for absent in pip gcc cc make git; do test -z "$(inside sh -c "command -v $absent || true")"; done
for absent in /src /wheels /opt/setuptools; do inside test ! -e "$absent"; done
inside sh -c 'if python -m pip --version 2>/dev/null; then exit 1; fi'
echo "no pip, compilers or sources"
inside python -c 'import sys
from importlib.metadata import version
others = [line for line in sys.argv[1:] if version(line.split("==")[0]) != line.split("==")[1]]
print(len(sys.argv) - 1, "packages as locked, but for", others or "none")
sys.exit(bool(others))' $(sed -n 's/^\([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' "${lists[@]}")
inside evlgen --help >/dev/null
eval "inside $(words Entrypoint) $(words Cmd)" &
server=$!
health=$(words Healthcheck.Test)
for _ in $(seq 300); do
    kill -0 "$server"
    if eval "inside $health" 2>/dev/null; then break; fi
    sleep 2
done
eval "inside $health"
echo "healthy"
inside python -c 'import urllib.request; print(urllib.request.urlopen("http://127.0.0.1:8000/v1/models").read().decode())'
inside python -c 'import os, pathlib, signal
(number,) = [
    int(place.parent.name)
    for place in pathlib.Path("/proc").glob("[0-9]*/cmdline")
    if place.stat().st_uid == 1000 and place.read_bytes().split(b"\0")[1:3] == [b"/opt/evlgen/bin/evlgen", b"serve"]
]
os.kill(number, signal.SIGTERM)'
wait "$server"
server=
echo "ended on SIGTERM with 0"
