#!/usr/bin/env bash
# Prepares building and running for 64-bit ARM on an x86-64 Debian machine; prints the environment that cargo needs.
#
# A rustup that can add the target is used. Elsewhere the standard library is built once from the sources of exactly the
# compiler in use (Debian's package rust-src), with that compiler, into a folder of its own: the toolchain stays as it is.
set -euo pipefail
target=aarch64-unknown-linux-gnu
say() { printf 'arm: %s\n' "$*" >&2; }
[ "$(uname -sm)" = "Linux x86_64" ] || { say "this recipe is for x86-64 Linux"; exit 3; }

cache=${AWQC_ARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/awqc-aarch64}
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# A cross linker, the C library, and an emulator.
if ! command -v aarch64-linux-gnu-gcc qemu-aarch64-static >/dev/null || [ ! -e /usr/aarch64-linux-gnu/lib/libc.so.6 ]; then
  command -v apt-get >/dev/null || { say "aarch64-linux-gnu-gcc and qemu-aarch64-static are needed"; exit 3; }
  apt-get -qq update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends \
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static >&2
fi

version=$(rustc --version | awk '{print $2}')
commit=$(rustc --version --verbose | sed -n 's/^commit-hash: //p' | cut -c1-9)
sysroot=$(rustc --print sysroot)
flags=
if ! compgen -G "$sysroot/lib/rustlib/$target/lib/libcore-*.rlib" >/dev/null; then
  if ! { command -v rustup >/dev/null && timeout 60 rustup target add "$target" >&2 2>&1; }; then
    own=$cache/sysroot-$version-$commit
    if [ ! -e "$own/done" ]; then
      # The sources, from the first suite of the machine's own mirror that has this version.
      mirror=$(apt-get indextargets --format '$(SITE)' | grep -v security | head -1)
      apt=$cache/apt
      rm -rf "$apt" "$cache/src" "$own"
      mkdir -p "$apt"/lists/partial "$apt"/archives/partial "$cache/src"
      : >"$apt/status"
      options=(-q -o Dir::Etc::SourceList="$apt/list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$apt/lists"
        -o Dir::State::status="$apt/status" -o Dir::Cache="$apt" -o Acquire::Check-Valid-Until=false
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
      package=
      for suite in trixie-backports trixie forky sid; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/list"
        apt-get "${options[@]}" update >&2 || continue
        package=$(apt-cache "${options[@]}" madison rust-src | awk '{print $3}' | grep -F "$version+" | head -1 || true)
        [ -z "$package" ] || break
      done
      [ -n "$package" ] || { say "the mirror has no rust-src of version $version"; exit 3; }
      (cd "$apt" && apt-get "${options[@]}" download "rust-src=$package" >&2)
      dpkg-deb --fsys-tarfile "$apt"/rust-src_*.deb |
        tar -x -C "$cache/src" --strip-components=5 --wildcards './usr/src/rustc-*/library/*'
      say "build the standard library of rustc $version for $target"
      (
        cd "$cache/src"
        unset CARGO_ENCODED_RUSTFLAGS
        export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$cache/build" __CARGO_DEFAULT_LIB_METADATA=awqc
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CARGO_PROFILE_RELEASE_DEBUG=0
        export RUSTFLAGS="-Zforce-unstable-if-unmarked -Cembed-bitcode=yes --cap-lints=allow"
        cargo build --quiet --release --target "$target" -p sysroot --features panic-unwind,backtrace >&2
      )
      mkdir -p "$own/lib/rustlib/$target/lib"
      cp "$cache/build/$target/release/deps/"*.rlib "$own/lib/rustlib/$target/lib/"
      rm -rf "$cache/build" "$cache/src" "$apt"
      touch "$own/done"
    fi
    flags=--sysroot=$own
  fi
fi

cat <<END
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64-static
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$flags
CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar
QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
END
