#!/usr/bin/env bash
# Rebuilds the test policies from source, annotates them and renews the checksums.
#
#   build.sh           rebuild everything into built/
#   build.sh --check   only compare built/*.wasm with built/SHA256SUMS
#
# Rust policies need the standard library for wasm32-wasip1. It comes from rustup; where
# rustup can't deliver it, Debian's rustc-web, rust-web-src and wasi-libc serve, with a
# standard library built once below the root target/ directory.
# POLICIES_RUST=rustup or POLICIES_RUST=debian insists on one of the two.
#
# Rego policies are compiled by OPA, which Go builds from its module.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
built=$here/built
work=$root/target/policies
cargo_home=${CARGO_HOME:-$HOME/.cargo}
triple=wasm32-wasip1
rust_policies=(host-guard label-adder pod-guard raw-gate secret-guard)
opa_version=v1.22.2

# The entrypoints of each Rego policy, the first one first.
declare -A rego_policies=(
    [gatekeeper-echo]=echo/violation
    [gatekeeper-labels]=labels/violation
    [opa-echo]=echo/main
    [opa-guard]='policy/main policy/lenient'
)

say() { printf '%s\n' "$*" >&2; }
die() {
    say "build.sh: $*"
    exit 1
}
need() { command -v "$1" >/dev/null || die "$1 is needed but not installed"; }

check() {
    cd "$built"
    sha256sum --check --strict --quiet SHA256SUMS ||
        die "built/ doesn't agree with built/SHA256SUMS"
    # A module without a checksum is as wrong as one with another checksum.
    diff <(awk '{ print $2 }' SHA256SUMS) <(printf '%s\n' *.wasm) >&2 ||
        die "built/SHA256SUMS doesn't list what is in built/"
    say "built/: $(wc -l <"$built/SHA256SUMS") policies agree with their checksums"
}

