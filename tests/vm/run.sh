#!/usr/bin/env bash
# Boots a stock Debian kernel in a virtual machine without a network, and looks at Conclave
# there. The exit code is 0 if all that inside.sh checks was as it should be.
#
#   run.sh [6.1|6.12] [SUITE[:TEST]...]    6.1 is the kernel of Debian 12, 6.12 the newer one in
#                                          its security archive; without a SUITE all that can
#                                          be run here, TEST is a part of the tests' names
#
# VM_CACHE      where kernels, the root image and logs are kept (target/vm)
# VM_MINUTES    how long the machine may run (45)
# VM_ACCEL      QEMU's accelerator (tcg, which runs anywhere and is slow)
#
# Needs no root. The binaries are the debug build of this repository, linked against this
# host's libc, which must be no newer than Debian 12's.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${VM_CACHE:-$root/target/vm}
kernel=${1:-6.1}
shift $(($# > 0))
# Not filters: to find that every rule is needed takes hours on an emulated processor.
suites=(confinement hostile_policy lifecycle lying_worker red_team)
modules=(virtio_pci virtio_blk squashfs overlay)
mirror=http://deb.debian.org

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

need() {
    local lacking=()
    while [ $# -gt 0 ]; do
        command -v "$1" >/dev/null || lacking+=("$1 (package $2)")
        shift 2
    done
    [ ${#lacking[@]} -eq 0 ] || die "needed but not installed: ${lacking[*]}"
}

case $kernel in 6.1 | 6.12) ;; *) die "$kernel is neither 6.1 nor 6.12" ;; esac
PATH=$PATH:/usr/sbin:/sbin
need qemu-system-x86_64 qemu-system-x86 mmdebstrap mmdebstrap tar2sqfs squashfs-tools-ng \
    busybox busybox-static cpio cpio modprobe kmod dpkg-deb dpkg cargo rustup
[ "$(id -u)" = 0 ] || need newuidmap uidmap
! ldd "$(command -v busybox)" >/dev/null 2>&1 || die "busybox must be static (package busybox-static)"

mkdir -p "$cache"
work=$(mktemp -d "$cache/run.XXXXXX")
running=
finish() {
    [ -z "$running" ] || kill "$running" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The root file system, and in it, under /boot, the package of either kernel. They come out of
# one mmdebstrap, which knows how to do without root, and check Debian's signatures.
build_root() {
    printf 'building the root image, once\n' >&2
    local fetch='set -e; cd /boot; for version in 6.1 6.12; do
        name=$(apt-cache pkgnames "linux-image-$version." |
            grep -E "[0-9]-cloud-amd64$" | sort -V | tail -n 1)
        apt-get -q download "$name"; mv "$name"_*.deb "linux-$version.deb"
    done'
    mmdebstrap --variant=minbase --include=systemd,curl \
        --customize-hook="chroot \"\$1\" sh -c '$fetch'" \
        --customize-hook="copy-out /boot/linux-6.1.deb /boot/linux-6.12.deb $work" \
        --customize-hook='rm -rf "$1"/boot/* "$1"/var/lib/apt/lists/*' \
        bookworm - "deb $mirror/debian bookworm main" \
        "deb $mirror/debian-security bookworm-security main" |
        tar2sqfs --quiet --compressor zstd "$work/root.squashfs"
    mv "$work"/linux-*.deb "$cache"
    mv "$work/root.squashfs" "$cache"
}

# A kernel, and a first file system with busybox and the modules that find the root.
build_kernel() {
    local packed=$cache/linux-$kernel.deb tree=$work/kernel first=$work/first version name file
    dpkg-deb -x "$packed" "$tree"
    version=$(basename "$tree"/lib/modules/*)
    depmod -b "$tree" "$version"
    mkdir -p "$first/bin" "$first/modules"
    cp "$(command -v busybox)" "$first/bin/busybox"
    cp "$here/init" "$first/init"
    for name in "${modules[@]}"; do
        modprobe -d "$tree" -S "$version" --show-depends "$name"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
        cp "$file" "$first/modules"
        basename "$file" >>"$first/modules/order"
    done
    (cd "$first" && find . | cpio --quiet -o -H newc) >"$work/initramfs"
    cp "$tree/boot/vmlinuz-$version" "$work/vmlinuz"
    mv "$work/vmlinuz" "$cache/vmlinuz-$kernel"
    mv "$work/initramfs" "$cache/initramfs-$kernel"
}

# The paths, from the root, of the executables that cargo says it has built.
built() {
    cargo "$@" --quiet --message-format=json | sed -n "s,.*\"executable\":\"$root/\([^\"]*\)\".*,\1,p"
}

# The payload. The suites look for binaries beside themselves, and for policies where they
# were when they were built.
pack() {
    local suite
    cd "$root"
    {
        printf '%s\n' systemd/conclave.service tests/vm/inside.sh tests/policies/{built,requests} worker/seccomp.json
        built build --workspace --bins
        for suite in "${suites[@]%%:*}"; do
            built test --no-run -p tests --test "$suite" | grep "/deps/$suite-"
        done
    } | sort -u >"$work/names"
    tar -cf "$work/payload" --owner=0 --group=0 --transform "s,^,${root#/}/,S" -T "$work/names"
}

[ $# -eq 0 ] || suites=("$@")
[ -e "$cache/root.squashfs" ] || build_root
[ -e "$cache/initramfs-$kernel" ] || build_kernel
pack

log=$cache/$kernel.log
: >"$log"
# tsc=unstable: an emulated processor's own clock is given up sooner or later, and then reading
# the time is a system call. From the start it is the same for all.
nice -n 10 timeout --kill-after=5 "$((${VM_MINUTES:-45} * 60))" qemu-system-x86_64 \
    -accel "${VM_ACCEL:-tcg}" -cpu max -smp 1 -m 3072 -nodefaults -no-reboot -display none -nic none \
    -kernel "$cache/vmlinuz-$kernel" -initrd "$cache/initramfs-$kernel" \
    -append "console=ttyS0 panic=-1 tsc=unstable conclave.root=$root conclave.suites=$(IFS=,; echo "${suites[*]}")" \
    -drive "file=$cache/root.squashfs,format=raw,if=virtio,readonly=on" \
    -drive "file=$work/payload,format=raw,if=virtio,readonly=on" \
    -serial "file:$cache/$kernel.console" -serial "file:$log" </dev/null &
running=$!
tail --pid="$running" -n +1 -f "$log" | sed -u 's,\r$,,' &
shown=$!
wait "$running" || die "the machine did not come to its end; its console is in $cache/$kernel.console"
running=
wait "$shown"
grep -q '^RESULT: everything was as it should be' "$log"
