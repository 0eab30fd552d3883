#!/usr/bin/env bash
# Builds the policies that are too large to be committed, into target/policies/heavy/, and
# says what it made. Needs Go and Python 3, and for some of them Go's module proxy.
#
#   build.sh           build what is older than its source
#   build.sh NAME…     only these: readers init init-long reactor cel kyverno
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
out=$root/target/policies/heavy
policies=(readers init init-long reactor cel kyverno)

say() { printf '%s\n' "$*" >&2; }
die() {
    say "build.sh: $*"
    exit 1
}

# build NAME SOURCE [OPTION…]: with these options of `go build`
build() {
    local name=$1 source=$here/$2 module=$out/go-$1.wasm plain=$out/plain-$1.wasm
    shift 2
    if [[ -f $module && -z $(find "$source" "$here"/*.{sh,py} -newer "$module") ]]; then
        say "$module: is as new as its source"
        return
    fi
    (
        cd "$source"
        if [[ $name == kyverno ]]; then
            vendor_kyverno "$source" "$out/kyverno"
            cd "$out/kyverno"
        fi
        GOOS=wasip1 GOARCH=wasm GOWASM='' GOFLAGS='' GOWORK=off \
            go build -trimpath -buildvcs=false -ldflags='-s -w' "$@" -o "$plain" .
    )
    if [[ $name == reactor ]]; then
        python3 "$here/export.py" "$plain" _initialize _start "$plain"
    fi
    python3 "$here/../annotate.py" "$plain" "$source/metadata.json" "$module"
    rm "$plain"
    say "$module: $(wc -c <"$module") bytes"
}

# Puts the policy and all that it imports into a directory, where what verifies images and
# manifests can be left out: that is most of it, and some can't be built for WASI.
vendor_kyverno() {
    local source=$1 directory=$2
    local vendor=$directory/vendor/github.com
    rm -rf "$directory"
    mkdir -p "$directory"
    cp "$source"/{go.mod,go.sum,main.go} "$directory"
    (cd "$directory" && go mod vendor)
    rm "$vendor"/kyverno/kyverno/pkg/{cosign,notary}/*.go "$vendor"/moby/term/*.go \
        "$vendor"/kyverno/kyverno/pkg/engine/factories/registryclientfactory.go \
        "$vendor"/sigstore/k8s-manifest-sigstore/pkg/k8smanifest/*.go
    cp -R "$source/_stubs/." "$directory/vendor"
}

make() {
    case $1 in
        init-long) build init-long init -tags=long ;;
        reactor) build reactor reactor -buildmode=c-shared ;;
        cel | init | kyverno | readers) build "$1" "$1" ;;
        *) die "there is no $1; there are ${policies[*]}" ;;
    esac
}

for tool in go python3; do
    command -v $tool >/dev/null || die "$tool is needed but not installed"
done
mkdir -p "$out"
if [[ $# == 0 ]]; then
    set -- "${policies[@]}"
fi
for name in "$@"; do
    make "$name"
done
