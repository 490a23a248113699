#!/bin/sh
# Unpacks Debian 12 for arm64 and this project's base install into a folder, to run programs there with
# qemu-aarch64-static -L FOLDER. Nothing of it is run to build it, so that neither root nor chroot is needed.
#
#     tests/aarch64/make_root.sh FOLDER
#
# MIRROR is where Debian's packages are fetched, unless debootstrap knows; PYTHON is one that has pip.
set -eu

root=${1:?usage: make_root.sh FOLDER}
project=$(cd "$(dirname "$0")/../.." && pwd)

for program in debootstrap qemu-aarch64-static; do
  # debootstrap is in a folder that only root has on its PATH.
  if ! PATH=$PATH:/usr/sbin command -v $program >/dev/null; then
    echo "make_root.sh: $program is missing: apt-get install qemu-user-static debootstrap" >&2
    exit 2
  fi
done

if [ ! -e "$root/.unpacked" ]; then
  mkdir -p "$root"
  PATH=$PATH:/usr/sbin debootstrap --arch=arm64 --variant=minbase --include=python3.11 --download-only \
    bookworm "$root" ${MIRROR:+"$MIRROR"}
  for folder in bin sbin lib; do
    mkdir -p "$root/usr/$folder"
    ln -sfn usr/$folder "$root/$folder"
  done
  for package in "$root"/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" |
      tar -x -C "$root" --keep-directory-symlink --no-same-owner --no-same-permissions
  done
  rm -r "$root/var/cache/apt/archives"
  # A core of a Raspberry Pi 4. Shown the processors of another architecture, ONNX Runtime dies as it is imported.
  {
    echo "processor : 0"
    echo "Features : fp asimd evtstrm crc32 cpuid"
    echo "CPU implementer : 0x41"
    echo "CPU architecture : 8"
    echo "CPU variant : 0x0"
    echo "CPU part : 0xd08"
    echo "CPU revision : 3"
  } >"$root/proc/cpuinfo"
  touch "$root/.unpacked"
fi

# As pip on a board would choose: for an interpreter and a system that are not those it runs on.
"${PYTHON:-python3}" -m pip install --quiet --upgrade --target "$root/site" --only-binary=:all: \
  --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "$project"