# Sets `cargo_env`, the variables under which cargo builds for wasm32-wasip1.
choose_rust() {
    local wanted=${POLICIES_RUST:-any} libs
    cargo fetch --locked --quiet
    # Keeps this machine's paths out of the modules' panic messages.
    flags="--remap-path-prefix=$root=."
    for source in "$cargo_home"/registry/src/*/; do
        flags+=$'\x1f'"--remap-path-prefix=${source%/}=registry"
    done
    if [[ $wanted != debian ]]; then
        libs=$(rustc --print target-libdir --target $triple)
        if compgen -G "$libs/libstd-*.rlib" >/dev/null ||
            { command -v rustup >/dev/null && timeout 300 rustup target add $triple >&2; }; then
            say "Rust: $(rustc --version) with rustup's standard library"
            cargo_env=("CARGO_ENCODED_RUSTFLAGS=$flags")
            return
        fi
        [[ $wanted == any ]] || die "rustup couldn't add $triple"
        say "rustup couldn't add $triple: trying Debian's compiler"
    fi
    use_debian_rust
}

use_debian_rust() {
    local rustc=/usr/bin/rustc libc=/usr/lib/wasm32-wasi lld key sysroot
    lld=$(rustc --print sysroot)/lib/rustlib/$(rustc -vV | sed -n 's/^host: //p')/bin/rust-lld
    if [[ ! -x $rustc || ! -d /usr/lib/rustlib/src/rust/library || ! -f $libc/libc.a ]]; then
        die "install Debian's packages first: apt-get install --no-install-recommends rustc-web rust-web-src wasi-libc"
    fi
    [[ -x $lld ]] || die "$lld is missing: Debian's compiler needs rustup's linker"
    key=$($rustc -vV | sha256sum | cut -c1-16)
    sysroot=$work/sysroot-$key
    if [[ ! -f $sysroot/complete ]]; then
        say "Rust: building the standard library for $triple"
        build_debian_std "$rustc" "$libc" "$sysroot"
    fi
    say "Rust: $($rustc --version) with a standard library of our own"
    cargo_env=(
        "RUSTC=$rustc"
        "CARGO_ENCODED_RUSTFLAGS=$flags"$'\x1f'"--sysroot=$sysroot"
        "CARGO_TARGET_WASM32_WASIP1_LINKER=$lld"
    )
}

build_debian_std() {
    local rustc=$1 libc=$2 sysroot=$3 empty=$work/std std_flags libs
    rm -rf "$sysroot" "$empty"
    mkdir -p "$empty/src"
    printf '[workspace]\n[package]\nname = "empty"\nedition = "2021"\n[profile.release]\npanic = "abort"\n' \
        >"$empty/Cargo.toml"
    : >"$empty/src/lib.rs"
    # With bitcode in the library, policies can be built with `lto = true`.
    std_flags=$flags$'\x1f'--remap-path-prefix=/usr/lib/rustlib/src/rust=rust$'\x1f'-Cembed-bitcode=yes
    (
        cd "$empty"
        env RUSTC="$rustc" RUSTC_BOOTSTRAP=1 CARGO_ENCODED_RUSTFLAGS="$std_flags" \
            CARGO_TARGET_DIR="$empty/target" cargo build --release --target $triple \
            -Zbuild-std=std,panic_abort -Zbuild-std-features=
    )
    libs=$sysroot/lib/rustlib/$triple/lib
    mkdir -p "$libs/self-contained"
    cp "$empty/target/$triple/release/deps"/*.rlib "$libs/"
    rm -f "$libs"/libempty-*.rlib
    cp "$libc"/{crt1-command.o,crt1-reactor.o,libc.a} "$libs/self-contained/"
    touch "$sysroot/complete"
}

build_rust() {
    local cargo_env=() flags='' policy plain
    # Here, so that rustup and cargo see the same toolchain file.
    cd "$here/rust"
    choose_rust
    for policy in "${rust_policies[@]}"; do
        # One by one: what one of them needs of a library would make the others larger.
        env "${cargo_env[@]}" CARGO_TARGET_DIR="$work/rust" \
            cargo build --release --locked --target $triple --package "$policy"
        plain=$work/rust/$triple/release/$policy.wasm
        # Libraries have another name than commands.
        [[ -f $plain ]] || plain=$work/rust/$triple/release/${policy//-/_}.wasm
        annotate "$plain" "$here/rust/$policy" "$policy"
    done
}

build_go() {
    local plain=$work/go/go-labels.wasm
    mkdir -p "$work/go"
    say "Go: $(go version)"
    (
        cd "$here/go/labels"
        GOOS=wasip1 GOARCH=wasm GOWASM='' GOFLAGS='' GOWORK=off \
            go build -trimpath -buildvcs=false -ldflags='-s -w' -o "$plain" .
    )
    annotate "$plain" "$here/go/labels" go-labels
}

build_rego() {
    local name entrypoint arguments bundle
    mkdir -p "$work/rego"
    GOBIN=$work/rego GOFLAGS='' GOWORK=off go install "github.com/open-policy-agent/opa@$opa_version"
    say "Rego: OPA $opa_version"
    for name in "${!rego_policies[@]}"; do
        arguments=()
        for entrypoint in ${rego_policies[$name]}; do
            arguments+=(--entrypoint "$entrypoint")
        done
        bundle=$work/rego/$name.tar.gz
        # The module has the paths of the sources in it.
        (cd "$here/rego/$name" && "$work/rego/opa" build --target wasm "${arguments[@]}" --output "$bundle" policy.rego)
        tar --extract --gzip --absolute-names --to-stdout --file "$bundle" /policy.wasm >"$work/rego/$name.wasm"
        annotate "$work/rego/$name.wasm" "$here/rego/$name" "$name"
    done
}

# annotate PLAIN_MODULE SOURCE_DIRECTORY NAME
annotate() {
    python3 "$here/annotate.py" "$1" "$2/metadata.json" "$built/$3.wasm"
    say "built/$3.wasm: $(wc -c <"$built/$3.wasm") bytes"
}

case ${1-} in
    '') ;;
    --check)
        check
        exit
        ;;
    *) die "usage: build.sh [--check]" ;;
esac

for tool in cargo rustc go python3 sha256sum tar; do
    need "$tool"
done
mkdir -p "$built" "$work"
build_rust
build_go
build_rego
(cd "$built" && sha256sum -- *.wasm >SHA256SUMS)
check
